"""A Run: a directory on the storage. What is in it, whether it is done, and who works on it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from orchestrator.errors import RefusedError, first_line
from orchestrator.job.places import local_path
from orchestrator.job.plans import Plan, read_plan_json

SAMPLES = "samples"
"""The folder of a run that holds its sample table: while it is made, and in runs of an earlier version."""
ERROR_FILE = "error.txt"
"""The trace of what ended a run that failed."""
_LOOKED_AT_S = (0.01, 0.05, 0.2)
"""Waits before a lock counts as held: who lists the runs holds one for an instant, to see whether it is free."""
_OURS = frozenset(
    (
        "job.yaml", "plan.json", "samples", "samples.json", "samples.arrow", "skipped.jsonl", "lineage.json",
        "metrics.jsonl", "results.json", ERROR_FILE, ".lock", "checkpoints", "features", "features.json",
        "tensorboard", "model", ".ray",
    )
)  # fmt: skip
"""What a run's directory may hold that is ours: anything else in it is somebody else's, and is left alone."""


@dataclass(frozen=True)
class Run:
    """A run of ours, by its directory: job.yaml, plan.json, metrics.jsonl, checkpoints/, model/, results.json."""

    path: Path

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.name

    @property
    def finished(self) -> bool:
        """Whether the figures and the model are there; results.json is written last."""
        return (self.path / "results.json").is_file() and self.model.is_dir()

    @property
    def busy(self) -> bool:
        """Whether a process works on it now."""
        try:
            with (self.path / ".lock").open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # never begun, or not ours to look at
            return False
        return False

    @property
    def state(self) -> str:
        """`running`, `finished`, `unfinished` or, where its results cannot be understood, `damaged`."""
        if self.busy:
            return "running"
        if not self.finished:
            return "unfinished"
        try:
            _ = self.results
        except RefusedError:
            return "damaged"
        return "finished"

    @property
    def results(self) -> dict[str, Any]:
        """The final figures: accuracy with its interval, macro F1, loss, confusion, for each split."""
        if not self.finished:
            raise RefusedError(
                "not_found",
                f"the run {self.path} has not finished",
                mend=f"go on with it: orchestrator finetune {self.path / 'job.yaml'}",
            )
        return _read(self.path / "results.json")

    @property
    def lineage(self) -> dict[str, Any]:
        """Where the model came from: commits, fingerprint, versions, what only the running job knew."""
        return _read(self.path / "lineage.json")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One entry an epoch."""
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return []
        lines = []
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # the last one may be cut off; a run that goes on writes it again
                lines.append(json.loads(line))
        return lines

    @property
    def plan(self) -> Plan:
        """What it was decided to do."""
        return read_plan(self.path)

    @property
    def is_earlier(self) -> bool:
        """Whether an earlier version laid it out, which had its sample table elsewhere; its model is as today's."""
        return (self.path / "samples.arrow").is_file()

    @property
    def model(self) -> Path:
        """The Hugging Face directory."""
        return self.path / "model"

    @property
    def figures(self) -> dict[str, Any]:
        """Those of the test split, or of the validation split where there is no test split."""
        figures = self.results.get("test") or self.results.get("validation")
        if figures is None:
            raise RefusedError(
                "data", f"the run {self.path} held no sample back, so it has no figures",
                mend="measure it on other data: orchestrator evaluate",
            )  # fmt: skip
        return dict(figures)

    @property
    def accuracy(self) -> float:
        """Of the `figures`. Only a task with one class a sample has it."""
        if "accuracy" not in self.figures:
            raise RefusedError(
                "usage", f"the task of {self.path} is {self.results['task']}, which has no accuracy",
                expected="one of " + ", ".join(key for key in self.figures), mend="use run.figures",
            )  # fmt: skip
        return float(self.figures["accuracy"])

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else works on this run meanwhile. The lock goes with the process, however it ends."""
        self._refuse_foreign()
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                file = (self.path / ".lock").open("a+")
            except FileNotFoundError:  # another one gave up the run just now
                continue
            with file, self._held(file):
                if still_there(file):
                    yield
                    return

    @contextlib.contextmanager
    def _held(self, file: TextIO) -> Iterator[None]:
        for wait_s in (*_LOOKED_AT_S, None):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if wait_s is not None:
                    time.sleep(wait_s)
                    continue
                file.seek(0)
                raise RefusedError(
                    "busy",
                    f"process {file.read().strip() or '?'} is working on the run {self.path}",
                    mend="wait for it, or give this one another name: --name",
                ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield

    def give_up(self) -> None:
        """Remove the directory of a run that never began, and that of the runs where nothing else is in it."""
        if [child.name for child in self.path.iterdir()] == [".lock"]:
            (self.path / ".lock").unlink()
            self.path.rmdir()
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()

    def clear(self) -> None:
        """Remove what a run writes, but its lock and a sample table being made; nothing else that may lie there."""
        # First what says that the run is there: cut short after that, the same command starts over.
        for name in ("results.json", "plan.json"):
            (self.path / name).unlink(missing_ok=True)
        for child in self.path.iterdir():
            if child.name in (".lock", f"{SAMPLES}.partial") or not _is_ours(child):
                continue
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()

    def _refuse_foreign(self) -> None:
        if not self.path.is_dir() or (self.path / "plan.json").is_file():
            return
        foreign = [child.name for child in self.path.iterdir() if not _is_ours(child)]
        if foreign:
            raise RefusedError(
                "usage",
                f"{self.path} is no run of ours, and not empty: it holds {foreign[0]}",
                expected="a directory that is empty, new, or a run",
                mend="give the run another name (--name) or another place (--storage)",
            )


def _is_ours(path: Path) -> bool:
    return path.name.removesuffix(".partial") in _OURS


def open_run(path: str | Path) -> Run:
    """The run of that directory. Raises `RefusedError` where there is none."""
    place = local_path(path)
    if not (place / "plan.json").is_file():
        raise RefusedError(
            "not_found",
            f"there is no run {path}",
            expected="a directory that a finetune or pretrain command made",
            mend="list them: orchestrator runs",
        )
    return Run(place)


def open_finished(path: str | Path) -> Run:
    """The run of that directory, which has finished. Raises `RefusedError` where it has not, or is none."""
    run = open_run(path)
    _ = run.results
    return run


def list_runs(storage: str | Path) -> list[Run]:
    """The runs below a storage directory, by name. Raises `RefusedError` where it is a file."""
    place = local_path(storage)
    if place.exists() and not place.is_dir():
        raise RefusedError(
            "usage",
            f"{storage} is a file",
            expected="the directory that holds the runs",
            mend="name a directory: --storage runs",
        )
    if not place.is_dir():
        return []
    return [Run(child) for child in sorted(place.iterdir()) if (child / "plan.json").is_file()]


def read_plan(path: Path) -> Plan:
    """The plan of a run's directory."""
    try:
        return read_plan_json((path / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path / "plan.json", error) from None


def write_file(path: Path, text: str) -> None:
    """Write a file whole or not at all; once this returns, it is on the disk under its name."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def still_there(file: TextIO) -> bool:
    """Whether an open file is the one at its place: a lock on one that was removed meanwhile holds nobody off."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        return False


def sync(path: Path) -> None:
    """Return once the file, or what a folder lists, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    return value


def _damaged(path: Path, error: Exception) -> RefusedError:
    return RefusedError(
        "damaged",
        f"{path} cannot be understood: {first_line(error)}",
        expected="the file as this version wrote it",
        mend="start that run over with --fresh, or give the new one another name: --name",
    )
