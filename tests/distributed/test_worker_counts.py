"""One, two and four workers learn the same, step by step, also where their number changes in the middle of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.errors import InterruptedRunError
from orchestrator.job import Advanced, Event
from orchestrator.training import Taken, read_audit
from tests.audited import taken_of
from tests.conftest import ALL_CORES
from tests.whole.test_train import silent

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(600)]
NUM_STEPS = 50
# BatchNorm in train mode is what full training of a ResNet has. A batch is in four parts, whoever takes them.
SGD: dict[str, Any] = {
    "optimizer": "sgd", "learning_rate": 0.02, "precision": "fp32", "batch_norm": "train", "num_microbatches": 4,
    "audit": True,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _four_cores_to_ray() -> Iterator[None]:
    """Whatever this machine has: the workers are slow then, and learn the same."""
    import ray

    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, ALL_CORES)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    os.sched_setaffinity(0, before)


def train(backbone: Path, digits: Path, workers: int, training: dict[str, Any], **more: Any) -> orchestrator.Run:
    """One worker: in this process. Several: on Ray."""
    scaling = {"num_workers": workers, "threads_per_worker": 1, **({"address": "auto"} if workers > 1 else {})}
    return orchestrator.finetune(
        backbone=str(backbone), data=str(digits), scaling=scaling, training={**SGD, **training},
        **{"report": silent, "method": "full", **more},
    )  # fmt: skip


def each_sample_once_an_epoch(run: orchestrator.Run) -> list[Taken]:
    """What the steps took; each sample was taken exactly once in each epoch, by one worker."""
    taken = taken_of(run)
    assert len(taken) == 4 * run.plan.recipe.num_steps
    return taken


def test_fifty_steps_cost_the_same_on_one_two_and_four_workers(tiny_resnet: Path, digits: Path) -> None:
    """An epoch is one step here, so that its figure is the loss of that step.

    The order of a sum is another one, which is 1e-7 at first; at five times the rate this network makes 1e-3 of that.
    """
    runs = {
        num: train(
            tiny_resnet,
            digits,
            num,
            {"epochs": NUM_STEPS, "batch_size": 360},
            name=f"on-{num}",
            settings={"augment": "none"},  # it is learnt sooner so
        )
        for num in (1, 2, 4)
    }
    losses = {num: [line["train_loss"] for line in run.metrics] for num, run in runs.items()}
    for num, run in runs.items():
        assert run.plan.recipe.num_steps == len(losses[num]) == NUM_STEPS
        assert {one.worker for one in each_sample_once_an_epoch(run)} == set(range(num))
        assert max(abs(ours - one) for ours, one in zip(losses[num], losses[1], strict=True)) < 1e-4
    assert losses[1][-1] < losses[1][0] - 0.1, "nothing was learnt, so nothing was compared"


def test_the_number_of_workers_changes_twice_in_the_middle(tiny_resnet: Path, digits: Path) -> None:
    """Four, stopped soon, then two, then this process: each sample once an epoch, and the losses of one."""
    training = {"epochs": 17, "batch_size": 120, "checkpoint_every_steps": 4, "learning_rate": 0.01}
    alone = train(tiny_resnet, digits, 1, training, name="alone")
    for workers in (4, 2):
        heard: list[Event] = []
        with pytest.raises(InterruptedRunError):
            train(
                tiny_resnet, digits, workers, training, name="changed", report=heard.append,
                stop=lambda heard=heard: any(isinstance(event, Advanced) for event in heard),
            )  # fmt: skip
    changed = train(tiny_resnet, digits, 1, training, name="changed")
    workers_of: dict[int, int] = {}
    for one in each_sample_once_an_epoch(changed):
        workers_of[one.step] = max(workers_of.get(one.step, 0), one.worker + 1)
    assert sorted(set(workers_of.values())) == [1, 2, 4]
    assert list(workers_of.values()) == sorted(workers_of.values(), reverse=True)
    for ours, theirs in zip(changed.metrics, alone.metrics, strict=True):
        assert abs(ours["train_loss"] - theirs["train_loss"]) < 1e-4
        assert abs(ours["validation_loss"] - theirs["validation_loss"]) < 1e-4


def test_two_workers_learn_what_is_alike_as_one_does(tiny_vit: Path, flat_digits: Path) -> None:
    """Samples are compared within a part of the batch; the head is fitted to what all workers' bodies gave."""
    training = {"loss": "contrastive", "batch_norm": "auto", "epochs": 8, "batch_size": 32, "learning_rate": 0.3}
    alone, both = (
        train(tiny_vit, flat_digits, num, training, name=f"on-{num}", method="lp-ft") for num in (1, 2)
    )  # fmt: skip
    assert both.plan.recipe.phases[1].loss == "contrastive"
    assert {one.worker for one in read_audit(both)} == {0, 1}
    for ours, theirs in zip(both.metrics, alone.metrics, strict=True):
        assert abs(ours["train_loss"] - theirs["train_loss"]) < 1e-4
        assert abs(ours["train_accuracy"] - theirs["train_accuracy"]) < 0.01  # two of 240 samples: a sum's last digits
        assert abs(ours["validation_loss"] - theirs["validation_loss"]) < 1e-4
    assert alone.metrics[-1]["train_loss"] < alone.metrics[1]["train_loss"], "nothing was learnt"
