"""A folder, or a table in CSV, Parquet or JSON lines -> rows: where the sample is, its label, its split."""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from orchestrator import registry
from orchestrator.errors import DataError
from orchestrator.modality import SampleField
from orchestrator.spec import Data, TaskName

SPLIT_NAMES: dict[str, int] = {
    "train": 0, "training": 0,
    "validation": 1, "valid": 1, "val": 1, "dev": 1,
    "test": 2, "testing": 2,
}  # fmt: skip
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson")
_LITTER = {"thumbs.db", "desktop.ini", "icon\r"}
_TEXT_COLUMNS = (("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("text",), ("sentence",),
                 ("content",))  # fmt: skip
_SWITCHES = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True, "no": False, "yes": True}
_BLOCK_BYTES = 32 * 2**20
"""What is parsed at once of CSV and JSON lines: no row may be longer."""
_LARGEST = 3.4e38  # of a float32
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "uri")


Label = str | tuple[str, ...] | tuple[float, ...]
"""The class; multi-label: all that the sample has; regression: the targets."""


@dataclass
class Row:
    """One labelled sample, as a source names it."""

    place: str
    """For messages: the file, or the row of the table."""
    label: Label
    uri: str = ""
    """Relative to `root`; '' where the table holds the bytes themselves."""
    root: Path = Path()
    content: bytes | None = None
    second: bytes | None = None
    """The second text of a pair."""
    group: str | None = None
    split: int | None = None
    problem: str = ""
    """Why it cannot be used."""


@dataclass
class Rows:
    """All that a source holds."""

    root: Path
    rows: list[Row]
    classes: list[str] = field(default_factory=list)
    """Named by the source itself (class folders), empty ones too."""
    ready_made: bool = False
    """Whether it came split."""
    notes: list[str] = field(default_factory=list)


def label_columns(spec: Data) -> tuple[str, ...]:
    """The names of the columns that say what is to be learnt."""
    return (spec.label_column,) if isinstance(spec.label_column, str) else spec.label_column


def read_rows(spec: Data, sample: Sequence[SampleField], task: TaskName) -> Rows:
    """The rows of `spec.path`, with those of `spec.validation` and `spec.test` behind them."""
    if task == "single-label" and len(label_columns(spec)) > 1:
        raise DataError(
            f"data.label_column names {len(label_columns(spec))} columns, and the task is single-label",
            mend="set task to multi-label or regression (--task), or name one column",
        )
    if spec.label_separator is not None and (task != "multi-label" or len(label_columns(spec)) > 1):
        raise DataError(
            "data.label_separator is for several labels in one cell",
            expected="task multi-label and one label column",
            mend="set task to multi-label (--task), or leave the separator out",
        )
    main = _read_one(spec.path, spec, sample, task)
    for row in main.rows:
        row.root = main.root
    for place, split in ((spec.validation, 1), (spec.test, 2)):
        if place is None:
            continue
        more = _read_one(place, spec, sample, task)
        if any(row.split for row in more.rows):
            raise DataError(f"{place} is split itself", expected="the samples of one split")
        for row in main.rows:
            row.split = row.split or 0
        for row in more.rows:
            row.split, row.root = split, more.root
        main.rows += more.rows
        main.classes = sorted({*main.classes, *more.classes})
        main.ready_made = True
        main.notes += more.notes
    return main


def _read_one(place: str, spec: Data, sample: Sequence[SampleField], task: TaskName) -> Rows:
    path = Path(place).expanduser()
    if path.is_dir():
        if task != "single-label":
            raise DataError(
                f"{place} is a folder, where a sample has one class, and the task is {task}",
                expected="a .csv, .parquet or .jsonl table",
                mend="write a table with the columns path and label",
            )
        for setting in ("group_column", "split_column", "input_column"):
            if getattr(spec, setting):
                raise DataError(
                    f"data.{setting} names a column, and {place} is a folder",
                    expected="a .csv, .parquet or .jsonl table with that column",
                    mend="write a table with the columns path, label and " + getattr(spec, setting),
                )
        return _read_folder(path, sample[0])
    if not path.exists():
        raise DataError(
            f"there is no {place}", expected="a folder of class folders, or a .csv, .parquet or .jsonl table"
        )
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise DataError(
            f"{place} is neither a folder nor a table",
            expected="a folder of class folders, or a file ending in " + ", ".join(TABLE_SUFFIXES),
        )
    return _read_table(path, spec, sample, task)


def _read_folder(root: Path, sample: SampleField) -> Rows:
    found = Rows(root=root.resolve(), rows=[])
    folders = _folders(root)
    splits = {folder: SPLIT_NAMES.get(folder.name.lower()) for folder in folders}
    if 0 in splits.values():
        found.ready_made = True
        ignored = [folder.name for folder, split in splits.items() if split is None]
        if ignored:
            found.notes.append(f"folders beside train/ that are no split, not read: {', '.join(ignored)}")
        tops: list[tuple[Path, int | None]] = [(f, split) for f, split in splits.items() if split is not None]
    elif folders and all(split is not None for split in splits.values()):
        raise DataError(f"{root} has no train/ folder", expected="train/ beside " + folders[0].name + "/")
    else:
        tops = [(root, None)]
    others: list[str] = []
    for top, split in tops:
        for folder in _folders(top):
            name = unicodedata.normalize("NFC", folder.name)
            found.classes.append(name)
            _walk(folder, root, name, split, sample, found.rows, others)
        for file in sorted(top.iterdir()):
            if file.is_file() and file.suffix.lower() in sample.suffixes and not file.name.startswith("."):
                uri = str(file.relative_to(root))
                found.rows.append(
                    Row(
                        str(file),
                        "",
                        uri=uri,
                        split=split,
                        problem="has no label: it lies beside the class folders",
                    )
                )
    found.classes = sorted(set(found.classes))
    if not found.rows:
        seen = f"; it holds {len(others)} other files, such as {others[0]}" if others else ""
        raise DataError(
            f"{root} holds no {sample.name} files in class folders{seen}",
            expected=f"one folder a class, with files ending in {', '.join(sample.suffixes)}",
            mend=_other_modality(others),
        )
    if others:
        found.notes.append(f"{len(others)} files that are no {sample.name}, not read: {', '.join(others[:3])}")
    return found


def _other_modality(files: Sequence[str]) -> str:
    """Which modality takes such files, '' if none does."""
    suffixes = {os.path.splitext(file)[1].lower() for file in files}
    found = [name for name, other in registry.available().items() if suffixes & set(other.sample[0].suffixes)]
    return f"say what they are: --modality {found[0]}" if found else ""


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _walk(
    folder: Path,
    root: Path,
    label: str,
    split: int | None,
    sample: SampleField,
    rows: list[Row],
    others: list[str],
) -> None:
    for directory, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in sorted(files):
            if name.startswith(".") or name.lower() in _LITTER:
                continue
            file = os.path.join(directory, name)
            if not _is_text(file):
                shown = os.fsencode(file).decode("utf-8", "backslashreplace")
                rows.append(Row(shown, "", split=split, problem="its name is not in UTF-8"))
                continue
            if os.path.splitext(name)[1].lower() in sample.suffixes:
                rows.append(Row(file, label, uri=os.path.relpath(file, root), split=split))
            else:
                others.append(os.path.relpath(file, root))


def _is_text(name: str) -> bool:
    """Whether a file's name can be written down; POSIX allows any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_table(path: Path, spec: Data, sample: Sequence[SampleField], task: TaskName) -> Rows:
    table = _load(path)
    twice = [name for name in table.column_names if table.column_names.count(name) > 1]
    if twice:
        raise DataError(f"{path} has two columns named {twice[0]!r}", mend="rename or remove one of them")
    labelled = label_columns(spec)
    wanted = [("label_column", column) for column in labelled]
    wanted += [(setting, getattr(spec, setting)) for setting in ("group_column", "split_column")]
    for setting, column in wanted:
        if column is not None and column not in table.column_names:
            raise DataError(
                f"{path} has no column {column!r} (data.{setting})",
                expected="one of " + ", ".join(table.column_names),
                mend=_delimiter(table.column_names, path),
            )
    input_columns = _find_inputs(table, spec, sample, path)
    root = (Path(spec.root).expanduser() if spec.root else path.parent).resolve()
    found = Rows(root=root, rows=[], ready_made=spec.split_column is not None)
    inputs = table.column(input_columns[0]).to_pylist()
    seconds = table.column(input_columns[1]).to_pylist() if len(input_columns) > 1 else [None] * len(inputs)
    labels = zip(*(table.column(column).to_pylist() for column in labelled), strict=True)
    groups = table.column(spec.group_column).to_pylist() if spec.group_column else [None] * len(inputs)
    splits = table.column(spec.split_column).to_pylist() if spec.split_column else [None] * len(inputs)
    if "split" in table.column_names and spec.split_column is None:
        found.notes.append("the column 'split' is not used; if it says train, validation or test: data.split_column")
    pairs = len(input_columns) > 1
    for number, (value, second, label, group, split) in enumerate(
        zip(inputs, seconds, labels, groups, splits, strict=True), 1
    ):
        row = Row(f"{path} row {number}", "")
        found.rows.append(row)
        if sample[0].kind == "text":
            _fill_text(row, value, second, pairs)
        else:
            _fill_file(row, value)
        if not row.problem:
            _fill_label(row, label, spec, task)
        if not row.problem:
            _fill_side(row, group, split, spec)
    if task == "multi-label" and len(labelled) > 1:
        found.classes = list(labelled)
    return found


def _fill_text(row: Row, value: object, second: object, pair: bool) -> None:
    for text in (value, second) if pair else (value,):
        if not isinstance(text, str):
            row.problem = "has no text" if text is None else f"has {str(text)[:60]!r} where a text should stand"
            return
    row.content = str(value).encode("utf-8", "surrogatepass")
    row.second = str(second).encode("utf-8", "surrogatepass") if pair else None


def _fill_file(row: Row, value: object) -> None:
    if isinstance(value, dict):  # the Hugging Face form: {bytes, path}
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        row.content = value
    elif isinstance(value, str) and "\0" in value:
        row.problem = "has a path with a NUL byte"
        return
    elif isinstance(value, str) and value.strip():
        row.uri = value
    else:
        row.problem = "has neither a path nor bytes"


def _fill_label(row: Row, cells: Sequence[object], spec: Data, task: TaskName) -> None:
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
            mend="set task to multi-label: --task multi-label",
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
    except (TypeError, ValueError):
        raise DataError(
            f"{row.place} has {cell!r} in {column!r}, and a regression target is a number",
            mend="name a column of numbers, or leave --task regression out to learn classes",
        ) from None
    if not abs(number) <= _LARGEST:  # NaN too
        row.problem = f"has {number} in {column!r}"
        return 0.0
    return number


def _fill_side(row: Row, group: object, split: object, spec: Data) -> None:
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


def _load(path: Path) -> Any:
    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            parse = pyarrow.csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",", newlines_in_values=True)
            with path.open("rb") as head:
                columns = pyarrow.csv.open_csv(head, parse_options=parse).schema.names
            return pyarrow.csv.read_csv(
                path,
                read_options=pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES),
                parse_options=parse,
                convert_options=pyarrow.csv.ConvertOptions(
                    # A type that is guessed holds for the first block only.
                    column_types=dict.fromkeys(columns, pa.string()),
                    null_values=[""],
                    strings_can_be_null=True,
                    quoted_strings_can_be_null=True,
                ),
            )
        if suffix == ".parquet":
            return pyarrow.parquet.read_table(path)
        return pyarrow.json.read_json(path, read_options=pyarrow.json.ReadOptions(block_size=_BLOCK_BYTES))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}",
            expected=f"a {suffix} table in UTF-8, every row with all columns",
        ) from None


def _find_inputs(table: Any, spec: Data, sample: Sequence[SampleField], path: Path) -> Sequence[str]:
    """The columns of the samples: one, or two of a pair of texts."""
    columns: list[str] = table.column_names
    given = (spec.input_column,) if isinstance(spec.input_column, str) else spec.input_column
    if given is not None and len(given) > len(sample):
        raise DataError(
            f"data.input_column names {len(given)} columns, and a sample has {len(sample)} at most",
            expected=" and ".join(field.name for field in sample),
        )
    if given is not None:
        wanted: list[tuple[str, ...]] = [tuple(given)]
    elif sample[0].kind == "text":
        wanted = [columns for columns in _TEXT_COLUMNS if len(columns) <= len(sample)]
    else:
        wanted = [(name,) for name in (sample[0].name, *_PATH_COLUMNS, "bytes")]
    for names in wanted:
        if all(name in columns for name in names):
            return names
    kind = "texts" if sample[0].kind == "text" else f"{sample[0].name} paths or bytes"
    raise DataError(
        f"{path} has no column of {kind}: it has {', '.join(columns)}",
        expected="one of " + ", ".join(" + ".join(names) for names in wanted),
        mend=_delimiter(columns, path) or _modality_of(columns, sample) or "name it: data.input_column",
    )


def _modality_of(columns: Sequence[str], sample: Sequence[SampleField]) -> str:
    """Which other modality such columns are for, '' if that is not plain."""
    for name, other in registry.available().items():
        first = other.sample[0]
        if first.name != sample[0].name and first.name in columns:
            return f"if the data is {first.name}: --modality {name}; else name the column: data.input_column"
    return ""


def _delimiter(columns: Sequence[str], path: Path) -> str:
    """What to do about a table of one column whose name holds another delimiter."""
    found = next((mark for mark in (";", "\t", "|") if len(columns) == 1 and mark in columns[0]), None)
    return f"its columns are separated by {found!r}: write {path.name} with commas" if found else ""


def inside(root: Path, uri: str, resolved: dict[str, str]) -> tuple[str | None, str]:
    """(the file below `root`, '') or (None, why not): a path may not leave the data's root, links included.

    `resolved` remembers directories, so that each is resolved once.
    """
    pure = PurePosixPath(uri.replace("\\", "/")) if "\\" in uri and not (root / uri).exists() else Path(uri)
    file = os.path.normpath(root / pure)
    directory, name = os.path.split(file)
    if directory not in resolved:
        resolved[directory] = os.path.realpath(directory)
    real = os.path.join(resolved[directory], name)
    if os.path.islink(real):
        real = os.path.realpath(real)
    if os.path.commonpath([str(root), real]) != str(root):
        return None, "leaves the data's root"
    return file, ""
