"""Runs in a directory: a commit is an fsync and a rename, a lease a lock of the operating system.

The lock goes with the process, however it ends, so nothing expires and nobody waits. Whoever removes the lock's file
lets another one in; then the number of the lease tells the first one that it has lost. On a file system that several
machines share, the lock holds as far as that file system has locks for all of them (NFS from version 4 does).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from orchestrator.errors import OrchestratorError, RefusedError
from orchestrator.job.files import PARTIAL, beside, remove_old, still_there, sync, write_file
from orchestrator.job.manifests import MANIFEST_FILE, Manifest, make_manifest, next_version
from orchestrator.job.storage import Lease, Storage, run_is_busy, run_was_taken

LOCK_FILE, LEASE_FILE = ".lock", ".lease.json"
_LOOKED_AT_S = (0.01, 0.05, 0.2)
"""Waits before a lock counts as held: who asks for the holder has it for an instant."""


class DirectoryStorage(Storage):
    """Runs below a directory of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.place = str(path)

    # --- who works on a run ---

    @contextlib.contextmanager
    def acquire(self, name: str, owner: str) -> Iterator[Lease]:
        folder = self.path / name
        while True:
            with self._writing(name):
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    file = (folder / LOCK_FILE).open("a")
                except FileNotFoundError:  # removed just now
                    continue
            with file:
                if not _locked(file, fcntl.LOCK_EX):
                    raise run_is_busy(self.place_of(name), self._lease(name).owner)
                if not still_there(file):
                    continue
                lease = Lease(name, owner, self._lease(name).number + 1, uuid.uuid4().hex[:8])
                with self._writing(name):
                    write_file(folder / LEASE_FILE, json.dumps(vars(lease)).encode())
                yield lease
                return

    def give_up(self, lease: Lease) -> None:
        folder = self.path / lease.name
        with contextlib.suppress(OSError):
            ours = {child.name for child in folder.iterdir()} <= {LOCK_FILE, LEASE_FILE}
            if ours and self._lease(lease.name) == lease:
                (folder / LEASE_FILE).unlink(missing_ok=True)
                (folder / LOCK_FILE).unlink()
                folder.rmdir()  # unless somebody came meanwhile
                self.path.rmdir()  # as long as no other run is there

    def check(self, lease: Lease) -> None:
        now = self._lease(lease.name)
        if now == lease:
            return
        if not now.number:
            raise OrchestratorError(
                f"{self.place_of(lease.name)}/{LEASE_FILE} cannot be read: it is not known who works on the run",
                expected="the run's directory as it was", mend="see that it is there; the same command goes on",
            )  # fmt: skip
        raise run_was_taken(self.place_of(lease.name), lease, now.owner)

    def holder(self, name: str) -> str:
        try:
            with (self.path / name / LOCK_FILE).open() as file:
                free = _locked(file, fcntl.LOCK_SH, waits=())
        except (OSError, OrchestratorError):  # never begun, not ours to look at, or no locks there
            return ""
        return "" if free else self._lease(name).owner or "another process"

    def require(self) -> None:
        require_no_file(self.path, self.place)  # it is made when the first run is

    def last_lease(self, name: str) -> Lease | None:
        """Of who held it last; None of a copy that was brought home, until it is gone on with here.

        Its number is 0 where it cannot be understood any more.
        """
        return None if self.read(f"{name}/{LEASE_FILE}") is None else self._lease(name)

    def local_folder(self, name: str) -> Path:
        return self.path / name

    def _lease(self, name: str) -> Lease:
        """The newest one of a run; number 0 where there was none, or its file is no longer to be understood."""
        try:
            return Lease(**json.loads((self.path / name / LEASE_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return Lease(name, "", 0, "")

    def _check(self, name: str, lease: Lease) -> None:
        assert lease.covers(name), (name, lease.name)
        self.check(lease)

    # --- small files ---

    def children(self, name: str = "") -> list[str]:
        folder = self.path / name
        if not folder.is_dir():
            return []
        return sorted(child.name for child in folder.iterdir() if not child.name.startswith("."))

    def times(self, name: str) -> dict[str, float]:
        times = {}
        for child in self.children(name):
            with contextlib.suppress(OSError):
                if (self.path / name / child).is_file():
                    times[child] = (self.path / name / child).stat().st_mtime
        return times

    def read(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise RefusedError(
                "damaged", f"{self.place_of(name)} cannot be read: {error.strerror}",
                expected="a file that may be read",
                mend="see that it is one and that you may read it, or start that run over with --fresh",
            ) from error  # fmt: skip

    def write(self, name: str, content: bytes, lease: Lease) -> None:
        self._check(name, lease)
        with self._writing(name):
            _make_folder((self.path / name).parent)
            write_file(self.path / name, content)

    def delete(self, name: str, lease: Lease) -> None:
        self._check(name, lease)
        path = self.path / name
        with self._writing(name):
            if name == lease.name:
                for child in self.children(name):
                    self.delete(f"{name}/{child}", lease)
            elif path.is_dir() and not path.is_symlink():
                gone = beside(path)  # all that it holds is gone at once
                path.rename(gone)
                sync(path.parent)
                shutil.rmtree(gone, ignore_errors=True)  # NFS keeps a file that somebody has open
            else:
                path.unlink(missing_ok=True)

    # --- folders ---

    def commits(self, below: str) -> list[str]:
        found = []
        for folder, inner, files in os.walk(self.path / below):  # what is removed meanwhile is passed over
            inner[:] = [name for name in inner if not name.startswith(".")]
            if MANIFEST_FILE in files:
                found.append(Path(folder).relative_to(self.path).as_posix())
        return sorted(found)

    def torn(self, below: str) -> list[str]:
        folders = [f"{below}/{child}" for child in self.children(below) if (self.path / below / child).is_dir()]
        return [name for name in folders if not (self.path / name / MANIFEST_FILE).exists()]

    def find(self, name: str) -> Manifest | None:
        text = self.read(f"{name}/{MANIFEST_FILE}")
        return None if text is None else self._parsed(name, text)

    def commit(self, folder: Path, name: str, lease: Lease) -> Manifest:
        self._check(name, lease)
        path = self.path / name
        before = None
        with contextlib.suppress(RefusedError):  # a damaged one may be replaced
            before = self.find(name)
        manifest = make_manifest(folder, next_version(lease.number, before.version if before else None))
        with self._writing(name):
            manifest.write(folder)
            _make_folder(path.parent)
            whole = _on_the_same_disk(folder, beside(path))
            for file in sorted(whole.rglob("*")):
                sync(file)
            sync(whole)
            self._check(name, lease)  # all that has taken its time
            replaced = beside(path)
            if path.exists():
                path.rename(replaced)
            whole.rename(path)
            sync(path.parent)
            shutil.rmtree(replaced, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
        return manifest

    def copy_of(self, name: str, but: str = "") -> Path:  # noqa: ARG002  # all of it is here
        return self.path / name

    def beginning_of(self, name: str, manifest: Manifest, file: str, num_bytes: int) -> bytes:  # noqa: ARG002
        with (self.path / name / file).open("rb") as content:
            return content.read(num_bytes)

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        manifest = self._manifest(name)
        try:
            problem = manifest.problem(self._sizes(name, manifest)) or manifest.changed(self.path / name)
        except OSError as error:
            problem = f"{error.filename} cannot be read: {error.strerror}"
        if problem:
            raise self._damaged(name, problem)
        yield self.path / name  # as it lies there: nobody removes it but who holds the run

    def collect_orphans(self, lease: Lease, older_s: float) -> list[str]:
        self.check(lease)
        removed = remove_old(self.path / lease.name, f".*{PARTIAL}", older_s)
        return [path.relative_to(self.path).as_posix() for path in removed]

    def _sizes(self, name: str, manifest: Manifest) -> dict[str, int]:
        paths = {file: self.path / name / file for file in manifest.files}
        return {file: path.stat().st_size for file, path in paths.items() if path.is_file()}

    def _copy(self, name: str, manifest: Manifest, file: str, to: Path) -> None:  # noqa: ARG002  # one version alone is here
        shutil.copyfile(self.path / name / file, to)

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """An error of the disk becomes one of ours."""
        try:
            yield
        except OSError as error:
            raise OrchestratorError(
                f"{self.place_of(name)} cannot be written: {error.strerror or error}",
                expected="a directory that may be written, on a disk with room",
                mend="make room, or give it another place: --storage; then the same command goes on",
            ) from error


def require_no_file(path: Path, shown: str) -> None:
    """Raise `RefusedError` where the place of runs is a file; `shown`: as the message has it."""
    if path.exists() and not path.is_dir():
        raise RefusedError(
            "usage", f"{shown} is a file", expected="the directory that holds the runs",
            mend="name a directory: --storage runs",
        )  # fmt: skip


def _locked(file: TextIO, how: int, waits: tuple[float, ...] = _LOOKED_AT_S) -> bool:
    """Whether the lock was got. Raises `OrchestratorError` on a file system that has none."""
    for wait_s in (*waits, None):
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait_s is not None:
                time.sleep(wait_s)
        except OSError as error:
            raise OrchestratorError(
                f"{file.name} cannot be locked: {error.strerror}", expected="a file system with locks",
                mend="give the run another place: --storage",
            ) from error  # fmt: skip
        else:
            return True
    return False


def _make_folder(path: Path) -> None:
    """Make a folder, with those above it; once this returns, they are on the disk."""
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def _on_the_same_disk(folder: Path, copy: Path) -> Path:
    """The folder itself where it can be renamed to its place, else a copy of it there."""
    if folder.stat().st_dev == copy.parent.stat().st_dev:
        return folder
    shutil.copytree(folder, copy)
    return copy
