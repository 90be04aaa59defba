"""Every row of a source, looked at once: is it there, can it be read, what is it known by, what is measured on it.

What is remembered of a row is in `ingested.py`, all else goes to disk: memory grows with the labels, not with the data.
"""

from __future__ import annotations

import math
import os
import posixpath
import stat
from array import array
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from orchestrator.data.contents import content_id, digest64
from orchestrator.data.ingested import Example, IngestedRows, Skip, view
from orchestrator.data.rows import Row, Source, inside, inside_store
from orchestrator.data.samples import SampleWriter
from orchestrator.data.tables import suffix_of
from orchestrator.data.text_files import POINTER_PROBLEM
from orchestrator.errors import BadSampleError, DataError
from orchestrator.job import POINTER, BackboneCard, TaskName
from orchestrator.job.asking import PATIENCE_S, Asker, UnansweredError
from orchestrator.job.locations import Location
from orchestrator.job.object_storage import asked_once, read_once
from orchestrator.modality import Facts, Modality, Profile, Sample

NUM_MEASURED_ALL = 5_000
"""Up to so many samples are all decoded before the start; of more, some at even distances."""
NUM_MEASURED = 1_000
"""Of more, at least so many."""
MAX_HASHED_BYTES = 256 * 2**20
"""Up to so many bytes the fingerprint is of the contents; above, of sizes and modification times."""
_MAX_PROBLEMS = 1_000
"""After so many broken rows, a job that may not skip them reads on no further."""
_EXPLAINED = 3
"""For so many missing files it is said what lies in their folder."""
_LOOKED_AT = 10_000
NUM_EXAMPLES = 8
"""So many samples are kept to try the first batch with."""
_EXAMPLE_BYTES = 16 * 2**20
_CHUNK_ROWS = 128
_NO_SPLIT = -1


def ingest(
    source: Source, modality: Modality, card: BackboneCard, task: TaskName, writer: SampleWriter, may_skip: bool
) -> IngestedRows:
    """Read the source to its end; rows that can be used go to `writer`, the others are listed as skipped.

    Raises `DataError` where a path leaves its root, and `RefusedError` where a store does not answer. Unless broken
    rows may be skipped, the reading ends after `_MAX_PROBLEMS` of them.
    """
    ingested = IngestedRows(label=array("d" if task == "regression" else "i"))
    measured: list[tuple[int, Facts]] = []
    looker, examples = _Looker(source, modality, card), _Examples(ingested.examples)
    rows = source.rows()
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool, ExitStack() as behind:
        behind.callback(pool.shutdown, cancel_futures=True)
        while chunk := list(islice(rows, _CHUNK_ROWS)):
            usable = [row for row in chunk if not row.problem]
            for row in usable:
                looker.find(row)
            usable = [row for row in usable if not row.problem]
            numbers = range(len(ingested), len(ingested) + len(usable))
            run = pool.map if looker.is_work(usable, numbers) else map
            first = run(looker.look_once, usable, numbers)
            looks = [
                (number, look or looker.ask_again(row, number))
                for row, number, look in zip(usable, numbers, first, strict=True)
            ]
            look_of = dict(zip(map(id, usable), looks, strict=True))
            for row in chunk:
                if row.problem:
                    ingested.skipped.append(Skip(row.place, row.problem))
                    continue
                number, look = look_of[id(row)]
                if look.facts is not None:
                    measured.append((number, look.facts))
                    examples.offer(row.place, look)
                looker.total_bytes += max(0, look.num_bytes)
                _remember(ingested, row, look, task)
                writer.add(row)
            if not may_skip and len(ingested.skipped) >= _MAX_PROBLEMS:
                break
    step = _step(len(ingested))
    ingested.profile = Profile.of(facts for number, facts in measured if number % step == 0)
    ingested.by_content = looker.total_bytes <= MAX_HASHED_BYTES and bool(view(ingested.content_id).all())
    return ingested


def _step(num_rows: int) -> int:
    """Every so many rows are measured. A power of two, so that what was measured before it grew is not in vain."""
    if num_rows <= NUM_MEASURED_ALL:
        return 1
    return 1 << max(0, int(math.log2(num_rows / NUM_MEASURED)))


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
    """Append the entry of a row to an array that stays empty as long as all are 0."""
    if value and not values:
        values.frombytes(bytes(row * values.itemsize))
    if value or values:
        values.append(value)


@dataclass(frozen=True)
class _Look:
    """What one row turned out to be; the fields are those of `IngestedRows`."""

    num_bytes: int
    """-1 where it is not known."""
    content_id: tuple[int, int] = (0, 0)
    stat_id: int = 0
    timed: bool = False
    facts: Facts | None = None
    """None where the row is not one of the measured."""
    sample: Sample | None = None
    """As it was read, of the measured."""


class _Examples:
    """Chooses a few of the measured rows: the first of each kind, and some at growing distances."""

    def __init__(self, chosen: list[Example]) -> None:
        self._chosen = chosen
        self._kinds: set[object] = set()
        self._num_offered = self._num_bytes = 0

    def offer(self, place: str, look: _Look) -> None:
        """A measured row; it is kept if it is wanted, and there is room."""
        assert look.facts is not None
        assert look.sample is not None
        number, self._num_offered = self._num_offered, self._num_offered + 1
        if len(self._chosen) >= NUM_EXAMPLES:
            return
        kind = frozenset((key, value) for key, value in look.facts.items() if isinstance(value, str))
        size = sum(map(len, look.sample.values()))
        is_spread = number & (number - 1) == 0 and len(self._chosen) < NUM_EXAMPLES // 2  # the others are for kinds
        is_wanted = kind not in self._kinds or is_spread
        if is_wanted and (not self._chosen or self._num_bytes + size <= _EXAMPLE_BYTES):
            self._kinds.add(kind)
            self._num_bytes += size
            self._chosen.append(Example(place, look.sample))


class _Looker:
    """Looks at rows, several at once. What is wrong with a row becomes its `problem`."""

    def __init__(self, source: Source, modality: Modality, card: BackboneCard) -> None:
        assert modality.decode is not None
        assert modality.measure is not None
        self._source, self._card = source, card
        self._decode, self._measure = modality.decode, modality.measure
        self._sample = modality.sample[0]
        self._fields = [one.name for one in modality.sample]
        self._resolved: dict[str, str] = {}
        self._num_missing = 0
        self.total_bytes = 0
        """Of the rows so far, as far as their sizes are known."""

    def find(self, row: Row) -> None:
        """Set the row's `uri` and `file`. Raises `DataError` where it leaves the data's root, with `skip` too."""
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
            folder = posixpath.dirname(row.uri)
            raise DataError(
                f"{row.place}: the path {row.uri!r} {why} {shown}",
                expected="paths below the data's root",
                mend="move the files below it, or name the folder that holds them all"
                + (f", such as {folder}: data.root" if folder.startswith("/") else ": data.root"),
            )
        row.uri = uri

    def _is_sentence(self, uri: str) -> bool:
        return " " in uri.strip() and suffix_of(uri) not in self._sample.suffixes

    def _missing(self, root: Path | Location, uri: str) -> str:
        """Where a file was looked for; of the first ones also what lies there instead: a folder may be long."""
        if isinstance(root, Location):
            return f"the file {uri} is missing in {root.text}"
        folder, name = os.path.split(os.path.normpath(root / uri))
        self._num_missing += 1
        missing = f"the file {uri} is missing in {root}"
        if self._num_missing > _EXPLAINED:
            return missing
        try:
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in islice(entries, _LOOKED_AT))
        except OSError:
            return f"{missing}: there is no folder {folder}"
        stem = os.path.splitext(name)[0].lower()
        near = [one for one in names if os.path.splitext(one)[0].lower() in (stem, name.lower())]
        near = near or [one for one in names if suffix_of(one) in self._sample.suffixes] or names
        return f"{missing}: beside it lies {near[0]}" if near else f"{missing}: the folder {folder} is empty"

    def is_work(self, rows: list[Row], numbers: range) -> bool:
        """Whether looking at these rows decodes or reads files, so that threads are worth their cost."""
        reads = self.total_bytes <= MAX_HASHED_BYTES and any(row.content is None for row in rows)
        return reads or any(number % _step(number + 1) == 0 for number in numbers)

    def look_once(self, row: Row, number: int) -> _Look | None:
        """`look`; None where the row's store does not answer."""
        try:
            return self.look(row, number)
        except UnansweredError:
            return None

    def ask_again(self, row: Row, number: int) -> _Look:
        """`look`, for a minute. Raises `RefusedError` where the store does not answer."""
        store = self._source.origins[row.origin].root_text
        return Asker(store, PATIENCE_S)(f"{store.rstrip('/')}/{row.uri}", lambda: self.look(row, number))

    def look(self, row: Row, number: int) -> _Look:
        """Size, digests and, of a row that is one of the measured, its facts.

        Raises `UnansweredError` where the row's store does not answer.
        """
        is_measured = number % _step(number + 1) == 0
        size_and_time, content = row.stat, row.content
        if content is None:
            size_and_time, content = self._fetch(row, is_measured)
            if row.problem:
                return _Look(0)
        if row.uri and content is not None and content.startswith(POINTER):
            row.problem = POINTER_PROBLEM
            return _Look(0)
        look = _Look(
            num_bytes=len(content) if content is not None else size_and_time[0] if size_and_time else -1,
            content_id=content_id(content, row.second) if content is not None else (0, 0),
            stat_id=digest64(*size_and_time) if size_and_time else 0,
            timed=size_and_time is not None and size_and_time[1] > 0,
        )
        if not is_measured or content is None:
            return look
        try:
            sample = {self._fields[0]: content} | ({} if row.second is None else {self._fields[1]: row.second})
            return replace(look, facts=self._measure(self._decode(sample), self._card), sample=sample)
        except BadSampleError as error:
            row.problem = error.message
            return look

    def _fetch(self, row: Row, is_measured: bool) -> tuple[tuple[int, int] | None, bytes | None]:
        """((bytes, time of modification in ns), content where it is needed) of the row's file; sets its problem."""
        root = self._source.origins[row.origin].root
        is_needed = is_measured or self.total_bytes <= MAX_HASHED_BYTES
        try:
            if isinstance(root, Location):
                # In a store each file asked about is a request: those that are not measured are met when they are used.
                listed = row.stat if row.stat is not None or not is_measured else _stat(root, row.uri)
                if listed is None and is_measured:
                    row.problem = self._missing(root, row.uri)
                return listed, read_once(root, row.uri) if is_measured and not row.problem else None
            file = root / row.uri
            status = os.stat(file)
            if not stat.S_ISREG(status.st_mode):
                row.problem = "is no file"
                return None, None
            return (status.st_size, status.st_mtime_ns), file.read_bytes() if is_needed else None
        except FileNotFoundError:
            row.problem = self._missing(root, row.uri) if row.number else "is no file"
        except ValueError:  # half a character
            row.problem = "has a path that is no Unicode"
        except UnansweredError:
            raise
        except OSError as error:
            row.problem = f"cannot be read: {error.strerror or error}"
        return None, None


def _stat(root: Location, uri: str) -> tuple[int, int] | None:
    """What the store says of a file, None where there is none. Raises `UnansweredError`, of a refusal too."""
    try:
        return asked_once(root).join(uri).asked_stat()
    except OSError as error:
        raise UnansweredError(str(error)) from None
