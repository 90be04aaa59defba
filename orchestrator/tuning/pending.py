"""A trial that is to be done, and what whoever does it works with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.job import Plan, Report, Stop
from orchestrator.tuning.layout import Layout
from orchestrator.tuning.space import Config
from orchestrator.tuning.stopping import Stopping
from orchestrator.tuning.trials import Key, Metric, Trial


@dataclass(frozen=True)
class PendingTrial:
    """A trial that is to be done."""

    key: Key
    config: Config
    plan: Plan


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a search are done with, heads in stacks and runs of Tune's alike."""

    layout: Layout
    metric: Metric
    stopping: Stopping
    report: Report
    should_stop: Stop
    """Asked all the time: once it is true, what runs ends where it is, and is no row of the record."""
    heard: Callable[[Key, Mapping[str, Any]], None]
    """Called with the line of each trial's epoch."""
    ended: Callable[[Sequence[Trial]], None]
    """Called with the trials that have ended, some at once."""


def is_stackable(plan: Plan) -> bool:
    """Whether the plan trains a head on features of its samples as they are, in one process."""
    phases = plan.recipe.phases
    one = len(phases) == 1 and phases[0].source == "features" and plan.recipe.num_microbatches == 1
    return one and not plan.views and plan.num_workers == 1 and not plan.num_extractors


def grouped(tasks: Sequence[PendingTrial]) -> list[list[PendingTrial]]:
    """The tasks whose heads have the same features, batch size, number of steps and optimizer."""
    groups: dict[str, list[PendingTrial]] = {}
    for task in tasks:
        plan, recipe = task.plan, task.plan.recipe
        training = plan.job.training
        alike = [
            plan.backbone.source, plan.input, plan.job.settings, plan.data.fingerprint, plan.precision,
            training.optimizer, recipe.batch_size, recipe.num_steps,
        ]  # fmt: skip
        groups.setdefault(json.dumps(alike, sort_keys=True), []).append(task)
    return list(groups.values())
