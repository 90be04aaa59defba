"""What an audit says of a run that was cut off and gone on with: each sample once an epoch."""

from __future__ import annotations

from pathlib import Path

import pytest

import orchestrator
from orchestrator.errors import TrainingError
from orchestrator.job import Advanced, Event
from orchestrator.training import read_audit
from tests.audited import taken_of


def test_each_sample_is_taken_once_an_epoch_also_by_a_run_that_went_back_a_checkpoint(
    tiny_resnet: Path, digits: Path
) -> None:
    job = {
        "backbone": str(tiny_resnet), "data": str(digits), "method": "full", "name": "audited",
        "training": {"epochs": 3, "batch_size": 32, "num_microbatches": 2, "checkpoint_every_steps": 5, "audit": True},
    }  # fmt: skip
    steps: list[int] = []

    def fail_at_18(event: Event) -> None:
        if isinstance(event, Advanced):
            steps.append(1)
            if len(steps) == 18:
                raise RuntimeError("as a process that is killed")

    with pytest.raises(TrainingError, match="killed"):
        orchestrator.finetune(job, report=fail_at_18)
    run = orchestrator.open_run("runs/audited")
    newest = max(run.path.glob("checkpoints/step-*"))
    (newest / ".manifest.json").unlink()  # so the steps before it come again
    before = {one.step for one in read_audit(run)}
    done = orchestrator.finetune(job, report=lambda _: None)
    taken = taken_of(done)
    assert max(before) > int(newest.name[5:]) - 5
    assert len(taken) == 2 * done.plan.recipe.num_steps
    assert {one.worker for one in taken} == {0}


def test_steps_that_are_only_measured_for_a_budget_are_not_taken(tiny_resnet: Path, digits: Path) -> None:
    run = orchestrator.finetune(
        backbone=str(tiny_resnet), data=str(digits), method="full", report=lambda _: None,
        training={"epochs": 2, "batch_size": 32, "budget_min": 60, "audit": True},
    )  # fmt: skip
    taken = taken_of(run)
    assert len(taken) == run.plan.recipe.num_steps


def test_without_being_asked_for_none_is_written(tiny_resnet: Path, digits: Path) -> None:
    run = orchestrator.finetune(backbone=str(tiny_resnet), data=str(digits), training={"epochs": 1}, method="head",
                                report=lambda _: None)  # fmt: skip
    assert read_audit(run) == []
    assert not (run.path / "audit").exists()
