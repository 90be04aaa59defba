"""A set of features that lies in an object store as well: what one machine has computed, no other one computes.

The directory on the storage stays what is read from. Shards go to the store when they are written, and come from there
when they are used; they are never changed, their names are never given twice, and a manifest goes last. So machines
need not know of each other, and a store without locks or renaming will do.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.fs

from orchestrator.contents import Ids
from orchestrator.errors import RefusedError, first_line
from orchestrator.locations import Location
from orchestrator.runs import sync
from orchestrator.store import NUM_READERS, FeatureSet, Format, Shard, Values

_FAILS = (OSError, pa.ArrowException)
_BUFFER_BYTES = 8 * 2**20


class MirroredSet(FeatureSet):
    """A feature set whose shards are kept in `place` too.

    A store that does not answer costs no features: they stand on the storage, `note` is told so once, and the next job
    brings what is missing there.
    """

    def __init__(self, folder: Path, place: Location, note: Callable[[str], None]) -> None:
        super().__init__(folder)
        self._place = place
        self._note = note
        self._there: set[str] = set()
        """Shards that the store has."""
        self._manifests: dict[str, bytes] = {}
        """Of those that are not here."""
        self._unusable: set[str] = set()
        """Of a later version, or found damaged."""
        self._silent = False

    def refresh(self, names: Iterable[str] = ()) -> None:
        super().refresh(names)
        try:
            self._there = {name.removesuffix(".json") for name in self._listed() if name.endswith(".json")}
            unknown = sorted(self._there - set(self._shards) - self._broken - self._unusable)
            with ThreadPoolExecutor(NUM_READERS) as pool:
                texts = list(pool.map(lambda name: self._place.join(f"{name}.json").read(), unknown))
        except (RefusedError, *_FAILS) as error:
            self._failed(error)
            return
        for name, text in zip(unknown, texts, strict=True):
            try:
                shard = Shard.from_manifest(name, text)
            except ValueError:  # a store that shows a file before it is written to its end
                continue
            if shard is None:
                self._unusable.add(name)
            else:
                self._shards[name], self._manifests[name] = shard, text
        if unknown:
            self._index()

    def _listed(self) -> list[str]:
        selector = pa.fs.FileSelector(self._place.path, allow_not_found=True)
        return [info.base_name for info in self._place.fs.get_file_info(selector)]

    def values(self, number: int) -> Values:
        name = self.names[number]
        if name in self._manifests and not self._fetch(name):
            raise FileNotFoundError(f"{self._place.text}/{name}.safetensors")
        return super().values(number)

    def damaged(self, numbers: Iterable[int]) -> list[str]:
        numbers = list(numbers)
        wanted = [name for name in {self.names[number] for number in numbers} if name in self._manifests]
        with ThreadPoolExecutor(NUM_READERS) as pool:
            broken = [name for name, whole in zip(wanted, pool.map(self._fetch, wanted), strict=True) if not whole]
        found = super().damaged(number for number in numbers if self.names[number] not in broken)
        self.forget(broken)
        return [*broken, *found]

    def forget(self, names: Iterable[str]) -> None:
        names = list(names)
        for name in names:
            self._manifests.pop(name, None)
            self._unusable.add(name)  # a listing may show it for a while
        super().forget(names)

    def add(self, ids: Ids, values: Values, format: Format) -> str:
        name = super().add(ids, values, format)
        self._put(name)
        return name

    def settle(self) -> None:
        """Bring to the store what it lacks: of earlier jobs without one, or from when it did not answer."""
        for name in sorted(set(self._shards) - self._there - set(self._manifests)):
            self._put(name)

    def _put(self, name: str) -> None:
        try:
            for file in (self._file(name), self._manifest(name)):
                upload(file, self._place.join(file.name))
        except _FAILS as error:
            self._failed(error)
        else:
            self._there.add(name)

    def _fetch(self, name: str) -> bool:
        """Bring a shard from the store, if it is not here by now; False where it is gone, or not what was written."""
        shard, manifest = self._shards[name], self._manifests[name]
        if not self._manifest(name).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            digest, partial = hashlib.sha256(), self.folder / f"{uuid.uuid4().hex}.partial"
            try:
                with self._place.join(f"{name}.safetensors").stream(_BUFFER_BYTES) as source, partial.open("wb") as out:
                    while chunk := source.read(_BUFFER_BYTES):
                        digest.update(chunk)
                        out.write(chunk)
                if digest.hexdigest() != shard.sha256:
                    self._remove(name)
                    return False
                partial.replace(self._file(name))
                partial.write_bytes(manifest)
                partial.replace(self._manifest(name))
                sync(self.folder)
            except _FAILS as error:
                self._failed(error)
                return False
            finally:
                partial.unlink(missing_ok=True)
            self._trusted.add(name)
        self._manifests.pop(name, None)
        return True

    def _remove(self, name: str) -> None:
        """A damaged shard, from the store: the manifest first."""
        for file in (f"{name}.json", f"{name}.safetensors"):
            try:
                self._place.fs.delete_file(self._place.join(file).path)
            except _FAILS:  # somebody else has removed it
                continue

    def _failed(self, error: Exception) -> None:
        if not self._silent:
            self._note(f"{self._place.text} does not answer, the features stay on the storage: {first_line(error)}")
        self._silent = True


def upload(file: Path, place: Location) -> None:
    """A file to a store. Raises `OSError` or pyarrow's errors."""
    place.fs.create_dir(place.parent().path, recursive=True)
    with file.open("rb") as source, place.fs.open_output_stream(place.path) as out:
        shutil.copyfileobj(source, out, _BUFFER_BYTES)


def share(file: Path, place: Location) -> None:
    """A small file that all machines should have alike: here from the store, or there from here; the store's wins."""
    there = place.join(file.name)
    try:
        if there.stat() is not None:
            partial = file.with_name(f"{uuid.uuid4().hex}.partial")
            partial.write_bytes(there.read())
            partial.replace(file)
        elif file.exists():
            upload(file, there)
    except (RefusedError, *_FAILS):
        return  # the set of features says that the store does not answer
