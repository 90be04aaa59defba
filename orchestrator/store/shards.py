"""The feature store: what frozen bodies gave for samples, kept for every epoch, job and search that asks again.

    <storage>/.features/
        contents/                     which content lies in which file (data/contents.py)
        <backbone>-<16 hex digits>/   of one backbone, cut, input: key.json says which
            float32/                  the set of one number format; bfloat16-view-0-... of one augmented view
                <32 hex digits>.safetensors   a shard: "features" [samples, ...]
                <32 hex digits>.json          its manifest, written last: what is in it, and its digest

A shard is never changed. One without its manifest does not exist; one whose bytes are not those of its manifest is
removed, and made again by the job that met it. So what is there is right without a lock: what two jobs computed at once
is there twice. The locks of sets.py spare that, and keep what a job reads from being pruned.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from orchestrator.data import Ids, Ints, Marks
from orchestrator.errors import TrainingError
from orchestrator.job import sync

Format = Literal["float32", "bfloat16"]
_NUMPY: Mapping[str, Any] = {"float32": np.float32, "bfloat16": np.uint16}
_DEAD_S = 3600.0
"""What was begun so long ago, and has no manifest, is of a job that died."""
NUM_READERS = 4

Values = npt.NDArray[Any]
"""float32, or the bits of bfloat16 as uint16: numpy has no such type."""


@dataclass(frozen=True)
class Shard:
    """A file of features, as its manifest describes it."""

    name: str
    sha256: str
    num_bytes: int
    offset: int
    """Of the first feature in the file."""
    shape: tuple[int, ...]
    """[samples, ...]"""
    format: Format
    ids: Ids
    made: int
    """Nanoseconds since 1970."""

    @property
    def row_bytes(self) -> int:
        """Of one sample's features."""
        return math.prod(self.shape[1:]) * int(np.dtype(_NUMPY[self.format]).itemsize)

    @staticmethod
    def from_manifest(name: str, text: bytes) -> Shard | None:
        """What a manifest says; None for a format of a later version. Raises `ValueError` where it is not whole."""
        try:
            manifest = json.loads(text)
            if manifest["format"] not in _NUMPY:
                return None
            raw = base64.b64decode(manifest["ids"], validate=True)
            ids = np.frombuffer(raw, "<u8").reshape(-1, 2).astype(np.uint64)
            shape = tuple(int(size) for size in manifest["shape"])
            shard = Shard(
                name, str(manifest["sha256"]), int(manifest["bytes"]), int(manifest["offset"]), shape,
                manifest["format"], ids, int(manifest.get("made", 0)),
            )  # fmt: skip
            whole = (
                hashlib.sha256(raw).hexdigest() == manifest["ids_sha256"]
                and len(ids) == shape[0]
                and shard.num_bytes == shard.offset + shape[0] * shard.row_bytes
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the manifest {name} is not whole: {error!r}") from None
        if not whole:
            raise ValueError(f"the manifest {name} is not whole")
        return shard


class FeatureSet:
    """Features of one backbone, cut, input, format and view: shards of a folder, which this reads and writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: dict[str, Shard] = {}
        self._names: list[str] = []
        nothing, nowhere = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        self._places: tuple[Marks, Marks, Ints, Ints] = (nothing, nothing, nowhere, nowhere)
        """Of all ids, by their lower half: lower, higher half, shard, row in it. Replaced as a whole, for threads."""
        self._values: dict[str, Values] = {}
        self._verified: set[str] = set()
        """Shards that were held against their digests, or written here."""
        self._broken: set[str] = set()
        """Whose manifest is not what was written."""
        self._preferred: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Of the shards, by the numbers that `find` gives."""
        return self._names

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of one sample's features; None while there are none."""
        return next((shard.shape[1:] for shard in self._shards.values()), None)

    @property
    def num_samples(self) -> int:
        """Of how many contents there are features."""
        low, high, _, _ = self._places
        return len(np.unique(np.stack([low, high], axis=1), axis=0))

    def refresh(self, names: Iterable[str] = ()) -> None:
        """Learn which shards there are by now: all of the folder, and those named, which its listing may lack yet."""
        with contextlib.suppress(FileNotFoundError):
            names = {*names, *(file.stem for file in self.folder.glob("*.json"))}
        read = [self._read(name) for name in sorted(set(names) - set(self._shards) - self._broken)]
        new = {shard.name: shard for shard in read if shard is not None}
        if new:  # else the index stands: to sort the ids of all shards anew takes its time
            self._shards |= new
            self._index()

    def _index(self) -> None:
        shards = sorted(self._shards.values(), key=lambda one: (one.name not in self._preferred, one.made, one.name))
        self._names = [shard.name for shard in shards]
        ids = np.concatenate([shard.ids for shard in shards]) if shards else np.zeros((0, 2), np.uint64)
        order = np.argsort(ids[:, 0], kind="stable")
        sizes = [len(shard.ids) for shard in shards]
        numbers = np.repeat(np.arange(len(shards)), sizes)
        rows = np.concatenate([np.arange(size) for size in sizes]) if sizes else np.zeros(0, np.int64)
        self._places = (ids[order, 0], ids[order, 1], numbers[order], rows[order])

    def find(self, ids: Ids) -> tuple[Ints, Ints]:
        """(number of the shard, row in it) of each id, int64 [samples]; -1 where there are no features of it."""
        nowhere = np.full(len(ids), -1, np.int64)
        low, high, shard, row = self._places
        if not len(low) or not len(ids):
            return nowhere, nowhere.copy()
        at = np.searchsorted(low, ids[:, 0]).clip(max=len(low) - 1)
        stored = (low[at] == ids[:, 0]) & (high[at] == ids[:, 1]) & (ids[:, 0] != 0)
        return np.where(stored, shard[at], -1), np.where(stored, row[at], -1)

    def values(self, number: int) -> Values:
        """The features of a shard, [samples, ...], memory-mapped; of bfloat16 their bits as uint16."""
        name = self._names[number]
        if name not in self._values:
            self._values[name] = self._mapped(self._shards[name])
        return self._values[name]

    def open(self, names: Sequence[str], verified: bool = False) -> list[Values]:
        """The features in these shards, as `values` gives them, whatever else is in the set.

        `verified`: they were held against their digests already. Raises `TrainingError` where one is gone or damaged.
        """
        shards = [self._shards.get(name) or self._read(name) for name in names]
        for name, shard in zip(names, shards, strict=True):
            if shard is None or not (verified or name in self._verified or self._is_whole(shard)):
                raise TrainingError(
                    f"the shard {name} of the features in {self.folder} is gone or damaged",
                    expected="what was stored, until it is read",
                    mend="the same command makes it again; `orchestrator features prune` only what no job uses",
                )
            self._verified.add(name)
        return [self._mapped(shard) for shard in shards if shard is not None]

    def add(self, ids: Ids, values: Values, format: Format) -> str:
        """Write a shard: values [samples, ...]; its name. Durable, with its manifest, once this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = uuid.uuid4().hex
        values = np.ascontiguousarray(values)
        header = json.dumps({
            "__metadata__": {"format": "pt"},
            "features": {
                "dtype": {"float32": "F32", "bfloat16": "BF16"}[format], "shape": list(values.shape),
                "data_offsets": [0, values.nbytes],
            },
        }).encode()  # fmt: skip
        header += b" " * (-len(header) % 64)
        start = len(header).to_bytes(8, "little") + header
        digest = hashlib.sha256(start)
        digest.update(values.data if values.nbytes else b"")
        partial = self.folder / f"{name}.partial"
        with partial.open("wb") as file:
            file.write(start)
            file.write(values.data if values.nbytes else b"")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self._file(name))
        raw = np.ascontiguousarray(ids, "<u8").tobytes()
        manifest = {
            "format": format, "shape": list(values.shape), "offset": len(start), "bytes": len(start) + values.nbytes,
            "sha256": digest.hexdigest(), "ids": base64.b64encode(raw).decode(),
            "ids_sha256": hashlib.sha256(raw).hexdigest(), "made": time.time_ns(),
        }  # fmt: skip
        with partial.open("w") as text:
            json.dump(manifest, text)
            text.flush()
            os.fsync(text.fileno())
        os.replace(partial, self._manifest(name))
        sync(self.folder)
        self._verified.add(name)
        return name

    def damaged(self, numbers: Iterable[int]) -> list[str]:
        """Which of these shards are not what was written, each looked at once, and those whose manifests are not.

        They are removed. The numbers that `find` gave before are void where there is one.
        """
        names = [name for name in {self._names[number] for number in numbers} if name not in self._verified]
        shards = [self._shards[name] for name in names]
        with ThreadPoolExecutor(NUM_READERS) as pool:
            broken = [name for name, whole in zip(names, pool.map(self._is_whole, shards), strict=True) if not whole]
        self._verified |= set(names) - set(broken)
        for name in (*broken, *self._broken):
            self._manifest(name).unlink(missing_ok=True)
            self._file(name).unlink(missing_ok=True)
        removed = [*broken, *self._broken]
        self._broken = set()
        self.forget(broken)
        return removed

    def forget(self, names: Iterable[str]) -> None:
        """Count no more on shards that were removed, by another worker of the same job for one."""
        for name in names:
            self._shards.pop(name, None)
            self._values.pop(name, None)
        self._index()

    def fetch_missing(self, ids: Ids, needed: bool = False) -> None:
        """Copy the shards that hold these contents from wherever else the set is kept: nowhere, for this class.

        `ids`, uint64 [samples, 2]. Called by one worker of a job, before `find` is asked for them. `needed`: only there
        are they, and a place that is away is waited for.
        """

    def send(self, names: Iterable[str]) -> list[str]:  # noqa: ARG002
        """Copy the shards of these names to wherever else the set is kept, as other machines need them.

        The names of those that were found damaged, and were removed instead.
        """
        return []

    def flush_uploads(self, whole: bool) -> None:
        """Return once what this process wrote is wherever else the set is kept: nowhere, for this class.

        `whole`: all other shards of the set too.
        """

    def prefer(self, names: Iterable[str]) -> None:
        """Let `find` give these shards for a content that several hold; of the others, the oldest one."""
        self._preferred = set(names)
        self._index()

    def sweep(self) -> None:
        """Remove what jobs that died have left: files half written, shards without a manifest."""
        begun = [*self.folder.glob("*.partial"), *self.folder.glob("*.safetensors")]
        for file in begun:
            with contextlib.suppress(FileNotFoundError):
                if not file.with_suffix(".json").exists() and time.time() - file.stat().st_mtime > _DEAD_S:
                    file.unlink()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _manifest(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _read(self, name: str) -> Shard | None:
        """The shard that a manifest describes; None where the manifest or its file is not whole."""
        try:
            text = self._manifest(name).read_bytes()
            num_bytes = self._file(name).stat().st_size
        except OSError:  # pruned meanwhile, a manifest whose shard is gone, or storage that does not answer
            return None
        try:
            shard = Shard.from_manifest(name, text)
            if shard is None or shard.num_bytes == num_bytes:
                return shard
        except ValueError:
            pass
        self._broken.add(name)
        return None

    def _mapped(self, shard: Shard) -> Values:
        file, dtype = self._file(shard.name), _NUMPY[shard.format]
        return np.memmap(file, dtype, "r", offset=shard.offset, shape=shard.shape).view(np.ndarray)

    def _is_whole(self, shard: Shard) -> bool:
        try:
            with self._file(shard.name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
        except FileNotFoundError:  # pruned
            return False
