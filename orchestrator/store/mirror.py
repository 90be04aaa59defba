"""A set of features that lies in an object store as well: what one machine has computed, no other one computes.

The directory on the storage stays what jobs read from. One worker of a job fetches what all of them will ask for; each
uploads what it has computed. Shards are never changed, their names are never given twice, and a manifest goes last. So
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
from orchestrator.job import sync, write_file
from orchestrator.store.sets import USED
from orchestrator.store.shards import NUM_READERS, FeatureSet, Format, Shard, Values

_BUFFER_BYTES = 8 * 2**20
_SILENT_S = 300.0
"""A store that did not answer is not asked for so long."""
_MANY_UNKNOWN = 0.1
"""Of the samples without features here: of more than this part it is not known what they hold."""
_MAX_UPLOADS = 2
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
        self._stored: set[str] = set()
        """Shards that the store has, as far as is known."""
        self._ignored: set[str] = set()
        """Manifests of the store that are of no use: of a later version, or of what was found damaged or gone."""
        self._uploader: ThreadPoolExecutor | None = None
        self._uploads: list[Future[None]] = []
        self._silent_until = 0.0
        """0 as long as it has answered."""

    def fetch_missing(self, ids: Ids) -> None:
        """Copy the shards that hold any of these contents from the store to the folder, as far as they are not there.

        Where few of the contents are known, all shards of the set.
        """
        self.refresh()
        if time.monotonic() < self._silent_until:
            return
        missing = ids[self.find(ids)[0] < 0]
        if not len(missing):
            return
        # A sample that cannot be read is never known: for a few such nobody wants all that there is.
        everything = (~known(missing)).mean() > _MANY_UNKNOWN
        try:
            listed = self._listed()
        except Exception as error:  # each store's library has errors of its own
            self._failed(error)
            return
        self._stored |= listed & set(self._shards)
        new = sorted(listed - set(self._shards) - self._ignored)

        def fetch(name: str) -> None:
            answer = self._manifest_of(name)
            if answer is not None and (everything or np.isin(answer[0].ids[:, 0], missing[:, 0]).any()):
                self._fetch(*answer)

        with ThreadPoolExecutor(NUM_READERS) as pool:
            list(pool.map(fetch, new))
        self.refresh()

    def _listed(self) -> set[str]:
        """Names of the shards whose manifests the store has."""
        return {name.removesuffix(".json") for name in self._place.names() if name.endswith(".json")}

    def _manifest_of(self, name: str) -> tuple[Shard, bytes] | None:
        """(what the store's manifest says, its bytes); None where it is of no use."""
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
            self._ignored.add(name)
            return None
        return shard, text

    def _fetch(self, shard: Shard, manifest: bytes) -> None:
        """Copy a shard to the folder. One that is gone or damaged is removed from the store."""
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
            write_file(self._manifest(name), manifest)
            sync(self.folder)
            self._verified.add(name)
            self._stored.add(name)
        except FileNotFoundError:  # a store whose old files go, the manifest after its shard
            self._remove(name)
        except Exception as error:
            self._failed(error)
        finally:
            partial.unlink(missing_ok=True)

    def _remove(self, name: str) -> None:
        """Remove a shard that is of no use from the store, its manifest first."""
        self._ignored.add(name)  # a listing may show it for a while
        for file in (f"{name}.json", f"{name}.safetensors"):
            try:
                self._place.join(file).delete()
            except Exception:  # somebody else has removed it, or this job may not
                continue

    def add(self, ids: Ids, values: Values, format: Format) -> str:
        name = super().add(ids, values, format)
        self._upload([name])
        return name

    def flush_uploads(self, whole: bool) -> None:
        """Return once what this process wrote is in the store; `whole`: and all other shards of the folder too."""
        if whole and time.monotonic() >= self._silent_until:
            try:
                self._stored |= self._listed()  # what other workers have uploaded
                self._upload(sorted(set(self._shards) - self._stored))
            except Exception as error:
                self._failed(error)
            if self._shards:
                with contextlib.suppress(Exception):  # a job that may only read; all else is there
                    self._place.join(USED).write(b"")  # its time tells what may be pruned
        self._wait(0)
        if self._uploader is not None:
            self._uploader.shutdown()
            self._uploader = None

    def _upload(self, names: list[str]) -> None:
        """Begin to copy shards to the store, while this job computes."""
        for name in names:
            if time.monotonic() < self._silent_until:
                break
            self._stored.add(name)
            self._uploader = self._uploader or ThreadPoolExecutor(1)
            self._uploads.append(self._uploader.submit(self._put, name))
            self._wait(_MAX_UPLOADS)

    def _wait(self, most: int) -> None:
        """Until at most so many uploads are on their way."""
        while len(self._uploads) > most:
            self._uploads.pop(0).result()

    def _put(self, name: str) -> None:
        try:
            for file in (self._file(name), self._manifest(name)):
                self._place.join(file.name).upload(file)
        except Exception as error:
            self._stored.discard(name)
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Leave the store alone for a while; say so the first time."""
        told = bool(self._silent_until)
        self._silent_until = time.monotonic() + _SILENT_S
        if not told:
            self._note(
                f"{self._place.text} does not answer: features stay on the storage, and a later job brings them there "
                f"({first_line(error)})"
            )


def share_note(file: Path, place: Location) -> None:
    """Copy a small file that all machines should have alike to the store, or from it, where one of the two lacks it."""
    stored = place.join(file.name)
    try:
        if file.exists():
            if stored.stat() is None:
                stored.upload(file)
        elif stored.stat() is not None:
            write_file(file, stored.read())
    except Exception:  # the set of features says that the store does not answer
        return
