"""A table's columns and cells -> the fields of rows, and what is wrong with them."""

from __future__ import annotations

import math
import posixpath
import unicodedata
from collections.abc import Sequence

from orchestrator.data.rows import Row
from orchestrator.errors import DataError
from orchestrator.job import SPLIT_NAMES, Data, TaskName
from orchestrator.modality import SampleField, registry

_TEXT_COLUMNS = (("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("text",), ("sentence",),
                 ("content",))  # fmt: skip
_SWITCHES = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True, "no": False, "yes": True}
_LARGEST = 3.4e38  # of a float32
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "uri")


def label_columns(spec: Data) -> tuple[str, ...]:
    """The names of the columns that say what is to be learnt."""
    return (spec.label_column,) if isinstance(spec.label_column, str) else spec.label_column


def input_columns(spec: Data) -> tuple[str, ...]:
    """The names of the columns that samples stand in, where the user gave them."""
    return (spec.input_column,) if isinstance(spec.input_column, str) else spec.input_column or ()


def find_inputs(columns: Sequence[str], spec: Data, sample: Sequence[SampleField], text: str) -> Sequence[str]:
    """The columns of the samples: one, or two of a pair of texts."""
    given = input_columns(spec)
    if len(given) > len(sample):
        raise DataError(
            f"data.input_column names {len(given)} columns, and a sample has {len(sample)} at most",
            expected=" and ".join(field.name for field in sample),
        )
    if given:
        wanted: list[tuple[str, ...]] = [given]
    elif sample[0].kind == "text":
        wanted = [columns for columns in _TEXT_COLUMNS if len(columns) <= len(sample)]
    else:
        wanted = [(name,) for name in (sample[0].name, *_PATH_COLUMNS, "bytes")]
    for names in wanted:
        if all(name in columns for name in names):
            return names
    kind = "texts" if sample[0].kind == "text" else f"{sample[0].name} paths or bytes"
    raise DataError(
        f"{text} has no column of {kind}: it has {', '.join(columns)}",
        expected="one of " + ", ".join(" + ".join(names) for names in wanted),
        mend=delimiter(columns, text) or _modality_of(columns, sample) or "name it: data.input_column",
    )


def _modality_of(columns: Sequence[str], sample: Sequence[SampleField]) -> str:
    """Which other modality such columns are for, '' if that is not plain."""
    for name, other in registry.available().items():
        first = other.sample[0]
        if first.name != sample[0].name and first.name in columns:
            return (
                f"if the data is {first.name}: modality {name} (--modality {name}); "
                "else name the column: data.input_column"
            )
    return ""


def delimiter(columns: Sequence[str], text: str) -> str:
    """What to do about a table of one column whose name holds another delimiter."""
    found = next((mark for mark in (";", "\t", "|") if len(columns) == 1 and mark in columns[0]), None)
    return f"its columns are separated by {found!r}: write {posixpath.basename(text)} with commas" if found else ""


def fill_text(row: Row, value: object, second: object, pair: bool) -> None:
    """The text, or the two of a pair."""
    for text in (value, second) if pair else (value,):
        if not isinstance(text, str):
            row.problem = "has no text" if text is None else f"has {str(text)[:60]!r} where a text should stand"
            return
    row.content = str(value).encode("utf-8", "surrogatepass")
    row.second = str(second).encode("utf-8", "surrogatepass") if pair else None


def fill_file(row: Row, value: object) -> None:
    """The path or the bytes; also the Hugging Face form {bytes, path}."""
    if isinstance(value, dict):  # the Hugging Face form: {bytes, path}
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        row.content = value
    elif isinstance(value, str) and "\0" in value:
        row.problem = "has a path with a NUL byte"
        return
    elif isinstance(value, str) and value.strip():
        row.uri = value
    else:
        row.problem = "has neither a path nor bytes"


def fill_label(row: Row, cells: Sequence[object], spec: Data, task: TaskName) -> None:
    """The first cell that cannot be used becomes the row's problem."""
    columns = label_columns(spec)
    if task == "regression":
        row.label = tuple(_number(row, cell, column) for cell, column in zip(cells, columns, strict=True))
        return
    if task == "multi-label" and len(columns) > 1:
        on = [_SWITCHES.get(str(label_text(cell)).lower()) for cell in cells]
        for column, cell, switch in zip(columns, cells, on, strict=True):
            if switch is None:
                row.problem = f"has {cell!r} in {column!r}, not 0 or 1"
        row.label = tuple(column for column, switch in zip(columns, on, strict=True) if switch)
        return
    (cell,), (column,) = cells, columns
    if task == "multi-label":
        parts = cell if isinstance(cell, list) else None
        if parts is None and spec.label_separator is not None:
            parts = [part for part in (label_text(cell) or "").split(spec.label_separator) if part.strip()]
        if parts is None:
            parts = [cell]
        names = [label_text(part) for part in parts]
        if None in names:
            row.problem = f"has no label in {column!r}"
        row.label = tuple(sorted({name for name in names if name is not None}))
        return
    if isinstance(cell, list):
        raise DataError(
            f"{row.place} has a list of labels in {column!r}, and the task is single-label",
            mend="set task to multi-label (--task multi-label)",
        )
    text = label_text(cell)
    if text is None:
        row.problem = f"has no label in {column!r}"
    else:
        row.label = text


def _number(row: Row, cell: object, column: str) -> float:
    """A target. Words are refused at once: they are no matter of single samples."""
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        row.problem = f"has no number in {column!r}"
        return 0.0
    try:
        number = float(cell)  # type: ignore[arg-type]  # what is no number raises
    except OverflowError:
        row.problem = f"has a number beyond all bounds in {column!r}"
        return 0.0
    except (TypeError, ValueError):
        raise DataError(
            f"{row.place} has {cell!r} in {column!r}, and a regression target is a number",
            mend="name a column of numbers, or leave task regression out (--task) to learn classes",
        ) from None
    if not abs(number) <= _LARGEST:  # NaN too
        row.problem = f"has {number} in {column!r}"
        return 0.0
    return number


def fill_side(row: Row, group: object, split: object, spec: Data) -> None:
    """The group and the split, where the table has columns of them."""
    if spec.group_column:
        row.group = label_text(group)
        if row.group is None:
            row.problem = f"has no group in {spec.group_column!r}"
    if spec.split_column:
        row.split = SPLIT_NAMES.get(str(split).strip().lower())
        if row.split is None:
            row.problem = f"has {split!r} in {spec.split_column!r}, not train, validation or test"


def label_text(value: object) -> str | None:
    """A label as the class is named: text in NFC, whole numbers without a point; None where it is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, (list, dict)):
        return None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = unicodedata.normalize("NFC", str(value)).strip()
    return text or None
