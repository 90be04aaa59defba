"""Which of a table's columns samples and labels stand in: those that the job names, else the usual names."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.data.tables import Table
from orchestrator.errors import DataError, did_you_mean, marked
from orchestrator.job import Data
from orchestrator.modality import SampleField, registry

_TEXT_COLUMNS = (("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("text",), ("sentence",),
                 ("content",))  # fmt: skip
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "uri")


def label_columns(spec: Data) -> tuple[str, ...]:
    """The names of the columns that say what is to be learnt."""
    return (spec.label_column,) if isinstance(spec.label_column, str) else spec.label_column


def input_columns(spec: Data) -> tuple[str, ...]:
    """The names of the columns that samples stand in, where the user gave them."""
    return (spec.input_column,) if isinstance(spec.input_column, str) else spec.input_column or ()


def require_columns(table: Table, spec: Data) -> None:
    """Raise `DataError` where the table lacks a column of labels, groups or splits that the job names."""
    settings = [("label_column", column) for column in label_columns(spec)]
    settings += [(setting, getattr(spec, setting)) for setting in ("group_column", "split_column")]
    for setting, column in settings:
        if column is not None:
            _require_column(table, column, setting)


def _require_column(table: Table, column: str, setting: str) -> None:
    if column not in table.columns:
        raise DataError(
            f"{table.text} has no column {column!r} (data.{setting})",
            expected="one of " + ", ".join(map(marked, table.columns)),
            mend=_delimiter_hint(table)
            or _header_hint(table)
            or did_you_mean(column, table.columns)
            or f"correct data.{setting}",
        )


def find_inputs(table: Table, spec: Data, sample: Sequence[SampleField]) -> Sequence[str]:
    """The columns that samples stand in: one, or two of a pair of texts. Raises `DataError` where there are none."""
    given = input_columns(spec)
    if len(given) > len(sample):
        raise DataError(
            f"data.input_column names {len(given)} columns, and a sample has {len(sample)} at most",
            expected=" and ".join(field.name for field in sample),
            mend=f"name {len(sample)} columns at most",
        )
    if given:
        wanted: list[tuple[str, ...]] = [given]
    elif sample[0].kind == "text":
        wanted = [names for names in _TEXT_COLUMNS if len(names) <= len(sample)]
    else:
        wanted = [(name,) for name in (sample[0].name, *_PATH_COLUMNS, "bytes")]
    for name in given:
        _require_column(table, name, "input_column")
    for names in wanted:
        if all(name in table.columns for name in names):
            return names
    kind = "texts" if sample[0].kind == "text" else f"{sample[0].name} paths or bytes"
    raise DataError(
        f"{table.text} has no column of {kind}: it has {', '.join(map(marked, table.columns))}",
        expected="one of " + ", ".join(" + ".join(names) for names in wanted),
        mend=_delimiter_hint(table) or _modality_hint(table.columns, sample) or "name it: data.input_column",
    )


def _modality_hint(columns: Sequence[str], sample: Sequence[SampleField]) -> str:
    """Which other modality such columns are for, '' if that is not plain."""
    for name, other in registry.available().items():
        first = other.sample[0]
        if first.name != sample[0].name and first.name in columns:
            return (
                f"if the data is {first.name}: modality {name} (--modality {name}); "
                "else name the column: data.input_column"
            )
    return ""


def _header_hint(table: Table) -> str:
    """What to do about a CSV whose first line seems to be a sample, as a cell of it is met again below it; else ''."""
    try:
        first = next(iter(table.batches(table.columns)), {}) if table.is_text and len(table.columns) > 1 else {}
    except DataError:  # that is for later
        return ""
    if not any(name in first.get(name, ()) for name in table.columns):
        return ""
    return "its first line looks like a sample: write a line with the names of the columns above it, such as text,label"


def _delimiter_hint(table: Table) -> str:
    """What to do about a table whose columns' names hold another delimiter, '' of others."""
    mark = next((mark for mark in (";", "\t", "|", ",") if any(mark in name for name in table.columns)), None)
    if mark is None and table.is_text and len(table.columns) == 1:
        mark = next((mark for mark in table.columns[0] if not mark.isalnum() and mark not in "_-. "), None)
    return f"if {mark!r} separates its columns: data.separator {mark!r} (--separator {mark!r})" if mark else ""
