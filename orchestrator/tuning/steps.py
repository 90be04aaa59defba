"""How long full fine-tuning would take on this machine: a few of its steps are done and timed."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from orchestrator.data import Ints, Samples
from orchestrator.errors import TrainingError
from orchestrator.features import SampleSource
from orchestrator.job import Plan
from orchestrator.network import Network, Worker, autocast, channels_last, freeze, make_optimizer, set_mode
from orchestrator.tasks import make_objective
from orchestrator.training import epoch_batches

_NUM_STEPS = 2
_LONG_S = 1.0
"""After a step that takes longer, and is not the first, none is timed: a first one takes up to twice as long."""
_MOST_ROWS = 100_000
"""Samples that are laid out in batches, to find one of mean size."""
_VERY_LONG_S = 10.0
"""A first step that takes longer is not taken for one that only warms up."""


def measured_minutes(
    plan: Plan, network: Network, source: SampleSource, worker: Worker, length_bucketing: bool
) -> float:  # fmt: skip
    """Minutes that all steps of a plan would take, by the fastest of a few. The network is of no use afterwards.

    plan: of a method that trains everything. `length_bucketing`: of the modality. Raises `TrainingError` where no
    sample can be read.
    """
    phase = plan.recipe.phases[-1]
    rows = mean_batch(source.samples, plan.job.training.seed, phase.steps_per_epoch, length_bucketing)
    freeze(network, phase)
    set_mode(network, phase, training=True)
    optimizer, _ = make_optimizer(network, plan.job.training, phase)
    objective = make_objective(plan, network)
    seconds: list[float] = []
    while len(seconds) <= _NUM_STEPS and not _is_enough(seconds):
        started = time.perf_counter()
        batch = source.batch(rows, train=True)
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


def mean_batch(samples: Samples, seed: int, num_steps: int, length_bucketing: bool) -> Ints:
    """Of an epoch's batches the one nearest to their mean size in bytes, each sample filled up to the longest."""
    rows = samples.rows("train")
    some = np.sort(np.random.default_rng(seed).choice(rows, min(len(rows), _MOST_ROWS), replace=False))
    num = max(1, num_steps * len(some) // len(rows))
    batches = epoch_batches(samples, some, seed, 0, num, length_bucketing)
    sizes = np.array([len(batch) * samples.num_bytes[batch].max() for batch in batches], np.float64)
    return batches[int(np.abs(sizes - sizes.mean()).argmin())]


def _is_enough(seconds: Sequence[float]) -> bool:
    return bool(seconds) and (seconds[0] > _VERY_LONG_S or (len(seconds) > 1 and seconds[-1] > _LONG_S))


def minutes_by_throughput(plan: Plan, samples_per_s: float) -> float:
    """The same from how many samples a second pass the frozen body: backward takes twice as long as forward."""
    num = plan.recipe.num_steps * plan.recipe.batch_size
    return 3 * num / samples_per_s / 60
