"""The trials of a search and their record, `trials.jsonl`: a line a trial that has ended, which alone is the truth.

search.json      what is searched: digests of job and space, of data and backbones, and in the end the best
proposed.jsonl   the configuration of each trial, from before it began
trials.jsonl     what came of each that has ended
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.errors import JobError, RefusedError, did_you_mean
from orchestrator.job import SEARCH_FILE, HeldRun, Run, read_lines
from orchestrator.tasks import LOWEST, may_be_as_good, rank_of
from orchestrator.tuning.space import Config

PROPOSED_FILE, TRIALS_FILE = "proposed.jsonl", "trials.jsonl"
KEPT = "kept"
"""In an epoch's line: a run would keep its weights, if it ended there."""
State = Literal["finished", "stopped", "failed", "refused"]
"""stopped: early, by a scheduler; failed: it ended with an error; refused: its settings do not go together."""
Key = tuple[int, int]
"""Of a trial: its number from 1, and 0, or which repetition of it with another seed."""
_METRICS = {"single-label": "validation_accuracy", "multi-label": "validation_loss", "regression": "validation_loss"}


@dataclass(frozen=True)
class Metric:
    """What trials are judged by: a figure of the validation split."""

    key: str
    mode: Literal["max", "min"]
    task: str
    num_validation: int = 0
    """Samples that it is a figure of: of few, the last epoch that may be as good as the best one counts."""

    def value(self, lines: Sequence[Mapping[str, Any]]) -> float | None:
        """That of the best epoch, as a run chooses it; None without one."""
        best = self.best_line(lines)
        return None if best is None else float(best[self.key])

    def best_line(self, lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """The line of the epoch whose weights a run of the task keeps; None where nothing was held back.

        A run says so itself; of a head that is trained beside others it is what such a run would say.
        """
        if kept := [line for line in lines if line.get(KEPT) and self.key in line]:
            return kept[-1]
        best, highest = None, LOWEST
        for line in lines:
            rank = rank_of(self.task, line)
            if rank > highest:
                best, highest = line, rank
            elif may_be_as_good(self.task, rank, highest, self.num_validation):
                best = line
        return best

    def better_first(self, trials: Iterable[Trial]) -> list[Trial]:
        """Those with a score, the best one first; of equals the one of less loss, then the earlier one."""
        sign = -1 if self.mode == "max" else 1

        def place(trial: Trial) -> tuple[float, float, int]:
            best = self.best_line(trial.lines) or {}
            return sign * (trial.score or 0.0), best.get("validation_loss", 0.0), trial.number

        return sorted((one for one in trials if one.score is not None), key=place)


def make_metric(task: str, asked: str | None) -> Metric:
    """The metric of a task, or the one that was asked for. Raises `JobError`."""
    there = ["validation_loss"] if task == "regression" else ["validation_accuracy", "validation_loss"]
    key = asked or _METRICS[task]
    key = key if key.startswith("validation_") else f"validation_{key}"
    if key not in there:
        raise JobError(
            f"metric = {asked!r}", expected=" or ".join(there) + f", of the task {task}",
            mend=did_you_mean(asked, there) or "leave it out",
        )  # fmt: skip
    return Metric(key, "min" if key.endswith("loss") else "max", task)


@dataclass(frozen=True)
class Trial:
    """A trial that has ended."""

    number: int
    """From 1."""
    config: Config
    state: State
    score: float | None
    """None where it has none: it failed, or was refused."""
    num_epochs: int
    """Planned; how many there were, `lines` tells."""
    lines: list[dict[str, Any]] = field(default_factory=list)
    """One an epoch: epoch (from 1), train_loss, validation_loss, validation_accuracy; of a run's epochs, `kept`."""
    seconds: float = 0.0
    """Of heads that were trained side by side, each one's share."""
    error: str = ""
    repeat: int = 0
    """Which repetition of the trial of that number this is, with another seed; 0: it is the trial itself."""
    together: int = 1
    """So many heads were trained side by side, this one among them."""

    @property
    def key(self) -> Key:
        """(number, repeat)"""
        return self.number, self.repeat


class Book:
    """The record of a search, read when it begins and written after each trial."""

    def __init__(self, run: HeldRun) -> None:
        self._run = run
        self.spec: dict[str, Any] = _object(run, SEARCH_FILE)
        """What is searched; {} of one that has not begun."""
        self.proposed: dict[int, Config] = {
            line["number"]: line["config"]
            for line in read_lines(run.read(PROPOSED_FILE))
            if {"number", "config"} <= set(line)
        }
        self.trials: dict[Key, Trial] = {trial.key: trial for trial in read_trials(run.read(TRIALS_FILE))}

    def write_spec(self, spec: Mapping[str, Any]) -> None:
        """Write what is searched, and what came of it."""
        self.spec = dict(spec)
        self._run.write(SEARCH_FILE, json.dumps(self.spec, indent=1, ensure_ascii=False) + "\n")

    def propose(self, configs: Mapping[int, Config]) -> None:
        """Note configurations, before anything is done with them."""
        if configs.keys() - self.proposed.keys():
            self.proposed |= configs
            lines = [{"number": number, "config": config} for number, config in sorted(self.proposed.items())]
            self._run.write(PROPOSED_FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def add(self, *trials: Trial) -> None:
        """Note what came of trials; once this returns, none of them is done again."""
        if trials:
            self.trials |= {trial.key: trial for trial in trials}
            lines = [json.dumps(vars(self.trials[key]), ensure_ascii=False) for key in sorted(self.trials)]
            self._run.write(TRIALS_FILE, "".join(f"{line}\n" for line in lines))

    def open_numbers(self, num_trials: int) -> list[int]:
        """Of the first `num_trials` those that have not ended."""
        return [number for number in range(1, num_trials + 1) if (number, 0) not in self.trials]


def read_trials(text: str | None) -> list[Trial]:
    """The trials of a record, in order; lines that were cut off are left out."""
    known = set(Trial.__dataclass_fields__)
    lines = [line for line in read_lines(text) if {"number", "config", "state"} <= set(line) <= known]
    return sorted((Trial(**line) for line in lines), key=lambda trial: trial.key)


def read_search(run: Run | HeldRun) -> dict[str, Any]:
    """What is searched in that directory. Raises `RefusedError` where it holds no search."""
    spec = _object(run, SEARCH_FILE)
    if not spec:
        raise RefusedError(
            "not_found", f"there is no search {run.place}",
            expected="a directory, or a place in a store, that a search made",
            mend="list them: orchestrator runs",
        )  # fmt: skip
    return spec


def _object(run: Run | HeldRun, file: str) -> dict[str, Any]:
    text = run.read(file)
    if text is None:
        return {}
    try:
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    except ValueError:
        pass
    raise RefusedError(
        "damaged", f"{run.place}/{file} cannot be understood", expected="the file as this version wrote it",
        mend="start the search over with --fresh, or give it another name: --name",
    )  # fmt: skip
