"""Files on the disk of this machine: written whole, settled, compared."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

POINTER = b"version https://git-lfs.github.com/spec/"
"""How the small file begins that Git LFS puts in the place of a large one."""
PARTIAL = ".partial"
"""What the names end with of what is being written; they begin with a dot."""


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; once this returns, it is on the disk under its name."""
    partial = beside(path)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync(path.parent)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write in, which is at its place, with its folder, when the context ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = beside(path)
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def beside(path: Path) -> Path:
    """A new name in the same folder, that nobody takes for what has its place there."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")


def remove_old(folder: Path, pattern: str, older_s: float) -> list[Path]:
    """Remove the files and folders of that name below a folder in which nothing was written for so long; which."""
    removed = []
    for path in sorted(folder.rglob(pattern)):
        with contextlib.suppress(OSError):  # gone already, or another user's: it harms nobody
            newest = max(one.lstat().st_mtime for one in (path, *path.rglob("*")))
            if time.time() - newest >= older_s:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed.append(path)
    return removed


def sync(path: Path) -> None:
    """Return once the file, or what a folder lists, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def still_there(file: TextIO) -> bool:
    """Whether an open file is the one at its place: a lock on one that was removed meanwhile holds nobody off."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        return False


def file_sha256(file: Path) -> str:
    """SHA-256 of a local file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
