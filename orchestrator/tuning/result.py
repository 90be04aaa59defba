"""What a search gives: its trials, the best of them as a finished run, and tables of them."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from orchestrator.errors import RefusedError
from orchestrator.job import BEST_OF_SEARCH, SEARCH_FILE, Run, run_at, run_in
from orchestrator.tasks import wilson
from orchestrator.tuning.space import Config
from orchestrator.tuning.trials import TRIALS_FILE, Metric, Trial, read_search, read_trials

CSV_FILE = "search.csv"
_FORMULA = re.compile(r"[=+\-@\t\r]")
"""What spreadsheets take for the beginning of a formula."""


@dataclass(frozen=True)
class SearchResult:
    """A search that has ended."""

    search: Run
    """Where it lies; what `Run` gives of a place, it gives of this one."""
    trials: list[Trial]
    """All that have ended, by their numbers; repetitions behind their trial."""
    metric: Metric
    keys: tuple[str, ...]
    """Of the space."""
    best_run: Run | None
    """The best trial as a finished run: exported, and the only one whose test split was read. None where all failed."""
    num_validation: int
    """Samples that trials were judged by."""
    ray: Any = field(default=None, repr=False, compare=False)
    """The `ResultGrid` of Ray Tune; None where it ran nothing in this call."""

    @property
    def path(self) -> Path:
        """Its directory. Raises `RefusedError` where it lies in an object store, and has none."""
        return self.search.path

    @property
    def place(self) -> str:
        """Its directory or URI, as a text."""
        return self.search.place

    @property
    def ranked(self) -> list[Trial]:
        """Trials with a score, the best first: by the mean over its seeds, where one has several."""
        return ranked(self.trials, self.metric)

    @property
    def best(self) -> Trial | None:
        """The best trial."""
        return next(iter(self.ranked), None)

    @property
    def num_tried(self) -> int:
        """Trials among which the best one was chosen."""
        return sum(one.score is not None and not one.repeat for one in self.trials)

    @property
    def caveat(self) -> str:
        """What is to be known of the best score: it is the best of many on the same samples."""
        best = self.best
        if best is None:
            return "no trial has ended with a score"
        of = f"the best of {self.num_tried} on the same {self.num_validation} validation samples"
        line = self.metric.best_line(best.lines) or {}
        accuracy = line.get("validation_accuracy")
        if accuracy is None:
            return f"its score is {of}: the test split's figures are the ones to publish"
        low, high = wilson(round(accuracy * self.num_validation), self.num_validation, among=self.num_tried)
        return (
            f"its accuracy is {of}: corrected for that, its 95 % interval is {low:.3f} to {high:.3f}; "
            "the test split was read by this one alone"
        )

    def mean_score(self, trial: Trial) -> float | None:
        """The mean over a trial and its repetitions with other seeds."""
        return mean_score(trial, self.trials)

    def as_dict(self) -> dict[str, Any]:
        """The search as `--json` prints it."""
        best = self.best_run
        return {
            "search": self.place, "metric": self.metric.key, "caveat": self.caveat,
            "run": best.place if best else None, "results": best.results if best else None, "trials": self.rows(),
        }  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """A row a trial, as `search.csv` has them."""
        return [
            {
                "trial": one.number, "repeat": one.repeat, "state": one.state, self.metric.key: one.score,
                "epochs": len(one.lines), "of": one.num_epochs, "seconds": one.seconds,
                **{key: one.config.get(key) for key in self.keys}, "error": one.error,
            }
            for one in self.trials
        ]  # fmt: skip


def mean_score(trial: Trial, trials: Sequence[Trial]) -> float | None:
    """The mean over a trial and its repetitions with other seeds, None where it has no score itself."""
    scores = [one.score for one in trials if one.number == trial.number and one.score is not None]
    return sum(scores) / len(scores) if trial.score is not None else None


def ranked(trials: Sequence[Trial], metric: Metric) -> list[Trial]:
    """Trials with a score, the best first: those that were repeated come first, by the mean over their seeds."""
    repeated = {one.number for one in trials if one.repeat and one.score is not None}
    order = metric.better_first([one for one in trials if not one.repeat])
    sign = -1 if metric.mode == "max" else 1
    several = [one for one in order if one.number in repeated]
    several.sort(key=lambda one: sign * (mean_score(one, trials) or 0.0))
    return several + [one for one in order if one.number not in repeated]


def open_search(place: str | Path) -> SearchResult:
    """The search of that directory or URI, as far as it is. Raises `RefusedError` where there is none."""
    return search_of(run_at(place))


def search_of(run: Run) -> SearchResult:
    """The same of the place itself."""
    spec = read_search(run)
    try:
        keys, num = tuple(spec["space"]), int(spec.get("num_validation", 0))
        metric = Metric(spec["metric"], cast("Literal['max', 'min']", spec["mode"]), spec["task"], num)
        best = spec.get(BEST_OF_SEARCH)
    except (KeyError, TypeError, ValueError):
        raise RefusedError(
            "damaged", f"{run.place}/{SEARCH_FILE} cannot be understood", expected="the file as this version wrote it",
            mend="start the search over with --fresh, or give it another name: --name",
        ) from None  # fmt: skip
    trials = read_trials(run.read(TRIALS_FILE))
    return SearchResult(run, trials, metric, keys, run_in(run.storage, best) if best else None, num)


def as_csv(result: SearchResult) -> str:
    """The rows as a table for spreadsheets, in which no text is a formula."""
    rows = result.rows()
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]) if rows else ["trial"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: cell(value) for key, value in row.items()} for row in rows)
    return out.getvalue()


def cell(value: Any) -> Any:
    """A value as a cell: nothing where there is none, and no text that a spreadsheet would compute."""
    if value is None or isinstance(value, (int, float)):
        return "" if value is None else value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = text.replace("\0", "")
    return f"'{text}" if _FORMULA.match(text) else text


def shown_config(config: Config, keys: Sequence[str]) -> dict[str, str]:
    """Short name of each key -> its value, as a person reads it: of a path its last two parts."""
    return {short(key): _shown(value) for key in keys if (value := config.get(key)) is not None}


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "/".join(str(value).rstrip("/").split("/")[-2:])


def short(key: str) -> str:
    """The last part of a dotted key."""
    return key.rpartition(".")[2]
