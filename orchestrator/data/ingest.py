"""Every row of a source, looked at once: is it there, can it be read, what is it known by, what is measured on it.

Of each row some 50 bytes are remembered; all else goes to disk. So memory grows with the labels, not with the data.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.data.contents import content_id
from orchestrator.data.locations import Location
from orchestrator.data.rows import Row, Source, inside, inside_store
from orchestrator.data.samples import SampleWriter
from orchestrator.data.tables import suffix_of
from orchestrator.errors import BadSampleError, DataError
from orchestrator.job import BackboneCard, TaskName
from orchestrator.modality import Facts, Modality, Profile

Ints = npt.NDArray[np.int64]

NUM_MEASURED_ALL = 5_000
"""Up to so many samples are all decoded before the start; of more, some at even distances."""
NUM_MEASURED = 1_000
"""Of more, at least so many."""
MAX_HASHED_BYTES = 256 * 2**20
"""Up to so many bytes the fingerprint is of the contents; above, of sizes and modification times."""
_MAX_PROBLEMS = 1_000
"""After so many broken rows, a job that may not skip them reads on no further."""
_CHUNK_ROWS = 128
_NO_SPLIT = -1


@dataclass(frozen=True)
class Skip:
    """A sample that is left out, and why."""

    place: str
    problem: str


@dataclass
class IngestedRows:
    """What is remembered of the rows that can be used, one entry a row in each array.

    Arrays that say so stay empty as long as all of their entries would be 0; `whole` gives those too.
    """

    label: array[Any] = field(default_factory=lambda: array("i"))
    """Single-label: the number of the name; multi-label: of all rows' names in turn; regression: floats."""
    num_labels: array[int] = field(default_factory=lambda: array("i"))
    """Multi-label alone: how many of `label` are the row's."""
    names: dict[str, int] = field(default_factory=dict)
    """Label -> number, in the order that they were met in."""
    group: array[int] = field(default_factory=lambda: array("i"))
    """Empty where the data has no groups."""
    groups: dict[str, int] = field(default_factory=dict)
    split: array[int] = field(default_factory=lambda: array("b"))
    origin: array[int] = field(default_factory=lambda: array("i"))
    """May be empty."""
    num_bytes: array[int] = field(default_factory=lambda: array("q"))
    uri_id: array[int] = field(default_factory=lambda: array("Q"))
    """Of the file, whatever it is called; 0 where the table holds the sample itself. May be empty."""
    label_id: array[int] = field(default_factory=lambda: array("Q"))
    """Single-label: of each name, by its number; else of each row."""
    content_id: array[int] = field(default_factory=lambda: array("Q"))
    """Of the content; 0 where it was not read."""
    content_high: array[int] = field(default_factory=lambda: array("Q"))
    """64 more bits of that, for what is kept longer than a job."""
    stat_id: array[int] = field(default_factory=lambda: array("Q"))
    """Of a file's size and time of modification; 0 where they are not known. May be empty."""
    timed: array[int] = field(default_factory=lambda: array("b"))
    """Whether `stat_id` holds a time: some stores tell none, and then the same size is no sign of the same content.
    May be empty."""
    skipped: list[Skip] = field(default_factory=list)
    facts: list[tuple[int, Facts]] = field(default_factory=list)
    """(row, what was measured on it)"""

    def __len__(self) -> int:
        return len(self.split)

    def profile(self) -> Profile:
        """Of all rows, or of some at even distances."""
        step = _step(len(self))
        return Profile.of(facts for row, facts in self.facts if row % step == 0)

    def whole(self, values: array[Any]) -> npt.NDArray[Any]:
        """An array with an entry a row, one that is empty among them."""
        return view(values) if len(values) else np.broadcast_to(np.zeros((), values.typecode), len(self))

    def label_key(self, row: int) -> int:
        """What tells a row's label, or labels, from others."""
        return self.label_id[self.label[row] if self._by_name else row]

    def label_keys(self) -> npt.NDArray[np.uint64]:
        """Of all rows, uint64."""
        return view(self.label_id)[view(self.label)] if self._by_name else view(self.label_id)

    @property
    def _by_name(self) -> bool:
        return bool(self.names) and not self.num_labels

    def total_bytes(self) -> int:
        """Of all samples whose size is known."""
        return int(view(self.num_bytes).sum(where=view(self.num_bytes) > 0, dtype=np.int64))

    def known_by(self) -> npt.NDArray[np.uint64]:
        """What each sample is known by: its content, or, of much data, its file's size and time of modification."""
        content = view(self.content_id)
        if self.total_bytes() <= MAX_HASHED_BYTES and content.all():
            return content
        return np.where(self.whole(self.uri_id) == 0, content, self.whole(self.stat_id))

    def contents(self) -> npt.NDArray[np.uint64]:
        """The content that `known_by` is of, 0 where it is of something else."""
        content, known_by = view(self.content_id), self.known_by()
        return np.where(known_by == content, content, np.uint64(0))


def view(values: array[Any]) -> npt.NDArray[Any]:
    """An array of the intake as numpy's, in its own type, not copied."""
    return np.frombuffer(values, dtype=values.typecode) if len(values) else np.zeros(0, values.typecode)


def numbers(values: array[Any]) -> Ints:
    """An array of the intake as int64 [rows]."""
    return view(values).astype(np.int64)


def _step(num_rows: int) -> int:
    """Every so many rows are measured. A power of two, so that what was measured before it grew is not in vain."""
    if num_rows <= NUM_MEASURED_ALL:
        return 1
    return 1 << max(0, int(math.log2(num_rows / NUM_MEASURED)))


def digest64(*what: object) -> int:
    """64 bits that stand for `what`, never 0."""
    text = json.dumps(what, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") or 1


def ingest(
    source: Source, modality: Modality, card: BackboneCard, task: TaskName, writer: SampleWriter, may_skip: bool
) -> IngestedRows:
    """Read the source to its end. Raises `DataError` where a path leaves its root, or too many rows are broken."""
    ingested = IngestedRows(label=array("d" if task == "regression" else "i"))
    looker = _Looker(source, modality, card)
    rows = source.rows()
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        while chunk := list(islice(rows, _CHUNK_ROWS)):
            usable = [row for row in chunk if not row.problem]
            for row in usable:
                looker.find(row)
            usable = [row for row in usable if not row.problem]
            spots = range(len(ingested), len(ingested) + len(usable))
            run = pool.map if looker.is_work(usable, spots) else map
            looks = run(looker.look, usable, spots)
            found = {id(row): (number, look) for row, number, look in zip(usable, spots, looks, strict=True)}
            for row in chunk:
                if row.problem:
                    ingested.skipped.append(Skip(row.place, row.problem))
                    continue
                number, look = found[id(row)]
                if look.facts is not None:
                    ingested.facts.append((number, look.facts))
                looker.total += max(0, look.num_bytes)
                _remember(ingested, row, look, task)
                writer.add(row)
            if not may_skip and len(ingested.skipped) >= _MAX_PROBLEMS:
                break
    return ingested


def _remember(ingested: IngestedRows, row: Row, look: _Look, task: TaskName) -> None:
    at = len(ingested)
    if task == "regression":
        ingested.label.extend(row.label)
    else:
        labels = row.label if isinstance(row.label, tuple) else (row.label,)
        ingested.label.extend([ingested.names.setdefault(str(name), len(ingested.names)) for name in labels])
        if task == "multi-label":
            ingested.num_labels.append(len(labels))
    if task != "single-label" or len(ingested.names) > len(ingested.label_id):
        ingested.label_id.append(digest64(row.label))
    if row.group is not None:
        ingested.group.append(ingested.groups.setdefault(row.group, len(ingested.groups)))
    ingested.split.append(_NO_SPLIT if row.split is None else row.split)
    ingested.num_bytes.append(look.num_bytes)
    ingested.content_id.append(look.content_id[0])
    ingested.content_high.append(look.content_id[1])
    _put(ingested.origin, row.origin, at)
    _put(ingested.uri_id, digest64(row.file or row.uri) if row.uri else 0, at)
    _put(ingested.stat_id, look.stat_id, at)
    _put(ingested.timed, look.timed, at)


def _put(values: array[int], value: int, row: int) -> None:
    """The entry of a row, in an array that stays empty as long as all are 0."""
    if value and not values:
        values.frombytes(bytes(row * values.itemsize))
    if value or values:
        values.append(value)


@dataclass(frozen=True)
class _Look:
    """What one row turned out to be."""

    num_bytes: int
    """-1 where it is not known."""
    content_id: tuple[int, int] = (0, 0)
    stat_id: int = 0
    timed: bool = False
    facts: Facts | None = None


class _Looker:
    """Looks at rows, several at once."""

    def __init__(self, source: Source, modality: Modality, card: BackboneCard) -> None:
        assert modality.decode is not None
        assert modality.measure is not None
        self._source, self._card = source, card
        self._decode, self._measure = modality.decode, modality.measure
        self._sample = modality.sample[0]
        self._fields = [one.name for one in modality.sample]
        self._resolved: dict[str, str] = {}
        self.total = 0
        """Bytes of the rows so far."""

    def find(self, row: Row) -> None:
        """Settle a row's URI; what leaves the data's root is refused whatever the user chose."""
        origin = self._source.origins[row.origin]
        if not row.uri or origin.listed:
            return
        if isinstance(origin.root, Location):
            uri, why = inside_store(origin.root, row.uri)
            shown: object = origin.root.text
        else:
            uri, why = inside(origin.root, row.uri, self._resolved)
            row.file = "" if uri is None else why
            shown = origin.root
            if self._is_sentence(row.uri) and (uri is None or not os.path.isfile(origin.root / uri)):
                raise DataError(
                    f"{row.place}: there is no file {row.uri[:60]!r}; this looks like a text",
                    expected=f"paths of {self._sample.name} files",
                    mend="if the data is text: modality text (--modality text); else name the column of paths: "
                    "data.input_column",
                )
        if uri is None:
            # Never a matter of skipping: somebody wrote a path that reaches for other files.
            raise DataError(
                f"{row.place}: the path {row.uri!r} {why} {shown}",
                expected="paths below the data's root",
                mend="move the files below it, or name a higher one: data.root",
            )
        row.uri = uri

    def _is_sentence(self, uri: str) -> bool:
        return " " in uri.strip() and suffix_of(uri) not in self._sample.suffixes

    def is_work(self, rows: list[Row], places: range) -> bool:
        """Whether looking at these rows decodes or reads files, so that threads are worth their cost."""
        reads = self.total <= MAX_HASHED_BYTES and any(row.content is None for row in rows)
        return reads or any(number % _step(number + 1) == 0 for number in places)

    def look(self, row: Row, number: int) -> _Look:
        """The row's size, what it is known by, its facts where it is one of the measured; else its `problem`."""
        measured = number % _step(number + 1) == 0
        listed, content = row.stat, row.content
        if content is None:
            listed, content = self._fetch(row, measured)
            if row.problem:
                return _Look(0)
        num_bytes = len(content) if content is not None else listed[0] if listed is not None else -1
        known = _Look(
            num_bytes,
            content_id(content, row.second) if content is not None else (0, 0),
            digest64(*listed) if listed is not None else 0,
            listed is not None and listed[1] > 0,
        )
        if not measured or content is None:
            return known
        try:
            sample = {self._fields[0]: content} | ({} if row.second is None else {self._fields[1]: row.second})
            facts = self._measure(self._decode(sample), self._card)
        except BadSampleError as error:
            row.problem = error.message
            return known
        return _Look(known.num_bytes, known.content_id, known.stat_id, known.timed, facts)

    def _fetch(self, row: Row, measured: bool) -> tuple[tuple[int, int] | None, bytes | None]:
        """(size and time, content where it is needed) of the row's file; sets its problem."""
        root = self._source.origins[row.origin].root
        needed = measured or self.total <= MAX_HASHED_BYTES
        try:
            if isinstance(root, Location):
                # In a store each file asked about is a request: those that are not measured are met when they are used.
                place = root.join(row.uri)
                listed = row.stat if row.stat is not None or not measured else place.stat()
                if listed is None and measured:
                    row.problem = f"the file {row.uri} is missing"
                return listed, place.read() if measured and not row.problem else None
            file = root / row.uri
            found = os.stat(file)
            if not stat.S_ISREG(found.st_mode):
                row.problem = "is no file"
                return None, None
            return (found.st_size, found.st_mtime_ns), file.read_bytes() if needed else None
        except FileNotFoundError:
            row.problem = f"the file {row.uri} is missing" if row.number else "is no file"
        except ValueError:  # half a character
            row.problem = "has a path that is no Unicode"
        except OSError as error:
            row.problem = f"cannot be read: {error.strerror or error}"
        return None, None
