"""Runs in an object store: objects first, then one small object that says they are whole.

    <run>/plan.json                                                            a small file: one object
    <run>/checkpoints/step-00000120/00000007-000001-5be1f0aa/weights.safetensors   objects of a commit, then
    <run>/checkpoints/step-00000120/00000007-000001-5be1f0aa.json                  its manifest, the marker

Each commit has a folder of its own, and of several markers the highest version counts, whose first part is the number
of the lease. So whatever a driver writes that was away meanwhile, it neither touches objects of a newer commit nor
replaces it. A small file is one object under its own name: the lease is looked at before it is written, and a process
that stops just then for longer than a lease lives can replace a newer one's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pyarrow as pa

from orchestrator.data.leases import Answer, Leases
from orchestrator.data.locations import Location, asking, cached
from orchestrator.errors import OrchestratorError
from orchestrator.job import (
    VERSION,
    DirectoryStorage,
    Lease,
    Manifest,
    Storage,
    is_uri,
    local_path,
    make_manifest,
    next_version,
    number_of,
    run_was_taken,
)

TTL_S = 60.0
"""A lease that is not renewed for so long may be taken."""
PATIENCE_S = 60.0
"""A store that does not answer is asked again for so long."""
REQUEST_TIMEOUT_S = 15.0
_FIRST_WAIT_S, _MOST_WAIT_S = 0.2, 5.0
_REPLACED = 5
"""Times that a marker may vanish between listing and reading, because a newer commit replaces it."""
_BUFFER_BYTES = 8 * 2**20
_MARKER = re.compile(rf"({VERSION.pattern})\.json")
_COMMITTED = re.compile(rf"(.+)/({VERSION.pattern})(?:\.json|/.+)")
_NOT_TO_BE_MENDED_BY_WAITING = (
    "ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "EXPIRED_TOKEN",
    "INVALID_CLIENT_TOKEN_ID",
)  # fmt: skip
"""Errors as pyarrow's S3 names them."""


def open_storage(place: str, ttl_s: float = TTL_S, patience_s: float = PATIENCE_S) -> Storage:
    """The storage at a path or a URI. Raises `RefusedError` where no installed library opens it."""
    if is_uri(place):
        return ObjectStorage(cached(place), ttl_s, patience_s)
    return DirectoryStorage(local_path(place).absolute())


class ObjectStorage(Storage):
    """Runs below a place of an object store."""

    def __init__(self, root: Location, ttl_s: float = TTL_S, patience_s: float = PATIENCE_S) -> None:
        self.place = root.text
        self._root = root.asked_once(REQUEST_TIMEOUT_S)
        self._ttl_s = ttl_s
        self._patience_s = patience_s

    # --- who works on a run ---

    def acquire(self, name: str, owner: str) -> AbstractContextManager[Lease]:
        return self._leases(name).held(name, owner)

    def check(self, lease: Lease) -> None:
        self._leases(lease.name).check(lease)

    def holder(self, name: str) -> str:
        return self._leases(name).holder()

    def give_up(self, lease: Lease) -> None:
        """The last ticket stays: the next lease goes on from its number."""

    def local_folder(self, name: str) -> Path:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return cache / "orchestrator" / "runs" / hashlib.sha256(self.place.encode()).hexdigest()[:16] / name

    def _leases(self, name: str) -> Leases:
        return Leases(self._root.join(name), self._ttl_s, partial(self._asked, name))

    def _check(self, name: str, lease: Lease) -> None:
        assert lease.covers(name), (name, lease.name)
        self.check(lease)

    # --- small files ---

    def children(self, name: str = "") -> list[str]:
        names = self._asked(name, self._root.join(name).names)
        return sorted(child for child in names if not child.startswith("."))

    def read(self, name: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return self._asked(name, self._root.join(name).read)
        return None

    def write(self, name: str, content: bytes, lease: Lease) -> None:
        assert lease.covers(name), (name, lease.name)

        def put() -> None:
            self.check(lease)  # anew at each attempt: a store may be away for longer than a lease lives
            self._root.join(name).write(content)

        self._asked(name, put)

    def delete(self, name: str, lease: Lease) -> None:
        self._check(name, lease)
        if name == lease.name:  # the lease stays
            for child in self.children(name):
                self.delete(f"{name}/{child}", lease)
            return
        place = self._root.join(name)
        files = self._asked(name, partial(place.entries, recursive=True))
        for file in files:
            if _MARKER.fullmatch(file.uri.split("/")[-1]):
                self._remove(f"{name}/{file.uri}")
        if files:
            self._asked(name, place.delete_folder)
        else:
            self._remove(name)

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._asked(name, self._root.join(name).delete)

    # --- folders ---

    def commits(self, below: str) -> list[str]:
        files = self._asked(below, partial(self._root.join(below).entries, recursive=True))
        markers = (_COMMITTED.fullmatch(f"{below}/{file.uri}") for file in files if file.uri.endswith(".json"))
        return sorted({match[1] for match in markers if match and match.group().endswith(f"{match[2]}.json")})

    def find(self, name: str) -> Manifest | None:
        for _ in range(_REPLACED):
            versions = self._versions(name)
            text = self.read(f"{name}/{versions[-1]}.json") if versions else None
            if text is not None:
                return self._parsed(name, text)
        return None

    def commit(self, folder: Path, name: str, lease: Lease) -> Manifest:
        self._check(name, lease)
        before = self._versions(name)
        if before and number_of(before[-1]) > lease.number:
            raise run_was_taken(self.place_of(lease.name), lease)
        manifest = make_manifest(folder, next_version(lease, before[-1] if before else None))
        place = self._root.join(f"{name}/{manifest.version}")
        for file in manifest.files:
            self._asked(f"{name}/{file}", partial(place.join(file).upload, folder / file))
        problem = manifest.problem(self._sizes(name, manifest))
        if problem:
            raise OrchestratorError(
                f"{self.place_of(name)} is not what was sent: {problem}",
                expected="a store that keeps what it is given",
                mend="the same command goes on from the last checkpoint",
            )  # fmt: skip
        self.write(f"{name}/{manifest.version}.json", manifest.model_dump_json(indent=1).encode(), lease)
        with contextlib.suppress(OrchestratorError):  # it counts no more, and is collected another time
            for version in before:
                self._remove_version(name, version)
        shutil.rmtree(folder)
        return manifest

    def collect_orphans(self, lease: Lease, older_s: float) -> list[str]:
        self.check(lease)
        files = self._asked(lease.name, partial(self._root.join(lease.name).entries, recursive=True))
        now_ns = max((file.modified_ns for file in files), default=0)  # the lease was renewed just now
        newest_ns: dict[tuple[str, str], int] = {}
        current: dict[str, str] = {}
        for file in files:
            match = _COMMITTED.fullmatch(f"{lease.name}/{file.uri}")
            if match:
                name, version = match[1], match[2]
                newest_ns[name, version] = max(file.modified_ns, newest_ns.get((name, version), 0))
                if file.uri.endswith(f"{version}.json"):
                    current[name] = max(version, current.get(name, ""))
        orphans = [
            (name, version)
            for (name, version), modified_ns in newest_ns.items()
            if modified_ns and current.get(name) != version and now_ns - modified_ns >= older_s * 1e9
        ]
        for name, version in orphans:
            self._remove_version(name, version)
        return sorted(f"{name}/{version}" for name, version in orphans)

    def _versions(self, name: str) -> list[str]:
        """Those of the markers of a name, the one that counts last."""
        files = self._asked(name, self._root.join(name).entries)
        return sorted(match[1] for file in files if (match := _MARKER.fullmatch(file.uri)))

    def _remove_version(self, name: str, version: str) -> None:
        self._remove(f"{name}/{version}.json")
        self._asked(name, self._root.join(f"{name}/{version}").delete_folder)

    def _sizes(self, name: str, manifest: Manifest) -> dict[str, int]:
        place = self._root.join(f"{name}/{manifest.version}")
        return {file.uri: file.size for file in self._asked(name, partial(place.entries, recursive=True))}

    def _copy(self, name: str, manifest: Manifest, file: str, to: Path) -> None:
        stored = self._root.join(f"{name}/{manifest.version}/{file}")

        def copy() -> None:
            with stored.stream(_BUFFER_BYTES) as source, to.open("wb") as out:
                shutil.copyfileobj(source, out, _BUFFER_BYTES)

        self._asked(f"{name}/{file}", copy)

    def _asked(self, name: str, call: Callable[[], Answer]) -> Answer:
        """What the store answers; it is asked again while it fails. Raises `FileNotFoundError`, or `RefusedError`."""
        given_up_s, wait_s = time.monotonic() + self._patience_s, _FIRST_WAIT_S
        while True:
            try:
                return call()
            except FileNotFoundError:
                raise
            except (OSError, pa.ArrowException) as error:
                hopeless = isinstance(error, PermissionError) or any(
                    word in str(error) for word in _NOT_TO_BE_MENDED_BY_WAITING
                )
                if hopeless or time.monotonic() + wait_s > given_up_s:
                    with asking(self.place_of(name)):
                        raise
            time.sleep(wait_s * random.uniform(0.5, 1))
            wait_s = min(2 * wait_s, _MOST_WAIT_S)
