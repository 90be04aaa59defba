"""A Run: a directory on the storage. What is in it, whether it is done, and who works on it."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import RefusedError, first_line
from orchestrator.job.directories import DirectoryStorage
from orchestrator.job.held import METRICS_FILE, MODEL
from orchestrator.job.places import local_path
from orchestrator.job.plans import Plan, read_plan_json
from orchestrator.job.storage import Storage


@dataclass(frozen=True)
class Run:
    """A run of ours, by its directory: job.yaml, plan.json, metrics.jsonl, checkpoints/, model/, results.json."""

    path: Path

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.name

    @property
    def storage(self) -> Storage:
        """Where it lies."""
        return DirectoryStorage(self.path.parent)

    @property
    def folder(self) -> Path:
        """What of it lies on this machine alone."""
        return self.storage.local_folder(self.name)

    def read(self, file: str) -> str | None:
        """The text of a small file, None where there is none."""
        return self.storage.read_text(f"{self.name}/{file}")

    @property
    def finished(self) -> bool:
        """Whether the figures and the model are there; results.json is written last."""
        return {"results.json", MODEL} <= set(self.storage.children(self.name))

    @property
    def busy(self) -> bool:
        """Whether a process works on it now."""
        return bool(self.storage.holder(self.name))

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
    def changed(self) -> float:
        """When something of it was written last, in seconds since 1970; of a finished run, when it finished."""
        return self.changed_at("results.json") or self.changed_at(METRICS_FILE, "lineage.json", "plan.json")

    def changed_at(self, *files: str) -> float:
        """When the newest of these files was written, in seconds since 1970; 0 where there is none."""
        times = []
        for name in files:
            with contextlib.suppress(OSError):
                times.append((self.path / name).stat().st_mtime)
        return max(times, default=0.0)

    @property
    def results(self) -> dict[str, Any]:
        """The final figures: accuracy with its interval, macro F1, loss, confusion, for each split."""
        if not self.finished:
            raise RefusedError(
                "not_found",
                f"the run {self.path} has not finished",
                mend=f"go on with it: orchestrator finetune {self.path / 'job.yaml'}",
            )
        return self._object("results.json")

    @property
    def lineage(self) -> dict[str, Any]:
        """Where the model came from: commits, fingerprint, versions, what only the running job knew."""
        return self._object("lineage.json")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One entry an epoch."""
        return read_lines(self.read(METRICS_FILE))

    @property
    def plan(self) -> Plan:
        """What it was decided to do."""
        try:
            return read_plan_json(self.read("plan.json") or "")
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged("plan.json", error) from None

    @property
    def is_earlier(self) -> bool:
        """Whether an earlier version laid it out, which had its sample table elsewhere; its model is as today's."""
        return (self.path / "samples.arrow").is_file()

    @property
    def model(self) -> Path:
        """The Hugging Face directory."""
        return self.path / MODEL

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

    def _object(self, file: str) -> dict[str, Any]:
        try:
            value = json.loads(self.read(file) or "")
            if not isinstance(value, dict):
                raise ValueError("no object")
        except ValueError as error:
            raise self._damaged(file, error) from None
        return value

    def _damaged(self, file: str, error: Exception) -> RefusedError:
        return RefusedError(
            "damaged",
            f"{self.path / file} cannot be understood: {first_line(error)}",
            expected="the file as this version wrote it",
            mend="start that run over with --fresh, or give the new one another name: --name",
        )


SEARCH_FILE, BEST_OF_SEARCH = "search.json", "best"
"""What the directory of a search holds instead of a plan, and the key there of the name of its best run."""


def open_run(path: str | Path) -> Run:
    """The run of that directory, of a search its best one. Raises `RefusedError` where there is none."""
    run = Run(local_path(path).absolute())
    if is_search(run):
        return _best_of(run)
    if run.storage.read(f"{run.name}/plan.json") is None:
        raise RefusedError(
            "not_found",
            f"there is no run {path}",
            expected="a directory that a finetune or pretrain command made",
            mend="list them: orchestrator runs",
        )
    return run


def is_search(run: Run) -> bool:
    """Whether the directory is a search's, whose trials are runs beside it."""
    return run.storage.read(f"{run.name}/{SEARCH_FILE}") is not None


def _best_of(search: Run) -> Run:
    best = search._object(SEARCH_FILE).get(BEST_OF_SEARCH)
    if not isinstance(best, str) or not best.startswith(f"{search.name}."):
        raise RefusedError(
            "not_found", f"the search {search.path} has not ended, so that it has no best run yet",
            expected="a search that has ended", mend="go on with it by the command that it began with",
        )  # fmt: skip
    return open_run(search.path.parent / best)


def open_finished(path: str | Path) -> Run:
    """The run of that directory, which has finished. Raises `RefusedError` where it has not, or is none."""
    run = open_run(path)
    _ = run.results
    return run


def list_searches(storage: str | Path) -> list[Run]:
    """The directories of searches below a storage directory, by name."""
    place = local_path(storage)
    return [Run(place / name) for name in DirectoryStorage(place).children() if (place / name / SEARCH_FILE).is_file()]


def is_trial_of(search: Run, name: str) -> bool:
    """Whether that is the name of a run of a search's trial: `the-search.0007`, `the-search.0007.1`."""
    return re.fullmatch(rf"{re.escape(search.name)}\.\d{{4,}}(\.\d+)?", name) is not None


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
    names = DirectoryStorage(place).children()
    return [Run(place / name) for name in names if (place / name / "plan.json").is_file()]


def read_lines(text: str | None) -> list[dict[str, Any]]:
    """The objects of JSON lines, without what was cut off; [] where there is no file."""
    lines = []
    for one in (text or "").split("\n"):  # and at no other character that Unicode calls the end of a line
        with contextlib.suppress(ValueError):
            line = json.loads(one)
            if isinstance(line, dict):
                lines.append(line)
    return lines
