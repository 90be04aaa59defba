"""Files of text: in which encoding, and what is none though its suffix says so. Opens them for the readers of tables.

A mark at the beginning (UTF-8, UTF-16, UTF-32) tells the encoding; without one it is UTF-8, or what the job says.
"""

from __future__ import annotations

import codecs
import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, cast

from orchestrator.job import POINTER
from orchestrator.job.locations import Location

BLOCK_BYTES = 8 * 2**20
"""What is read at once; no row of a table may be longer."""
POINTER_PROBLEM = "is a pointer of Git LFS, not the file itself: git lfs pull fetches it"
_ENCODING_MEND = "write it in UTF-8, or name its encoding, such as cp1252: data.encoding (--encoding)"
_NO_TEXT = (
    (b"\x1f\x8b", "it is compressed, by gzip", "unpack it: gunzip"),
    (b"BZh91AY&SY", "it is compressed, by bzip2", "unpack it: bunzip2"),
    (b"\xfd7zXZ\0", "it is compressed, by xz", "unpack it: unxz"),
    (b"\x28\xb5\x2f\xfd", "it is compressed, by zstd", "unpack it: zstd -d"),
    (b"PK\3\4", "it is a ZIP archive, as Excel's files are too", "unpack it, or save the sheet as CSV"),
    (b"\xd0\xcf\x11\xe0", "it is a file of Excel", "save the sheet as CSV"),
    (b"PAR1\x15", "it is Parquet", "name it .parquet"),
    (b"ARROW1\0\0", "it is Arrow", "name it .arrow"),
)
"""First bytes of files that are no text, what they are, and what to do."""
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
"""UTF-32's before UTF-16's, which it begins with."""


class UnreadableError(ValueError):
    """A file of a table is not what its suffix says."""

    def __init__(self, message: str, mend: str) -> None:
        super().__init__(message)
        self.mend = mend


@contextlib.contextmanager
def open_text(place: Path | Location, encoding: str | None, notes: list[str] | None = None) -> Iterator[TextIO]:
    """The file as text, with its line ends as they are. An encoding other than UTF-8 that its mark tells is noted.

    Raises `OSError`, and `UnreadableError` where it is no text, also while it is read.
    """
    raw = place.open("rb") if isinstance(place, Path) else place.stream(BLOCK_BYTES)
    with raw, io.BufferedReader(cast(io.RawIOBase, raw), BLOCK_BYTES) as file:
        head = file.peek(64)[:64]
        if head.startswith(POINTER):
            raise pointer_error()
        for first, what, mend in _NO_TEXT:
            if head.startswith(first):
                raise UnreadableError(what, mend)
        marked = next((name for mark, name in _MARKS if head.startswith(mark)), None)
        if marked in ("utf-16", "utf-32") and encoding is None and notes is not None:
            notes.append(f"read as {marked.upper()}, as the mark at its beginning says")
        if marked == "utf-8-sig" and encoding is not None and codecs.lookup(encoding).name == "utf-8":
            encoding = marked
        if marked is None and encoding is None and (name := _without_mark(head)):
            raise UnreadableError(
                "it looks like UTF-16 without a mark at its beginning",
                f"write it in UTF-8, or say so: data.encoding {name} (--encoding {name})",
            )
        with io.TextIOWrapper(file, encoding=encoding or marked or "utf-8", newline="") as text:
            try:
                yield text
            except UnicodeError as error:
                raise UnreadableError(str(error), _ENCODING_MEND) from None


def pointer_error() -> UnreadableError:
    """Of a file that Git LFS has not fetched."""
    return UnreadableError("it is a pointer of Git LFS, not the file itself", "fetch it: git lfs pull")


def _without_mark(head: bytes) -> str:
    """Which UTF-16 such first bytes are, where every other one is NUL; '' of others."""
    pairs = head[: len(head) // 2 * 2]
    for name, zeros, letters in (("utf-16-le", pairs[1::2], pairs[::2]), ("utf-16-be", pairs[::2], pairs[1::2])):
        if zeros.count(0) * 2 > len(zeros) and letters.count(0) * 4 < len(letters):
            return name
    return ""
