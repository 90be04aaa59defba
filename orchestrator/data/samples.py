"""The sample table of a run on disk: written in one pass, memory-mapped when it is read.

`samples.arrow` holds what each row of the source is (its URI, or its bytes and texts); `index.arrow` says which rows
are used, with their targets and splits. So nothing that is large is copied or held in memory.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orchestrator.data.contents import Ids, Ints, Marks, content_id
from orchestrator.data.rows import Row
from orchestrator.errors import BadSampleError
from orchestrator.job import SPLITS, is_uri
from orchestrator.job.asking import UnansweredError
from orchestrator.job.locations import cached
from orchestrator.job.object_storage import read_once
from orchestrator.modality import Sample

ROWS_FILE, INDEX_FILE = "samples.arrow", "index.arrow"
_BATCH_ROWS = 1024
_BATCH_BYTES = 16 * 2**20
MAX_AT_ONCE = 64
"""So many samples are decoded at once, fewer where they are large."""
_BYTES_AT_ONCE = 64 * 2**20
"""Of files, which are up to some ten times as large once they are decoded."""
_NAMES_AT_ONCE = 65_536
_IN_NO_SPLIT = -1


class SampleWriter:
    """Rows of a source -> `samples.arrow`, a batch at a time."""

    def __init__(self, file: Path, fields: Sequence[str], with_content: bool) -> None:
        """`fields` of a sample; without content, only what messages need is kept."""
        self._fields = fields if with_content else ()
        columns = {"uri": pa.large_string(), "origin": pa.int32(), "number": pa.int64()}
        self._schema = pa.schema(columns | {name: pa.large_binary() for name in self._fields})
        self._sink = pa.OSFile(str(file), "wb")
        self._writer = pa.ipc.new_file(self._sink, self._schema)
        self._rows: list[Row] = []
        self._bytes = 0

    def add(self, row: Row) -> None:
        """The next row."""
        self._rows.append(row)
        self._bytes += len(row.content or b"") if self._fields else 0
        if len(self._rows) >= _BATCH_ROWS or self._bytes >= _BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        rows, self._rows, self._bytes = self._rows, [], 0
        parts: list[list[bytes | None]] = [[row.content for row in rows], [row.second for row in rows]]
        columns = [
            pa.array([row.uri for row in rows], pa.large_string()),
            pa.array([row.origin for row in rows], pa.int32()),
            pa.array([row.number for row in rows], pa.int64()),
            *(pa.array(part, pa.large_binary()) for part in parts[: len(self._fields)]),
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._rows:
            self._flush()
        self._writer.close()
        self._sink.close()


def write_index(
    file: Path, rows: Ints, targets: npt.NDArray[Any], split: Ints, num_bytes: Ints,
    contents: tuple[Marks, Marks], marks: Marks, roots: Sequence[str], groups: Ints | None = None,
) -> None:  # fmt: skip
    """Write `index.arrow`: which rows of `samples.arrow` are used, with their targets.

    targets: int64 [rows], the class; else float32 [rows, classes]. contents (lower and higher halves) and marks:
    what each row is known by, as far as that is known. `roots`: of each origin. groups: int64 [rows], where samples
    have some.
    """
    if targets.ndim == 1:
        column = pa.array(targets, pa.int32())
    else:
        column = pa.FixedSizeListArray.from_arrays(pa.array(targets.ravel(), pa.float32()), targets.shape[1])
    table = pa.table(
        {
            "row": pa.array(rows, pa.int64()),
            "target": column,
            "split": pa.array(split, pa.int8()),
            "num_bytes": pa.array(num_bytes, pa.int64()),
            "content_low": pa.array(contents[0], pa.uint64()),
            "content_high": pa.array(contents[1], pa.uint64()),
            "mark": pa.array(marks, pa.uint64()),
            **({} if groups is None else {"group": pa.array(groups, pa.int64())}),
        }
    ).replace_schema_metadata({"roots": json.dumps(list(roots))})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


class Samples:
    """The sample table of a run; a sample's bytes are read when asked for."""

    def __init__(self, directory: Path, fields: tuple[str, ...]) -> None:
        table = _mapped(directory / ROWS_FILE)
        index = _mapped(directory / INDEX_FILE)
        self._roots: list[str] = json.loads(index.schema.metadata[b"roots"])
        self._uri, self._origin, self._number = (table.column(name) for name in ("uri", "origin", "number"))
        self._content = {name: table.column(name) for name in fields if name in table.column_names}
        self._fields, self._first = fields, fields[0]
        self._row: Ints = index.column("row").to_numpy()
        target = index.column("target").combine_chunks()
        self.targets: npt.NDArray[Any]
        """int64 [samples], the class; multi-label and regression: float32 [samples, classes]."""
        if pa.types.is_fixed_size_list(target.type):
            self.targets = target.flatten().to_numpy().reshape(len(target), -1)
        else:
            self.targets = target.to_numpy().astype(np.int64)
        self.num_bytes: Ints = index.column("num_bytes").to_numpy()
        """int64 [samples]: of the first field; samples of like size are mostly of like length."""
        self._split: npt.NDArray[np.int8] = index.column("split").to_numpy()
        unknown = np.zeros(len(index), np.uint64)  # of runs that were planned before there was a feature store
        self._contents, self._marks = [unknown, unknown], unknown
        if "mark" in index.column_names:
            self._contents = [index.column(name).to_numpy() for name in ("content_low", "content_high")]
            self._marks = index.column("mark").to_numpy()
        self.groups: Ints | None = index.column("group").to_numpy() if "group" in index.column_names else None
        """int64 [samples]: of one group are those that may not be torn apart; None where nothing says so."""

    def contents(self, rows: Ints) -> Ids:
        """The id of each row's content, (0, 0) where it was not read before the start. rows: int64 [some samples]."""
        return np.stack([column[rows] for column in self._contents], axis=1)

    def files(self, rows: Ints) -> tuple[Marks, Marks]:
        """(digest of each row's file name, digest of its size and time of modification), 0 for rows without a file."""
        roots = [os.path.realpath(root) if not is_uri(root) else root for root in self._roots]
        places, marks = np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.uint64)
        for start in range(0, len(rows), _NAMES_AT_ONCE):
            some = rows[start : start + _NAMES_AT_ONCE]
            at = self._row[some]
            uris, origins = self._uri.take(at).to_pylist(), self._origin.take(at).to_pylist()
            places[start : start + len(some)] = [
                content_id(f"{roots[origin]}\0{uri}".encode())[0] if uri else 0
                for uri, origin in zip(uris, origins, strict=True)
            ]
            marks[start : start + len(some)] = np.where([bool(uri) for uri in uris], self._marks[some], 0)
        return places, marks

    def rows(self, split: str) -> Ints:
        """The numbers of a split's samples, int64, ascending. `split` is one of `SPLITS`."""
        return np.flatnonzero(self._split == SPLITS.index(split))

    def only(self, rows: Ints) -> Samples:
        """The same table, with no others than these rows in its splits."""
        some = copy.copy(self)
        some._split = np.full_like(self._split, _IN_NO_SPLIT)
        some._split[rows] = self._split[rows]
        return some

    def all_in_training(self) -> Samples:
        """The same samples, those of the validation split among the training samples."""
        other = copy.copy(self)
        other._split = np.where(self._split == SPLITS.index("validation"), SPLITS.index("train"), self._split)
        return other

    def order_by_length(self, rows: Ints) -> Ints:
        """The rows with the shortest samples first, by their size in bytes."""
        return rows[np.argsort(self.num_bytes[rows], kind="stable")]

    def batches(self, rows: Ints, most: int | None = None, beside: int = 1) -> Iterator[Ints]:
        """The rows in pieces that are decoded at once: `most` (or `MAX_AT_ONCE`), fewer where their files are large.

        `beside`: so many pieces are in memory side by side.
        """
        for piece in split_by_size(self.num_bytes[rows], most, beside):
            yield rows[piece]

    def num_among(self, rows: Ints, other: Samples, others: Ints) -> int:
        """How many of `rows` are among the rows `others` of the other table: the same file, or the same content.

        What differs in size differs, and is not looked at: a file that has another size by now is another sample.
        """
        known = set(other._known_by(others, self.num_bytes[rows]))
        return sum(one in known for one in self._known_by(rows, other.num_bytes[others]))

    def _known_by(self, rows: Ints, sizes: Ints) -> Iterator[str]:
        """`known_by` of rows whose size is among `sizes`, and of all files in stores, whose sizes may be unknown."""
        in_store = np.array([is_uri(root) for root in self._roots])[self._origin.to_numpy()[self._row[rows]]]
        for row in rows[in_store | np.isin(self.num_bytes[rows], sizes)].tolist():
            yield self.known_by(row)

    def known_by(self, row: int) -> str:
        """What tells this sample from others: its file, or what its content is known by."""
        if self._uri[int(self._row[row])].as_py():
            place = self.place(row)
            return place if is_uri(place) else os.path.realpath(place)
        content = tuple(int(column[row]) for column in self._contents)
        return "%016x%016x" % (content if any(content) else self.id_of(self.read(row)))

    def place(self, row: int) -> str:
        """What the sample is called in a message: its file, or its row in the table."""
        at = int(self._row[row])
        uri: str = self._uri[at].as_py()
        if not uri:
            return f"table row {self._number[at].as_py()}"
        return os.path.join(self._roots[self._origin[at].as_py()], uri)

    def store_of(self, row: int) -> str:
        """The store, or the folder, that the sample's file lies in."""
        root: str = self._roots[self._origin[int(self._row[row])].as_py()]
        return root

    def read(self, row: int) -> Sample:
        """{field: its bytes} of one sample.

        Raises `BadSampleError` where they cannot be read, and `UnansweredError` where their store does not answer.
        """
        at = int(self._row[row])
        sample = {name: column[at].as_py() for name, column in self._content.items() if column[at].is_valid}
        if self._first not in sample:
            sample[self._first] = _read(self._roots[self._origin[at].as_py()], self._uri[at].as_py())
        return sample

    def id_of(self, sample: Sample) -> tuple[int, int]:
        """The id of the content of a sample that was read, (low, high)."""
        first, *more = (sample[name] for name in self._fields if name in sample)
        return content_id(first, more[0] if more else None)


def split_by_size(num_bytes: Ints, most: int | None = None, beside: int = 1) -> Iterator[slice]:
    """Samples of these sizes in pieces as `Samples.batches` makes them, one after the other. num_bytes: int64."""
    start = 0
    while start < len(num_bytes):
        sizes = np.cumsum(num_bytes[start : start + (most or MAX_AT_ONCE)])
        num_fitting = max(1, int(np.searchsorted(sizes, _BYTES_AT_ONCE // beside, side="right")))
        yield slice(start, start + num_fitting)
        start += num_fitting


def _mapped(file: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()


def _read(root: str, uri: str) -> bytes:
    try:
        if is_uri(root):
            return read_once(cached(root), uri)
        with open(os.path.join(root, uri), "rb") as file:
            return file.read()
    except UnansweredError:
        raise
    except OSError as error:
        raise BadSampleError(f"cannot be read: {error.strerror or error}") from None
