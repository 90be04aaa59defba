"""What a sample's content is known by, and what is remembered of files, so that none is read twice to find that out."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from pathlib import Path

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
"""Rows of a sample table, numbers, sizes."""
Ids = npt.NDArray[np.uint64]
"""uint64 [samples, 2]: 128 bits a sample that stand for its content; (0, 0) where it is not known."""
Marks = npt.NDArray[np.uint64]
"""uint64 [samples]: 64 bits that stand for a place, or for a file's size and time of modification; 0: not known."""

_ENTRY = np.dtype([("place", "<u8"), ("mark", "<u8"), ("low", "<u8"), ("high", "<u8")])
_MOST_FILES = 16


def content_id(content: bytes, more: bytes | None = None) -> tuple[int, int]:
    """(low, high), each of 64 bits: BLAKE2b over a sample's bytes, and over the second text of a pair."""
    digest = hashlib.blake2b(content, digest_size=16, person=b"" if more is None else b"pair")
    if more is not None:
        digest.update(len(content).to_bytes(8, "little") + more)
    whole = digest.digest()
    return int.from_bytes(whole[:8], "little") or 1, int.from_bytes(whole[8:], "little")


def known(ids: Ids) -> npt.NDArray[np.bool_]:
    """bool [samples]: whose content is known."""
    found: npt.NDArray[np.bool_] = (ids[:, 0] | ids[:, 1]) != 0
    return found


class Catalog:
    """Files of earlier jobs: their place, size and time of modification -> the id of their content.

    Kept as files that are never changed, each named by its digest: what was cut or damaged counts for nothing, and
    jobs that write at the same time do not meet.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, places: Marks, marks: Marks) -> Ids:
        """The ids of those that are remembered as they are now, (0, 0) of the others."""
        found = np.zeros((len(places), 2), np.uint64)
        for file in self._files():
            entries = _read(file)
            if entries is None or not len(entries):
                continue
            at = np.searchsorted(entries["place"], places).clip(max=len(entries) - 1)
            same = (entries["place"][at] == places) & (entries["mark"][at] == marks) & (marks != 0)
            found[same, 0], found[same, 1] = entries["low"][at[same]], entries["high"][at[same]]
        return found

    def add(self, places: Marks, marks: Marks, ids: Ids) -> None:
        """Remember more files; those without a mark are left out."""
        new = np.empty(len(places), _ENTRY)
        new["place"], new["mark"], new["low"], new["high"] = places, marks, ids[:, 0], ids[:, 1]
        new = new[(marks != 0) & known(ids)]
        if not len(new):
            return
        old = self._files()
        merged = old if len(old) >= _MOST_FILES else []
        parts = [entries for file in merged if (entries := _read(file)) is not None]
        # The newest entry of a place is the one to keep.
        entries = np.concatenate([new, *reversed(parts)])
        _, first = np.unique(entries["place"], return_index=True)
        self._write(entries[first])
        for file in merged:
            file.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """Oldest first."""
        found = []
        for file in self._folder.glob("*.npy"):
            with contextlib.suppress(FileNotFoundError):  # merged into another one just now
                found.append((file.stat().st_mtime_ns, file))
        return [file for _, file in sorted(found)]

    def _write(self, entries: npt.NDArray[np.void]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f"{uuid.uuid4().hex}.partial"
        with partial.open("wb") as file:
            np.save(file, entries, allow_pickle=False)
        os.replace(partial, self._folder / f"{_digest(entries)}.npy")


def _digest(entries: npt.NDArray[np.void]) -> str:
    return hashlib.blake2b(entries.tobytes(), digest_size=16).hexdigest()


def _read(file: Path) -> npt.NDArray[np.void] | None:
    """The entries of a file, by place; None where it is not what was written."""
    try:
        entries: npt.NDArray[np.void] = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return entries if entries.dtype == _ENTRY and _digest(entries) == file.stem else None
