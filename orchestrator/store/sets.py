"""The sets of a feature store: the key of each, and the locks of the jobs of one machine that use, fill or prune it.

On a file system without locks (flock) each counts as had.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from orchestrator.job import beside, still_there, write_file
from orchestrator.store.shards import FeatureSet

FOLDER = ".features"
"""Of a storage directory."""
CONTENTS = "contents"
KEY_FILE = "key.json"
FORMAT_FILE = "format.json"
"""Of a cache group: which number format was decided on, for all later jobs."""
USED = "used"
"""Of a set in an object store: written anew by each job that uses it."""
USED_HERE = ".used"
"""The same of a set on a storage directory."""
_VERSION = 1
"""Of what features are: raised when this package computes them otherwise than before."""
_IN_USE, _FILLED = ".lock", ".filling"


def cache_group_folder(root: Path, name: str, key: Mapping[str, Any]) -> Path:
    """The folder of all that has this key; made, with the key in it, if need be."""
    text = json.dumps({"version": _VERSION, **key}, sort_keys=True, indent=1, ensure_ascii=False)
    folder = root / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if not (folder / KEY_FILE).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / KEY_FILE, text.encode())
    return folder


@contextlib.contextmanager
def opened(features: FeatureSet, key: Mapping[str, Any]) -> Iterator[FeatureSet]:
    """A set of the cache group with that key, made if need be; nobody prunes it meanwhile."""
    cache_group = features.folder.parent
    with in_use(features.folder):
        touch(features.folder)
        cache_group_folder(cache_group.parent, cache_group.name.rpartition("-")[0], key)  # pruned just before, perhaps
        yield features


def touch(folder: Path) -> None:
    """Note that a set was used now: what was not used for longest is pruned first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / USED_HERE).touch()


# --- small files that several jobs write ---


def write_first(file: Path, text: str) -> None:
    """Write a file whole, unless it is there already: of several that write at the same moment one is the first."""
    partial = beside(file)
    try:
        partial.write_text(text, encoding="utf-8")
        try:
            os.link(partial, file)
        except FileExistsError:
            return
        except OSError:  # a file system without links
            if not file.exists():
                os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


# --- locks ---


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """While a job writes or reads the set, which is made if need be: nobody prunes it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = (folder / _IN_USE).open("a+")  # NFS locks what may be read
        except FileNotFoundError:  # pruned just now
            continue
        with file:
            _lock(file, fcntl.LOCK_SH)
            if still_there(file):
                yield
                return


@contextlib.contextmanager
def pruning(folder: Path) -> Iterator[bool]:
    """Whether the set is there and nobody uses it; meanwhile nobody begins to."""
    try:
        file = (folder / _IN_USE).open("a+")
    except FileNotFoundError:
        yield False
        return
    with file:
        yield _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def filling(folder: Path) -> Iterator[bool]:
    """While a job computes features: whether it is the only one that does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _FILLED).open("a") as file:
        yield _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock(file: TextIO, how: int) -> bool:
    """Whether the lock was got."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
