"""A table's cells -> rows, and what is wrong with each."""

from __future__ import annotations

import math
import posixpath
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator.data.arrow_cells import ClassName
from orchestrator.data.columns import find_inputs, label_columns, require_columns
from orchestrator.data.rows import TRIMMED, Origin, Row, Source, is_unicode
from orchestrator.data.spellings import meaning
from orchestrator.data.tables import Table
from orchestrator.errors import DataError, marked
from orchestrator.job import Data, TaskName, split_of
from orchestrator.job.locations import Location, path_or_location
from orchestrator.modality import SampleField

_SWITCHES = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True, "no": False, "yes": True}
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+")
_LARGEST = 3.4e38  # of a float32

_Cells = tuple[object, object, Sequence[object], object, object]
"""Of one row: input, second input, labels, group, split."""


def open_rows(
    source: Source, table: Table, spec: Data, sample: Sequence[SampleField], task: TaskName, is_place: bool
) -> None:
    """Put the table's rows behind those of the source. Reads none yet.

    Raises `DataError` where it lacks a column that the job names, or one that samples stand in.
    """
    require_columns(table, spec)
    inputs, labelled = find_inputs(table, spec, sample), label_columns(spec)
    _refuse_label_as_input(table, inputs, labelled)
    root, given_root = _root_of(table, spec, is_place)
    is_nowhere = given_root is not None and isinstance(root, Path) and not root.is_dir()
    number = source.add(Origin(table.text, root, is_table=True, is_place=is_place))
    origin = source.origins[number]
    note = "the column 'split' is not used; if it says train, validation or test: data.split_column"
    if "split" in table.columns and spec.split_column is None and note not in source.notes:
        source.notes.append(note)
    if task == "multi-label" and len(labelled) > 1:
        source.classes |= set(labelled)

    def rows() -> Iterator[Row]:
        num_trimmed = 0
        for at, (value, second, label, group, split) in enumerate(_cells(table, inputs, spec), 1):
            row = Row(origin.row(at), "", number, at, split=table.split)
            if sample[0].kind == "text":
                fill_text(row, value, second, len(inputs) > 1)
            else:
                fill_file(row, value)
            if row.uri and table.folders:
                row.split = table.folders.get(posixpath.normpath(row.uri).split("/")[0])
                row.problem = "" if row.split is not None else f"lies in none of {', '.join(table.folders)}"
            if row.uri and is_nowhere:
                raise DataError(
                    f"there is no folder {given_root} (data.root)",
                    expected="the folder that paths are relative to",
                    mend="correct it, or leave it out: then paths are relative to the table's folder",
                )
            num_trimmed += task != "regression" and any(map(_is_trimmed, label))
            if not row.problem:
                _fill_label(row, label, spec, task, table.is_text)
            if not row.problem:
                _fill_group_and_split(row, group, split, spec)
            yield row
        source.notes += [f"{table.text}: {one}" for one in table.notes]
        if num_trimmed:
            what = "label is" if num_trimmed == 1 else "labels are"
            source.notes.append(f"{table.text}: {num_trimmed:,} {what} {TRIMMED}")

    source.parts.append(rows)


def _refuse_label_as_input(table: Table, inputs: Sequence[str], labelled: Sequence[str]) -> None:
    both = [name for name in inputs if name in labelled]
    if both:
        others = [name for name in table.columns if name not in both]
        raise DataError(
            f"{table.text}: the column {both[0]!r} is both the input and the label (data.input_column, "
            "data.label_column), so that there is nothing to learn",
            expected="two columns" + (f", out of {', '.join(map(marked, table.columns))}" if others else ""),
            mend="name another column in one of them" if others else "add a column of labels",
        )


def _root_of(table: Table, spec: Data, is_place: bool) -> tuple[Path | Location, str | None]:
    """(what paths in the table's cells are relative to, that as the job gives it)."""
    given = spec.root if spec.root is not None or is_place else spec.rows_root
    root = table.root if given is None else path_or_location(given)
    return root.resolve() if isinstance(root, Path) else root, given


def _cells(table: Table, inputs: Sequence[str], spec: Data) -> Iterator[_Cells]:
    """The cells of each row; None where there is no such column."""
    labelled = label_columns(spec)
    extra = [column for column in (spec.group_column, spec.split_column) if column is not None]
    for batch in table.batches([*inputs, *labelled, *extra]):
        nothing = [None] * len(batch[inputs[0]])
        yield from zip(
            batch[inputs[0]],
            batch[inputs[1]] if len(inputs) > 1 else nothing,
            zip(*(batch[column] for column in labelled), strict=True),
            batch[spec.group_column] if spec.group_column else nothing,
            batch[spec.split_column] if spec.split_column else nothing,
            strict=True,
        )


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
    elif isinstance(value, str) and not is_unicode(value):
        row.problem = "has a path that is no Unicode"
    elif isinstance(value, str) and value.strip():
        row.uri = value
    else:
        row.problem = "has neither a path nor bytes"


def _fill_label(row: Row, cells: Sequence[object], spec: Data, task: TaskName, is_text: bool) -> None:
    """The first cell that cannot be used becomes the row's problem; multi-label: an empty cell of CSV is no label."""
    columns = label_columns(spec)
    if task == "regression":
        row.label = tuple(_number(row, cell, column) for cell, column in zip(cells, columns, strict=True))
        return
    if task == "multi-label" and len(columns) > 1:
        on = [_switch(cell) for cell in cells]
        for column, cell, switch in zip(columns, cells, on, strict=True):
            if switch is None:
                row.problem = f"has {cell!r} in {column!r}, not 0 or 1"
        row.label = tuple(column for column, switch in zip(columns, on, strict=True) if switch)
        return
    (cell,), (column,) = cells, columns
    if task == "multi-label":
        parts = cell if isinstance(cell, list) else [] if is_text and _label_text(cell) is None else None
        if parts is None and spec.label_separator is not None:
            parts = [part for part in (_label_text(cell) or "").split(spec.label_separator) if part.strip()]
        if parts is None:
            parts = [cell]
        names = [_label_text(part) for part in parts]
        if None in names:
            row.problem = f"has {'an empty label among others' if any(names) else 'no label'} in {column!r}"
        row.label = tuple(sorted({name for name in names if name is not None}))
        return
    if isinstance(cell, list):
        raise DataError(
            f"{row.place} has a list of labels in {column!r}, and the task is single-label",
            mend="set task to multi-label (--task multi-label)",
        )
    text = _label_text(cell)
    if text is None:
        row.problem = f"has no label in {column!r}"
    else:
        row.label = text


def _is_trimmed(cell: object) -> bool:
    return isinstance(cell, str) and cell.strip() not in ("", cell)


def _switch(cell: object) -> bool | None:
    """Whether a label's own column says that the sample has it; of a class by its name, else by its number."""
    said = _SWITCHES.get(str(_label_text(cell)).lower())
    return _SWITCHES.get(str(cell.number)) if said is None and isinstance(cell, ClassName) else said


def _number(row: Row, cell: object, column: str) -> float:
    """A target. Words are refused at once: they are no matter of single samples."""
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        row.problem = f"has no number in {column!r}"
        return 0.0
    try:
        number = _as_number(cell)
    except OverflowError:
        row.problem = f"has a number beyond all bounds in {column!r}"
        return 0.0
    except (TypeError, ValueError):
        raise DataError(
            f"{row.place} has {cell!r} in {column!r}, and a regression target is a number",
            mend="write it with a point"
            if isinstance(cell, str) and _DECIMAL_COMMA.fullmatch(cell.strip())
            else "name a column of numbers, or leave task regression out (--task) to learn classes",
        ) from None
    if not abs(number) <= _LARGEST:  # NaN too
        row.problem = f"has {number} in {column!r}"
        return 0.0
    return number


def _as_number(cell: object) -> float:
    """The number; a truth value as 0 or 1, in words too; of a class its number in the table.

    Raises `TypeError`, `ValueError`, `OverflowError`.
    """
    if isinstance(cell, ClassName):
        return float(cell.number)
    if isinstance(cell, str) and cell.strip().lower() in ("true", "false"):
        return float(cell.strip().lower() == "true")
    if isinstance(cell, str) and "_" in cell:  # Python takes 1_000 for 1000
        raise ValueError
    return float(cell)  # type: ignore[arg-type]  # what is no number raises


def _fill_group_and_split(row: Row, group: object, split: object, spec: Data) -> None:
    """The group and the split, where the table has columns of them."""
    if spec.group_column:
        name = _label_text(group)
        row.group = None if name is None else meaning(name)
        if name is None:
            row.problem = f"has no group in {spec.group_column!r}"
    if spec.split_column:
        row.split = split_of(str(split))
        if row.split is None:
            row.problem = f"has {split!r} in {spec.split_column!r}, not train, validation or test (data.split_column)"


def _label_text(value: object) -> str | None:
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
