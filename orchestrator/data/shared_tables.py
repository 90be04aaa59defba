"""Checked sample tables of an object store, each kept there once for all runs; who reads one has a copy.

`.data/<key>/` of the storage is one table, a folder whose manifest says that it is whole; a machine's copy is below
its cache. A run names its table in `samples.json`. Nobody locks a store: so a table that no run names is pruned once it
is a day old, when whoever has put it there has long named it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from orchestrator.data.table_store import REFERENCE_FILE, StoredTable, TableStore, key_of, table_key, used_by
from orchestrator.errors import RefusedError
from orchestrator.job import DATA_FOLDER, SAMPLES, DirectoryStorage, HeldRun, Run, Storage, run_in
from orchestrator.job.object_storage import ObjectStorage

_YOUNG_S = 24 * 3600.0


class SharedTables:
    """The sample tables of one object store, which holds the runs."""

    def __init__(self, storage: ObjectStorage) -> None:
        self._storage = storage

    def put(self, folder: Path, run: HeldRun) -> Path:
        """Keep the table that was written into `folder`, for that run of the storage; where this machine has it.

        `folder` is gone afterwards. Cut off at any point, the store holds the whole table or nothing of it, and the run
        names a table that is there, or none.
        """
        key = table_key(folder)
        path = self._storage.share(folder, f"{DATA_FOLDER}/{key}")
        self.refer(key, run)
        return path

    def refer(self, key: str, run: HeldRun) -> None:
        """Let that run of the storage use a table that is there."""
        run.write(REFERENCE_FILE, json.dumps({"table": key}) + "\n")

    def find(self, key: str) -> Path | None:
        """This machine's copy of a table, fetched if need be; None where the store has none.

        Raises `RefusedError` (`damaged`) where it is not as it was put there.
        """
        try:
            return self._storage.copy_of(f"{DATA_FOLDER}/{key}")
        except RefusedError as error:
            if error.reason == "not_found":
                return None
            raise

    def in_use(self) -> dict[str, list[str]]:
        """{key of a table: names of the runs that use it}. Raises `RefusedError` where a run does not tell."""
        names = [*self._storage.children(), *self._storage.hidden()]
        return used_by(run_in(self._storage, name) for name in names)

    def prune(self, dry_run: bool = False) -> list[StoredTable]:
        """Remove the tables that no run uses and that are a day old; which these were. `dry_run`: only tell.

        So old left-overs go too, of tables that were replaced or whose upload was cut off.
        """
        in_use, removed = self.in_use(), []
        for name in self._storage.commits(DATA_FOLDER):
            key, written = name.rpartition("/")[2], max(self._storage.times(name).values(), default=0.0)
            manifest = self._storage.find(name)
            if key in in_use or manifest is None or time.time() - written < _YOUNG_S:
                continue
            removed.append(StoredTable(key, sum(file.size for file in manifest.files.values())))
            if not dry_run:
                self._storage.drop_shared(name)
        if not dry_run:
            self._storage.collect_shared(DATA_FOLDER, _YOUNG_S)
        return removed


def tables_in(storage: Storage) -> TableStore | SharedTables:
    """The sample tables of a storage."""
    return TableStore(storage.path) if isinstance(storage, DirectoryStorage) else SharedTables(_as_store(storage))


def table_of(run: Run | HeldRun) -> Path | None:
    """The folder of this machine with the table that a run uses; None where there is none, or it is gone.

    A run of an earlier version has its own. Raises `RefusedError` where its file cannot be understood, or where the
    table of a run in an object store is damaged.
    """
    key = key_of(run)
    if key is not None:
        return tables_in(run.storage).find(key)
    own = run.folder / SAMPLES
    return own if own.is_dir() else None


def _as_store(storage: Storage) -> ObjectStorage:
    assert isinstance(storage, ObjectStorage)
    return storage
