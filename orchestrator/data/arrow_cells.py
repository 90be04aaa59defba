"""Batches of Arrow -> cells of Python: the names of classes that the schema tells, and numbers as they were written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

ArrowBatch = dict[str, list[Any]]
"""Column -> its cells."""


class ClassName(str):
    """The name of a class that knows its number, which stands in the table: a target is that number."""

    number: int

    def __new__(cls, name: str, number: int) -> ClassName:
        made = super().__new__(cls, name)
        made.number = number
        return made


def cells_of(batch: pa.RecordBatch | pa.Table, names: Mapping[str, list[str]]) -> ArrowBatch:
    """The cells of each column; numbers of the columns in `names`, which stand for classes, as the classes' names.

    A float32 is the shortest number that it is the nearest to: 0.1, as CSV has it, and not 0.10000000149011612.
    """
    cells: ArrowBatch = batch.to_pydict()
    for name, kind in zip(batch.schema.names, batch.schema.types, strict=True):
        if name in names:
            classes = [ClassName(one, number) for number, one in enumerate(names[name])]
            cells[name] = [named(cell, classes) for cell in cells[name]]
        elif pa.types.is_float32(kind) or pa.types.is_float16(kind):
            exact = np.float32 if pa.types.is_float32(kind) else np.float16
            cells[name] = [None if cell is None else float(str(exact(cell))) for cell in cells[name]]
    return cells


def named(cell: Any, names: Sequence[str]) -> Any:
    """The name of a class by its number, of each in a list; None where it is no class."""
    if isinstance(cell, list):
        return [named(one, names) for one in cell]
    return names[cell] if isinstance(cell, int) and 0 <= cell < len(names) else None  # -1 is no label


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """{column of numbers: the names of its classes}, by the metadata that the `datasets` library writes into a schema.

    Metadata of another form, and of columns that hold something else by now, count for nothing.
    """
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = {str(name): _names_of(feature) for name, feature in features.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}
    types: dict[str, pa.DataType] = dict(zip(schema.names, schema.types, strict=True))
    return {name: names for name, names in found.items() if names is not None and _holds_integers(types.get(name))}


def _names_of(feature: Any) -> list[str] | None:
    """The names of a ClassLabel, alone or in a list."""
    if isinstance(feature, list) and len(feature) == 1:
        return _names_of(feature[0])
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") in ("Sequence", "List", "LargeList"):
        return _names_of(feature.get("feature"))
    names: Any = feature.get("names")
    if feature.get("_type") != "ClassLabel" or not isinstance(names, list):
        return None
    return names if all(isinstance(name, str) for name in names) else None


def _holds_integers(kind: pa.DataType | None) -> bool:
    if kind is not None and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return _holds_integers(kind.value_type)
    return kind is not None and pa.types.is_integer(kind)
