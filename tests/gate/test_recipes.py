"""A method -> its phases, with every default resolved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import orchestrator
from orchestrator.errors import JobError
from orchestrator.gate.recipes import kind_of
from orchestrator.job import Phase, Recipe
from tests.tiny import make_bert


@pytest.fixture
def recipe_of(tiny_resnet: Path, flat_digits: Path) -> Any:
    def recipe(**fields: Any) -> Recipe:
        return orchestrator.plan(backbone=str(tiny_resnet), data=str(flat_digits), **fields).recipe

    return recipe


def test_lp_ft_is_a_probe_and_then_everything(recipe_of: Any) -> None:
    first, second = recipe_of(method="lp-ft").phases
    assert (first.trains, first.source, first.solver, first.num_steps) == ("head", "features", "probe", 1)
    assert (second.trains, second.source, second.batch_norm) == ("everything", "samples", "frozen")
    assert second.learning_rate == 3e-4


def test_what_is_asked_for_is_of_the_phase_after_the_head(recipe_of: Any) -> None:
    """Three epochs are three of everything, and not of a head that converges for nothing."""
    asked = {"epochs": 3, "learning_rate": 1e-5, "batch_norm": "train"}
    first, second = recipe_of(method="lp-ft", training=asked).phases
    assert first == recipe_of(method="lp-ft").phases[0]
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


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [
        ("transformer", "bert"), ("transformer", "distilbert"), ("transformer", "deberta-v2"), ("transformer", "gpt2"),
        ("transformer", "vit"), ("transformer", "swin"), ("transformer", "wav2vec2"), ("transformer", "whisper"),
        ("batch_norm", "resnet"), ("batch_norm", "mobilenet_v2"), ("batch_norm", "levit"), ("other", "convnext"),
    ],
)  # fmt: skip
def test_the_kind_of_a_network_is_told_by_its_weights(kind: str, model_type: str) -> None:
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        network = AutoModel.from_config(AutoConfig.for_model(model_type))
    assert kind_of({name: ("F32", tuple(one.shape)) for name, one in network.state_dict().items()}) == kind


def test_what_is_no_transformer_is_not_taken_for_one() -> None:
    for network in (nn.LSTM(40, 256, 3), nn.Sequential(nn.Conv1d(3, 16, 7), nn.ReLU(), nn.Linear(16, 4))):
        assert kind_of({name: ("F32", tuple(one.shape)) for name, one in network.state_dict().items()}) == "other"
    assert kind_of(None) == "unknown"


def test_a_transformer_moves_slowly_and_its_new_layer_does_not(tiny_vit: Path, flat_digits: Path) -> None:
    def phase(**training: Any) -> Phase:
        job: dict[str, Any] = {"backbone": str(tiny_vit), "data": str(flat_digits), "method": "full"}
        return orchestrator.plan(**job, training=training).recipe.phases[-1]

    default = phase()
    assert (default.learning_rate, default.head_learning_rate, default.batch_norm) == (1e-4, 3e-3, "none")
    assert default.num_steps >= 200  # 240 samples are eight steps an epoch
    asked = phase(learning_rate=1e-5, epochs=2)
    assert (asked.learning_rate, asked.head_learning_rate, asked.epochs) == (1e-5, 1e-5, 2)
    assert phase(optimizer="sgd").learning_rate == pytest.approx(1e-3)


def test_auto_is_lp_ft_that_has_to_win_within_a_budget(recipe_of: Any) -> None:
    auto, other = recipe_of(), recipe_of(method="lp-ft")
    assert auto.phases[0] == other.phases[0]
    assert (auto.phases[1].must_win, other.phases[1].must_win) == (True, False)
    assert (auto.budget_s, other.budget_s) == (3600.0, None)
    assert recipe_of(training={"epochs": 3}).budget_s is None  # who gives epochs has them
    assert recipe_of(training={"epochs": 3, "budget_min": 2}).budget_s == 120.0
    assert recipe_of(method="full", training={"budget_min": 2}).budget_s == 120.0


def test_few_samples_of_a_class_are_learnt_by_what_is_alike(tmp_path: Path, recipe_of: Any) -> None:
    bert = make_bert(tmp_path / "bert")

    def losses(num: int = 70, num_classes: int = 10, **fields: Any) -> list[str]:
        table = tmp_path / f"{num}-{num_classes}.csv"
        lines = [f"rain number {i},c{i % num_classes},train,w{i % 9}" for i in range(num)]
        lines += [f"snow number {i},c{i % num_classes},validation,v{i}" for i in range(num_classes)]
        table.write_text("\n".join(["text,label,split,writer", *lines]))
        data = {"path": str(table), "split_column": "split", "input_column": "text", "label_column": "label"}
        job: dict[str, Any] = {"modality": "text", "backbone": str(bert), "data": data}
        return [phase.loss for phase in orchestrator.plan(**{**job, **fields}).recipe.phases]

    assert losses() == losses(method="lp-ft") == ["task", "contrastive"]
    assert losses(method="full") == ["task"]
    assert losses(**{"training.refit": True}) == ["task", "contrastive"] * 2
    for asked in (
        {"loss": "task"}, {"ema": 0.9}, {"head_learning_rate": 1e-3}, {"label_smoothing": 0.1},
        {"features": "every step"}, {"num_microbatches": 16},
    ):  # fmt: skip
        assert losses(training=asked) == ["task", "task"], asked
    assert losses(119) == ["task", "contrastive"]
    assert losses(120) == ["task", "task"]  # twelve a class
    assert losses(60, 45) == ["task", "task"]  # most are alone in their class
    assert losses(**{"data.group_column": "writer"}) == ["task", "task"]
    for few in ({"data.num_train": 100}, {"training.loss": "contrastive"}):
        assert [phase.loss for phase in recipe_of(**few).phases] == ["task", "contrastive"]
    assert [phase.loss for phase in recipe_of().phases] == ["task", "task"]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"method": "full"}, "method full has no head that is fitted"),
        ({"training.mix": "mixup"}, "samples of several classes"),
        ({"training.ema": 0.9}, "averages weights"),
        ({"training.features": "every step"}, "keeps no features"),
        ({"training.views": 2, "settings": {"augment": "light"}}, "keeps random views"),
        ({"training.batch_size": 3}, "a microbatch of 2"),
    ],
)
def test_what_cannot_be_learnt_by_what_is_alike_says_why(fields: dict[str, Any], why: str, recipe_of: Any) -> None:
    with pytest.raises(JobError, match=why) as refused:
        recipe_of(**{"training.loss": "contrastive", **fields})
    assert refused.value.mend == "leave training.loss out"


def test_few_samples_take_more_epochs(recipe_of: Any) -> None:
    few, many = (recipe_of(**{"data.num_train": num}).phases[1] for num in (20, 200))
    assert few.epochs > many.epochs
    assert few.num_steps <= many.num_steps


@pytest.mark.parametrize("method", ["auto", "full", "lp-ft", "scratch"])
def test_few_samples_come_in_small_batches_where_the_body_moves(recipe_of: Any, method: str) -> None:
    few = recipe_of(method=method)
    assert (few.batch_size, few.phases[-1].num_steps) == (16, few.phases[-1].epochs * few.steps_per_epoch)
    assert few.phases[-1].num_steps >= 400
    assert recipe_of(method=method, training={"batch_size": 24}).batch_size == 24
    assert recipe_of(method=method, training={"num_microbatches": 4}).batch_size == 32  # parts of 4 are too small
    assert recipe_of(method=method, training={"epochs": 3}).phases[-1].epochs == 3
    assert recipe_of(method="head").batch_size == 32


def test_samples_are_changed_where_everything_is_trained_to_tell_classes(tiny_resnet: Path, flat_digits: Path) -> None:
    def planned(**fields: Any) -> Any:
        return orchestrator.plan(backbone=str(tiny_resnet), data=str(flat_digits), **fields)

    for method in ("auto", "full", "lp-ft", "scratch"):
        plan = planned(method=method)
        assert (plan.input["augment"], plan.job.settings) == ("light", {})
        assert planned(method=method, settings={"augment": "none"}).input["augment"] == "none"
        assert planned(method=method, settings={"augment": "flip"}).input["augment"] == "flip"
    assert planned(method="auto").recipe.phases[0].source == "features"  # of the samples as they are
    head = planned(method="head")
    assert (head.input["augment"], head.recipe.phases[0].source) == ("none", "features")


def test_numbers_may_be_of_what_a_random_change_moves(tiny_resnet: Path, tmp_path: Path, flat_digits: Path) -> None:
    lines = [f"{file},{number / 7}" for number, file in enumerate(sorted(flat_digits.rglob("*.png")))]
    (tmp_path / "angles.csv").write_text("image,angle\n" + "\n".join(lines))
    columns = {"input_column": "image", "label_column": "angle"}
    data = {"path": str(tmp_path / "angles.csv"), "root": str(flat_digits), **columns}
    plan = orchestrator.plan(backbone=str(tiny_resnet), data=data, task="regression", method="full")
    assert plan.input["augment"] == "none"


@pytest.mark.long
@pytest.mark.slow
def test_lp_ft_is_at_least_as_good_as_the_head_that_it_begins_with(efficientnet: Path, digits: Path) -> None:
    """Real weights, 100 digits: a head, and everything from there."""
    job: dict[str, Any] = {
        "backbone": str(efficientnet), "settings": {"size": 32}, "report": lambda _: None,
        "data": {"path": str(digits), "num_train": 100},
    }  # fmt: skip
    head = orchestrator.finetune(**job, method="head")
    run = orchestrator.finetune(**job, method="lp-ft", training={"epochs": 10})
    assert len(run.metrics) == 11
    assert run.lineage["features"] == "once"
    assert run.accuracy > head.accuracy
