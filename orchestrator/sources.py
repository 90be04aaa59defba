"""A folder, a table or a data set -> rows, one after the other: where the sample is, its label, its split."""

from __future__ import annotations

import math
import os
import posixpath
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from orchestrator import registry
from orchestrator.errors import DataError
from orchestrator.locations import Location, locate
from orchestrator.modality import SampleField
from orchestrator.places import SPLIT_NAMES, TABLE_SUFFIXES, is_dataset, is_uri
from orchestrator.spec import Data, TaskName
from orchestrator.tables import Table, open_table, suffix_of

_LITTER = {"thumbs.db", "desktop.ini", "icon\r"}
_TEXT_COLUMNS = (("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("text",), ("sentence",),
                 ("content",))  # fmt: skip
_SWITCHES = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True, "no": False, "yes": True}
_LARGEST = 3.4e38  # of a float32
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "uri")


Label = str | tuple[str, ...] | tuple[float, ...]
"""The class; multi-label: all that the sample has; regression: the targets."""


@dataclass(frozen=True)
class Origin:
    """What rows come from: one folder, or one table."""

    text: str
    """As messages call it."""
    root: Path | Location
    """What its rows' URIs are relative to."""
    is_table: bool
    listed: bool = False
    """Whether its files were listed, so that they are there and their sizes are known."""


@dataclass(slots=True)
class Row:
    """One labelled sample, as a source names it."""

    place: str
    """For messages: the file, or the row of the table."""
    label: Label
    origin: int = 0
    """Which of the source's origins it comes from."""
    number: int = 0
    """Of the row in its table, from 1; of a file 0."""
    uri: str = ""
    """Relative to the origin's root; '' where the table holds the bytes themselves."""
    content: bytes | None = None
    second: bytes | None = None
    """The second text of a pair."""
    group: str | None = None
    split: int | None = None
    problem: str = ""
    """Why it cannot be used."""
    stat: tuple[int, int] | None = None
    """(bytes, time of modification in ns), where a listing told."""


@dataclass
class Source:
    """All that a job's data holds. What is noted is whole once `rows` has ended."""

    origins: list[Origin] = field(default_factory=list)
    classes: set[str] = field(default_factory=set)
    """Named by the source itself (class folders, columns), empty ones too."""
    ready_made: bool = False
    """Whether it came split."""
    notes: list[str] = field(default_factory=list)
    parts: list[Callable[[], Iterator[Row]]] = field(default_factory=list)

    def rows(self) -> Iterator[Row]:
        """Every row, in the order of the source."""
        for part in self.parts:
            yield from part()

    def add(self, origin: Origin) -> int:
        """The number of a new origin."""
        self.origins.append(origin)
        return len(self.origins) - 1


@dataclass(frozen=True)
class _Wanted:
    """What rows are read for."""

    spec: Data
    sample: Sequence[SampleField]
    task: TaskName


def label_columns(spec: Data) -> tuple[str, ...]:
    """The names of the columns that say what is to be learnt."""
    return (spec.label_column,) if isinstance(spec.label_column, str) else spec.label_column


def open_source(spec: Data, sample: Sequence[SampleField], task: TaskName) -> Source:
    """The source of `spec.path`, with `spec.validation` and `spec.test` behind it. Reads no row yet."""
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
    source, wanted = Source(), _Wanted(spec, sample, task)
    more = [(place, split) for place, split in ((spec.validation, 1), (spec.test, 2)) if place is not None]
    if more:
        source.ready_made = True
    _add(source, spec.path, wanted, None, 0 if more else None)
    for place, split in more:
        _add(source, place, wanted, split, None)
    return source


def _add(source: Source, place: str, wanted: _Wanted, split: int | None, otherwise: int | None) -> None:
    """Put a place's rows behind those of the source: all of one `split`, or `otherwise` where they name none."""
    first = len(source.parts)
    _open_place(source, place, wanted)

    def settled(part: Callable[[], Iterator[Row]]) -> Callable[[], Iterator[Row]]:
        def rows() -> Iterator[Row]:
            for row in part():
                if split is not None and row.split:
                    raise DataError(f"{place} is split itself", expected="the samples of one split")
                row.split = split if split is not None else otherwise if row.split is None else row.split
                yield row

        return rows

    source.parts[first:] = [settled(part) for part in source.parts[first:]]


def _open_place(source: Source, place: str, wanted: _Wanted) -> None:
    if is_dataset(place):
        from orchestrator.hub_datasets import open_repository

        tables, notes = open_repository(place, wanted.spec.subset)
        source.notes += notes
        return _open_tables(source, tables, wanted)
    here: Path | Location = locate(place) if is_uri(place) else Path(place).expanduser()
    kind = here.kind() if isinstance(here, Location) else _kind(here)
    if kind == "missing":
        raise DataError(
            f"there is no {place}", expected="a folder of class folders, or a .csv, .parquet or .jsonl table"
        )
    if kind == "file":
        if suffix_of(place) not in TABLE_SUFFIXES:
            raise DataError(
                f"{place} is neither a folder nor a table",
                expected="a folder of class folders, or a file ending in " + ", ".join(TABLE_SUFFIXES),
            )
        return _open_tables(source, [open_table(here)], wanted)
    if isinstance(here, Path):
        from orchestrator.hub_datasets import is_saved, open_saved

        if is_saved(here):
            tables, notes = open_saved(here)
            source.notes += notes
            return _open_tables(source, tables, wanted)
    files = _table_files(here)
    if files:
        return _open_tables(source, [open_table(file) for file in files], wanted)
    if wanted.task != "single-label":
        raise DataError(
            f"{place} is a folder, where a sample has one class, and the task is {wanted.task}",
            expected="a .csv, .parquet or .jsonl table",
            mend="write a table with the columns path and label",
        )
    for setting in ("group_column", "split_column", "input_column"):
        if getattr(wanted.spec, setting):
            raise DataError(
                f"data.{setting} names a column, and {place} is a folder",
                expected="a .csv, .parquet or .jsonl table with that column",
                mend="write a table with the columns path, label and " + str(getattr(wanted.spec, setting)),
            )
    _open_folder(source, here, wanted.sample[0])
    return None


def _kind(path: Path) -> str:
    return "directory" if path.is_dir() else "file" if path.exists() else "missing"


def _table_files(folder: Path | Location) -> list[Path | Location]:
    """The parts of a table that is a folder of files, as Spark and Ray write it; [] where it is none.

    Every file must be a table of one kind, and there is no folder beside them.
    """
    names = _children(folder)
    files = [name for name, is_folder in names if not is_folder and not name.startswith((".", "_"))]
    if any(is_folder for _, is_folder in names) or len({suffix_of(name) for name in files}) != 1:
        return []
    if suffix_of(files[0]) not in TABLE_SUFFIXES:
        return []
    return [folder / name if isinstance(folder, Path) else folder.join(name) for name in files]


def _children(folder: Path | Location) -> list[tuple[str, bool]]:
    if isinstance(folder, Location):
        return folder.children()
    return sorted((child.name, child.is_dir()) for child in folder.iterdir())


# --- folders ---


def _open_folder(source: Source, root: Path | Location, sample: SampleField) -> None:
    text = str(root) if isinstance(root, Path) else root.text
    resolved = root.resolve() if isinstance(root, Path) else root
    origin = source.add(Origin(text, resolved, is_table=False, listed=isinstance(root, Location)))
    folders = [name for name, is_folder in _children(root) if is_folder and not name.startswith(".")]
    splits = {name: SPLIT_NAMES.get(name.lower()) for name in folders}
    if 0 in splits.values():
        source.ready_made = True
        ignored = [name for name, split in splits.items() if split is None]
        if ignored:
            source.notes.append(f"folders beside train/ that are no split, not read: {', '.join(ignored)}")
        tops: list[tuple[str, int | None]] = [(name, split) for name, split in splits.items() if split is not None]
    elif folders and all(split is not None for split in splits.values()):
        raise DataError(f"{text} has no train/ folder", expected="train/ beside " + folders[0] + "/")
    else:
        tops = [("", None)]

    def rows() -> Iterator[Row]:
        others = _Others()
        num = 0
        for top, split in tops:
            for row in _walk_top(source, root, top, sample, others):
                row.origin, row.split = origin, split
                num += 1
                yield row
        if not num:
            seen = f"; it holds {others.num} other files, such as {others.first[0]}" if others.num else ""
            raise DataError(
                f"{text} holds no {sample.name} files in class folders{seen}",
                expected=f"one folder a class, with files ending in {', '.join(sample.suffixes)}",
                mend=_other_modality(others.suffixes),
            )
        if others.num:
            source.notes.append(f"{others.num} files that are no {sample.name}, not read: {', '.join(others.first)}")

    source.parts.append(rows)


@dataclass
class _Others:
    """Files of no use, counted."""

    num: int = 0
    first: list[str] = field(default_factory=list)
    suffixes: set[str] = field(default_factory=set)

    def add(self, uri: str) -> None:
        self.num += 1
        self.suffixes.add(suffix_of(uri))
        if len(self.first) < 3:
            self.first.append(uri)


def _walk_top(source: Source, root: Path | Location, top: str, sample: SampleField, others: _Others) -> Iterator[Row]:
    """The rows below one split's folder ('' where the whole is one)."""
    here = root if not top else root / top if isinstance(root, Path) else root.join(top)
    for name, is_folder in _children(here):
        uri = posixpath.join(top, name)
        if name.startswith("."):
            continue
        if is_folder:
            label = unicodedata.normalize("NFC", name)
            source.classes.add(label)
            walk = _walk(root, uri) if isinstance(root, Path) else _list(root, uri)
            for row in walk:
                if row.problem:
                    yield row
                elif suffix_of(row.uri) in sample.suffixes:
                    row.label = label
                    yield row
                elif posixpath.basename(row.uri).lower() not in _LITTER:
                    others.add(row.uri)
        elif suffix_of(name) in sample.suffixes:
            place = str(root / uri) if isinstance(root, Path) else root.join(uri).text
            yield Row(place, "", uri=uri, problem="has no label: it lies beside the class folders")


def _other_modality(suffixes: set[str]) -> str:
    """Which modality takes such files, '' if none does."""
    found = [name for name, other in registry.available().items() if suffixes & set(other.sample[0].suffixes)]
    return f"say what they are: --modality {found[0]}" if found else ""


def _walk(root: Path, folder: str) -> Iterator[Row]:
    """Every file below a folder of this machine, hidden ones left out."""
    for directory, names, files in os.walk(root / folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in sorted(files):
            if name.startswith("."):
                continue
            file = os.path.join(directory, name)
            if not _is_text(file):
                shown = os.fsencode(file).decode("utf-8", "backslashreplace")
                yield Row(shown, "", problem="its name is not in UTF-8")
                continue
            yield Row(file, "", uri=os.path.relpath(file, root))


def _list(root: Location, folder: str) -> Iterator[Row]:
    for found in root.join(folder).files():
        uri = posixpath.join(folder, found.uri)
        yield Row(root.join(uri).text, "", uri=uri, stat=(found.size, found.modified_ns))


def _is_text(name: str) -> bool:
    """Whether a file's name can be written down; POSIX allows any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- tables ---


def _open_tables(source: Source, tables: Sequence[Table], wanted: _Wanted) -> None:
    if any(table.split is not None for table in tables) or wanted.spec.split_column is not None:
        source.ready_made = True
    for table in tables:
        _open_table(source, table, wanted)


def _open_table(source: Source, table: Table, wanted: _Wanted) -> None:
    spec, text = wanted.spec, table.text
    labelled = label_columns(spec)
    given = [("label_column", column) for column in labelled]
    given += [(setting, getattr(spec, setting)) for setting in ("group_column", "split_column")]
    for setting, column in given:
        if column is not None and column not in table.columns:
            raise DataError(
                f"{text} has no column {column!r} (data.{setting})",
                expected="one of " + ", ".join(table.columns),
                mend=_delimiter(table.columns, text),
            )
    inputs = _find_inputs(table.columns, spec, wanted.sample, text)
    root: Path | Location = table.root
    if spec.root is not None:
        root = locate(spec.root) if is_uri(spec.root) else Path(spec.root).expanduser()
    root = root.resolve() if isinstance(root, Path) else root
    origin = source.add(Origin(text, root, is_table=True))
    note = "the column 'split' is not used; if it says train, validation or test: data.split_column"
    if "split" in table.columns and spec.split_column is None and note not in source.notes:
        source.notes.append(note)
    if wanted.task == "multi-label" and len(labelled) > 1:
        source.classes |= set(labelled)
    extra = [column for column in (spec.group_column, spec.split_column) if column is not None]

    def rows() -> Iterator[Row]:
        number = 0
        for batch in table.batches([*inputs, *labelled, *extra]):
            nothing = [None] * len(batch[inputs[0]])
            cells = zip(
                batch[inputs[0]],
                batch[inputs[1]] if len(inputs) > 1 else nothing,
                zip(*(batch[column] for column in labelled), strict=True),
                batch[spec.group_column] if spec.group_column else nothing,
                batch[spec.split_column] if spec.split_column else nothing,
                strict=True,
            )
            for value, second, label, group, split in cells:
                number += 1
                row = Row(f"{text} row {number}", "", origin, number, split=table.split)
                if wanted.sample[0].kind == "text":
                    _fill_text(row, value, second, len(inputs) > 1)
                else:
                    _fill_file(row, value)
                if not row.problem:
                    _fill_label(row, label, spec, wanted.task)
                if not row.problem:
                    _fill_side(row, group, split, spec)
                yield row

    source.parts.append(rows)


def _fill_text(row: Row, value: object, second: object, pair: bool) -> None:
    for text in (value, second) if pair else (value,):
        if not isinstance(text, str):
            row.problem = "has no text" if text is None else f"has {str(text)[:60]!r} where a text should stand"
            return
    row.content = str(value).encode("utf-8", "surrogatepass")
    row.second = str(second).encode("utf-8", "surrogatepass") if pair else None


def _fill_file(row: Row, value: object) -> None:
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


def _find_inputs(columns: Sequence[str], spec: Data, sample: Sequence[SampleField], text: str) -> Sequence[str]:
    """The columns of the samples: one, or two of a pair of texts."""
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
        f"{text} has no column of {kind}: it has {', '.join(columns)}",
        expected="one of " + ", ".join(" + ".join(names) for names in wanted),
        mend=_delimiter(columns, text) or _modality_of(columns, sample) or "name it: data.input_column",
    )


def _modality_of(columns: Sequence[str], sample: Sequence[SampleField]) -> str:
    """Which other modality such columns are for, '' if that is not plain."""
    for name, other in registry.available().items():
        first = other.sample[0]
        if first.name != sample[0].name and first.name in columns:
            return f"if the data is {first.name}: --modality {name}; else name the column: data.input_column"
    return ""


def _delimiter(columns: Sequence[str], text: str) -> str:
    """What to do about a table of one column whose name holds another delimiter."""
    found = next((mark for mark in (";", "\t", "|") if len(columns) == 1 and mark in columns[0]), None)
    return f"its columns are separated by {found!r}: write {posixpath.basename(text)} with commas" if found else ""


def inside(root: Path, uri: str, resolved: dict[str, str]) -> tuple[str | None, str]:
    """(the file relative to `root`, '') or (None, why not): a path may not leave the data's root, links included.

    `resolved` remembers directories, so that each is resolved once.
    """
    if is_uri(uri):
        return None, "lies in a store, outside of"
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
    return os.path.relpath(file, root), ""


def inside_store(root: Location, uri: str) -> tuple[str | None, str]:
    """`inside` of a store, where there are no links: (the URI relative to `root`, '') or (None, why not)."""
    if is_uri(uri):
        start = root.text.rstrip("/") + "/"
        if not uri.startswith(start):
            return None, "leaves the data's root"
        uri = uri[len(start) :]
    uri = posixpath.normpath(uri)
    if uri.startswith(("/", "../")) or uri in ("..", "."):
        return None, "leaves the data's root"
    return uri, ""
