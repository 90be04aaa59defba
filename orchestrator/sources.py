"""A folder, or a table in CSV, Parquet or JSON lines -> rows: where the sample is, its label, its split."""

from __future__ import annotations

import math
import os
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from orchestrator.errors import DataError
from orchestrator.modality import SampleField
from orchestrator.spec import Data

SPLIT_NAMES: dict[str, int] = {
    "train": 0, "training": 0,
    "validation": 1, "valid": 1, "val": 1, "dev": 1,
    "test": 2, "testing": 2,
}  # fmt: skip
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson")
_LITTER = {"thumbs.db", "desktop.ini", "icon\r"}
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "uri")


@dataclass
class Row:
    """One labelled sample, as a source names it."""

    place: str
    """For messages: the file, or the row of the table."""
    label: str
    uri: str = ""
    """Relative to `root`; '' where the table holds the bytes themselves."""
    root: Path = Path()
    content: bytes | None = None
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


def read_rows(spec: Data, sample: SampleField) -> Rows:
    """The rows of `spec.path`, with those of `spec.validation` and `spec.test` behind them."""
    main = _read_one(spec.path, spec, sample)
    for row in main.rows:
        row.root = main.root
    for place, split in ((spec.validation, 1), (spec.test, 2)):
        if place is None:
            continue
        more = _read_one(place, spec, sample)
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


def _read_one(place: str, spec: Data, sample: SampleField) -> Rows:
    path = Path(place).expanduser()
    if path.is_dir():
        if sample.kind != "file":
            raise DataError(
                f"{place} is a folder, and {sample.name} stands in tables",
                expected="a .csv, .parquet or .jsonl",
            )
        for setting in ("group_column", "split_column", "input_column"):
            if getattr(spec, setting):
                raise DataError(
                    f"data.{setting} names a column, and {place} is a folder",
                    expected="a .csv, .parquet or .jsonl table with that column",
                    mend="write a table with the columns path, label and " + getattr(spec, setting),
                )
        return _read_folder(path, sample)
    if not path.exists():
        raise DataError(
            f"there is no {place}", expected="a folder of class folders, or a .csv, .parquet or .jsonl table"
        )
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise DataError(
            f"{place} is neither a folder nor a table",
            expected="a folder of class folders, or a file ending in " + ", ".join(TABLE_SUFFIXES),
        )
    return _read_table(path, spec, sample)


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
        )
    if others:
        found.notes.append(f"{len(others)} files that are no {sample.name}, not read: {', '.join(others[:3])}")
    return found


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


def _read_table(path: Path, spec: Data, sample: SampleField) -> Rows:
    table = _load(path, spec)
    twice = [name for name in table.column_names if table.column_names.count(name) > 1]
    if twice:
        raise DataError(f"{path} has two columns named {twice[0]!r}", mend="rename or remove one of them")
    wanted = {
        "label_column": spec.label_column,
        "group_column": spec.group_column,
        "split_column": spec.split_column,
    }
    for setting, column in wanted.items():
        if column is not None and column not in table.column_names:
            raise DataError(
                f"{path} has no column {column!r} (data.{setting})",
                expected="one of " + ", ".join(table.column_names),
            )
    input_column = _find_input(table, spec, sample, path)
    root = (Path(spec.root).expanduser() if spec.root else path.parent).resolve()
    found = Rows(root=root, rows=[], ready_made=spec.split_column is not None)
    inputs = table.column(input_column).to_pylist()
    labels = table.column(spec.label_column).to_pylist()
    groups = table.column(spec.group_column).to_pylist() if spec.group_column else [None] * len(inputs)
    splits = table.column(spec.split_column).to_pylist() if spec.split_column else [None] * len(inputs)
    if "split" in table.column_names and spec.split_column is None:
        found.notes.append("the column 'split' is not used; if it says train, validation or test: data.split_column")
    for number, (value, label, group, split) in enumerate(zip(inputs, labels, groups, splits, strict=True), 1):
        row = Row(f"{path} row {number}", "")
        found.rows.append(row)
        _fill(row, value, label, group, split, spec)
    return found


def _fill(row: Row, value: object, label: object, group: object, split: object, spec: Data) -> None:
    """Put a table's cells into a row; the first that cannot be used becomes its problem."""
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
        return
    text = label_text(label)
    if text is None:
        row.problem = f"has no label in {spec.label_column!r}"
        return
    row.label = text
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


def _load(path: Path, spec: Data) -> Any:
    names = [spec.label_column, spec.group_column, spec.split_column, spec.input_column, *_PATH_COLUMNS]
    as_text = {name: pa.string() for name in names if name}
    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            return pyarrow.csv.read_csv(
                path,
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter="\t" if suffix == ".tsv" else ",", newlines_in_values=True
                ),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=as_text,
                    null_values=[""],
                    strings_can_be_null=True,
                    quoted_strings_can_be_null=True,
                ),
            )
        if suffix == ".parquet":
            return pyarrow.parquet.read_table(path)
        return pyarrow.json.read_json(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}",
            expected=f"a {suffix} table in UTF-8, every row with all columns",
        ) from None


def _find_input(table: Any, spec: Data, sample: SampleField, path: Path) -> str:
    columns: list[str] = table.column_names
    wanted = (spec.input_column,) if spec.input_column else (sample.name, *_PATH_COLUMNS, "bytes")
    for name in wanted:
        if name in columns:
            return name
    raise DataError(
        f"{path} has no column of {sample.name} paths or bytes: it has {', '.join(columns)}",
        expected="one of " + ", ".join(str(name) for name in wanted),
        mend="name it: data.input_column",
    )


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
