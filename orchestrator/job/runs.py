"""A Run, in a directory or in an object store: what is in it, whether it is done, and who works on it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrator.errors import RefusedError, first_line, missing_extra
from orchestrator.job.damage import damage_of, explaining, lost_in
from orchestrator.job.directories import DirectoryStorage
from orchestrator.job.held import CHECKPOINTS, METRICS_FILE, MODEL, HeldRun
from orchestrator.job.manifests import GONE
from orchestrator.job.places import SECRET, holds_secret, is_uri, local_path, plain_path
from orchestrator.job.plans import Plan, read_plan_json
from orchestrator.job.storage import Storage

AWAY_S = 600.0
"""A store that does not answer is asked again for so long by who has begun to work; training goes on meanwhile."""


def open_storage(
    place: str, ttl_s: float | None = None, patience_s: float | None = None,
    note: Callable[[str], None] | None = None, stop: Callable[[float], bool] | None = None,
) -> Storage:  # fmt: skip
    """The storage at a path or a URI. Raises `RefusedError` where no installed library opens it.

    Of an object store: a lease of it lasts for `ttl_s` without being renewed; where it does not answer it is asked
    again for `patience_s`, and `note` is told so; no longer than `stop` says.
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
    return ObjectStorage(place, ttl_s, patience_s, note, stop)


def patient(run: HeldRun, note: Callable[[str], None], stop: Callable[[float], bool] | None = None) -> HeldRun:
    """The same run for work that has begun: a store that is away is asked again for minutes, and `note` is told so.

    `stop`: whether the caller wants to end, and waits no longer for one that has been away for so many seconds: that
    raises `InterruptedRunError`.
    """
    return HeldRun(open_storage(run.storage.place, patience_s=AWAY_S, note=note, stop=stop), run.lease)


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
        return self._lost() == {}

    def _lost(self) -> dict[str, str] | None:
        """{file: what is wrong with it} of what its model cannot be built without; None where it has no figures yet."""
        there = self.storage.children(self.name)
        return lost_in(damage_of(self.storage, self.name, there)) if "results.json" in there else None

    @property
    def damage(self) -> dict[str, str]:
        """{file: what is wrong with it} where the figures are there, and not all that was written with them."""
        return damage_of(self.storage, self.name, self.storage.children(self.name))

    @property
    def busy(self) -> bool:
        """Whether a process works on it now."""
        return bool(self.storage.holder(self.name))

    @property
    def state(self) -> str:
        """`running`, `finished`, `unfinished` or, without its model or readable results, `damaged`."""
        if self.busy:
            return "running"
        lost = self._lost()
        if lost is None:
            return "unfinished"
        if lost:
            return "damaged"
        try:
            _ = self.read_object("results.json")
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
        lost = self._lost()
        if lost is None:
            raise RefusedError("not_found", f"the run {self.place} has not finished", mend=self.mend)
        if lost:
            raise self.damaged(lost)
        return self.read_object("results.json")

    @property
    def mend(self) -> str:
        """How one that has not finished goes on."""
        if isinstance(self.at, str):
            return "go on with it: the command that began it, on any machine"
        return f"go on with it: {self._command or 'the command that began it'}"

    @property
    def over(self) -> str:
        """How one that is of no use is trained again."""
        return f"start that run over with --fresh{f': {self._command} --fresh' if self._command else ''}"

    @property
    def _command(self) -> str:
        """That which makes it again, '' where it has no job.yaml to make it by."""
        there = isinstance(self.at, Path) and (self.at / "job.yaml").is_file()
        return f"orchestrator finetune {self.at}/job.yaml" if there else ""

    def damaged(self, wrong: Mapping[str, str], why: str = "") -> RefusedError:
        """The refusal for who needs these files, {file: what is wrong with it}; `why`: what that led to."""
        told = "; ".join([*([why] if why else []), *(f"{file} {what}" for file, what in wrong.items())])
        message = f"the run {self.place} is damaged: {told}"
        starts_over = "plan.json" in wrong
        if not starts_over and not self.storage.commits(f"{self.name}/{CHECKPOINTS}"):
            return RefusedError("damaged", message, mend=self.over)
        does = "starts it over" if starts_over else "writes it again"
        mend = f"the command that made the run {does}{f': {self._command}' if self._command else ''}"
        return RefusedError("damaged", message, expected="what it wrote", mend=mend)

    def unbuildable(self, why: str) -> RefusedError:
        """The refusal where nothing can be built from its model, with the files that are not as they were written."""
        wrong = explaining(self.damage)
        return self.damaged(wrong, why) if wrong else RefusedError(
            "damaged", why, expected="its files, and those beside it, as the run wrote them",
            mend=f"put back what was changed, or {self.over}",
        )  # fmt: skip

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """A refusal that its model's files lead to says which of them are not as they were written, if some are."""
        try:
            yield
        except RefusedError as error:
            wrong = explaining(self.damage) if error.reason != "damaged" else {}
            if wrong:
                raise self.damaged(wrong, error.message) from error
            raise

    @property
    def lineage(self) -> dict[str, Any]:
        """Where the model came from: commits, fingerprint, versions, what only the running job knew."""
        return self.read_object("lineage.json")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One entry an epoch."""
        return read_lines(self.read(METRICS_FILE))

    @property
    def plan(self) -> Plan:
        """What it was decided to do."""
        try:
            return read_plan_json(self._text("plan.json"))
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

    def _text(self, file: str) -> str:
        text = self.read(file)
        if text is None:
            raise self.damaged({file: GONE})
        return text

    def read_object(self, file: str) -> dict[str, Any]:
        """That of a small JSON file. Raises `RefusedError` (`damaged`) where it is gone, or holds none."""
        try:
            value = json.loads(self._text(file))
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
            mend=f"{self.over}; or give the new one another name: --name",
        )


def run_in(storage: Storage, name: str) -> Run:
    """The run of that name in a storage, whether it is there or not."""
    at = storage.path / name if isinstance(storage, DirectoryStorage) else storage.place_of(name)
    return Run(at, storage)


def read_lines(text: str | None) -> list[dict[str, Any]]:
    """The objects of JSON lines, without what was cut off; [] where there is no file."""
    lines = []
    for one in (text or "").split("\n"):  # and at no other character that Unicode calls the end of a line
        with contextlib.suppress(ValueError):
            line = json.loads(one)
            if isinstance(line, dict):
                lines.append(line)
    return lines
