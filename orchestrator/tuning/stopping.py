"""Ray Tune's schedulers that stop trials early: which are taken, and how they judge trials that Tune does not run.

They go by the `epoch` of a trial, from 1, however often it was cut off, and hear again of trials that ended before.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from orchestrator.errors import JobError, first_line
from orchestrator.tuning.trials import Key, Metric, Trial

_BY_NAME = {"fifo": FIFOScheduler, "asha": AsyncHyperBandScheduler, "median": MedianStoppingRule}
_TIMES = ("epoch", "training_iteration")
LAST_EPOCH = "num_epochs"
"""What a trial of Tune's tells beside its epoch."""


def make_stopping(asked: Any, metric: Metric, num_epochs: int) -> Stopping:
    """The scheduler that was asked for: its name, {its name: its settings}, or Ray Tune's own.

    `num_epochs`: of the longest trial. Raises `JobError` for one that pauses trials or changes their settings.
    """
    if asked is None:
        return Stopping(FIFOScheduler(), metric)
    name: Any = asked
    settings: Any = {}
    if isinstance(asked, Mapping) and len(asked) == 1:
        ((name, settings),) = asked.items()
    if isinstance(name, str) and name in _BY_NAME and isinstance(settings, Mapping):
        own = {"max_t": num_epochs} if name == "asha" else {}
        try:
            return Stopping(_BY_NAME[name](**{**own, **settings}), metric)
        except (TypeError, AssertionError, ValueError) as error:
            raise JobError(
                f"scheduler {name} = {dict(settings)}: {first_line(error)}",
                expected=f"the arguments of ray.tune's {_BY_NAME[name].__name__}", mend="correct them",
            ) from None  # fmt: skip
    if type(asked) not in _BY_NAME.values():
        shown = type(asked).__name__ if isinstance(asked, TrialScheduler) else repr(asked)
        raise JobError(
            f"scheduler = {shown}, which would have to pause trials, or to change a run's settings while it trains",
            expected="one that stops trials early, or none: asha, median, fifo, ASHAScheduler(...), "
            "MedianStoppingRule(...)",
            mend="use asha; a setting that is to change gets a trial a value",
        )
    _require_ours(asked, metric)
    return Stopping(asked, metric)


def _require_ours(scheduler: TrialScheduler, metric: Metric) -> None:
    own = (getattr(scheduler, "_metric", None), getattr(scheduler, "_mode", None))
    if own[0] not in (None, metric.key) or own[1] not in (None, metric.mode):
        raise JobError(
            f"scheduler has metric {own[0]!r} and mode {own[1]!r}", expected=f"{metric.key}, {metric.mode}",
            mend="leave both out of the scheduler, or set the metric of the search",
        )  # fmt: skip
    time = getattr(scheduler, "_time_attr", "epoch")
    if time not in _TIMES and not (isinstance(scheduler, MedianStoppingRule) and time == "time_total_s"):
        raise JobError(
            f"scheduler has time_attr {time!r}", expected=" or ".join(_TIMES) + ", both of which count epochs",
            mend="leave time_attr out",
        )  # fmt: skip


@dataclass(frozen=True)
class _Known:
    """A trial as schedulers see it that Tune does not run."""

    trial_id: str
    status: str = "RUNNING"
    config: Mapping[str, Any] = field(default_factory=dict, compare=False)


class _NoController:
    """What schedulers ask of Tune's controller, where there is none."""

    search_alg = None

    def get_live_trials(self) -> list[Any]:
        """None wait."""
        return []

    get_trials = get_live_trials


class Stopping(FIFOScheduler):  # type: ignore[misc]  # Ray has no types
    """A scheduler of Tune's that stops trials and never pauses one, in Tune or apart from it."""

    def __init__(self, inner: TrialScheduler, metric: Metric) -> None:
        super().__init__()
        self._inner = inner
        if isinstance(inner, MedianStoppingRule) and inner._time_attr == "time_total_s":  # its default
            inner._time_attr = "epoch"
        own = (getattr(inner, "_metric", None), getattr(inner, "_mode", None))
        inner.set_search_properties(None if own[0] else metric.key, None if own[1] else metric.mode)
        self._known: dict[Key, _Known] = {}

    @property
    def is_asked(self) -> bool:
        """Whether it may stop a trial at all."""
        return type(self._inner) is not FIFOScheduler

    # --- trials that Tune does not run ---

    def hear_again(self, trial: Trial) -> None:
        """Of a trial that ended before this process began."""
        for line in trial.lines:
            self.goes_on(trial.key, line)
        self.ended(trial.key, trial.lines[-1] if trial.lines else None)

    def goes_on(self, key: Key, line: Mapping[str, Any]) -> bool:
        """Whether a trial goes on after the epoch of that line."""
        if key not in self._known:
            self._known[key] = _Known(f"{key[0]:05}-{key[1]}")
            self._inner.on_trial_add(_NoController(), self._known[key])
        return bool(self.on_trial_result(_NoController(), self._known[key], _as_result(line)) != TrialScheduler.STOP)

    def ended(self, key: Key, line: Mapping[str, Any] | None) -> None:
        """A trial has ended with that epoch, or without one."""
        known = self._known.get(key)
        if known is not None and line is not None:
            self._inner.on_trial_complete(_NoController(), known, _as_result(line))

    # --- what Tune calls ---

    def set_search_properties(self, *_args: Any, **_more: Any) -> bool:
        """They are set."""
        return True

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        """A trial is there."""
        self._inner.on_trial_add(controller, trial)

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """What comes next: one that could be paused goes on, and one that is at its last epoch comes to its end."""
        action = self._inner.on_trial_result(controller, trial, result)
        if result.get("epoch", 0) == result.get(LAST_EPOCH):
            return str(TrialScheduler.CONTINUE)
        return str(TrialScheduler.STOP if action == TrialScheduler.STOP else TrialScheduler.CONTINUE)

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """It has ended."""
        self._inner.on_trial_complete(controller, trial, result)

    def on_trial_error(self, controller: Any, trial: Any) -> None:
        """It has failed."""
        self._inner.on_trial_error(controller, trial)

    def on_trial_remove(self, controller: Any, trial: Any) -> None:
        """It is gone."""
        self._inner.on_trial_remove(controller, trial)

    def debug_string(self) -> str:
        """For Tune's log."""
        return str(self._inner.debug_string())


def _as_result(line: Mapping[str, Any]) -> dict[str, Any]:
    return {**line, "training_iteration": line["epoch"]}


logging.getLogger("ray.tune.schedulers").setLevel(logging.ERROR)
