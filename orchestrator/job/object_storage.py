"""Runs in an object store: objects first, then one small object that says they are whole.

    <run>/plan.json                                                            a small file: one object
    <run>/checkpoints/step-00000120/00000007-000001-5be1f0aa/weights.safetensors   objects of a commit, then
    <run>/checkpoints/step-00000120/00000007-000001-5be1f0aa.json                  its manifest, the marker
    .data/<digest>/00000000-000001-9c02e6d1.json                                   of what several runs share

Each commit has a folder of its own, and of several markers the highest version counts, whose first part is the number
of the lease. So whatever a driver writes that was away meanwhile, it neither touches objects of a newer commit nor
replaces it. A small file is one object under its own name: the lease is looked at before it is written, and a process
that stops just then for longer than a lease lives can replace a newer one's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from orchestrator.errors import OrchestratorError, RefusedError
from orchestrator.job.asking import PATIENCE_S, Answer, Asker, UnansweredError, is_of_the_file
from orchestrator.job.files import PARTIAL, beside, remove_old
from orchestrator.job.leases import Leases
from orchestrator.job.locations import Found, Location, cached
from orchestrator.job.manifests import VERSION, Manifest, make_manifest, next_version, number_of
from orchestrator.job.storage import Lease, Storage, run_was_taken

LEAVING_S = 5.0
"""A store that does not answer is asked for so long by who only tidies up behind an error."""
TTL_S = 60.0
"""A lease that is not renewed for so long may be taken."""
REQUEST_TIMEOUT_S = 15.0
_REPLACED = 5
"""Times that a marker may vanish between listing and reading, because a newer commit replaces it."""
_BUFFER_BYTES = 8 * 2**20
_MARKER = re.compile(rf"({VERSION.pattern})\.json")
_COMMITTED = re.compile(rf"(.+)/({VERSION.pattern})(?:\.json|/.+)")
_COPIES = ".copies"
"""Of this machine: folders that were fetched, or sent, by their names and versions."""
_opened: dict[str, tuple[Location, Location]] = {}
"""Place -> (with the client's own retries, without them for use under `Asker`): to open one takes a quarter second."""


class ObjectStorage(Storage):
    """Runs below a place of an object store."""

    def __init__(
        self, place: str, ttl_s: float | None = None, patience_s: float | None = None,
        note: Callable[[str], None] | None = None, stop: Callable[[float], bool] | None = None,
    ) -> None:  # fmt: skip
        """`patience_s`: a store that does not answer is asked again for so long; `note` is told of it meanwhile, and
        where `stop`, which is
        told for how many seconds, says so it is asked no more.

        Raises `RefusedError` where no installed library opens the place.
        """
        self._root = asked_once(cached(place.rstrip("/")))
        self.place = self._root.text
        self._ttl_s = TTL_S if ttl_s is None else ttl_s
        self._ask = Asker(self.place, PATIENCE_S if patience_s is None else patience_s, note, stop)
        self._given_up: set[str] = set()
        """Names of the runs that never began."""

    def leaving(self) -> Storage:
        return ObjectStorage(self.place, self._ttl_s, LEAVING_S)

    # --- who works on a run ---

    @contextlib.contextmanager
    def acquire(self, name: str, owner: str) -> Iterator[Lease]:
        leases = self._leases(name)
        with contextlib.ExitStack() as behind:
            lease = behind.enter_context(leases.held(name, owner))
            try:
                yield lease
            finally:
                behind.close()
                if name in self._given_up:  # nothing of it is there, so that numbers may begin anew
                    self._given_up.remove(name)
                    leases.forget(lease)

    def check(self, lease: Lease) -> None:
        self._leases(lease.name).check(lease)

    def holder(self, name: str) -> str:
        return self._leases(name).holder()

    def give_up(self, lease: Lease) -> None:
        self._given_up.add(lease.name)

    def require(self) -> None:
        if self._asked("", self._root.lacks_bucket):
            bucket = self._root.path.split("/")[0]
            raise RefusedError(
                "not_found", f"the storage {self.place}: there is no bucket {bucket!r}",
                expected="a bucket that is there", mend="make it, or correct storage (--storage)",
            )  # fmt: skip

    def local_folder(self, name: str) -> Path:
        return self._cache / name

    @property
    def _cache(self) -> Path:
        """The folder of this machine for this storage; when no job runs, it may be removed."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return cache / "orchestrator" / "runs" / hashlib.sha256(self.place.encode()).hexdigest()[:16]

    def _asked(self, name: str, call: Callable[[], Answer]) -> Answer:
        """What the store answers for what has that name, as `Asker` asks."""
        return self._ask(self.place_of(name), call)

    def _leases(self, name: str) -> Leases:
        return Leases(self._root.join(name), self._ttl_s, partial(self._asked, name))

    def _check(self, name: str, lease: Lease) -> None:
        assert lease.covers(name), (name, lease.name)
        self.check(lease)

    # --- small files ---

    def children(self, name: str = "") -> list[str]:
        names = self._asked(name, self._root.join(name).names)
        return sorted(child for child in names if not child.startswith("."))

    def hidden(self) -> list[str]:
        """What `children` leaves out at the top: what is of several runs, and the run of a ranking at work."""
        return sorted(child for child in self._asked("", self._root.names) if child.startswith("."))

    def times(self, name: str) -> dict[str, float]:
        files = self._asked(name, self._root.join(name).entries)
        return {file.uri: file.modified_ns / 1e9 for file in files if not file.uri.startswith(".")}

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
            if not versions:
                return None
            text = self.read(f"{name}/{versions[-1]}.json")
            if text is not None:
                return self._parsed(name, text)
        return None

    def commit(self, folder: Path, name: str, lease: Lease) -> Manifest:
        self._check(name, lease)
        before = self._versions(name)
        if before and number_of(before[-1]) > lease.number:
            raise run_was_taken(self.place_of(lease.name), lease)
        manifest = make_manifest(folder, next_version(lease.number, before[-1] if before else None))
        self._send(folder, name, manifest)
        self.write(f"{name}/{manifest.version}.json", manifest.model_dump_json(indent=1).encode(), lease)
        with contextlib.suppress(OrchestratorError):  # it counts no more, and is collected another time
            for version in before:
                self._remove_version(name, version)
        shutil.rmtree(folder)
        return manifest

    def _send(self, folder: Path, name: str, manifest: Manifest) -> None:
        """Upload the files of a commit, and see that they arrived. Raises `OrchestratorError`."""
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

    def collect_orphans(self, lease: Lease, older_s: float) -> list[str]:
        self.check(lease)
        for pattern in (f".*{PARTIAL}", ".*.opened"):
            remove_old(self.local_folder(lease.name), pattern, older_s)
        files = self._asked(lease.name, partial(self._root.join(lease.name).entries, recursive=True))
        now_ns = max((file.modified_ns for file in files), default=0)  # the lease was renewed just now
        return self._collect(lease.name, files, now_ns - int(older_s * 1e9))

    def _collect(self, below: str, files: Sequence[Found], before_ns: int) -> list[str]:
        """Remove the versions that no marker counts and that were written before; which these were.

        `files`: what lies below that name.
        """
        newest_ns: dict[tuple[str, str], int] = {}
        current: dict[str, str] = {}
        for file in files:
            match = _COMMITTED.fullmatch(f"{below}/{file.uri}")
            if match:
                name, version = match[1], match[2]
                newest_ns[name, version] = max(file.modified_ns, newest_ns.get((name, version), 0))
                if file.uri.endswith(f"{version}.json"):
                    current[name] = max(version, current.get(name, ""))
        orphans = [
            (name, version)
            for (name, version), modified_ns in newest_ns.items()
            if modified_ns and current.get(name) != version and modified_ns <= before_ns
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

    # --- what runs share, under the digest of its content ---

    def share(self, folder: Path, name: str) -> Path:
        """Give a folder to all runs, under a name that is of its content; a folder of this machine that holds it then.

        It needs no lease: who gives the same at this moment does no harm. One that is there already and whole is used.
        """
        with contextlib.suppress(RefusedError):  # damaged: it is replaced
            there = self.find(name)
            files = make_manifest(folder, there.version).files if there else None
            if there and files == there.files and not there.problem(self._sizes(name, there)):
                return self._keep(folder, self._copies_of(name) / there.version)
        before = self._versions(name)
        count = int(before[-1].split("-")[1]) + 1 if before else 1
        manifest = make_manifest(folder, f"{0:08d}-{count:06d}-{uuid.uuid4().hex[:8]}")
        self._send(folder, name, manifest)
        marker = self._root.join(f"{name}/{manifest.version}.json")
        self._asked(name, partial(marker.write, manifest.model_dump_json(indent=1).encode()))
        return self._keep(folder, self._copies_of(name) / manifest.version)

    def share_file(self, file: Path, name: str) -> bool:
        """The same for one file; whether it was not there before."""
        place = self._root.join(name)
        size = {found.uri: found.size for found in self._asked(name, place.parent().entries)}.get(name.split("/")[-1])
        if size != file.stat().st_size:
            self._asked(name, partial(place.upload, file))
        return size is None

    def drop_shared(self, name: str) -> None:
        """Remove a file or a folder that runs share; first what says that it is there."""
        versions = self._versions(name)
        for version in versions:
            self._remove_version(name, version)
        if not versions:
            self._remove(name)

    def collect_shared(self, below: str, older_s: float) -> list[str]:
        """Remove what is left of shared folders whose upload was cut off, or that were replaced; which these were."""
        files = self._asked(below, partial(self._root.join(below).entries, recursive=True))
        return self._collect(below, files, time.time_ns() - int(older_s * 1e9))

    def copy_of(self, name: str, but: str = "") -> Path:
        while True:
            manifest = self._manifest(name)
            files = {file: stored for file, stored in manifest.files.items() if not but or not file.endswith(but)}
            wanted = manifest.model_copy(update={"files": files})
            folder = self._copies_of(name) / (manifest.version + (f"-but{but}" if but else ""))
            sizes = {file: (folder / file).stat().st_size for file in files if (folder / file).is_file()}
            if not wanted.problem(sizes):
                return folder
            shutil.rmtree(folder, ignore_errors=True)
            fetched = beside(folder)
            problem = self._copy_all(name, wanted, fetched)
            if not problem:
                return self._keep(fetched, folder)
            shutil.rmtree(fetched, ignore_errors=True)
            if self._manifest(name) == manifest:  # else a newer one has replaced it while it was read
                raise self._damaged(name, problem)

    def beginning_of(self, name: str, manifest: Manifest, file: str, num_bytes: int) -> bytes:
        place = self._root.join(f"{name}/{manifest.version}/{file}")

        def read() -> bytes:
            with place.open() as content:
                return content.read(num_bytes)

        return self._asked(f"{name}/{file}", read)

    def _keep(self, folder: Path, place: Path) -> Path:
        """Where a copy stands on this machine from now on; `folder` becomes that, unless there is one."""
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.is_dir():
            whole = beside(place)
            shutil.move(folder, whole)
            with contextlib.suppress(OSError):  # another process was faster
                whole.rename(place)
            folder = whole
        shutil.rmtree(folder, ignore_errors=True)
        return place

    def _copies_of(self, name: str) -> Path:
        return self._cache / _COPIES / name


def read_once(root: Location, uri: str) -> bytes:
    """The content of a file below a place in a store, which is asked once.

    Raises `UnansweredError` where the store fails, and another `OSError` where it says that this file cannot be had.
    """
    try:
        return asked_once(root).join(uri).read()
    except OSError as error:
        if is_of_the_file(error):
            raise
        raise UnansweredError(str(error)) from None


def asked_once(root: Location) -> Location:
    """The same place without the client's own retries, for use under `Asker`."""
    known = _opened.get(root.text)
    if known is None or known[0] is not root:
        known = _opened[root.text] = (root, root.asked_once(REQUEST_TIMEOUT_S))
    return known[1]
