"""A run that somebody works on: what is written goes to its storage, under the lease. The workers have it too."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import OrchestratorError, RefusedError
from orchestrator.job.files import PARTIAL, beside
from orchestrator.job.storage import Lease, Storage

SAMPLES = "samples"
"""The folder of a run that holds its sample table, in runs of an earlier version."""
ERROR_FILE = "error.txt"
"""The trace of what ended a run that failed."""
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
MODEL = "model"
TRACKING_FILE = "tracking.json"
"""Which runs of tracking services it is, and what they have of it."""
RAY_FOLDER = ".ray"
"""What Ray Train writes, which is of no use to us."""
_WRITTEN = (
    "results.json", "plan.json", "job.yaml", SAMPLES, "samples.json", "samples.arrow", "skipped.jsonl", "lineage.json",
    METRICS_FILE, ERROR_FILE, CHECKPOINTS, "features", "features.json", "tensorboard", MODEL,
    TRACKING_FILE, "wandb", "audit",
)  # fmt: skip
"""What a run may hold that is ours, first what says that it is there; anything else in it is somebody else's."""
_OLD_S = 3600.0
"""What was cut off that long ago, no process is at any more."""


@dataclass(frozen=True)
class HeldRun:
    """A run and the lease of it. Names are relative to the run: `plan.json`, `checkpoints/step-00000120`."""

    storage: Storage
    lease: Lease

    @property
    def name(self) -> str:
        """The run's, in its storage."""
        return self.lease.name

    @property
    def place(self) -> str:
        """As the user knows it."""
        return self.storage.place_of(self.name)

    @property
    def folder(self) -> Path:
        """The folder of this machine for what the run needs while it is worked on; in a directory it is the run's."""
        return self.storage.local_folder(self.name)

    # --- small files ---

    def read(self, file: str) -> str | None:
        """The text of a small file, None where there is none."""
        return self.storage.read_text(self._of(file))

    def write(self, file: str, content: str | bytes) -> None:
        """Write a small file whole or not at all; text is UTF-8. Raises `OrchestratorError` where that fails."""
        self.storage.write(self._of(file), content.encode() if isinstance(content, str) else content, self.lease)

    def children(self, folder: str) -> list[str]:
        """Names of what lies directly below."""
        return self.storage.children(self._of(folder))

    def delete(self, name: str) -> None:
        """Remove a file or a folder, if it is there."""
        self.storage.delete(self._of(name), self.lease)
        shutil.rmtree(self.folder / name, ignore_errors=True)  # of a store: what this machine alone has

    # --- folders ---

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty local folder, on the run's own disk where that is a local one; gone afterwards."""
        folder = beside(self.folder / "scratch")
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise OrchestratorError(
                f"{folder.parent} cannot be written: {error.strerror}", expected="a disk with room",
                mend="make room; then the same command goes on",
            ) from error  # fmt: skip
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def committing(self, name: str) -> Iterator[Path]:
        """An empty local folder; what is in it is committed under this name at the end, whole or not at all.

        Nothing is committed where the context ends with an error.
        """
        with self.scratch() as folder:
            yield folder
            self.commit(folder, name)

    def commit(self, folder: Path, name: str) -> None:
        """Give a local folder to the run under this name, whole or not at all; it is here no more afterwards."""
        self.storage.commit(folder, self._of(name), self.lease)

    def opened(self, name: str) -> AbstractContextManager[Path]:
        """A committed folder, to read as long as the context lasts; all its files were compared with their digests.

        Raises `RefusedError`: `not_found`, or `damaged` where it is not as it was committed.
        """
        return self.storage.opened(self._of(name))

    def commits(self, below: str) -> list[str]:
        """Names of the committed folders below a name, sorted; whether they are whole, `opened` tells."""
        return [name.removeprefix(f"{self.name}/") for name in self.storage.commits(self._of(below))]

    def torn(self, below: str) -> list[str]:
        """Names of folders right below a name that were committed, and have lost what says so."""
        return [name.removeprefix(f"{self.name}/") for name in self.storage.torn(self._of(below))]

    # --- the whole run ---

    def collect_orphans(self, older_s: float = _OLD_S) -> None:
        """Remove what was left by writes that were cut off longer ago than that."""
        self.storage.collect_orphans(self.lease, older_s)

    def clear(self) -> None:
        """Remove what a run writes, and nothing else that may lie there."""
        there = self.children("")
        for name in _WRITTEN:  # cut short after the first ones, the same command starts over
            for child in there:
                if child.removesuffix(PARTIAL) == name:  # as an earlier version left it when it was cut off
                    self.delete(child)
        shutil.rmtree(self.folder / RAY_FOLDER, ignore_errors=True)

    def leaving(self) -> HeldRun:
        """The same run for who tidies up behind what ended it: a store that is away is asked for seconds alone."""
        return HeldRun(self.storage.leaving(), self.lease)

    def _of(self, name: str) -> str:
        return f"{self.name}/{name}".rstrip("/")


JOB_VARIABLE = "ORCHESTRATOR_JOB"
"""In the environment of a job that was submitted to a cluster: its id there."""


def this_process() -> str:
    """Who holds a lease, as others are told."""
    job = os.environ.get(JOB_VARIABLE)
    return f"process {os.getpid()} on {socket.gethostname()}" + (f" (job {job})" if job else "")


def works_for(lease: Lease, job: str) -> bool:
    """Whether its holder worked for that job on a cluster, or for another attempt of it."""
    return f" (job {job.rpartition('.')[0]}." in lease.owner


@contextlib.contextmanager
def hold(storage: Storage, name: str) -> Iterator[HeldRun]:
    """The run of that name, for this process alone as long as the context lasts; it is made if there is none.

    Raises `RefusedError`: `busy` where another one works on it, `usage` where what has its place is no run of ours.
    """
    _refuse_foreign(storage, name)
    with storage.acquire(name, this_process()) as lease:
        run = HeldRun(storage, lease)
        run.collect_orphans()
        try:
            yield run
        finally:
            with contextlib.suppress(OrchestratorError):  # a store that is away: what ended the job is said, not this
                if not run.leaving().children(""):
                    storage.give_up(lease)


def foreign_in(names: Iterable[str]) -> list[str]:
    """Those of the names in a run's directory that are none of a run's."""
    return [name for name in names if name.removesuffix(PARTIAL) not in _WRITTEN]


def _refuse_foreign(storage: Storage, name: str) -> None:
    there = storage.children(name)
    foreign = foreign_in(there)
    is_file = storage.local_folder(name).is_file()
    if is_file or (foreign and "plan.json" not in there):
        raise RefusedError(
            "usage",
            f"{storage.place_of(name)} is "
            + ("a file" if is_file else f"no run of ours, and not empty: it holds {foreign[0]}"),
            expected="a directory that is empty, new, or a run",
            mend="give the run another name (--name) or another place (--storage)",
        )
