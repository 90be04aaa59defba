"""A table in CSV, Parquet or JSON lines, or a data set of the Hub -> its columns and its rows, a batch at a time.

However long the table is, one batch of it is in memory.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from orchestrator.data.locations import Location
from orchestrator.errors import DataError

_BLOCK_BYTES = 8 * 2**20
"""What is parsed at once of CSV: no row may be longer."""
BATCH_ROWS = 64
"""Of a table, so many rows are in memory at once."""
_PEEKED_LINES = 100
"""Of JSON lines, whose keys are the columns; all of them, where a column that is wanted is not in these."""

Batch = dict[str, list[Any]]
"""Column -> its cells."""


@dataclass(frozen=True)
class Table:
    """Rows that are read when they are asked for."""

    text: str
    """What it is called in messages."""
    columns: tuple[str, ...]
    batches: Callable[[Sequence[str]], Iterator[Batch]]
    """Given columns of all rows, in order. Raises `DataError` where they cannot be read."""
    root: Path | Location
    """What paths in its cells are relative to, where the user names nothing else."""
    split: int | None = None
    """Of all its rows, where it came as one of several splits."""


def suffix_of(place: str) -> str:
    """The suffix in lower case, `.csv` for example."""
    return os.path.splitext(place)[1].lower()


def open_table(place: Path | Location, wanted: Sequence[str] = ()) -> Table:
    """The table in a file, with the columns `wanted` if it has them anywhere. Raises `DataError` where it is none."""
    text = str(place) if isinstance(place, Path) else place.text
    columns, batches = _READERS[suffix_of(text)]
    with _readable(text):
        names = columns(place, wanted)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"{text} has two columns named {twice[0]!r}", mend="rename or remove one of them")

    def read(wanted: Sequence[str]) -> Iterator[Batch]:
        with _readable(text):
            yield from batches(place, names, list(dict.fromkeys(wanted)))

    return Table(text, tuple(names), read, place.parent if isinstance(place, Path) else place.parent())


@contextlib.contextmanager
def _readable(text: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{text} cannot be read: {error}",
            expected=f"a {suffix_of(text)} table in UTF-8, every row with all columns",
            mend="mend the table, or write it again in UTF-8",
        ) from None


def _open(place: Path | Location) -> BinaryIO:
    return place.open("rb") if isinstance(place, Path) else place.open()


# --- CSV ---


@contextlib.contextmanager
def _csv_reader(place: Path | Location, names: Sequence[str] = (), wanted: Sequence[str] = ()) -> Iterator[Any]:
    delimiter = "\t" if suffix_of(place.name if isinstance(place, Path) else place.path) == ".tsv" else ","
    with _open(place) as file:
        yield pyarrow.csv.open_csv(
            file,
            read_options=pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                # A type that is guessed holds for the first block only.
                column_types=dict.fromkeys(names, pa.string()),
                include_columns=list(wanted),
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=True,
            ),
        )


def _csv_columns(place: Path | Location, _wanted: Sequence[str]) -> list[str]:
    with _csv_reader(place) as reader:
        return list(reader.schema.names)


def _csv_batches(place: Path | Location, names: Sequence[str], wanted: Sequence[str]) -> Iterator[Batch]:
    with _csv_reader(place, names, wanted) as reader:
        for batch in reader:
            yield from _cut(batch)


def _cut(batch: Any) -> Iterator[Batch]:
    for start in range(0, batch.num_rows, BATCH_ROWS):
        yield batch.slice(start, BATCH_ROWS).to_pydict()


# --- Parquet ---


def _parquet_columns(place: Path | Location, _wanted: Sequence[str]) -> list[str]:
    with _open(place) as file:
        return list(pyarrow.parquet.ParquetFile(file).schema_arrow.names)


def _parquet_batches(place: Path | Location, _names: Sequence[str], wanted: Sequence[str]) -> Iterator[Batch]:
    with _open(place) as file:
        # pre_buffer, which is on by default, keeps all that was read to the end of the file; without a buffer size
        # a whole column of a row group is read at once.
        table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=_BLOCK_BYTES)
        for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=list(wanted), use_threads=False):
            yield batch.to_pydict()


# --- JSON lines ---


def _lines(place: Path | Location) -> Iterator[dict[str, Any]]:
    source = place.open("rb") if isinstance(place, Path) else place.stream(_BLOCK_BYTES)
    with source as file, io.TextIOWrapper(file, encoding="utf-8-sig") as text:
        number = 0
        for line in text:
            if not line.strip():
                continue
            number += 1
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"row {number} is no JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"row {number} is a {type(row).__name__}, not an object")
            yield row


def _json_columns(place: Path | Location, wanted: Sequence[str]) -> list[str]:
    names: dict[str, None] = {}
    for number, row in enumerate(_lines(place)):
        if number >= _PEEKED_LINES and all(name in names for name in wanted):
            break
        names |= dict.fromkeys(row)
    return list(names)


def _json_batches(place: Path | Location, _names: Sequence[str], wanted: Sequence[str]) -> Iterator[Batch]:
    batch: Batch = {name: [] for name in wanted}
    size = 0
    for row in _lines(place):
        for name, cells in batch.items():
            cells.append(row.get(name))
        size += 1
        if size == BATCH_ROWS:
            yield batch
            batch, size = {name: [] for name in wanted}, 0
    if size:
        yield batch


_Readers = tuple[
    Callable[[Path | Location, Sequence[str]], list[str]],
    Callable[[Path | Location, Sequence[str], Sequence[str]], Iterator[Batch]],
]
_READERS: dict[str, _Readers] = {
    ".csv": (_csv_columns, _csv_batches),
    ".tsv": (_csv_columns, _csv_batches),
    ".parquet": (_parquet_columns, _parquet_batches),
    ".jsonl": (_json_columns, _json_batches),
    ".ndjson": (_json_columns, _json_batches),
}
