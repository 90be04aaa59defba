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
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data import PATIENCE_S, Answer, Asker, Ids, Location, known
from orchestrator.errors import RefusedError, first_line, storage_failed
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
    brings there what is missing. Where other machines need them it is waited for (`send`, and `needed`): these raise
    `OrchestratorError` once that has taken too long.
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
        self._uploads: list[Future[Any]] = []
        self._silent_until = 0.0
        self._told = False
        """Whether `note` knows that the store has failed."""

    def fetch_missing(self, ids: Ids, needed: bool = False) -> None:
        """Copy the shards that hold any of these contents from the store to the folder, as far as they are not there.

        Where few of the contents are known, all shards of the set.
        """
        self.refresh()
        if needed:
            self._ignored.clear()  # who has what was damaged sends it anew
        elif time.monotonic() < self._silent_until:
            return
        ask: Callable[[Callable[[], Any]], Any] = self._waited if needed else self._tried
        missing = ids[self.find(ids)[0] < 0]
        if not len(missing):
            return
        # A sample that cannot be read is never known: for a few such nobody wants all that there is.
        everything = (~known(missing)).mean() > _MANY_UNKNOWN
        listed = ask(self._listed)
        if listed is None:
            return
        self._stored |= listed & set(self._shards)
        new = sorted(listed - set(self._shards) - self._ignored)

        def fetch(name: str) -> None:
            answer = ask(partial(self._manifest_of, name))
            if answer is not None and (everything or np.isin(answer[0].ids[:, 0], missing[:, 0]).any()):
                ask(partial(self._fetch, *answer))

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
        self._wait(0)
        if whole and time.monotonic() >= self._silent_until:
            self._stored |= self._tried(self._listed) or set()  # what other workers have uploaded
            self._upload(sorted(set(self._shards) - self._stored))
            self._wait(0)
            if self._shards:
                with contextlib.suppress(Exception):  # a job that may only read; all else is there
                    self._place.join(USED).write(b"")  # its time tells what may be pruned
        if self._uploader is not None:
            self._uploader.shutdown()
            self._uploader = None

    def send(self, names: Iterable[str]) -> list[str]:
        """Copy the shards of these names to the store, as far as it lacks them.

        The names of those that were found damaged, and were removed instead.
        """
        lacked = set(names)
        if lacked:
            lacked -= self._waited(self._listed)
        broken = self.damaged(number for number, name in enumerate(self._names) if name in lacked)
        if broken:
            self._note(f"stored features were damaged, and are replaced ({len(broken)} of {len(lacked)} shards)")
        for name in sorted(lacked - set(broken)):
            self._waited(partial(self._put, name))
        return broken

    def _upload(self, names: list[str]) -> None:
        """Begin to copy shards to the store, while this job computes."""
        for name in names:
            if time.monotonic() < self._silent_until:
                break
            self._uploader = self._uploader or ThreadPoolExecutor(1)
            self._uploads.append(self._uploader.submit(self._tried, partial(self._put, name)))
            self._wait(_MAX_UPLOADS)

    def _wait(self, most: int) -> None:
        """Until at most so many uploads are on their way."""
        while len(self._uploads) > most:
            self._uploads.pop(0).result()

    def _put(self, name: str) -> None:
        for file in (self._file(name), self._manifest(name)):
            self._place.join(file.name).upload(file)
        self._stored.add(name)

    def _tried(self, call: Callable[[], Answer]) -> Answer | None:
        """What the store answers; None where it fails, and is then left alone for a while."""
        try:
            return call()
        except Exception as error:  # each store's library has errors of its own
            self._silent_until = time.monotonic() + _SILENT_S
            self._say(
                f"{self._place.text} does not answer: features stay here, and are brought there later "
                f"({first_line(error)})"
            )
            return None

    def _waited(self, call: Callable[[], Answer]) -> Answer:
        """What the store answers, which is asked again while it fails."""
        try:
            answer = Asker(self._place.text, PATIENCE_S, self._say)(self._place.text, call)
        except RefusedError as error:
            raise storage_failed(error) from None
        self._silent_until = 0.0
        return answer

    def _say(self, text: str) -> None:
        """Note that the store fails, the first time."""
        told, self._told = self._told, True
        if not told:
            self._note(text)


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
