"""When a phase ends before its epochs are over: nothing has become better for so long."""

from __future__ import annotations

import math

from orchestrator.job import Plan
from orchestrator.training.state import TrainState


def is_over(plan: Plan, state: TrainState) -> bool:
    """Whether `training.patience` epochs of the phase have ended without a better one.

    Those of the warm-up do not count: at the low rates that it begins with nothing gets better soon.
    """
    patience = plan.job.training.patience
    if patience is None:
        return False
    phase = plan.recipe.phases[state.phase]
    best = state.highest_epoch - (state.num_epochs_ended(plan.recipe) - state.epochs_ended)
    warmup = math.ceil(plan.job.training.warmup_fraction * phase.epochs)
    return state.epochs_ended - max(best, warmup) >= patience
