"""Rows that a program holds (an iterable, a Ray or Hugging Face data set, a table in memory) -> a Parquet file.

Written once, under a name that is the digest of its content: so the same rows are the same job, and a run that was
interrupted goes on. From then on they are a table like any other.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from orchestrator.data.hub_datasets import rows_of, splits_of
from orchestrator.data.tables import BATCH_ROWS
from orchestrator.errors import DataError, first_line
from orchestrator.job import SPLIT_KEYS, as_settings, is_rows, library_of

_INFERRED_ROWS = 1024
"""So many rows tell the type of a column, or fewer where they are large."""
_CHUNK_BYTES = 16 * 2**20
"""Of rows, so much is held at once; of Parquet, the size of a row group."""
_MEND = (
    "give rows such as {'image': bytes, 'label': 'cat'} or {'text': '...', 'label': 1}: bytes, paths, texts, numbers "
    "or lists of them; a Pillow image as the bytes of a PNG"
)


def materialise_rows(data: object, directory: Path, new: list[Path] | None = None) -> object:
    """`data` of a job's fields, with all that is no place replaced by a Parquet file in `directory`.

    Takes rows, or a mapping whose path, validation or test are rows. Paths in rows are relative to the working
    directory, unless `root` says another; those of a place beside them stay relative to its own folder. Files that
    were not there before are added to `new`. Raises `DataError`.
    """
    settings = as_settings(data)
    if not isinstance(settings, Mapping):
        return data
    rows = _by_split(settings)
    if not rows:
        return data
    new = [] if new is None else new
    batches = {key: chain.from_iterable(map(_batches, parts)) for key, parts in rows.items()}
    places = {key: _write(some, directory, new) for key, some in batches.items()}
    alone = all(key in places or settings.get(key) is None for key in SPLIT_KEYS)
    return {"root" if alone else "rows_root": str(Path.cwd()), **settings, **places}


def _by_split(settings: Mapping[str, Any]) -> dict[str, list[Any]]:
    """{path, validation or test: what holds its rows}, a DatasetDict cut into its splits."""
    rows: dict[str, list[Any]] = {}
    for key in SPLIT_KEYS:
        value = settings.get(key)
        if not is_rows(value):
            continue
        if not isinstance(value, Mapping) or library_of(value) != "datasets":
            rows.setdefault(key, []).append(value)
            continue
        parts = splits_of(value, "the data set")
        for split, part in parts:
            if split is not None and key != "path":
                raise DataError(
                    f"data.{key} is a data set of the splits {', '.join(value)}", expected="the rows of one split",
                    mend=f"give one of them: {key}=the_data_set[{next(iter(value))!r}]",
                )  # fmt: skip
            name = key if split is None else SPLIT_KEYS[split]
            if name != key and settings.get(name) is not None:
                raise DataError(
                    f"data.{name} is given, and the data set has a split {name} of its own",
                    mend="leave one of them out",
                )
            rows.setdefault(name, []).append(part)
    return rows


def _batches(value: Any) -> Iterator[pa.RecordBatch]:
    """The rows of whatever it is, a batch at a time."""
    library = library_of(value)
    if library == "ray":
        for table in value.iter_batches(batch_size=BATCH_ROWS, batch_format="pyarrow"):
            yield from table.to_batches()
    elif library == "datasets":
        yield from _of_rows(iter(rows_of(value)))
    elif library == "pandas" and hasattr(value, "columns"):
        yield from pa.Table.from_pandas(value, preserve_index=False).to_batches(max_chunksize=BATCH_ROWS)
    elif isinstance(value, pa.Table):
        yield from value.to_batches(max_chunksize=BATCH_ROWS)
    elif isinstance(value, pa.RecordBatch):
        yield value
    elif isinstance(value, pa.RecordBatchReader):
        yield from value
    elif library == "pyarrow" and hasattr(value, "to_batches"):  # pyarrow.dataset
        yield from value.to_batches(batch_size=BATCH_ROWS)
    elif library not in ("pandas", "pyarrow") and isinstance(value, Iterable) and not isinstance(value, bytes):
        yield from _of_rows(iter(value))
    else:
        raise DataError(f"data is a {type(value).__name__}", expected="a place, rows or a table", mend=_MEND)


def _of_rows(rows: Iterator[Any]) -> Iterator[pa.RecordBatch]:
    """Mappings as batches of one schema, that of the first `_INFERRED_ROWS`. Raises `DataError` for what differs."""
    schema: pa.Schema | None = None
    number = 0
    for chunk in _chunks(_plain(row) for row in rows):
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


def _chunks(rows: Iterator[Any]) -> Iterator[list[Any]]:
    """The rows in pieces that are held at once: the first tells the columns' types."""
    chunk: list[Any] = []
    size, most = 0, _INFERRED_ROWS
    for row in rows:
        chunk.append(row)
        size += _num_bytes(row)
        if len(chunk) >= most or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size, most = [], 0, BATCH_ROWS
    if chunk:
        yield chunk


def _num_bytes(value: Any) -> int:
    """About so much of memory."""
    if isinstance(value, (bytes, bytearray, str)):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_num_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_num_bytes, value))
    return int(getattr(value, "nbytes", 8))


def _schema_of(rows: list[Any]) -> pa.Schema:
    """The columns of the rows; one that holds nothing yet may hold texts later."""
    names = dict.fromkeys(key for row in rows for key in row)
    return pa.schema({name: _filled(pa.array([row.get(name) for row in rows]).type) for name in names})


def _filled(kind: pa.DataType) -> pa.DataType:
    """The type with texts where nothing was met."""
    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_filled(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct({kind.field(i).name: _filled(kind.field(i).type) for i in range(kind.num_fields)})
    return kind


def _plain(row: Any) -> Any:
    """The row with its paths as texts."""
    if not isinstance(row, Mapping):
        return row
    return {key: str(value) if isinstance(value, PurePath) else value for key, value in row.items()}


def _write(batches: Iterator[pa.RecordBatch], directory: Path, new: list[Path]) -> str:
    """The path of the Parquet file that holds the rows; one that was not there before is added to `new`."""
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
        if not final.exists():
            new.append(final)
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)
    return str(final.absolute())


def _write_to(file: Path, batches: Iterator[pa.RecordBatch]) -> int:
    """Write the batches as Parquet, about `_CHUNK_BYTES` a row group; the number of rows. Raises `DataError`."""
    writer: pa.parquet.ParquetWriter | None = None
    waiting: list[pa.RecordBatch] = []
    num_rows = 0
    try:
        for batch in batches:
            writer = writer or pa.parquet.ParquetWriter(file, batch.schema)
            waiting.append(batch)
            num_rows += batch.num_rows
            if sum(one.nbytes for one in waiting) > _CHUNK_BYTES:
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
