"""A moving average of the weights, and an end before the last epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import orchestrator
from orchestrator.errors import InterruptedRunError, JobError
from orchestrator.job import Event, Noted, Plan
from orchestrator.training.averaging import Average
from orchestrator.training.patience import is_over
from orchestrator.training.state import TrainState
from tests.training.test_loop import JOB, at_call, train
from tests.whole.test_train import Cli, same, weights_of


def test_the_average_is_the_one_of_the_formula() -> None:
    own = {"weight": torch.zeros(3), "seen": torch.tensor(0)}
    average = Average(own, 0.9, {})
    expected = torch.zeros(3)
    for step in range(1, 40):
        own["weight"].copy_(torch.full((3,), float(step)))
        own["seen"].add_(1)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * own["weight"]
        average.update(step)
    assert torch.allclose(average.tensors["weight"], expected)
    with average.in_place():
        assert torch.equal(own["weight"], average.tensors["weight"])
    assert (own["weight"][0], own["seen"], average.tensors["seen"]) == (39.0, 39, 39)
    again = Average(own, 0.9, average.tensors)
    assert same(again.tensors, average.tensors)
    assert again.tensors["weight"] is not average.tensors["weight"]


@pytest.mark.slow
def test_the_average_is_exported_where_it_is_better_and_survives_an_interruption(
    tiny_resnet: Path, digits: Path
) -> None:
    """At a constant high rate the weights jump about, and their average does not."""
    job: dict[str, Any] = {
        "training": {"batch_size": 16, "checkpoint_every_steps": 7, "epochs": 12, "ema": 0.97, "learning_rate": 0.1,
                     "schedule": "constant"},
        "data.validation_fraction": 0.3,
    }  # fmt: skip
    whole = train(tiny_resnet, digits, name="whole", **job)
    pairs = [(line["validation_accuracy"], line["average_validation_accuracy"]) for line in whole.metrics]
    assert len(pairs) == 12
    assert max(b for _, b in pairs) > max(a for a, _ in pairs)
    assert whole.results["averaged"] is True
    assert whole.results["validation"]["accuracy"] == pairs[whole.results["best_epoch"] - 1][1]
    *_, kept = [line for line in whole.metrics if "kept" in line]
    assert (kept["epoch"], kept["kept"]) == (whole.results["best_epoch"], "average")
    with pytest.raises(InterruptedRunError):
        train(tiny_resnet, digits, name="cut", stop=at_call(99), **job)
    run = train(tiny_resnet, digits, name="cut", **job)
    assert same(weights_of(whole), weights_of(run))
    assert [line["average_validation_loss"] for line in run.metrics] == [
        line["average_validation_loss"] for line in whole.metrics
    ]
    plain = train(tiny_resnet, digits, **{**job, "training": {**job["training"], "ema": None}})
    assert [line["validation_loss"] for line in plain.metrics] == [line["validation_loss"] for line in whole.metrics]


def test_stopped_while_the_average_is_looked_at_the_weights_are_kept_and_not_the_average(
    tiny_resnet: Path, digits: Path
) -> None:
    job: dict[str, Any] = {
        "data.num_train": 160, "data.validation_fraction": 0.2, "method": "full",
        "training": {"epochs": 2, "batch_size": 40, "ema": 0.5},
    }  # fmt: skip
    whole = train(tiny_resnet, digits, name="whole", **job)
    for number in (4, 5, 6):  # behind the four steps of an epoch: validation, the average's, and the step after them
        with pytest.raises(InterruptedRunError):
            train(tiny_resnet, digits, name=f"cut-{number}", stop=at_call(number), **job)
        cut = train(tiny_resnet, digits, name=f"cut-{number}", **job)
        assert same(weights_of(whole), weights_of(cut)), number
        for key in ("train_loss", "kept"):
            assert [line.get(key) for line in cut.metrics] == [line.get(key) for line in whole.metrics], (number, key)


def test_without_a_validation_the_average_is_what_is_exported(tiny_resnet: Path, digits: Path) -> None:
    job: dict[str, Any] = {
        "data.num_train": 80, "data.validation_fraction": 0.0, "training": {"epochs": 2, "ema": 0.5},
    }  # fmt: skip
    run = train(tiny_resnet, digits, **job)
    assert run.results["averaged"] is True
    plain = train(tiny_resnet, digits, **{**job, "training": {"epochs": 2}})
    assert "averaged" not in plain.results
    assert not same(weights_of(run), weights_of(plain))


def test_patience_counts_epochs_of_the_phase_after_its_warm_up(tiny_resnet: Path, digits: Path) -> None:
    fields = {"training.patience": 3, "training.epochs": 20, "method": "lp-ft"}
    plan: Plan = orchestrator.plan(backbone=str(tiny_resnet), data={"path": str(digits), "validation_fraction": 0.2},
                                   **fields)  # fmt: skip
    first = plan.recipe.phases[0].epochs

    def over(phase: int, ended: int, best: int) -> bool:
        return is_over(plan, TrainState(phase=phase, epochs_ended=ended, highest_epoch=best))

    assert not over(0, 9, 7)
    assert over(0, 10, 7)
    assert not over(1, 4, first - 9)  # the two of the warm-up, and two more
    assert over(1, 5, first - 9)
    assert not over(1, 5, first + 3)
    assert over(1, 6, first + 3)


@pytest.mark.slow
def test_a_run_that_gets_no_better_ends_as_a_finished_one(tiny_resnet: Path, digits: Path, cli: Cli) -> None:
    job: dict[str, Any] = {
        "training": {**JOB["training"], "epochs": 30, "patience": 2, "learning_rate": 1e-12, "batch_norm": "frozen"},
    }  # fmt: skip
    heard: list[Event] = []
    run = train(tiny_resnet, digits, name="whole", report=heard.append, **job)
    ran = len(run.metrics)
    best = max(run.metrics, key=lambda line: (line["validation_accuracy"], -line["validation_loss"]))["epoch"]
    assert ran == max(best, 3) + 2 < 30  # three of warm-up
    assert run.results["best_epoch"] == ran  # so few samples cannot tell it from that one
    assert run.results["epochs"] == ran
    said = [event.text for event in heard if isinstance(event, Noted) and "ended after" in event.text]
    assert said == [f"ended after {ran} of 30 epochs: no epoch since number {best} was better"]
    done = cli("finetune", run.path / "job.yaml")
    assert done.returncode == 0
    assert f"{ran} of 30, number {ran} kept" in done.stdout
    with pytest.raises(InterruptedRunError):
        train(tiny_resnet, digits, name="cut", stop=at_call(11), **job)
    cut = train(tiny_resnet, digits, name="cut", **job)
    assert same(weights_of(cut), weights_of(run))
    assert len(cut.metrics) == ran


def test_patience_without_a_validation_is_refused(tiny_resnet: Path, digits: Path) -> None:
    with pytest.raises(JobError, match="no validation samples") as caught:
        train(tiny_resnet, digits, **{"training.patience": 3, "data.validation_fraction": 0.0})
    assert "data.validation_fraction" in caught.value.mend
