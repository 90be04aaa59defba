"""What Ray Tune calls while it runs the trials of a search: each passes on to `TuneTrials`, which decides."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import cloudpickle, tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.search import Searcher

from orchestrator.distributed.failures import failures_of
from orchestrator.tuning.in_trial import key_of

if TYPE_CHECKING:
    from orchestrator.tuning.on_tune import TuneTrials
    from orchestrator.tuning.trials import Key

_LOUD = ("ray.tune.execution.tune_controller", "ray.tune.tune")
"""Loggers that print the whole trace of a trial that fails, whose row says why in a line."""


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Tune prints no traces while it lasts."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


class TrialFeed(Searcher):  # type: ignore[misc]  # Ray has no types
    """Gives Tune one trial after the other."""

    def __init__(self, trials: TuneTrials) -> None:
        super().__init__()
        self._trials = trials

    def suggest(self, trial_id: str) -> Any:  # noqa: ARG002  # trials have names of their own
        """The next one's configuration."""
        return self._trials.propose() or Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Its row is written elsewhere."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: our own record is what a search goes on with."""

    restore = save


class TrialCallback(tune.Callback):  # type: ignore[misc]
    """Passes on what Tune's trials do."""

    def __init__(self, trials: TuneTrials) -> None:
        self._trials = trials

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_info: Any) -> None:  # noqa: ARG002
        """A trial begins."""
        self._trials.began(_key_of(trial))

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **_info: Any) -> None:  # noqa: ARG002
        """It tells of an epoch."""
        self._trials.epoch(_key_of(trial), result)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_info: Any) -> None:  # noqa: ARG002
        """It has ended, by itself or because a scheduler has stopped it."""
        self._trials.over(_key_of(trial))

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **_info: Any) -> None:  # noqa: ARG002
        """Its process has died, and it is begun again."""
        why = _why_failed(trial, _cause_of(trial))
        self._trials.begins_again(_key_of(trial), why, trial.run_metadata.num_failures, trial.max_failures)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_info: Any) -> None:  # noqa: ARG002
        """It has failed, or its process has died."""
        cause = _cause_of(trial)
        self._trials.over(_key_of(trial), _why_failed(trial, cause), cause)


def _cause_of(trial: Any) -> Exception | None:
    """Tune has written the error into this process's own folder, and not yet where it keeps trials."""
    pickled = trial.pickled_error_file
    if pickled is None or not Path(pickled).exists():
        return None
    error = cloudpickle.loads(Path(pickled).read_bytes())
    found: Exception = getattr(error, "cause", None) or error
    return found


def _why_failed(trial: Any, cause: Exception | None) -> str:
    """In a few words."""
    if cause is not None:
        return failures_of({0: cause})[0]
    text = trial.error_file
    lines = Path(text).read_text().split("\n") if text is not None and Path(text).exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it failed")


def _key_of(trial: Any) -> Key:
    return key_of(trial.config)


class NothingShown(TrialProgressCallback):  # type: ignore[misc]
    """In place of Tune's, which prints a line for a trial that ends before its first epoch."""

    def log_result(self, trial: Any, result: Any, error: bool = False) -> None:
        """Not printed."""

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Not printed."""


class SearchStopper(tune.Stopper):  # type: ignore[misc]
    """Ends all trials when the search is to end, and they have stopped."""

    def __init__(self, trials: TuneTrials) -> None:
        self._trials = trials

    def __call__(self, trial_id: str, result: Any) -> bool:  # noqa: ARG002
        """No single one."""
        return False

    def stop_all(self) -> bool:
        """Whether all of them end."""
        return self._trials.stops()
