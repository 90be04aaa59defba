"""Files beside a `metadata.csv` that names them, as the imagefolder and audiofolder of `datasets` have it -> its table.

The file lies in the folder itself, or in each folder of a split; its column `file_name` is relative to it.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.data.columns import input_columns, label_columns
from orchestrator.data.layout import children
from orchestrator.data.locations import Location
from orchestrator.data.tables import Table, TextForm, open_table
from orchestrator.job import SPLITS, Data, choose_splits, name_splits

_NAMES = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")
_FILES = "file_name"


def metadata_tables(
    here: Path | Location, spec: Data, form: TextForm, wanted: Sequence[str]
) -> tuple[list[Table], list[str]] | None:
    """(the tables, notes) of a folder whose files such tables name, None where there are none. Raises `DataError`.

    Beside class folders a table without labels says something else about the files, and is not one.
    """
    text = str(here) if isinstance(here, Path) else here.text
    visible = [(name, is_folder) for name, is_folder in children(here) if not name.startswith(".")]
    folders = [name for name, is_folder in visible if is_folder]
    at_top = [name for name, is_folder in visible if name in _NAMES and not is_folder]
    if at_top:
        table = open_table(_join(here, at_top[0]), wanted, form)
        splits = {name: split for name, split in name_splits(folders).items() if split is not None}
        has_labels = all(column in table.columns for column in label_columns(spec))
        if not _names_files(table, spec) or (folders and not splits and not has_labels):
            return None
        several = splits if len(set(splits.values())) > 1 else {}
        said = [f"read as the table {at_top[0]} in it" + (", not as class folders" if folders else "")]
        if several:
            said.append("read as splits, by the folders of its paths: " + _shown(several))
        return [replace(table, folders=several)], said
    splits = {name: split for name, split in name_splits(folders).items() if split is not None}
    within = {name: posixpath.join(name, file) for name in splits for file in _NAMES if _has(_join(here, name), file)}
    if not within:
        return None
    tables = {name: open_table(_join(here, file), wanted, form) for name, file in within.items()}
    if not all(_names_files(table, spec) for table in tables.values()):
        return None
    chosen, notes = choose_splits({name: splits[name] for name in within}, text)
    left = [name for name in folders if name not in chosen]
    notes += [f"folders that are not read: {', '.join(left)}"] if left else []
    said = ["read as the tables " + ", ".join(within[name] for name in chosen)]
    return [replace(tables[name], split=split) for name, split in chosen.items()], said + notes


def _names_files(table: Table, spec: Data) -> bool:
    return _FILES in table.columns or any(name in table.columns for name in input_columns(spec))


def _has(folder: Path | Location, file: str) -> bool:
    return (file, False) in children(folder)


def _join(here: Path | Location, uri: str) -> Path | Location:
    return here / uri if isinstance(here, Path) else here.join(uri)


def _shown(splits: dict[str, int]) -> str:
    return ", ".join(f"{name}/ ({SPLITS[split]})" for name, split in splits.items())
