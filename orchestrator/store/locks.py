"""Locks of a set of features, for the jobs of one machine: who uses it, who prunes it, who fills it.

A file system without locks gives all of them.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from orchestrator.job import still_there

_USED, _FILLED = ".lock", ".filling"
FILES = (_USED, _FILLED)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """While a job writes or reads the set, which is made if need be: nobody prunes it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = (folder / _USED).open("a+")  # NFS locks what may be read
        except FileNotFoundError:  # pruned just now
            continue
        with file:
            _lock(file, fcntl.LOCK_SH)
            if still_there(file):
                yield
                return


@contextlib.contextmanager
def pruning(folder: Path) -> Iterator[bool]:
    """Whether the set is there and nobody holds it; meanwhile nobody begins to."""
    try:
        file = (folder / _USED).open("a+")
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
