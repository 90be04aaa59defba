"""A Run, in a directory or in an object store: what is in it, whether it is done, and who works on it."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrator.errors import RefusedError, first_line, missing_extra
from orchestrator.job.directories import DirectoryStorage
from orchestrator.job.held import METRICS_FILE, MODEL
from orchestrator.job.places import SECRET, holds_secret, is_uri, local_path, plain_path
from orchestrator.job.plans import Plan, read_plan_json
from orchestrator.job.spec import Job
from orchestrator.job.storage import Storage

_ASKED_AT_ONCE = 16
"""Runs of an object store that are looked at together."""


def open_storage(
    place: str, ttl_s: float | None = None, patience_s: float | None = None, note: Callable[[str], None] | None = None
) -> Storage:
    """The storage at a path or a URI. Raises `RefusedError` where no installed library opens it.

    Of an object store: a lease of it lasts for `ttl_s` without being renewed; where it does not answer it is asked
    again for `patience_s`, and `note` is told so.
    """
    place = plain_path(place)
    if not is_uri(place):
        return DirectoryStorage(local_path(place).absolute())
    if holds_secret(place):
        raise RefusedError("usage", f"the place of the runs {SECRET}", mend="take it out of the URI")
    try:
        from orchestrator.job.object_storage import ObjectStorage
    except ModuleNotFoundError as error:  # pyarrow
        raise missing_extra(error) or error from None
    return ObjectStorage(place, ttl_s, patience_s, note)


@dataclass(frozen=True)
class Run:
    """A run of ours, by its place: job.yaml, plan.json, metrics.jsonl, checkpoints/, model/, results.json."""

    at: Path | str
    """Its directory, or its URI in an object store."""
    of: Storage | None = field(default=None, repr=False, compare=False)
    """Where it lies, as it was opened already."""

    @property
    def place(self) -> str:
        """Its directory or URI, as a text."""
        return str(self.at)

    @property
    def path(self) -> Path:
        """Its directory. Raises `RefusedError` where it lies in an object store, and has none."""
        if isinstance(self.at, str):
            raise RefusedError(
                "usage", f"the run {self.at} lies in an object store, and has no directory",
                mend="run.model is a copy of its model on this machine; run.read gives a small file; run.place its URI",
            )  # fmt: skip
        return self.at

    @property
    def name(self) -> str:
        """The last part of its place."""
        return self.place.rpartition("/")[2]

    @cached_property
    def storage(self) -> Storage:
        """Where it lies."""
        return self.of or open_storage(self.at.rpartition("/")[0] if isinstance(self.at, str) else str(self.at.parent))

    @property
    def folder(self) -> Path:
        """What of it lies on this machine alone."""
        return self.storage.local_folder(self.name)

    def read(self, file: str) -> str | None:
        """The text of a small file, None where there is none."""
        return self.storage.read_text(f"{self.name}/{file}")

    @property
    def is_there(self) -> bool:
        """Whether anything stands at its place."""
        return bool(self.storage.children(self.name)) or (isinstance(self.at, Path) and self.at.exists())

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
        times = self.storage.times(self.name)
        return max((times[name] for name in files if name in times), default=0.0)

    @property
    def results(self) -> dict[str, Any]:
        """The final figures: accuracy with its interval, macro F1, loss, confusion, for each split."""
        if not self.finished:
            raise RefusedError(
                "not_found",
                f"the run {self.place} has not finished",
                mend=self.mend,
            )
        return self._object("results.json")

    @property
    def mend(self) -> str:
        """How one that has not finished goes on."""
        if isinstance(self.at, str):
            return "go on with it: the command that began it, on any machine"
        return f"go on with it: orchestrator finetune {self.at / 'job.yaml'}"

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
        return "samples.arrow" in self.storage.times(self.name)

    @property
    def model(self) -> Path:
        """The Hugging Face directory; of a run in an object store a copy on this machine, fetched when it is asked for.

        Raises `RefusedError`, there: `not_found`, or `damaged`.
        """
        return self.storage.copy_of(f"{self.name}/{MODEL}")

    @property
    def figures(self) -> dict[str, Any]:
        """Those of the test split, or of the validation split where there is no test split."""
        figures = self.results.get("test") or self.results.get("validation")
        if figures is None:
            raise RefusedError(
                "data", f"the run {self.place} held no sample back, so it has no figures",
                mend="measure it on other data: orchestrator evaluate",
            )  # fmt: skip
        return dict(figures)

    @property
    def accuracy(self) -> float:
        """Of the `figures`. Only a task with one class a sample has it."""
        if "accuracy" not in self.figures:
            raise RefusedError(
                "usage", f"the task of {self.place} is {self.results['task']}, which has no accuracy",
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
            f"{self.place}/{file} cannot be understood: {first_line(error)}",
            expected="the file as this version wrote it",
            mend="start that run over with --fresh, or give the new one another name: --name",
        )


SEARCH_FILE, BEST_OF_SEARCH = "search.json", "best"
"""What the directory of a search holds instead of a plan, and the key there of the name of its best run."""


def run_in(storage: Storage, name: str) -> Run:
    """The run of that name in a storage, whether it is there or not."""
    at = storage.path / name if isinstance(storage, DirectoryStorage) else storage.place_of(name)
    return Run(at, storage)


_USUAL = Job.model_fields["storage"].default
"""The storage of a run that names none."""


def open_run(place: str | Path) -> Run:
    """The run at that directory or URI, of a search its best one; a name alone may be that of one in `runs`.

    Raises `RefusedError` where there is none.
    """
    text = plain_path(str(place)).rstrip("/") if isinstance(place, str) else ""
    run = Run(text if is_uri(text) else local_path(text or place).absolute())
    if is_search(run):
        return _best_of(run)
    if run.storage.read(f"{run.name}/plan.json") is None:
        run.storage.require()
        usual = Path(_USUAL)
        if isinstance(run.at, Path) and run.at.parent == Path.cwd() and (usual / run.name / "plan.json").is_file():
            return open_run(usual / run.name)
        raise RefusedError(
            "not_found",
            f"there is no run {place}",
            expected="a directory, or a place in a store, that a finetune or pretrain command made",
            mend=_nearest(run, Path(place)) or "list them: orchestrator runs",
        )
    return run


def _nearest(run: Run, given: Path) -> str:
    """`did you mean ...?` of a part of a run, and of a name that is like that of a run beside it, else ''."""
    if not isinstance(run.at, Path):
        return ""
    above = next((one for one in run.at.parents if (one / "plan.json").is_file()), None)
    if above is not None:
        return f"did you mean {above if given.is_absolute() else os.path.relpath(above)}?"
    places = [given.parent, *([Path(_USUAL)] if run.at.parent == Path.cwd() else [])]
    beside = {file.parent.name: file.parent for place in reversed(places) for file in place.glob("*/plan.json")}
    near = difflib.get_close_matches(given.name, beside, n=1)
    return f"did you mean {beside[near[0]]}?" if near else ""


def is_search(run: Run) -> bool:
    """Whether the directory is a search's, whose trials are runs beside it."""
    return run.storage.read(f"{run.name}/{SEARCH_FILE}") is not None


def _best_of(search: Run) -> Run:
    best = search._object(SEARCH_FILE).get(BEST_OF_SEARCH)
    if not isinstance(best, str) or not best.startswith(f"{search.name}."):
        raise RefusedError(
            "not_found", f"the search {search.place} has not ended, so that it has no best run yet",
            expected="a search that has ended", mend="go on with it by the command that it began with",
        )  # fmt: skip
    return run_in(search.storage, best)


def open_finished(place: str | Path) -> Run:
    """The run at that directory or URI, which has finished. Raises `RefusedError` where it has not, or is none."""
    run = open_run(place)
    _ = run.results
    return run


def list_searches(storage: str | Path) -> list[Run]:
    """The directories of searches below a storage directory, by name; in an object store there are none."""
    if is_uri(str(storage)):
        return []
    place = local_path(storage)
    return [Run(place / name) for name in DirectoryStorage(place).children() if (place / name / SEARCH_FILE).is_file()]


def is_trial_of(search: Run, name: str) -> bool:
    """Whether that is the name of a run of a search's trial: `the-search.0007`, `the-search.0007.1`."""
    return re.fullmatch(rf"{re.escape(search.name)}\.\d{{4,}}(\.\d+)?", name) is not None


def list_runs(storage: str | Path) -> list[Run]:
    """The runs of a storage, by name. Raises `RefusedError` where it is a file, or a store that refuses us."""
    if is_uri(str(storage)):
        return _in_store(open_storage(str(storage)))
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


def _in_store(storage: Storage) -> list[Run]:
    storage.require()
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        names = storage.children()
        there = pool.map(lambda name: "plan.json" in storage.times(name), names)
        return [run_in(storage, name) for name, is_run in zip(names, there, strict=True) if is_run]


def read_lines(text: str | None) -> list[dict[str, Any]]:
    """The objects of JSON lines, without what was cut off; [] where there is no file."""
    lines = []
    for one in (text or "").split("\n"):  # and at no other character that Unicode calls the end of a line
        with contextlib.suppress(ValueError):
            line = json.loads(one)
            if isinstance(line, dict):
                lines.append(line)
    return lines
