"""A method -> its phases, with every default resolved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.errors import JobError
from orchestrator.job import Recipe


@pytest.fixture
def recipe_of(tiny_resnet: Path, flat_digits: Path) -> Any:
    def recipe(**fields: Any) -> Recipe:
        return orchestrator.plan(backbone=str(tiny_resnet), data=str(flat_digits), **fields).recipe

    return recipe


def test_lp_ft_is_the_head_on_features_and_then_everything(recipe_of: Any) -> None:
    first, second = recipe_of(method="lp-ft").phases
    (head,) = recipe_of(method="head").phases
    assert first == head
    assert (second.trains, second.source, second.batch_norm) == ("everything", "samples", "frozen")
    assert second.learning_rate == 3e-4


def test_what_is_asked_for_is_of_the_phase_after_the_head(recipe_of: Any) -> None:
    """Three epochs are three of everything, and not of a head that converges for nothing."""
    asked = {"epochs": 3, "learning_rate": 1e-5, "batch_norm": "train"}
    first, second = recipe_of(method="lp-ft", training=asked).phases
    assert first == recipe_of(method="head").phases[0]
    assert (second.epochs, second.learning_rate, second.head_learning_rate, second.batch_norm) == (
        3,
        1e-5,
        1e-5,
        "train",
    )
    assert recipe_of(method="head", training={"epochs": 3}).phases[0].epochs == 3


def test_a_frozen_body_has_no_batch_norm_to_train(recipe_of: Any) -> None:
    with pytest.raises(JobError, match="would change a frozen body") as caught:
        recipe_of(method="head", training={"batch_norm": "train"})
    assert "method full" in caught.value.mend


@pytest.mark.slow
def test_lp_ft_is_at_least_as_good_as_the_head_that_it_begins_with(efficientnet: Path, digits: Path) -> None:
    """Real weights, 100 digits: a head, and everything from there."""
    job: dict[str, Any] = {
        "backbone": str(efficientnet), "settings": {"size": 32}, "report": lambda _: None,
        "data": {"path": str(digits), "num_train": 100},
    }  # fmt: skip
    head = orchestrator.finetune(**job, method="head")
    run = orchestrator.finetune(**job, method="lp-ft", training={"epochs": 10})
    assert len(run.metrics) == 50
    assert run.lineage["features"] == "once"
    assert run.accuracy > head.accuracy
