"""Checked sample tables of a storage directory, each kept once, however many runs use it.

`<storage>/.data/<key>/` is one table, of read-only files; its key is a digest of all that the table says. A run names
its table in `samples.json`, and tables that no run of the storage names can be pruned. Whoever changes the store does
it alone, under a lock; readers need none.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from orchestrator.data.samples import INDEX_FILE, ROWS_FILE
from orchestrator.errors import RefusedError, first_line
from orchestrator.job import DATA_FOLDER, HeldRun, Run, sync

REFERENCE_FILE = "samples.json"
"""Of a run: which table it uses."""
_KEY = re.compile(r"[0-9a-f]{32}")
_TEMPORARY = ".temporary"
"""What the names end with of what is coming or going."""
_VERSION = 1
"""Of what a key is of."""


@dataclass(frozen=True)
class StoredTable:
    """A table of the store."""

    key: str
    num_bytes: int


class TableStore:
    """The sample tables of one storage directory, which holds the runs."""

    def __init__(self, storage: Path) -> None:
        self._storage, self._folder = storage, storage / DATA_FOLDER

    def path_of(self, key: str) -> Path:
        """The folder of a table, for `Samples` to read, whether it is there or not."""
        return self._folder / key

    def find(self, key: str) -> Path | None:
        """The folder of a table, None where it is not there."""
        path = self.path_of(key)
        return path if path.is_dir() else None

    def put(self, folder: Path, run: HeldRun) -> Path:
        """Keep the table that was written into `folder`, for that run of the storage; where it is kept.

        One that is kept already is used instead, and one that was damaged is replaced. `folder` is gone afterwards. Cut
        off at any point, the store holds the whole table or nothing of it, and the run names a table that is there, or
        none.
        """
        key = table_key(folder)
        with self._alone():
            path = self.path_of(key)
            if not _is_whole(path):
                self._move(folder, path)
            run.write(REFERENCE_FILE, json.dumps({"table": key}) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        return path

    def refer(self, key: str, run: HeldRun) -> None:
        """Let that run of the storage use a table that is there."""
        with self._alone():
            run.write(REFERENCE_FILE, json.dumps({"table": key}) + "\n")

    def in_use(self) -> dict[str, list[str]]:
        """{key of a table: names of the runs that use it}. Raises `RefusedError` where a run does not tell."""
        return used_by(Run(path) for path in (sorted(self._storage.iterdir()) if self._storage.is_dir() else ()))

    def prune(self, dry_run: bool = False) -> list[StoredTable]:
        """Remove the tables that no run uses, and what was left of some that were cut off; which tables these were.

        Those of other users stay. `dry_run`: only tell. Raises `RefusedError` where a run does not tell what it uses;
        then nothing is removed.
        """
        if not self._folder.is_dir():
            return []
        with self._alone():
            in_use = self.in_use()
            paths = [path for path in sorted(self._folder.iterdir()) if _is_ours(path)]
            unused = [path for path in paths if _KEY.fullmatch(path.name) and path.name not in in_use]
            tables = [StoredTable(path.name, sum(file.stat().st_size for file in path.iterdir())) for path in unused]
            if dry_run:
                return tables
            # Renamed while nobody begins to use them, removed when others may go on.
            going = [path.rename(self._temporary(path.name)) for path in unused]
            going += [path for path in paths if path.name.endswith(_TEMPORARY)]
        for path in going:
            _remove(path)
        return tables

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else changes the store meanwhile; a file system without locks gives all of them."""
        while True:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                file = (self._folder / ".lock").open("a+")  # NFS locks what may be written
            except FileNotFoundError:  # the folder was empty, and was removed just now
                continue
            with file:
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
                yield
                return

    def _move(self, folder: Path, path: Path) -> None:
        """Put the table at its place at once, its bytes on the disk before."""
        if folder.stat().st_dev != self._folder.stat().st_dev:
            folder = shutil.copytree(folder, self._temporary(path.name))
        for file in (folder / ROWS_FILE, folder / INDEX_FILE):
            _make_read_only(file)
            sync(file)
        sync(folder)
        if path.exists():  # a damaged one; who reads it goes on with what it has open
            _remove(path.rename(self._temporary(path.name)))
        folder.rename(path)
        sync(self._folder)

    def _temporary(self, key: str) -> Path:
        return self._folder / f"{key}.{uuid.uuid4().hex}{_TEMPORARY}"


def table_key(folder: Path) -> str:
    """32 hex digits that stand for all that the sample table in `folder` says: two with one key answer all alike.

    That is which rows are used, in which order, with which targets, splits and sizes; their files and the roots of
    these, or their columns and contents. Contents that the table holds count by their ids in the index, so that they
    are not read once more.
    """
    digest = hashlib.sha256(f"sample table {_VERSION}".encode())
    with (folder / INDEX_FILE).open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    with pa.memory_map(str(folder / ROWS_FILE)) as source:
        reader = pa.ipc.open_file(source)
        digest.update(str(reader.schema).encode())
        names = [field.name for field in reader.schema if not pa.types.is_large_binary(field.type)]
        for number in range(reader.num_record_batches):
            digest.update(reader.get_batch(number).select(names).serialize())
    return digest.hexdigest()[:32]


def used_by(runs: Iterable[Run]) -> dict[str, list[str]]:
    """{key of a table: names of the runs that use it}. Raises `RefusedError` where a run does not tell."""
    names: dict[str, list[str]] = {}
    for run in runs:
        key = key_of(run)
        if key is not None:
            names.setdefault(key, []).append(run.name)
    return names


def key_of(run: Run | HeldRun) -> str | None:
    """The key of the table that a run names, None where it names none."""
    text = run.read(REFERENCE_FILE)
    if text is None:
        return None
    try:
        key: str = json.loads(text)["table"]
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no key of a table")
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedError(
            "damaged", f"{run.place}/{REFERENCE_FILE} cannot be understood: {first_line(error)}",
            expected='{"table": key}, as this version wrote it',
            mend="start that run over with --fresh, or remove it",
        ) from None  # fmt: skip
    return key


def _is_whole(path: Path) -> bool:
    """Whether a table is there, and says what its key is of."""
    try:
        return table_key(path) == path.name
    except (OSError, pa.ArrowException):
        return False


def _make_read_only(path: Path) -> None:
    """For those who may read it now, 0444 where all may. Its folder is not, so that `rm -r` removes the storage."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o222:  # one of another user's is so already, and may not be changed
        path.chmod(mode & ~0o222)


def _is_ours(path: Path) -> bool:
    """Whether this user may remove it."""
    return path.is_dir() and os.geteuid() in (0, path.stat().st_uid)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # somebody else removes it as well
        path.chmod(0o700)  # who owns a folder may empty it only so
    shutil.rmtree(path, ignore_errors=True)
