"""A job's data -> its source: folders, tables and data sets opened, their rows read one after the other."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.cells import delimiter, fill_file, fill_label, fill_side, fill_text, find_inputs, label_columns
from orchestrator.errors import DataError
from orchestrator.folders import children, open_folder
from orchestrator.locations import Location, locate
from orchestrator.modality import SampleField
from orchestrator.places import SPLIT_NAMES, TABLE_SUFFIXES, is_dataset, is_uri
from orchestrator.rows import Origin, Row, Source
from orchestrator.spec import Data, TaskName
from orchestrator.tables import Table, open_table, suffix_of

_SHARD = re.compile(r"-\d+-of-\d+$")


@dataclass(frozen=True)
class _Wanted:
    """What rows are read for."""

    spec: Data
    sample: Sequence[SampleField]
    task: TaskName


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
            f"there is no {place}",
            expected="a folder of class folders, a .csv, .parquet or .jsonl table, or a data set of the Hub (org/name)",
            mend="check the path; a store is named by its URI, such as s3://bucket/folder",
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
        return _open_tables(source, [_with_split(open_table(file)) for file in files], wanted)
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
    open_folder(source, here, wanted.sample[0])
    return None


def _kind(path: Path) -> str:
    return "directory" if path.is_dir() else "file" if path.exists() else "missing"


def _table_files(folder: Path | Location) -> list[Path | Location]:
    """The parts of a table that is a folder of files, as Spark and Ray write it; [] where it is none.

    Every file must be a table of one kind, and there is no folder beside them.
    """
    names = children(folder)
    files = [name for name, is_folder in names if not is_folder and not name.startswith((".", "_"))]
    if any(is_folder for _, is_folder in names) or len({suffix_of(name) for name in files}) != 1:
        return []
    if suffix_of(files[0]) not in TABLE_SUFFIXES:
        return []
    return [folder / name if isinstance(folder, Path) else folder.join(name) for name in files]


def _with_split(table: Table) -> Table:
    """A part of a folder of tables, of the split that its name says: train.csv, test-00000-of-00001.parquet."""
    stem = posixpath.basename(table.text).split(".")[0].lower()
    return replace(table, split=SPLIT_NAMES.get(_SHARD.sub("", stem)))


def _open_tables(source: Source, tables: Sequence[Table], wanted: _Wanted) -> None:
    if any(table.split is not None for table in tables) or wanted.spec.split_column is not None:
        source.ready_made = True
    named = [table for table in tables if table.split is not None]
    if named and not any(table.split == 0 for table in named):
        raise DataError(f"{named[0].text} is a split, and there is none for training", expected="train beside it")
    if named and len(named) < len(tables):
        others = [table.text for table in tables if table.split is None]
        source.notes.append(f"tables beside train that are no split, not read: {', '.join(others[:3])}")
    for table in named or tables:
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
                mend=delimiter(table.columns, text),
            )
    inputs = find_inputs(table.columns, spec, wanted.sample, text)
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
                    fill_text(row, value, second, len(inputs) > 1)
                else:
                    fill_file(row, value)
                if not row.problem:
                    fill_label(row, label, spec, wanted.task)
                if not row.problem:
                    fill_side(row, group, split, spec)
                yield row

    source.parts.append(rows)
