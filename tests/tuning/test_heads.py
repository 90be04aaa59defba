"""Heads that are trained side by side learn what runs of their own learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.tuning import SearchResult
from tests.devices import both
from tests.toys import write_toys

EXACT = {"precision": "fp32"}  # which number format is faster, each storage finds out for itself


def silent(_event: object) -> None:
    pass


def compare(result: SearchResult, base: dict[str, Any], numbers: list[int]) -> None:
    """Hold trials against runs that are alone: each epoch's figures to three digits and more."""
    for trial in result.trials:
        if trial.number not in numbers:
            continue
        assert trial.together > 1
        run = orchestrator.finetune(**base, **trial.config, storage="alone", name=f"{trial.number}", report=silent)
        assert len(trial.lines) == len(run.metrics)
        for ours, alone in zip(trial.lines, run.metrics, strict=True):
            for name, value in ours.items():
                # Of 40 samples one that is on the edge of two classes may fall to the other side.
                assert value == pytest.approx(alone[name], abs=0.026 if name == "validation_accuracy" else 1e-4), name


@pytest.mark.parametrize("backbone", ["tiny_resnet", "tiny_vit"])
@both
def test_scores_are_those_of_separate_runs(
    backbone: str, digits: Path, device: str, request: pytest.FixtureRequest
) -> None:
    base: dict[str, Any] = {
        "backbone": str(request.getfixturevalue(backbone)),
        "data": str(digits),
        "method": "head",
        "epochs": 3,
        "device": device,
        **EXACT,
    }
    space = {
        "learning_rate": {"loguniform": [1e-3, 1e-1]}, "weight_decay": [0.0, 0.1, 1.0],
        "label_smoothing": [0.0, 0.2], "class_weights": ["none", "auto"], "training.seed": [0, 1],
        "clip_norm": [None, 0.1], "schedule": ["cosine", "constant"], "warmup_fraction": [0.0, 0.3],
    }  # fmt: skip
    result = orchestrator.search(base, space, num_trials=5, report=silent)
    compare(result, base, [1, 4])
    assert result.best_run is not None
    assert result.best is not None
    validation = result.best_run.results["validation"]
    assert validation["accuracy"] == pytest.approx(result.best.score, abs=0.026)


def test_sgd_with_momenta_of_their_own(tiny_resnet: Path, digits: Path) -> None:
    base = {
        "backbone": str(tiny_resnet),
        "data": str(digits),
        "method": "head",
        "epochs": 2,
        "optimizer": "sgd",
        **EXACT,
    }
    space = {"momentum": [0.0, 0.9], "weight_decay": [0.0, 0.1], "learning_rate": [0.01, 0.1]}
    compare(orchestrator.search(base, space, num_trials=4, report=silent), base, [1, 2])


@pytest.mark.parametrize("task", ["multi-label", "regression"])
def test_other_tasks(task: str, tiny_resnet: Path, tmp_path: Path) -> None:
    folder = tmp_path / "toys"
    folder.mkdir()
    columns = {"label_column": ["words", "height"]} if task == "regression" else {}
    data = {
        "path": str(write_toys(folder, "image", task)),
        "validation_fraction": 0.25,
        "test_fraction": 0.25,
        **columns,
    }
    more = {} if task == "regression" else {"class_weights": ["none", "auto"], "label_smoothing": [0.0, 0.2]}
    base = {"backbone": str(tiny_resnet), "data": data, "task": task, "method": "head", "epochs": 3, **EXACT}
    result = orchestrator.search(base, {"learning_rate": [1e-3, 1e-2], **more}, num_trials=3, report=silent)
    assert (result.metric.key, result.metric.mode) == ("validation_loss", "min")
    compare(result, base, [1, 2])


def test_a_loss_that_is_no_number_is_the_row_of_that_trial_alone(tiny_resnet: Path, digits: Path) -> None:
    base = {"backbone": str(tiny_resnet), "data": str(digits), "method": "head", "epochs": 2, "clip_norm": None,
            "optimizer": "sgd"}  # fmt: skip
    result = orchestrator.search(base, {"learning_rate": {"grid": [1e-2, 1e38, 1e-1]}}, report=silent)
    assert [one.state for one in result.trials] == ["finished", "failed", "finished"]
    assert "is not finite" in result.trials[1].error
    assert result.best is not None
    assert json.loads((result.path / "search.json").read_text())["best"].endswith(f".{result.best.number:04}")
