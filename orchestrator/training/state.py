"""Where a run stands, as every checkpoint has it; and what this worker holds while it works."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from orchestrator.data import Samples
from orchestrator.features import Batch, SampleSource, Source
from orchestrator.job import HeldRun, Phase, Plan, Recipe, Report
from orchestrator.network import Inputs, Network, Strategy, Worker
from orchestrator.tasks import Objective, finite
from orchestrator.training.audit import Audit
from orchestrator.training.batches import BatchLoader
from orchestrator.training.outbox import Outbox
from orchestrator.training.record import Record


@dataclass
class TrainState:
    """Where a run stands. JSON, in every checkpoint, whose `step` counts those of all phases."""

    phase: int = 0
    """Of the recipe."""
    step: int = 0
    """Steps of the phase that are done."""
    epochs_ended: int = 0
    """Epochs of the phase that are done, their validation too."""
    epoch_loss: float = 0.0
    epoch_correct: float = 0.0
    epoch_samples: float = 0.0
    epoch_weight: float = 0.0
    best_epoch: int = -1
    """Whose weights are kept, of all phases, from 1."""
    best_loss: float = math.inf
    best_accuracy: float = -1.0
    """The highest so far; 0 where the task has no accuracy: then the loss alone decides."""
    highest_epoch: int = -1
    """Whose figures these are: where validation cannot tell it from a later one, that is kept, and this one is not."""
    best_is_average: bool = False
    """Whether the best weights are the moving average of that epoch."""
    seconds: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)
    """Row of the sample table -> why it could not be read, of all workers."""
    decided: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Number of a phase -> its fields that only the running job could decide; they stay so when it goes on."""
    candidates: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Number of a phase -> the figures of its best epoch, and what else is known of it."""
    chosen_epoch: int = -1
    """The best one of those before the run began to refit, from 1."""
    comparison: dict[str, Any] | None = None
    """Of the phase that has to win, as `choice.Comparison`: of its best epoch."""

    @staticmethod
    def restored(entries: Mapping[str, Any], recipe: Recipe) -> TrainState:
        """What a checkpoint holds, whose `step` is of all phases."""
        names = {one.name for one in dataclasses.fields(TrainState)}
        state = TrainState(**{name: value for name, value in entries.items() if name in names and value is not None})
        recipe = state.recipe(recipe)
        state.step -= sum(phase.num_steps for phase in recipe.phases[: state.phase])
        return state

    def entries(self) -> dict[str, Any]:
        """For a checkpoint, null for a loss that there is not yet."""
        entries = copy.deepcopy(vars(self))  # it is written while the loop goes on
        return entries if math.isfinite(self.best_loss) else {**entries, "best_loss": None}

    def recipe(self, planned: Recipe) -> Recipe:
        """The recipe with what this run has decided."""
        return planned.decided({int(number): changes for number, changes in self.decided.items()})

    def steps_done(self, recipe: Recipe) -> int:
        """Of all phases."""
        return sum(phase.num_steps for phase in recipe.phases[: self.phase]) + self.step

    def num_epochs_ended(self, recipe: Recipe) -> int:
        """Of all phases."""
        return sum(phase.epochs for phase in recipe.phases[: self.phase]) + self.epochs_ended


@dataclass
class Session:
    """What this worker holds while it works."""

    plan: Plan
    """With the recipe as far as the run has decided it."""
    run: HeldRun
    worker: Worker
    network: Network
    strategy: Strategy
    """How the network lies on the workers."""
    objective: Objective
    samples: Samples
    raw: SampleSource
    """Samples, decoded when they are asked for; it notes those that cannot be read."""
    sources: dict[str, dict[str, Source]]
    """What phases train on ("samples", "features") -> split -> where its batches come from."""
    forwards: dict[str, Callable[[Inputs], Tensor]]
    """What phases train on -> inputs -> logits."""
    loader: BatchLoader
    length_bucketing: bool
    mix: Callable[[Batch], Batch] | None
    """How samples of a training batch are mixed with each other, where they are."""
    report: Report
    should_stop: Callable[[], bool]
    started: float
    state: TrainState = field(default_factory=TrainState)
    record: Record | None = None
    """Of the epochs; rank 0 alone has it, once it is known where the run goes on."""
    outbox: Outbox | None = None
    """What rank 0 has written beside the loop."""
    audit: Audit | None = None
    """Of what the steps take, where the job wants it."""
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def phase(self) -> Phase:
        """The one that the run is in."""
        return self.plan.recipe.phases[self.state.phase]

    def decide(self, number: int, **fields: Any) -> None:
        """Settle fields of a phase that only the running job can know; every checkpoint has them."""
        known = self.state.decided.get(str(number), {})
        self.state.decided[str(number)] = {**known, **fields}
        self.plan = self.plan.model_copy(update={"recipe": self.state.recipe(self.plan.recipe)})

    def note_of(self, number: int, **facts: Any) -> None:
        """Add to what is known of a phase's outcome."""
        self.state.candidates[str(number)] = {**self.state.candidates.get(str(number), {}), **finite(facts)}

    @property
    def source_name(self) -> str:
        """What the phase trains on; samples where no cut of the network holds, so that there are no features."""
        return self.phase.source if self.phase.source in self.sources else "samples"

    def source(self, split: str) -> Source:
        """Where the phase's batches of a split come from."""
        return self.sources[self.source_name][split]

    def forward(self, inputs: Inputs) -> Tensor:
        """float [batch, classes]: what the network, or its head, gives for a batch of the phase's source."""
        return self.forwards[self.source_name](inputs)

    def seconds(self) -> float:
        """Of work on this run, those of earlier processes included."""
        return self.state.seconds + time.monotonic() - self.started
