"""Rows that a program holds (an iterable, a Ray or Hugging Face data set, a table in memory) -> a Parquet file.

Written once, under a name that is the digest of its content: so the same rows are the same job, and a run that was
interrupted goes on. From then on they are a table like any other.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from orchestrator.errors import DataError, first_line
from orchestrator.hub_datasets import of_object
from orchestrator.places import SPLIT_KEYS
from orchestrator.tables import BATCH_ROWS

_INFERRED_ROWS = 1024
"""So many rows tell the type of a column."""
_GROUP_BYTES = 16 * 2**20
_MEND = (
    "give rows such as {'image': bytes, 'label': 'cat'} or {'text': '...', 'label': 1}: bytes, paths, texts, numbers "
    "or lists of them; a Pillow image as the bytes of a PNG"
)


def spill_data(data: object, directory: Path) -> object:
    """`data` of a job's fields, with all that is no place replaced by a Parquet file in `directory`.

    Takes rows, or a mapping whose path, validation or test are rows. Paths in rows are relative to the working
    directory, unless `root` says another. Raises `DataError`.
    """
    if _library(data) == "datasets" and isinstance(data, Mapping):  # a DatasetDict
        tables = {table.split: table for table in of_object(data, "the data set")}
        rows = {key: tables[i] for i, key in enumerate(SPLIT_KEYS) if i in tables}
        places = {key: _write(_dicts(table.batches(table.columns)), directory) for key, table in rows.items()}
        return {"root": str(Path.cwd()), **places}
    if not isinstance(data, Mapping):
        return {"root": str(Path.cwd()), "path": _write(_batches(data), directory)}
    places = {key: _write(_batches(data[key]), directory) for key in SPLIT_KEYS if _is_rows(data.get(key))}
    return {"root": str(Path.cwd()), **data, **places} if places else data


def _is_rows(value: object) -> bool:
    return value is not None and not isinstance(value, (str, Path))


def _library(value: object) -> str:
    return type(value).__module__.split(".")[0]


def _batches(value: Any) -> Iterator[pa.RecordBatch]:
    """The rows of whatever it is, a batch at a time."""
    library = _library(value)
    if library == "ray":
        for table in value.iter_batches(batch_size=BATCH_ROWS, batch_format="pyarrow"):
            yield from table.to_batches()
    elif library == "datasets":
        (table,) = of_object(value, "the data set")
        yield from _dicts(table.batches(table.columns))
    elif library in ("pyarrow", "pandas"):
        table = pa.Table.from_pandas(value, preserve_index=False) if library == "pandas" else value
        yield from table.to_batches(max_chunksize=BATCH_ROWS) if isinstance(table, pa.Table) else [table]
    elif isinstance(value, Iterable) and not isinstance(value, bytes):
        yield from _of_rows(iter(value))
    else:
        raise DataError(f"data is a {type(value).__name__}", expected="a place, or rows", mend=_MEND)


def _dicts(batches: Iterator[Mapping[str, list[Any]]]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield pa.RecordBatch.from_pydict(dict(batch))


def _of_rows(rows: Iterator[Any]) -> Iterator[pa.RecordBatch]:
    schema: pa.Schema | None = None
    rows = (_plain(row) for row in rows)
    number = 0
    while chunk := list(islice(rows, _INFERRED_ROWS if schema is None else BATCH_ROWS)):
        for at, row in enumerate(chunk, number + 1):
            if not isinstance(row, Mapping):
                raise DataError(f"row {at} of the data is a {type(row).__name__}", expected="a mapping", mend=_MEND)
            strange = next((key for key in row if schema is not None and key not in schema.names), None)
            if strange is not None:
                raise DataError(f"row {at} of the data has a key {strange!r}, and no row before it has", mend=_MEND)
        cut = schema is not None and next(
            ((at, name) for at, row in enumerate(chunk, number + 1) for name in schema.names
             if pa.types.is_integer(schema.field(name).type) and isinstance(row.get(name), float)),
            None,
        )  # fmt: skip
        if cut:  # pyarrow would cut off what stands behind the point, in silence
            raise DataError(
                f"row {cut[0]} of the data has a fraction in {cut[1]!r}, where the first rows have whole numbers",
                expected="one type a column", mend=f"give all of {cut[1]!r} as float",
            )  # fmt: skip
        try:
            schema = schema or _schema_of(chunk)
            yield pa.RecordBatch.from_pylist(chunk, schema=schema)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"one of the rows {number + 1} to {number + len(chunk)} of the data cannot be written as a table: "
                f"{first_line(error)}",
                expected="one type a column", mend=_MEND,
            ) from None  # fmt: skip
        number += len(chunk)


def _schema_of(rows: list[Any]) -> pa.Schema:
    """The columns of the rows; one that holds nothing yet may hold texts later."""
    names = dict.fromkeys(key for row in rows for key in row)
    types = {name: pa.array([row.get(name) for row in rows]).type for name in names}
    return pa.schema({name: pa.string() if pa.types.is_null(kind) else kind for name, kind in types.items()})


def _plain(row: Any) -> Any:
    """The row with its paths as texts."""
    if not isinstance(row, Mapping):
        return row
    return {key: str(value) if isinstance(value, PurePath) else value for key, value in row.items()}


def _write(batches: Iterator[pa.RecordBatch], directory: Path) -> str:
    """The path of the Parquet file that holds the rows."""
    directory.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=directory, suffix=".partial")
    os.close(handle)
    partial = Path(name)
    try:
        num_rows = _write_to(partial, batches)
        if not num_rows:
            raise DataError("the data holds no row", mend=_MEND)
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        final = directory / f"{digest[:16]}.parquet"
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)
    return str(final.absolute())


def _write_to(file: Path, batches: Iterator[pa.RecordBatch]) -> int:
    writer: pa.parquet.ParquetWriter | None = None
    waiting: list[pa.RecordBatch] = []
    num_rows = 0
    try:
        for batch in batches:
            writer = writer or pa.parquet.ParquetWriter(file, batch.schema)
            waiting.append(batch)
            num_rows += batch.num_rows
            if sum(one.nbytes for one in waiting) > _GROUP_BYTES:
                writer.write_table(pa.Table.from_batches(waiting, writer.schema))
                waiting = []
        if writer is not None and waiting:
            writer.write_table(pa.Table.from_batches(waiting, writer.schema))
    except pa.ArrowException as error:
        raise DataError(
            f"the rows cannot be written as one table: {first_line(error)}", expected="one type a column",
            mend=_MEND,
        ) from None  # fmt: skip
    finally:
        if writer is not None:
            writer.close()
    return num_rows
