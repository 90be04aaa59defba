"""Rows that a program holds, written down on the storage of its runs: from then on they are a table like any other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, cast

from orchestrator.errors import RefusedError
from orchestrator.gate.planning import materialised
from orchestrator.job import DATA_FOLDER, DirectoryStorage, Draft, Storage, holds_rows

if TYPE_CHECKING:
    from orchestrator.job.object_storage import ObjectStorage


@contextlib.contextmanager
def rows_written(draft: Draft, storage: Storage) -> Iterator[Draft]:
    """The draft with its rows on the storage. Refused, it leaves none there that no other run needs."""
    if not holds_rows(draft.tree.get("data")):
        yield draft
        return
    rows = _in_directory if isinstance(storage, DirectoryStorage) else _in_store
    with rows(draft, storage) as written:
        yield written


@contextlib.contextmanager
def _in_directory(draft: Draft, storage: Storage) -> Iterator[Draft]:
    path = cast("DirectoryStorage", storage).path
    new: list[Path] = []
    was_there = path.exists()
    try:
        yield materialised(draft, path / DATA_FOLDER, new)
    except RefusedError as error:
        for name in _no_longer_wanted(storage, [file.name for file in new], error):
            (path / DATA_FOLDER / name).unlink(missing_ok=True)
        if error.reason != "busy":
            with contextlib.suppress(OSError):  # as long as they are empty
                (path / DATA_FOLDER).rmdir()
                if not was_there:
                    path.rmdir()
        raise


@contextlib.contextmanager
def _in_store(draft: Draft, storage: Storage) -> Iterator[Draft]:
    store = cast("ObjectStorage", storage)
    new: list[str] = []
    with TemporaryDirectory(prefix="orchestrator-") as folder:
        written = materialised(draft, Path(folder) / DATA_FOLDER)
        files = list((Path(folder) / DATA_FOLDER).iterdir())
        try:
            new += [file.name for file in files if store.share_file(file, f"{DATA_FOLDER}/{file.name}")]
            places = {str(file.absolute()): store.place_of(f"{DATA_FOLDER}/{file.name}") for file in files}
            data = {key: places.get(value, value) for key, value in written.tree["data"].items()}
            yield replace(written, tree={**written.tree, "data": data})
        except RefusedError as error:
            for name in _no_longer_wanted(storage, new, error):
                store.drop_shared(f"{DATA_FOLDER}/{name}")
            raise


def _no_longer_wanted(storage: Storage, names: list[str], error: RefusedError) -> list[str]:
    """Which files of rows may go, now that the job was refused: those that no run's job names."""
    if not names or error.reason == "busy":  # another process may be at the same rows
        return []
    jobs = "".join(storage.read_text(f"{run}/job.yaml") or "" for run in storage.children())
    return [name for name in names if name not in jobs]  # YAML folds long paths at spaces; the name is a digest
