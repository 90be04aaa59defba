"""What a person asks about the features that are kept: which there are, of what, and to remove those long unused.

On a storage directory, or in an object store.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.data import Found, Location, feature_store, store_errors
from orchestrator.errors import JobError
from orchestrator.job import IN_A_STORE, is_uri, local_path, open_storage, write_file
from orchestrator.store.sets import FOLDER, FORMAT_FILE, KEY_FILE, USED, USED_HERE, pruning
from orchestrator.store.shards import NUM_READERS, FeatureSet, Shard

Root = Path | Location
"""Where the sets are: `.features/` of a storage directory, or a place in an object store."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)")


def of_storage(storage: str | Path) -> Root:
    """The features of a storage. Raises `JobError` where it is no directory, `RefusedError` where it is silent."""
    if is_uri(str(storage)):
        there = open_storage(str(storage))
        there.require()
        return feature_store(there.place_of(FOLDER))
    place = local_path(storage)
    if not place.is_dir():
        what = "is a file" if place.exists() else "is not there"
        raise JobError(f"the storage {storage} {what}", expected="the directory of the runs", mend="name it: --storage")
    return place / FOLDER


def of_store(place: str) -> Location:
    """The features of an object store. Raises `JobError` where there are none, `RefusedError` where it is silent."""
    if not re.fullmatch(IN_A_STORE, place):
        raise JobError(f"{place!r} is no place in a store", expected="a URI such as s3://bucket/features",
                       mend="for a directory there is --storage")  # fmt: skip
    store = feature_store(place)
    if store.kind() != "directory":
        raise JobError(f"there are no features at {place}", mend="name the place that jobs were given: --feature-store")
    return store


def parse_size(text: str) -> int:
    """Bytes: of `50GB`, `1.5 TB`, `64MiB`, `0`. Raises `JobError`."""
    parts = _SIZE.fullmatch(text.strip().upper())
    if parts is None or parts[2] not in _UNITS or (not parts[2] and float(parts[1])):
        raise JobError(f"{text!r} is no size", expected="a number with a unit, or 0", mend="say it like 50GB or 500MB")
    return round(float(parts[1]) * _UNITS[parts[2]])


@dataclass(frozen=True)
class Listing:
    """One set of features."""

    name: str
    """<cache group>/<set>"""
    key: Mapping[str, Any]
    num_samples: int
    """Of an object store: what its shards hold, so that a sample which two jobs have computed counts twice."""
    num_shards: int
    num_bytes: int
    used: float
    """Seconds since the epoch."""


def find_listing(root: Root, name: str) -> Listing:
    """The one set whose name begins so. Raises `JobError` where there is none, or more than one."""
    every = listings(root)
    fitting = [one for one in every if one.name == name] or [one for one in every if one.name.startswith(name)]
    if len(fitting) != 1:
        which = "no set of features" if not fitting else f"{len(fitting)} sets of features"
        names = ", ".join(one.name for one in (fitting or every)[:5])
        raise JobError(f"there is {which} {name!r}" if not fitting else f"{which} begin with {name!r}",
                       expected=names and f"one of {names}", mend="list them: orchestrator features list")  # fmt: skip
    return fitting[0]


def listings(root: Root) -> list[Listing]:
    """Every set, the one used last first."""
    sets = _on_storage(root) if isinstance(root, Path) else _in_store(root)
    return sorted(sets, key=lambda one: -one.used)


def prune(root: Root, max_bytes: int, dry_run: bool = False, sets: list[Listing] | None = None) -> list[Listing]:
    """Remove the sets that were not used for longest until all take `max_bytes` at most; what was removed.

    One that a job on this machine writes or reads is left, on a storage; jobs that read from an object store have
    copies of their own. `dry_run`: only tell. `sets`: the listings, where they are at hand.
    """
    sets = listings(root) if sets is None else sets
    total, removed = sum(one.num_bytes for one in sets), []
    for one in reversed(sets):
        if total <= max_bytes:
            break
        if isinstance(root, Path):
            with pruning(root / one.name) as free:
                if not free:
                    continue
                if not dry_run:
                    _remove(root / one.name)
            if not dry_run:
                _remove_empty((root / one.name).parent)
        elif not dry_run:
            _remove_from_store(root, one.name)
        total -= one.num_bytes
        removed.append(one)
    return removed


# --- on a storage directory ---


def _on_storage(root: Path) -> Iterable[Listing]:
    for key_file in root.glob(f"*/{KEY_FILE}"):
        key = _key(key_file.read_bytes)
        for folder in key_file.parent.glob("*/"):
            with contextlib.suppress(FileNotFoundError):  # pruned meanwhile
                yield _listing(folder, key)


def _key(read: Callable[[], bytes]) -> Mapping[str, Any]:
    """What a cache group is of, {} where that cannot be read."""
    try:
        key = json.loads(read())
    except (OSError, ValueError):
        return {}
    return key if isinstance(key, dict) else {}


def _listing(folder: Path, key: Mapping[str, Any]) -> Listing:
    features = FeatureSet(folder)
    features.refresh()
    used = folder / USED_HERE
    at = (used if used.exists() else folder).stat().st_mtime
    name = f"{folder.parent.name}/{folder.name}"
    return Listing(name, key, features.num_samples, len(features.names), _size(folder), at)


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def _remove(folder: Path) -> None:
    for manifest in folder.glob("*.json"):  # first, so that nobody counts on a shard that is going
        manifest.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _remove_empty(cache_group: Path) -> None:
    """Remove the folder of a cache group without sets; its notes stay where a job makes a set at this moment."""
    try:
        if any(child.is_dir() for child in cache_group.iterdir()):
            return
        notes = {file: file.read_text(encoding="utf-8") for file in cache_group.glob("*.json")}
        for file in cache_group.iterdir():
            if not file.is_dir():
                file.unlink(missing_ok=True)
    except FileNotFoundError:  # somebody else prunes it as well
        return
    try:
        cache_group.rmdir()
    except OSError:
        for file, text in notes.items():
            write_file(file, text.encode())


# --- in an object store ---

_OURS = re.compile(rf"[0-9a-f]{{32}}\.(json|safetensors)|{USED}")
"""Files of a set. Whatever else lies there is somebody else's, and is left alone."""


def _in_store(place: Location) -> list[Listing]:
    sets: dict[str, list[Found]] = {}
    if place.kind() != "directory":
        return []
    for file in place.files():
        match file.uri.split("/"):
            case [cache_group, name, last] if _OURS.fullmatch(last):
                sets.setdefault(f"{cache_group}/{name}", []).append(file)
    cache_groups = {name.split("/")[0] for name in sets}

    def key(cache_group: str) -> Mapping[str, Any]:
        return _key(place.join(f"{cache_group}/{KEY_FILE}").read)

    with ThreadPoolExecutor(NUM_READERS) as pool:
        keys = dict(zip(cache_groups, pool.map(key, cache_groups), strict=True))
        return list(pool.map(lambda name: _listing_in_store(place, name, sets[name], keys[name.split("/")[0]]), sets))


def _listing_in_store(place: Location, name: str, files: list[Found], key: Mapping[str, Any]) -> Listing:
    """From sizes and one manifest: to read all of them is 21 bytes a sample."""
    manifests = {file.uri.removesuffix(".json") for file in files if file.uri.endswith(".json")}
    shards = [file for file in files if file.uri.removesuffix(".safetensors") in manifests]
    num_samples = 0
    for uri in sorted(manifests):
        with contextlib.suppress(OSError, ValueError):  # pruned meanwhile, or not whole
            one = Shard.from_manifest(Path(uri).name, place.join(f"{uri}.json").read())
            if one is not None:
                num_samples = sum(round((file.size - one.offset) / one.row_bytes) for file in shards)
                break
    used = max(file.modified_ns for file in files) / 1e9
    return Listing(name, key, num_samples, len(shards), sum(file.size for file in files), used)


def _remove_from_store(place: Location, name: str) -> None:
    """A set, its manifests first, and with the last set of a cache group what is noted of it.

    Raises `RefusedError` where the store does not let it be removed.
    """
    cache_group = name.split("/")[0]
    files = [f"{cache_group}/{file.uri}" for file in place.join(cache_group).files()]
    sets = [uri for uri in files if uri.count("/") == 2 and _OURS.fullmatch(uri.split("/")[2])]
    of_set = [uri for uri in sets if uri.startswith(f"{name}/")]
    notes = [uri for uri in files if uri in (f"{cache_group}/{KEY_FILE}", f"{cache_group}/{FORMAT_FILE}")]

    def delete(uri: str) -> None:
        with store_errors(place.text), contextlib.suppress(FileNotFoundError):
            place.join(uri).delete()

    with ThreadPoolExecutor(NUM_READERS) as pool:
        list(pool.map(delete, [uri for uri in of_set if uri.endswith(".json")]))
        list(pool.map(delete, [uri for uri in of_set if not uri.endswith(".json")]))
        if len(of_set) == len(sets):
            list(pool.map(delete, notes))
