"""A set of features that lies in an object store as well: what one machine has computed, no other one computes.

The directory on the storage stays what jobs read from. One worker of a job brings what the others will ask for; each
sends what it has computed. Shards are never changed, their names are never given twice, and a manifest goes last. So
machines need not know of each other, and a store without locks or renaming will do.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from orchestrator.data import Ids, Location, known
from orchestrator.errors import first_line
from orchestrator.job import sync
from orchestrator.store.sets import USED, write_shared
from orchestrator.store.shards import NUM_READERS, FeatureSet, Format, Shard, Values

_BUFFER_BYTES = 8 * 2**20
_SILENT_S = 300.0
"""A store that did not answer is not asked for so long."""
_MANY_UNKNOWN = 0.1
"""Of the samples that features are lacking of."""
_WAITING = 2
"""Shards on their way to the store, before the job waits for it."""


class MirroredSet(FeatureSet):
    """A feature set whose shards are kept in `place` too.

    A store that falls silent costs no features: they stand on the storage, `note` is told so once, and a later job
    brings there what is missing.
    """

    def __init__(self, folder: Path, place: Location, note: Callable[[str], None]) -> None:
        super().__init__(folder)
        self._place = place
        self._note = note
        self._there: set[str] = set()
        """Shards that the store has, as far as is known."""
        self._passed_over: set[str] = set()
        """Manifests of the store that are of no use: of a later version, or of what was found damaged or gone."""
        self._sender: ThreadPoolExecutor | None = None
        self._sending: list[Future[None]] = []
        self._silent_until = 0.0
        """0 as long as it has answered."""

    def fetch_missing(self, ids: Ids) -> None:
        """Fetch the shards that hold any of these contents, where none is here; all of them where few ids are known."""
        self.refresh()
        if time.monotonic() < self._silent_until:
            return
        lacking = ids[self.find(ids)[0] < 0]
        if not len(lacking):
            return
        # A sample that cannot be read is never known: for a few such nobody wants all that there is.
        everything = (~known(lacking)).mean() > _MANY_UNKNOWN
        try:
            listed = self._listed()
        except Exception as error:  # each store's library has errors of its own
            self._failed(error)
            return
        self._there |= listed & set(self._shards)
        new = sorted(listed - set(self._shards) - self._passed_over)

        def fetched(name: str) -> None:
            found = self._manifest_of(name)
            if found is not None and (everything or np.isin(found[0].ids[:, 0], lacking[:, 0]).any()):
                self._fetch(*found)

        with ThreadPoolExecutor(NUM_READERS) as pool:
            list(pool.map(fetched, new))
        self.refresh()

    def _listed(self) -> set[str]:
        return {name.removesuffix(".json") for name in self._place.names() if name.endswith(".json")}

    def _manifest_of(self, name: str) -> tuple[Shard, bytes] | None:
        try:
            text = self._place.join(f"{name}.json").read()
        except FileNotFoundError:
            return None
        except Exception as error:
            self._failed(error)
            return None
        try:
            shard = Shard.from_manifest(name, text)
        except ValueError:  # a store that shows a file before it is written to its end
            return None
        if shard is None:
            self._passed_over.add(name)
            return None
        return shard, text

    def _fetch(self, shard: Shard, manifest: bytes) -> None:
        """Bring a shard. One that is gone or damaged is taken out of the store."""
        name, digest = shard.name, hashlib.sha256()
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{uuid.uuid4().hex}.partial"
        try:
            with self._place.join(f"{name}.safetensors").stream(_BUFFER_BYTES) as source, partial.open("wb") as out:
                while chunk := source.read(_BUFFER_BYTES):
                    digest.update(chunk)
                    out.write(chunk)
            if digest.hexdigest() != shard.sha256:
                self._note(f"a shard of features in {self._place.text} was damaged: it is made again")
                self._remove(name)
                return
            partial.replace(self._file(name))
            write_shared(self._manifest(name), manifest.decode())
            sync(self.folder)
            self._trusted.add(name)
            self._there.add(name)
        except FileNotFoundError:  # a store whose old files go, the manifest after its shard
            self._remove(name)
        except Exception as error:
            self._failed(error)
        finally:
            partial.unlink(missing_ok=True)

    def _remove(self, name: str) -> None:
        """What is of no use, from the store: the manifest first."""
        self._passed_over.add(name)  # a listing may show it for a while
        for file in (f"{name}.json", f"{name}.safetensors"):
            try:
                self._place.join(file).delete()
            except Exception:  # somebody else has removed it, or this job may not
                continue

    def add(self, ids: Ids, values: Values, format: Format) -> str:
        name = super().add(ids, values, format)
        self._send([name])
        return name

    def flush_uploads(self, whole: bool) -> None:
        if whole and time.monotonic() >= self._silent_until:
            try:
                self._there |= self._listed()  # what other workers have sent
                self._send(sorted(set(self._shards) - self._there))
            except Exception as error:
                self._failed(error)
            if self._shards:
                with contextlib.suppress(Exception):  # a job that may only read; all else is there
                    self._place.join(USED).write(b"")  # its time tells what may be pruned
        self._arrived(0)
        if self._sender is not None:
            self._sender.shutdown()
            self._sender = None

    def _send(self, names: list[str]) -> None:
        """To the store, beside what this job computes meanwhile."""
        for name in names:
            if time.monotonic() < self._silent_until:
                break
            self._there.add(name)
            self._sender = self._sender or ThreadPoolExecutor(1)
            self._sending.append(self._sender.submit(self._put, name))
            self._arrived(_WAITING)

    def _arrived(self, most: int) -> None:
        while len(self._sending) > most:
            self._sending.pop(0).result()

    def _put(self, name: str) -> None:
        try:
            for file in (self._file(name), self._manifest(name)):
                self._place.join(file.name).upload(file)
        except Exception as error:
            self._there.discard(name)
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        told = bool(self._silent_until)
        self._silent_until = time.monotonic() + _SILENT_S
        if not told:
            self._note(
                f"{self._place.text} does not answer: features stay on the storage, and a later job brings them there "
                f"({first_line(error)})"
            )


def share(file: Path, place: Location) -> None:
    """A small file that all machines should have alike: where one of the two has it, the other gets it."""
    there = place.join(file.name)
    try:
        if file.exists():
            if there.stat() is None:
                there.upload(file)
        elif there.stat() is not None:
            write_shared(file, there.read().decode())
    except Exception:  # the set of features says that the store does not answer
        return
