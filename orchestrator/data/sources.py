"""A job's data -> its source: folders, tables and data sets opened, their rows read one after the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.data.columns import input_columns, label_columns
from orchestrator.data.folders import open_folder
from orchestrator.data.layout import children
from orchestrator.data.metadata_tables import metadata_tables
from orchestrator.data.rows import Row, Source
from orchestrator.data.table_rows import open_rows
from orchestrator.data.tables import Table, TextForm, open_table, suffix_of
from orchestrator.errors import DataError
from orchestrator.job import (
    SPLIT_KEYS,
    TABLE_SUFFIXES,
    Data,
    TaskName,
    choose_splits,
    is_dataset,
    is_materialised,
    name_splits,
    shown,
)
from orchestrator.job.locations import Location, path_or_location
from orchestrator.modality import SampleField

_ROWS = ("the data", "the validation data", "the test data")
"""What the rows of a program are called, by their split."""
_OF_TEXT = {"separator": (".csv", ".tsv"), "encoding": (".csv", ".tsv", ".jsonl", ".ndjson")}
"""Settings of tables that are text -> the suffixes of those."""
_AS_TABLE = "save it as .csv, .jsonl or .parquet, a row a sample"
_UNPACK = "unpack it, and name what was in it"
_OTHER_FILES = {
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".txt", ".json", ".yaml", ".xml", ".pkl"), _AS_TABLE),
    **dict.fromkeys((".gz", ".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"), _UNPACK),
}
"""What to do about files that hold data in another form, by their suffix."""
_SHARD = re.compile(r"-\d+-of-\d+$|[-_]\d+$")


@dataclass(frozen=True)
class _Wanted:
    """What rows are read for."""

    spec: Data
    sample: Sequence[SampleField]
    task: TaskName
    known: Sequence[str] = ()


def open_source(spec: Data, sample: Sequence[SampleField], task: TaskName, known: Sequence[str] = ()) -> Source:
    """The source of `spec.path`, with `spec.validation` and `spec.test` behind it. Reads no row yet.

    known: the classes of a finished model.
    """
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
    places = {split: place for split, key in enumerate(SPLIT_KEYS) if (place := getattr(spec, key)) is not None}
    if spec.subset is not None and not any(map(is_dataset, places.values())):
        raise DataError(
            f"data.subset is {spec.subset!r}, and {shown(spec.path)} is no data set of the Hub",
            expected="a data set of the Hub that has several subsets, org/name",
            mend="leave data.subset out",
        )
    source, wanted = Source(), _Wanted(spec, sample, task, known)
    alone = len(places) == 1
    source.ready_made = not alone
    for split, place in places.items():
        _add(source, place, wanted, split or None, None if alone or split else 0)
    suffixes = {suffix_of(origin.text) for origin in source.origins if origin.is_table}
    for setting, of in _OF_TEXT.items():
        if getattr(spec, setting) is not None and not suffixes & set(of):
            raise DataError(
                f"data.{setting} is {getattr(spec, setting)!r}, and {shown(spec.path)} is no table that has one",
                expected=f"a table that ends in {', '.join(of)}",
                mend=f"leave data.{setting} out",
            )
    return source


def columns_of(spec: Data, wanted: Sequence[str]) -> tuple[str, ...]:
    """The columns that all tables of `spec.path` have, `wanted` ones looked for; none where it is no table.

    Raises `DataError`.
    """
    tables, _ = _tables_of(spec.path, spec, wanted)
    return tuple(name for name in tables[0].columns if all(name in one.columns for one in tables)) if tables else ()


def formed_as_run(spec: Data, run: Data) -> tuple[Data, list[str]]:
    """(the data with the separator and encoding of a run's, notes on them).

    Only where it names none itself, and its tables are text that has them. A separator that does not cut the header,
    which the file's own does, is not taken. Raises `DataError`.
    """
    given = {key: value for key in _OF_TEXT if getattr(spec, key) is None and (value := getattr(run, key)) is not None}
    if not given:
        return spec, []
    tables, _ = _tables_of(spec.path, spec.model_copy(update=given), [])
    suffixes = {suffix_of(table.text) for table in tables}
    given = {key: value for key, value in given.items() if suffixes & set(_OF_TEXT[key])}
    formed = spec.model_copy(update=given)
    if "separator" in given and all(len(table.columns) == 1 for table in tables):
        by_itself = formed.model_copy(update={"separator": None})
        formed = by_itself if len(columns_of(by_itself, [])) > 1 else formed
    taken = {key: value for key in given if (value := getattr(formed, key)) is not None}
    return formed, [f"read with the run's data.{key}, {value!r}" for key, value in taken.items()]


def _add(source: Source, place: str, wanted: _Wanted, split: int | None, otherwise: int | None) -> None:
    """Put a place's rows behind those of the source: all of one `split`, or `otherwise` where they name none."""
    first = len(source.parts)
    spec = wanted.spec
    columns = (*label_columns(spec), *input_columns(spec), spec.group_column, spec.split_column)
    tables, notes = _tables_of(place, spec, [name for name in columns if name is not None])
    source.notes += notes
    if any(table.split is not None or table.folders for table in tables) or spec.split_column is not None:
        source.ready_made = True
    for table in tables:
        named = replace(table, text=_ROWS[split or 0]) if is_materialised(place) else table
        open_rows(source, named, wanted.spec, wanted.sample, wanted.task, is_place=not is_materialised(place))
    if not tables:
        _open_folder(source, place, wanted)

    def settled(part: Callable[[], Iterator[Row]]) -> Callable[[], Iterator[Row]]:
        def rows() -> Iterator[Row]:
            for row in part():
                if split is not None and row.split:
                    raise DataError(
                        f"{shown(place)} is split itself",
                        expected="the samples of one split",
                        mend="name one of its parts: a folder, or a table without a column of splits",
                    )
                row.split = split if split is not None else otherwise if row.split is None else row.split
                yield row

        return rows

    source.parts[first:] = [settled(part) for part in source.parts[first:]]


def _tables_of(place: str, spec: Data, wanted: Sequence[str]) -> tuple[list[Table], list[str]]:
    """(the tables of a place, notes); none where it is a folder of class folders. Looks for columns `wanted`."""
    if is_dataset(place):
        from orchestrator.data.hub_datasets import open_repository

        return open_repository(place, spec.subset)
    here, form = path_or_location(place), TextForm(spec.separator, spec.encoding)
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
                mend=_OTHER_FILES.get(
                    suffix_of(place), "name the folder that the file is in, or the table that names it"
                ),
            )
        return [open_table(here, wanted, form)], []
    if isinstance(here, Path):
        from orchestrator.data.hub_datasets import is_saved, open_saved

        if is_saved(here):
            return open_saved(here)
    if (described := metadata_tables(here, spec, form, wanted)) is not None:
        return described
    files = {name: here / name if isinstance(here, Path) else here.join(name) for name in _table_names(here)}
    parts = {name: _SHARD.sub("", name.split(".")[0]) for name in files}
    splits = {name: found[part] for found in [name_splits(parts.values())] for name, part in parts.items()}
    if not any(split is not None for split in splits.values()):
        return [open_table(file, wanted, form) for file in files.values()], []
    chosen, notes = choose_splits(splits, place)
    return [replace(open_table(files[name], wanted, form), split=split) for name, split in chosen.items()], notes


def _open_folder(source: Source, place: str, wanted: _Wanted) -> None:
    """Put the rows of a folder of class folders behind those of the source."""
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
    open_folder(source, path_or_location(place), wanted.sample[0], wanted.known)


def _kind(path: Path) -> str:
    return "directory" if path.is_dir() else "file" if path.exists() else "missing"


def _table_names(folder: Path | Location) -> list[str]:
    """The files of a table that is a folder of files, as Spark and Ray write it; [] where it is none.

    Every file must be a table of one kind, and there is no folder beside them; hidden ones do not count.
    """
    visible = [(name, is_folder) for name, is_folder in children(folder) if not name.startswith(".")]
    files = [name for name, is_folder in visible if not is_folder and not name.startswith("_")]
    if any(is_folder for _, is_folder in visible) or len({suffix_of(name) for name in files}) != 1:
        return []
    return files if suffix_of(files[0]) in TABLE_SUFFIXES else []
