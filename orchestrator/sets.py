"""The sets of a feature store: under which key they stand, and what a person asks about them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import locks
from orchestrator.errors import JobError
from orchestrator.store import FeatureSet

FOLDER = ".features"
"""Of a storage directory."""
CONTENTS = "contents"
KEY_FILE = "key.json"
_VERSION = 1
"""Of what features are: raised when this package computes them otherwise than before."""


def family_folder(root: Path, name: str, key: Mapping[str, Any]) -> Path:
    """The folder of all that has this key; made, with the key in it, if need be."""
    text = json.dumps({"version": _VERSION, **key}, sort_keys=True, indent=1, ensure_ascii=False)
    folder = root / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if not (folder / KEY_FILE).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_shared(folder / KEY_FILE, text)
    return folder


def write_shared(file: Path, text: str) -> None:
    """Write a file whole or not at all, whoever else writes it at this moment: each under a name of its own first."""
    partial = file.with_name(f"{uuid.uuid4().hex}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


@contextlib.contextmanager
def opened(features: FeatureSet, key: Mapping[str, Any]) -> Iterator[FeatureSet]:
    """A set of the family with that key, made if need be; nobody prunes it meanwhile."""
    family = features.folder.parent
    with locks.held(features.folder):
        touch(features.folder)
        family_folder(family.parent, family.name.rpartition("-")[0], key)  # pruned just before, perhaps
        yield features


def touch(folder: Path) -> None:
    """Note that a set was used now: what was not used for longest is pruned first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".used").touch()


# --- what a person asks about a store ---

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)")


def of_storage(storage: str | Path) -> Path:
    """The store of a storage directory. Raises `JobError` where the storage is no directory."""
    place = Path(storage).expanduser()
    if not place.is_dir():
        what = "is a file" if place.exists() else "is not there"
        raise JobError(f"the storage {storage} {what}", expected="the directory of the runs", mend="name it: --storage")
    return place / FOLDER


def parse_size(text: str) -> int:
    """Bytes: of `50GB`, `1.5 TB`, `64MiB`, `0`. Raises `JobError`."""
    found = _SIZE.fullmatch(text.strip().upper())
    if found is None or found[2] not in _UNITS or (not found[2] and float(found[1])):
        raise JobError(f"{text!r} is no size", expected="a number with a unit, or 0", mend="say it like 50GB or 500MB")
    return round(float(found[1]) * _UNITS[found[2]])


def find_listing(root: Path, name: str) -> Listing:
    """The one set whose name begins so. Raises `JobError` where there is none, or more than one."""
    there = listings(root)
    found = [one for one in there if one.name == name] or [one for one in there if one.name.startswith(name)]
    if len(found) != 1:
        which = "no set of features" if not found else f"{len(found)} sets of features"
        names = ", ".join(one.name for one in (found or there)[:5])
        raise JobError(f"there is {which} {name!r}" if not found else f"{which} begin with {name!r}",
                       expected=names and f"one of {names}", mend="list them: orchestrator features list")  # fmt: skip
    return found[0]


@dataclass(frozen=True)
class Listing:
    """One set of a store."""

    name: str
    """<family>/<set>"""
    key: Mapping[str, Any]
    num_samples: int
    num_shards: int
    num_bytes: int
    used: float
    """Seconds since the epoch."""


def listings(root: Path) -> list[Listing]:
    """Every set of a store, the one used last first."""
    found = []
    for key_file in root.glob(f"*/{KEY_FILE}"):
        try:
            key = json.loads(key_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            key = {}
        for folder in key_file.parent.iterdir():
            if folder.is_dir():
                found.append(_listing(folder, key if isinstance(key, dict) else {}))
    return sorted(found, key=lambda one: -one.used)


def _listing(folder: Path, key: Mapping[str, Any]) -> Listing:
    features = FeatureSet(folder)
    features.refresh()
    used = folder / ".used"
    at = (used if used.exists() else folder).stat().st_mtime
    name = f"{folder.parent.name}/{folder.name}"
    return Listing(name, key, features.num_samples, len(features.names), _size(folder), at)


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def prune(root: Path, max_bytes: int) -> list[Listing]:
    """Remove the sets that were not used for longest until the store takes `max_bytes` at most; what was removed.

    One that a job on this machine writes or reads is left.
    """
    found = listings(root)
    total, removed = sum(one.num_bytes for one in found), []
    for one in reversed(found):
        if total <= max_bytes:
            break
        folder = root / one.name
        with locks.pruning(folder) as free:
            if not free:
                continue
            for manifest in folder.glob("*.json"):  # first, so that nobody counts on a shard that is going
                manifest.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
        total -= one.num_bytes
        removed.append(one)
        _remove_empty(folder.parent)
    return removed


def _remove_empty(family: Path) -> None:
    """Remove the folder of a family that has no set any more; what is noted of it stays where a job makes one now."""
    try:
        if any(child.is_dir() for child in family.iterdir()):
            return
        notes = {file: file.read_text(encoding="utf-8") for file in family.glob("*.json")}
        for file in family.iterdir():
            if not file.is_dir():
                file.unlink(missing_ok=True)
    except FileNotFoundError:  # somebody else prunes it as well
        return
    try:
        family.rmdir()
    except OSError:
        for file, text in notes.items():
            write_shared(file, text)
