"""Files beside a `metadata.csv` that names them, as the imagefolder and audiofolder of `datasets` have it -> its table.

The file lies in the folder itself, or in each folder of a split; its column `file_name` is relative to it.
"""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.data.columns import input_columns, label_columns
from orchestrator.data.layout import children
from orchestrator.data.tables import Table, TextForm, open_table
from orchestrator.job import SPLITS, Data, choose_splits, name_splits
from orchestrator.job.locations import Location

_NAMES = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")
_FILES = "file_name"


def metadata_tables(
    here: Path | Location, spec: Data, form: TextForm, wanted: Sequence[str]
) -> tuple[list[Table], list[str]] | None:
    """(the tables, notes) of a folder whose files such tables name, None where there are none. Raises `DataError`.

    Beside class folders a table without labels says something else about the files: then there are no tables, and a
    note on it.
    """
    text = str(here) if isinstance(here, Path) else here.text
    visible = [(name, is_folder) for name, is_folder in children(here) if not name.startswith(".")]
    folders = [name for name, is_folder in visible if is_folder]
    at_top = [name for name, is_folder in visible if name in _NAMES and not is_folder]
    if at_top:
        table = open_table(_join(here, at_top[0]), wanted, form)
        splits = {name: split for name, split in name_splits(folders).items() if split is not None}
        if not _names_files(table, spec):
            return None
        if not _has_labels(table, spec) and _lie_in_classes(here, folders, splits):
            return [], [_unread(at_top[:1], spec)]
        several = splits if len(set(splits.values())) > 1 else {}
        said = [f"read as the table {at_top[0]} in it" + (", not as class folders" if folders else "")]
        if several:
            said.append("read as splits, by the folders of its paths: " + _shown(several))
        return [replace(table, folders=several)], said
    splits = {name: split for name, split in name_splits(folders).items() if split is not None}
    inside = {name: children(_join(here, name)) for name in splits}
    within = {name: posixpath.join(name, file) for name in splits for file in _NAMES if (file, False) in inside[name]}
    if not within:
        return None
    tables = {name: open_table(_join(here, file), wanted, form) for name, file in within.items()}
    if not all(_names_files(table, spec) for table in tables.values()):
        return None
    has_classes = any(is_folder and not one.startswith(".") for name in within for one, is_folder in inside[name])
    if has_classes and not any(_has_labels(table, spec) for table in tables.values()):
        return [], [_unread(list(within.values()), spec)]
    chosen, notes = choose_splits({name: splits[name] for name in within}, text)
    left = [name for name in folders if name not in chosen]
    notes += [f"folders that are not read: {', '.join(left)}"] if left else []
    said = ["read as the tables " + ", ".join(within[name] for name in chosen)]
    return [replace(tables[name], split=split) for name, split in chosen.items()], said + notes


def _names_files(table: Table, spec: Data) -> bool:
    return _FILES in table.columns or any(name in table.columns for name in input_columns(spec))


def _has_labels(table: Table, spec: Data) -> bool:
    return all(column in table.columns for column in label_columns(spec))


def _lie_in_classes(here: Path | Location, folders: Sequence[str], splits: Collection[str]) -> bool:
    """Whether there are folders that may be classes, below the splits where there are any."""
    below = (one for name in splits for one in children(_join(here, name)))
    return any(is_folder and not name.startswith(".") for name, is_folder in below) if splits else bool(folders)


def _unread(files: Sequence[str], spec: Data) -> str:
    column = next(iter(label_columns(spec)), "label")
    return f"read as class folders: not read, for want of a column {column!r}: {', '.join(files)}"


def _join(here: Path | Location, uri: str) -> Path | Location:
    return here / uri if isinstance(here, Path) else here.join(uri)


def _shown(splits: dict[str, int]) -> str:
    return ", ".join(f"{name}/ ({SPLITS[split]})" for name, split in splits.items())
