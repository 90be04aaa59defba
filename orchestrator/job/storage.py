"""Storage of runs: one interface for a directory and for an object store.

A run works in a local folder. What is to last goes to its storage in two ways: a small file (`write`) or a whole folder
(`commit`), each of which is there whole or not at all. Names are relative to the storage, with slashes:
`my-run/plan.json`, `my-run/checkpoints/step-00000120`. A part that begins with a dot is the storage's own.

Who writes holds a lease of the run. Each acquisition gets a number higher than all before it; the number stands in what
is committed, so that a driver that was away and comes back replaces nothing of a newer one. A lease is plain data: the
driver holds it, its workers write with it (`held.py`).
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import FAILED, OrchestratorError, RefusedError, first_line, storage_failed
from orchestrator.job.files import beside
from orchestrator.job.manifests import Manifest

_UNREACHABLE = ("offline", "unauthorised")


@dataclass(frozen=True)
class Lease:
    """Who works on a run: JSON or pickle takes it to the workers."""

    name: str
    """The run's, in its storage."""
    owner: str
    """As others are told: a process and its machine."""
    number: int
    """Higher than that of every lease of this run before."""
    token: str
    """Unlike any other lease's."""

    def covers(self, name: str) -> bool:
        """Whether its holder may write there."""
        return name == self.name or name.startswith(f"{self.name}/")


def run_is_busy(place: str, owner: str) -> RefusedError:
    """The refusal for who wants the run at this place, which another one works on."""
    return RefusedError(
        "busy", f"{owner or 'another process'} is working on the run {place}",
        mend="wait for it, or give this one another name: --name",
    )  # fmt: skip


def run_was_taken(place: str, lease: Lease, owner: str = "") -> RefusedError:
    """The refusal for who held the run at this place, which `owner` has taken meanwhile."""
    return RefusedError(
        "busy",
        f"{owner or 'another process'} has taken over the run {place} from {lease.owner}: nothing is written there",
        mend="let the other one go on; once it has ended, the same command goes on from its last checkpoint",
    )


class Storage(ABC):
    """Where runs lie. Methods that reach it raise `OrchestratorError` with the place and the mend where it fails."""

    place: str
    """As messages name it, and as another process opens it."""

    def has_failed(self, error: BaseException) -> bool:
        """Whether an error says that this storage, or the one of the samples, does not answer or refuses us by now."""
        if isinstance(error, RefusedError):
            return error.reason in _UNREACHABLE and self.place in error.message
        return isinstance(error, OrchestratorError) and error.message.startswith(FAILED)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Around work that has begun: if this storage fails then, that is no refusal of the job any more."""
        try:
            yield
        except RefusedError as error:
            raise storage_failed(error) if self.place in error.message else error from None

    def leaving(self) -> Storage:
        """The same for who only tidies up behind an error: where it is away it is not waited for."""
        return self

    # --- who works on a run ---

    @abstractmethod
    def acquire(self, name: str, owner: str) -> AbstractContextManager[Lease]:
        """The lease of a run, as long as the context lasts. Raises `RefusedError` (`busy`) where another has it."""

    @abstractmethod
    def check(self, lease: Lease) -> None:
        """Return if nobody has taken the run over; raise `RefusedError` (`busy`) if somebody has."""

    @abstractmethod
    def give_up(self, lease: Lease) -> None:
        """Leave nothing behind of a run that never began; its holder calls this last, and writes no more."""

    @abstractmethod
    def holder(self, name: str) -> str:
        """Who works on a run, as far as a look from outside tells; '' if nobody does."""

    @abstractmethod
    def local_folder(self, name: str) -> Path:
        """The folder of this machine for what a run needs while it is worked on, and others never ask for."""

    @abstractmethod
    def require(self) -> None:
        """Return if runs can lie there. Raises `RefusedError` where the store refuses us, or has no such bucket."""

    # --- small files ---

    @abstractmethod
    def children(self, name: str = "") -> list[str]:
        """Names of what lies directly below: the runs of a storage, the files and folders of a run."""

    @abstractmethod
    def times(self, name: str) -> dict[str, float]:
        """{file: when it was written, in seconds since 1970} of the files directly below a name."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """A small file, None where there is none."""

    def read_text(self, name: str) -> str | None:
        """The text of a small file, None where there is none."""
        content = self.read(name)
        return None if content is None else content.decode(errors="replace")

    @abstractmethod
    def write(self, name: str, content: bytes, lease: Lease) -> None:
        """Write a small file, whole or not at all."""

    @abstractmethod
    def delete(self, name: str, lease: Lease) -> None:
        """Remove a file, a committed folder, or a folder with all below it; first what says that commits are there."""

    # --- folders ---

    @abstractmethod
    def commits(self, below: str) -> list[str]:
        """Names of the committed folders below a name, sorted."""

    def torn(self, below: str) -> list[str]:  # noqa: ARG002
        """Names of folders right below a name that were committed, and have lost what says so; an object store's are
        never seen so.
        """
        return []

    @abstractmethod
    def find(self, name: str) -> Manifest | None:
        """The manifest of a committed folder, None where there is none. Raises `RefusedError` (`damaged`)."""

    @abstractmethod
    def commit(self, folder: Path, name: str, lease: Lease) -> Manifest:
        """Give a local folder to the storage, whole or not at all; it is here no more afterwards.

        One that has this name is replaced; cut off in between, neither may be there. Raises `RefusedError` (`busy`),
        with the folder left as it is, where somebody has taken the run over.
        """

    @abstractmethod
    def collect_orphans(self, lease: Lease, older_s: float) -> list[str]:
        """Remove what commits left that were cut off longer ago than that, and say which."""

    @abstractmethod
    def copy_of(self, name: str, but: str = "") -> Path:
        """A folder of this machine with the files of a commit, to read as long as one likes; raises as `fetch` does.

        `but`: files whose names end so may be left out. In a directory it is the folder itself, whose digests nobody
        looks at here.
        """

    @abstractmethod
    def beginning_of(self, name: str, manifest: Manifest, file: str, num_bytes: int) -> bytes:
        """The first bytes of one file of a commit. Raises `FileNotFoundError`."""

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        """A local folder with the files of a commit, to read as long as the context lasts; raises as `fetch` does."""
        place = self.local_folder(name)
        folder = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.opened")
        try:
            self.fetch(name, folder)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def fetch(self, name: str, folder: Path) -> Manifest:
        """Copy a committed folder into a local one, replacing that; sizes and SHA-256 of all its files were compared.

        Raises `RefusedError`: `not_found`, or `damaged` where it is not as it was committed.
        """
        partial = beside(folder)
        tried: Manifest | None = None
        try:
            while True:
                manifest = self._manifest(name)
                problem = self._copy_all(name, manifest, partial)
                if not problem:
                    break
                if manifest == tried:  # else a newer one has replaced it while it was read
                    raise self._damaged(name, problem)
                tried = manifest
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return manifest

    def problems_of(self, name: str) -> dict[str, str] | None:
        """{file: what is wrong with it} of a commit, by names and sizes alone; None where no manifest tells."""
        with contextlib.suppress(RefusedError):
            manifest, newest = None, self.find(name)
            problems: dict[str, str] = {}
            while newest is not None and newest != manifest:  # else a newer one has replaced it meanwhile
                manifest = newest
                problems = manifest.problems(self._sizes(name, manifest))
                newest = self.find(name) if problems else manifest
            return None if newest is None else problems
        return None

    def _manifest(self, name: str) -> Manifest:
        manifest = self.find(name)
        if manifest is None:
            raise RefusedError(
                "not_found", f"there is no {self.place_of(name)}", expected="a committed folder",
                mend="look what there is: orchestrator runs",
            )  # fmt: skip
        return manifest

    def _copy_all(self, name: str, manifest: Manifest, into: Path) -> str:
        """Copy the files of a commit; what is wrong with them, '' if nothing is."""
        problem = manifest.problem(self._sizes(name, manifest))
        if problem:
            return problem
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir(parents=True)
        for file in manifest.files:
            (into / file).parent.mkdir(parents=True, exist_ok=True)
            try:
                self._copy(name, manifest, file, into / file)
            except FileNotFoundError:
                return f"{file} is not there"
        return manifest.changed(into)

    @abstractmethod
    def _sizes(self, name: str, manifest: Manifest) -> dict[str, int]:
        """{file: bytes} of what is there of a commit."""

    @abstractmethod
    def _copy(self, name: str, manifest: Manifest, file: str, to: Path) -> None:
        """Copy one file of a commit. Raises `FileNotFoundError`."""

    def place_of(self, name: str) -> str:
        """What lies there, as messages name it."""
        return f"{self.place.rstrip('/')}/{name}".rstrip("/")

    def _parsed(self, name: str, text: bytes) -> Manifest:
        try:
            return Manifest.model_validate_json(text)
        except ValueError as error:
            raise self._damaged(name, f"its manifest cannot be understood: {first_line(error)}") from None

    def _damaged(self, name: str, problem: str) -> RefusedError:
        return RefusedError(
            "damaged", f"{self.place_of(name)} is damaged: {problem}", expected="files as they were committed",
            mend="look at that storage; an earlier commit, or the same command with --fresh, does without it",
        )  # fmt: skip
