"""A run that has learnt nothing says so, with the likely cause; one that has says nothing."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import orchestrator
from orchestrator.job import Event, Noted, Plan
from orchestrator.training.convergence import find_problems
from tests.whole.test_train import Cli

GOOD = {"validation": {"num_samples": 60, "accuracy": 0.6, "accuracy_95": [0.47, 0.71], "auroc": 0.9,
                       "auroc_95": [0.85, 0.95]}}  # fmt: skip
CHANCE = {"validation": {"num_samples": 60, "accuracy": 0.1, "accuracy_95": [0.05, 0.2], "auroc": 0.5,
                         "auroc_95": [0.42, 0.58]}}  # fmt: skip


@pytest.fixture(scope="module")
def made(tiny_resnet: Path, digits: Path) -> Any:
    def plan(**fields: Any) -> Plan:
        return orchestrator.plan(backbone=str(tiny_resnet), data=str(digits), **{"method": "full", **fields})

    return plan


def said(plan: Plan, losses: Sequence[float], figures: Any, accuracy: float = 0.2, alike: bool = False) -> str:
    lines = [{"epoch": i, "train_loss": loss, "train_accuracy": accuracy} for i, loss in enumerate(losses, 1)]
    found = find_problems(plan, lines, figures, lambda: alike)
    assert len(found) <= 1
    return str(found[0]) if found else ""


@pytest.mark.parametrize(
    ("losses", "figures", "accuracy"),
    [
        ((2.3, 1.9, 1.2), GOOD, 0.7),
        ((2.3, 1.9, 2.1), GOOD, 0.3),  # it has been lower
        ((0.02, 0.021, 0.022), GOOD, 0.99),  # an earlier run that goes on on its own data
        ((2.3,), GOOD, 0.2),  # of one epoch nothing is known
        ((2.3, 1.0), {"validation": {**CHANCE["validation"], "num_samples": 12}}, 0.9),  # too few to tell
        ((2.3, 1.0), {}, 0.9),
        # A rare class, and the order of the scores is right.
        ((0.4, 0.2), {"validation": {**CHANCE["validation"], "auroc": 0.8, "auroc_95": [0.6, 0.9]}}, 0.9),
    ],
)
def test_nothing_is_said_of_what_learnt(made: Any, losses: Sequence[float], figures: Any, accuracy: float) -> None:
    assert said(made(), losses, figures, accuracy) == ""


def test_each_cause_has_its_mend(made: Any) -> None:
    assert "the learning rate 0.001 is too high: the loss rose; try: training.learning_rate = 0.0001" in said(
        made(), (2.3, 2.5, 3.9), CHANCE)  # fmt: skip
    low = said(made(training={"learning_rate": 1e-7, "epochs": 10, "batch_size": 32}), (2.3, 2.3, 2.299), CHANCE)
    assert "the learning rate 1e-07 is too low" in low
    assert "the validation accuracy is 0.100, no better than" in low
    assert "training.learning_rate = 0.003" in low
    few = said(made(training={"learning_rate": 1e-4, "epochs": 1, "batch_size": 32}), (2.3, 2.3), GOOD)
    assert "12 steps are too few; try: training.epochs = 17" in few
    assert "that was set does not suit" in said(made(training={"learning_rate": 0.3}), (2.3, 2.3), CHANCE)
    assert "the labels" in said(made(), (2.3, 2.3), CHANCE)
    assert "the preprocessing" in said(made(), (2.3, 2.3), CHANCE, alike=True)
    by_heart = said(made(), (2.3, 0.1), CHANCE, accuracy=0.99)
    assert by_heart.startswith("the validation accuracy is 0.100, no better than a prediction that is always the same")
    assert "by heart" in by_heart
    assert by_heart.endswith("try: method = head")
    assert said(made(method="scratch"), (2.3, 0.1), CHANCE, accuracy=0.99).endswith("try: method = full")
    assert "labels and inputs do not go together" in said(made(method="head"), (2.3, 0.1), CHANCE, accuracy=0.99)


def test_what_is_chance_depends_on_the_task(made: Any) -> None:
    def of_task(task: str, figures: Any) -> str:
        plan = made()
        plan = plan.model_copy(update={"job": plan.job.model_copy(update={"task": task})})
        return said(plan, (1.0, 0.5), {"test": {"num_samples": 50, **figures}}, accuracy=0.0)

    assert "R2 is 0.010" in of_task("regression", {"r2": 0.01, "r2_95": [-0.2, 0.1]})
    assert of_task("regression", {"r2": 0.4, "r2_95": [0.2, 0.5]}) == ""
    assert "AUROC is 0.510" in of_task("multi-label", {"auroc": 0.51, "auroc_95": [0.45, 0.6]})
    assert of_task("multi-label", {"auroc": 0.7, "auroc_95": [0.6, 0.8]}) == ""
    assert of_task("multi-label", {}) == ""


def test_an_ordinary_run_has_no_warning(tiny_resnet: Path, digits: Path) -> None:
    run = orchestrator.finetune(
        backbone=str(tiny_resnet), data=str(digits), report=lambda _: None,
        training={"epochs": 20, "batch_size": 32}, settings={"augment": "none"},
    )  # fmt: skip
    assert run.results["warnings"] == []


def test_a_run_that_moved_nothing_says_so_everywhere(tiny_resnet: Path, digits: Path, cli: Cli) -> None:
    heard: list[Event] = []
    job: dict[str, Any] = {
        "backbone": str(tiny_resnet), "data": str(digits), "name": "still", "report": heard.append,
        "method": "head",
        "training": {"epochs": 4, "learning_rate": 1e-9}, "scaling": {"threads_per_worker": 1},
    }  # fmt: skip
    run = orchestrator.finetune(**job)
    (warning,) = run.results["warnings"]
    assert "the training loss did not fall" in warning
    assert "the learning rate 1e-09 is too low" in warning
    assert Noted(warning, is_warning=True) in heard
    heard.clear()
    orchestrator.finetune(**job)  # which is finished
    assert Noted(warning, is_warning=True) in heard
    done = cli("runs", "show", run.path)
    assert done.returncode == 0
    assert "the learning rate 1e-09 is too low" in " ".join(done.stdout.split())


def test_labels_that_belong_to_nothing_are_told(tiny_resnet: Path, flat_digits: Path, tmp_path: Path) -> None:
    random, data = np.random.default_rng(0), tmp_path / "mixed-up"
    for file in sorted(flat_digits.glob("*/*.png")):
        folder = data / str(random.integers(2))
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / file.name)
    run = orchestrator.finetune(
        backbone=str(tiny_resnet), data={"path": str(data), "validation_fraction": 0.3}, report=lambda _: None,
        method="full", training={"epochs": 25, "batch_size": 32}, settings={"augment": "none"},
        scaling={"threads_per_worker": 1},
    )  # fmt: skip
    (warning,) = run.results["warnings"]
    assert "the validation accuracy is" in warning
    assert "likely cause: the labels" in warning


def test_inputs_that_have_become_alike_are_told(tiny_resnet: Path, digits: Path, tmp_path: Path) -> None:
    """16 bits a channel of which the lower 8 alone are used: all black to the network."""
    for file in sorted((digits / "train").glob("*/*.png"))[:200]:
        folder = tmp_path / "dark" / file.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(Image.open(file)).astype(np.uint16)).save(folder / file.name)
    run = orchestrator.finetune(
        backbone=str(tiny_resnet), data={"path": str(tmp_path / "dark"), "validation_fraction": 0.2},
        method="head", report=lambda _: None, training={"epochs": 3}, scaling={"threads_per_worker": 1},
    )  # fmt: skip
    (warning,) = run.results["warnings"]
    assert "the preprocessing: samples that differ are all the same to the network (channels" in warning
    assert "orchestrator settings image" in warning
