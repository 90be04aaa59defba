"""The schedule of the learning rate over a phase."""

from __future__ import annotations

import math

from orchestrator.job import Plan


def rate_factor(plan: Plan, num_steps: int, step: int) -> float:
    """Linear warm-up, then cosine towards 0 (Loshchilov & Hutter 2017, arXiv 1608.03983), or constant.

    `step` of the phase's `num_steps`, from 0. Of w steps of warm-up the first has 1 / (w + 1); the step behind the last
    one would have 0.
    """
    training = plan.job.training
    warmup = round(training.warmup_fraction * num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if training.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))
