"""How long full fine-tuning would take on this machine: a few of its steps are done and timed."""

from __future__ import annotations

import time

import numpy as np

from orchestrator.errors import TrainingError
from orchestrator.features import SampleSource
from orchestrator.job import Plan
from orchestrator.network import Network, Worker, autocast, channels_last, freeze, make_optimizer, set_mode
from orchestrator.tasks import make_objective

_NUM_STEPS = 2
_LONG_S = 5.0
"""A first step that takes longer is not taken for one that only warms up."""


def measured_minutes(plan: Plan, network: Network, source: SampleSource, worker: Worker) -> float:
    """Minutes that all steps of a plan would take, by the fastest of a few. The network is of no use afterwards.

    plan: of a method that trains everything. Raises `TrainingError` where no sample can be read.
    """
    phase = plan.recipe.phases[-1]
    rows = source.samples.order_by_length(source.samples.rows("train"))
    spread = rows[np.linspace(0, len(rows) - 1, min(len(rows), plan.recipe.batch_size)).round().astype(int)]
    freeze(network, phase)
    set_mode(network, phase, training=True)
    optimizer, _ = make_optimizer(network, plan.job.training, phase)
    objective = make_objective(plan, network)
    seconds: list[float] = []
    while len(seconds) <= _NUM_STEPS and not (seconds and seconds[0] > _LONG_S):
        started = time.perf_counter()
        batch = source.batch(spread, train=True)
        if batch is None:
            raise TrainingError("none of the samples can be read", mend="look at the first: orchestrator check --data")
        batch = batch.to(worker.device)
        with autocast(plan, worker):
            outputs = network.logits(channels_last(batch.inputs))
        loss, weight = objective.loss(outputs, batch.targets)
        (loss / weight).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss.detach())  # a GPU has done it by now
        seconds.append(time.perf_counter() - started)
    return min(seconds) * plan.recipe.num_steps / 60


def minutes_by_throughput(plan: Plan, samples_per_s: float) -> float:
    """The same from how many samples a second pass the frozen body: backward takes twice as long as forward."""
    num = plan.recipe.num_steps * plan.recipe.batch_size
    return 3 * num / samples_per_s / 60
