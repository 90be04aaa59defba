"""A table in CSV, Parquet, Arrow or JSON lines, or a data set of the Hub -> its columns and rows, a batch at a time.

However long the table is, one batch of it is in memory; of Arrow, one of those that it was written in.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet

from orchestrator.data.arrow_cells import ArrowBatch, cells_of, class_names
from orchestrator.data.arrow_files import AGAIN, arrow_stream, look_at_end, refuse_pointer
from orchestrator.data.delimited import read_header, read_records
from orchestrator.data.text_files import BLOCK_BYTES, UnreadableError, open_text
from orchestrator.errors import DataError, first_line
from orchestrator.job.locations import Location

BATCH_ROWS = 64
"""Of a table, so many rows are in memory at once."""
_SMALL_BYTES = 32 * 2**20
"""A Parquet file of which a whole column may be in memory."""
_PEEKED_LINES = 100
"""Of JSON lines, whose keys are the columns; all of them, where a column that is wanted is not in these."""

Read = Callable[[Sequence[str]], Iterator[ArrowBatch]]
"""Given columns -> the cells of all rows, in order."""


@dataclass(frozen=True)
class TextForm:
    """What a job says of its tables that are text; None: by the file."""

    separator: str | None = None
    """Of CSV and TSV."""
    encoding: str | None = None
    """Of CSV, TSV and JSON lines."""


@dataclass(frozen=True)
class Table:
    """Rows that are read when they are asked for."""

    text: str
    """What it is called in messages."""
    columns: tuple[str, ...]
    batches: Read
    """Raises `DataError` where they cannot be read."""
    root: Path | Location
    """What paths in its cells are relative to, where the user names nothing else."""
    split: int | None = None
    """Of all its rows, where it came as one of several splits."""
    folders: Mapping[str, int] = field(default_factory=dict)
    """{folder: the split of the rows whose paths lie in it}, where it is a table of such folders."""
    is_text: bool = False
    """Whether its cells are words, as CSV's are, which has no cell that is missing: only empty ones."""
    notes: list[str] = field(default_factory=list)
    """How it was read, as far as that is not plain; whole once its rows were read."""


def suffix_of(place: str) -> str:
    """The suffix in lower case, `.csv` for example."""
    return os.path.splitext(place)[1].lower()


def open_table(place: Path | Location, wanted: Sequence[str] = (), form: TextForm | None = None) -> Table:
    """The table in a file, with the columns `wanted` if it has them anywhere. Raises `DataError` where it is none."""
    text = str(place) if isinstance(place, Path) else place.text
    notes: list[str] = []
    with _readable(text):
        names, batches = _READERS[suffix_of(text)](place, wanted, form or TextForm(), notes)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"{text} has two columns named {twice[0]!r}", mend="rename or remove one of them")

    def read(wanted: Sequence[str]) -> Iterator[ArrowBatch]:
        with _readable(text):
            yield from batches(list(dict.fromkeys(wanted)))

    root = place.parent if isinstance(place, Path) else place.parent()
    return Table(text, tuple(names), read, root, is_text=suffix_of(text) in (".csv", ".tsv"), notes=notes)


@contextlib.contextmanager
def _readable(text: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        suffix = suffix_of(text)
        raise DataError(
            f"{text} cannot be read: {first_line(error)}",
            expected=f"a {suffix} table, every row with all columns",
            mend=getattr(error, "mend", "") or f"mend the table, or write it again as {suffix}",
        ) from None


def _open(place: Path | Location) -> BinaryIO:
    return place.open("rb") if isinstance(place, Path) else place.open()


# --- CSV ---


def _open_csv(
    place: Path | Location, _wanted: Sequence[str], form: TextForm, notes: list[str]
) -> tuple[list[str], Read]:
    names, separator = read_header(place, form.separator, form.encoding, notes)

    def read(wanted: Sequence[str]) -> Iterator[ArrowBatch]:
        at = {name: names.index(name) for name in wanted}
        rows = read_records(place, len(names), separator, form.encoding, notes)
        while some := list(islice(rows, BATCH_ROWS)):
            yield {name: [row[i] or None for row in some] for name, i in at.items()}

    return names, read


# --- Parquet, Arrow ---


def _open_parquet(
    place: Path | Location, _wanted: Sequence[str], _form: TextForm, _notes: list[str]
) -> tuple[list[str], Read]:
    def read(wanted: Sequence[str]) -> Iterator[ArrowBatch]:
        with _open(place) as file:
            # pre_buffer, which is on by default, keeps all that was read to the end of the file; without a buffer size
            # a whole column of a row group is read at once, and with one a damaged page may ask for 2 GiB.
            is_small = file.seek(0, os.SEEK_END) <= _SMALL_BYTES
            file.seek(0)
            table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=0 if is_small else BLOCK_BYTES)
            classes = class_names(table.schema_arrow)
            num_rows = 0
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=list(wanted), use_threads=False):
                num_rows += batch.num_rows
                yield cells_of(batch, classes)
            if num_rows != table.metadata.num_rows:
                raise UnreadableError(f"it holds {num_rows} of {table.metadata.num_rows} rows", AGAIN)

    with _open(place) as file:
        refuse_pointer(file)
        return list(pyarrow.parquet.ParquetFile(file).schema_arrow.names), read


def _open_arrow(
    place: Path | Location, _wanted: Sequence[str], _form: TextForm, notes: list[str]
) -> tuple[list[str], Read]:
    def read(wanted: Sequence[str]) -> Iterator[ArrowBatch]:
        with _open(place) as file:
            stream, promised = arrow_stream(file)
            classes, num_batches = class_names(stream.schema), 0
            for batch in stream:
                num_batches += 1
                chosen = batch.select(list(wanted))
                chosen.validate(full=True)  # what was changed in the file may point beyond its buffers
                for start in range(0, chosen.num_rows, BATCH_ROWS):
                    yield cells_of(chosen.slice(start, BATCH_ROWS), classes)
            if promised is None:
                look_at_end(file, notes)
            elif num_batches != promised:
                raise UnreadableError(f"its end names {promised} batches, and it holds {num_batches}", AGAIN)

    with _open(place) as file:
        refuse_pointer(file)
        return list(arrow_stream(file)[0].schema.names), read


# --- JSON lines ---


def _open_json(
    place: Path | Location, wanted: Sequence[str], form: TextForm, notes: list[str]
) -> tuple[list[str], Read]:
    names: dict[str, None] = {}
    for number, row in enumerate(_lines(place, form, notes)):
        if number >= _PEEKED_LINES and all(name in names for name in wanted):
            break
        names |= dict.fromkeys(row)

    def read(wanted: Sequence[str]) -> Iterator[ArrowBatch]:
        rows = _lines(place, form)
        while some := list(islice(rows, BATCH_ROWS)):
            yield {name: [row.get(name) for row in some] for name in wanted}

    return list(names), read


def _lines(place: Path | Location, form: TextForm, notes: list[str] | None = None) -> Iterator[dict[str, Any]]:
    with open_text(place, form.encoding, notes) as text:
        number = 0
        for line in text:
            if not line.strip():
                continue
            number += 1
            try:
                row = json.loads(line, object_pairs_hook=_once)
            except (ValueError, RecursionError) as error:
                raise UnreadableError(
                    f"row {number} is no JSON: {error}", "write one JSON object a line, each of its keys once"
                ) from None
            if not isinstance(row, dict):
                raise UnreadableError(
                    f"row {number} is a {type(row).__name__}, not an object", "write one JSON object a line"
                )
            yield row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object, of whose values none was put in the place of another. Raises `ValueError`."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


_Open = Callable[[Path | Location, Sequence[str], TextForm, list[str]], tuple[list[str], Read]]
_READERS: dict[str, _Open] = {
    ".csv": _open_csv,
    ".tsv": _open_csv,
    ".parquet": _open_parquet,
    ".arrow": _open_arrow,
    ".feather": _open_arrow,
    ".jsonl": _open_json,
    ".ndjson": _open_json,
}
