"""What a source gives: rows, where they come from, and whether a path of theirs may be read."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from orchestrator.job import is_uri
from orchestrator.job.locations import Location

_AS_URLS_ARE_READ = str.maketrans("\\", "/", "\t\r\n")

_FILE_URI = re.compile(r"^file://(localhost(?=/))?")

TRIMMED = "read without the spaces at the ends"
"""How a note ends on labels of which that is so."""

Label = str | tuple[str, ...] | tuple[float, ...]
"""The class; multi-label: all that the sample has; regression: the targets."""


@dataclass(frozen=True)
class Origin:
    """What rows come from: one folder, or one table."""

    text: str
    """As messages call it."""
    root: Path | Location
    """What its rows' URIs are relative to."""
    is_table: bool
    listed: bool = False
    """Whether its files were listed, so that they are there and their sizes are known."""
    is_place: bool = True
    """Whether the user knows it by its name; rows that a program gave have none."""

    @property
    def root_text(self) -> str:
        """The root as a path or a URI."""
        return self.root.text if isinstance(self.root, Location) else str(self.root)

    def row(self, number: int) -> str:
        """A row of the table, as messages call it."""
        return f"{self.text} row {number}" if self.is_place else f"row {number} of {self.text}"


@dataclass(slots=True)
class Row:
    """One labelled sample, as a source names it."""

    place: str
    """For messages: the file, or the row of the table."""
    label: Label
    origin: int = 0
    """Which of the source's origins it comes from."""
    number: int = 0
    """Of the row in its table, from 1; of a file 0."""
    uri: str = ""
    """Relative to the origin's root; '' where the table holds the bytes themselves."""
    file: str = ""
    """The same with its links resolved, '' in a store: of two names of one file."""
    content: bytes | None = None
    second: bytes | None = None
    """The second text of a pair."""
    group: str | None = None
    split: int | None = None
    problem: str = ""
    """Why it cannot be used."""
    stat: tuple[int, int] | None = None
    """(bytes, time of modification in ns), where a listing told."""


@dataclass
class Source:
    """All that a job's data holds. What is noted is whole once `rows` has ended."""

    origins: list[Origin] = field(default_factory=list)
    classes: set[str] = field(default_factory=set)
    """Named by the source itself (class folders, columns), empty ones too."""
    ready_made: bool = False
    """Whether it came split."""
    notes: list[str] = field(default_factory=list)
    parts: list[Callable[[], Iterator[Row]]] = field(default_factory=list)

    def rows(self) -> Iterator[Row]:
        """Every row, in the order of the source."""
        for part in self.parts:
            yield from part()

    def add(self, origin: Origin) -> int:
        """The number of a new origin."""
        self.origins.append(origin)
        return len(self.origins) - 1


def inside(root: Path, uri: str, resolved: dict[str, str]) -> tuple[str | None, str]:
    """(the file relative to `root`, the same with its links resolved) or (None, why not).

    `root` is absolute, its own links resolved. A path may not leave it, over links neither. `resolved` remembers
    directories, so that each is resolved once.
    """
    uri = _FILE_URI.sub("", uri)
    if is_uri(uri):
        return None, "lies in a store, outside of"
    if not _can_be_path(uri):
        return None, "is no path below"
    pure = PurePosixPath(uri.replace("\\", "/")) if "\\" in uri and not os.path.exists(root / uri) else Path(uri)
    file = os.path.normpath(root / pure)
    directory, name = os.path.split(file)
    if directory not in resolved:
        resolved[directory] = os.path.realpath(directory)
    real = os.path.join(resolved[directory], name)
    if os.path.islink(real):
        real = os.path.realpath(real)
    if os.path.commonpath([str(root), real]) != str(root):
        return None, "leaves the data's root"
    named, resolved_name = os.path.relpath(file, root), os.path.relpath(real, root)
    # The root itself may be named by a link.
    return (resolved_name if named.startswith("..") else named), resolved_name


def _can_be_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half a character
        return False


def inside_store(root: Location, uri: str) -> tuple[str | None, str]:
    """`inside` of a store, where there are no links: (the URI relative to `root`, '') or (None, why not).

    One that may leave the root only as some clients and servers read it is refused too: by RFC 3986 `%2e%2e` is `..`.
    """
    if is_uri(uri):
        start = root.text.rstrip("/") + "/"
        if not uri.startswith(start):
            return None, "leaves the data's root"
        uri = uri[len(start) :]
    uri = posixpath.normpath(uri)
    if uri.startswith("/") or uri == "." or ".." in _as_url(uri).split("/"):
        return None, "leaves the data's root"
    return uri, ""


def _as_url(uri: str) -> str:
    """The URI as the most generous of clients and servers reads it."""
    while uri != (reading := unquote(uri).translate(_AS_URLS_ARE_READ)):
        uri = reading
    return uri


def is_unicode(name: str) -> bool:
    """Whether it can be written down: POSIX allows any bytes in names, and JSON halves of characters."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
