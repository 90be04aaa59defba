"""What happens while a job runs: told by those who work, to whoever shows or records it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.errors import OrchestratorError


@dataclass(frozen=True)
class PhaseBegan:
    """The job turns to something else; what is advanced from here on is of this."""

    text: str
    total: int | None = None
    """How many units there are in all; None where that is not known."""
    done: int = 0
    """How many of them were done before."""
    unit: Literal["", "steps", "samples", "bytes"] = ""
    samples_per_unit: float = 1.0


@dataclass(frozen=True)
class Advanced:
    """So many more units of the phase are done."""

    num: int


@dataclass(frozen=True)
class EpochEnded:
    """An epoch is over; its last step was told before."""

    figures: Mapping[str, Any]
    """The epoch's line in metrics.jsonl: `epoch` (from 1), `train_loss`, what its validation gave, and `kept`.

    kept: "weights", or the "average" of `training.ema`, where these are to be the model's as far as is known; left out
    where those of an epoch before are.
    """
    num_epochs: int
    task: str


@dataclass(frozen=True)
class Noted:
    """Something that a person should know, and that stops nothing."""

    text: str
    is_warning: bool = False
    """Whether a person should look at it even where the job goes on."""


@dataclass(frozen=True)
class Failed:
    """A worker of a cluster has ended with this error; that it was asked to stop is one too."""

    error: OrchestratorError


@dataclass(frozen=True)
class TrialsAdvanced:
    """How far a search is, told when a trial has ended and when one has begun."""

    num_done: int
    num_trials: int
    num_running: int
    num_failed: int
    metric: str
    best: tuple[tuple[int, float, Mapping[str, str]], ...] = ()
    """(number, score, {short name of a setting: its value}) of the best trials so far, the best one first."""
    seconds_left: float | None = None
    """As far as the trials before tell."""


Event = PhaseBegan | Advanced | EpochEnded | Noted | Failed | TrialsAdvanced
Report = Callable[[Event], None]
