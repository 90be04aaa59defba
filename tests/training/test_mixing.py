"""Samples of a batch mixed with each other: what becomes of them, of their labels, and of the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import orchestrator
from orchestrator.errors import InterruptedRunError, JobError
from orchestrator.features import Batch, make_mix
from orchestrator.job import Plan
from orchestrator.modality import registry
from orchestrator.training.batches import BatchLoader
from tests.tasks.test_objective import objective, targets_of
from tests.tiny import make_bert
from tests.toys import write_toys
from tests.training.test_loop import at_call
from tests.whole.test_train import same, train, weights_of

KINDS = ("mixup", "cutmix", "both")


class Images:
    """A source of images that are each one value, their row."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def batch(self, rows: Any, train: bool) -> Batch | None:
        assert train
        pixels = torch.from_numpy(rows).float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
        return Batch({"pixel_values": pixels}, torch.from_numpy(rows % self.num_classes), rows)


def mix_of(backbone: Path, data: Path, kind: str, **fields: Any) -> Callable[[Batch], Batch]:
    plan: Plan = orchestrator.plan(
        backbone=str(backbone), data=str(data), method="full", **{"training.mix": kind, **fields}
    )
    mix = make_mix(plan, registry.get("image"))
    assert mix is not None
    return mix


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_mixed_in_the_shares_of_the_pixels(kind: str, tiny_resnet: Path, flat_digits: Path) -> None:
    """And by the key of the microbatch alone, read ahead or not."""
    mix, rows = mix_of(tiny_resnet, flat_digits, kind), np.arange(10)
    seen: dict[bool, list[Batch]] = {}
    for ahead in (False, True):
        with ExitStack() as resources:
            loader = BatchLoader(torch.device("cpu"), resources, ahead)
            loader.mix = mix
            keys = [(0, step, part) for step in range(6) for part in range(2)]
            batches = [loader.load(Images(10), key, rows) for key in (keys if ahead else reversed(keys))]  # type: ignore[arg-type]
            seen[ahead] = [one for one in batches if one is not None]
    assert len(seen[True]) == len(keys)
    for one, other in zip(seen[True], reversed(seen[False]), strict=True):
        assert torch.equal(one.inputs["pixel_values"], other.inputs["pixel_values"])
        assert torch.equal(one.targets, other.targets)
        pixels, targets = one.inputs["pixel_values"], one.targets
        assert torch.allclose(targets.sum(dim=1), torch.ones(10))
        # The mean pixel is the mean of the two rows, each by its share.
        assert torch.allclose(pixels.mean(dim=(1, 2, 3)), targets @ torch.arange(10.0), atol=1e-4)
    shares = torch.stack([one.targets.amax(dim=1)[0] for one in seen[True]])
    assert len(shares.unique()) > 6
    assert shares.min() < 0.999
    whole = [set(one.inputs["pixel_values"].unique().tolist()) <= set(range(10)) for one in seen[True]]
    assert {"mixup": not any(whole), "cutmix": all(whole), "both": True in whole and False in whole}[kind]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [(), (0.5, 1.0, 4.0)])
def test_shares_that_are_whole_are_as_labels(weights: tuple[float, ...], smoothing: float) -> None:
    ours, targets = objective("single-label", weights, smoothing), targets_of("single-label")
    outputs = torch.randn(12, 3)
    shares = torch.nn.functional.one_hot(targets, 3).float()
    for one, other in zip(ours.loss(outputs, targets), ours.loss(outputs, shares), strict=True):
        assert torch.allclose(one, other)
    assert ours.num_right(outputs, targets) == ours.num_right(outputs, shares)
    # The loss of a mixture is the mixture of the losses, and so is its weight.
    mixed = 0.3 * shares + 0.7 * shares.roll(1, 0)
    for part in (0, 1):
        parts = [ours.loss(outputs, one)[part] for one in (mixed, shares, shares.roll(1, 0))]
        assert torch.allclose(parts[0], 0.3 * parts[1] + 0.7 * parts[2])


@pytest.mark.slow
@pytest.mark.parametrize("task", ["single-label", "multi-label"])
def test_a_run_with_mixed_samples_goes_on_bit_for_bit(task: str, tiny_vit: Path, digits: Path, tmp_path: Path) -> None:
    job: dict[str, Any] = {
        "method": "full", "scaling": {"threads_per_worker": 1}, "task": task,
        "training": {"epochs": 2, "mix": "both", "label_smoothing": 0.1, "class_weights": "auto", "batch_size": 8,
                     "num_microbatches": 2, "checkpoint_every_steps": 1},
    }  # fmt: skip
    data = digits
    if task == "multi-label":
        (tmp_path / "toys").mkdir()
        data = write_toys(tmp_path / "toys", "image", task)
    else:
        job["data.num_train"] = 40
    whole = train(tiny_vit, data, name="whole", **job)
    with pytest.raises(InterruptedRunError):
        train(tiny_vit, data, name="cut", stop=at_call(3), **job)
    run = train(tiny_vit, data, name="cut", **job)
    assert same(weights_of(whole), weights_of(run))
    assert [line["train_loss"] for line in run.metrics] == [line["train_loss"] for line in whole.metrics]
    plain = train(tiny_vit, data, **{**job, "training": {**job["training"], "mix": "none"}})
    assert not same(weights_of(plain), weights_of(whole))


def test_what_cannot_be_mixed_is_refused(tiny_resnet: Path, flat_digits: Path, tmp_path: Path) -> None:
    def refusal(**fields: Any) -> str:
        fields = {"backbone": str(tiny_resnet), "data": str(flat_digits), "method": "full", **fields}
        with pytest.raises(JobError) as caught:
            orchestrator.plan(**fields)
        return str(caught.value)

    assert "mixup, mixed" not in refusal(**{"training.mix": "mixed"})
    assert "expected: one of none, both, cutmix, mixup" in refusal(**{"training.mix": "mixed"})
    once = refusal(**{"training.mix": "mixup", "method": "head"})
    assert "the body runs once for each" in once
    assert "training.features = 'every step'" in once
    (tmp_path / "toys").mkdir()
    numbers = write_toys(tmp_path / "toys", "image", "regression")
    columns = {"data.label_column": ["words", "height"], "data": str(numbers), "task": "regression"}
    assert "the task is regression" in refusal(**{"training.mix": "cutmix", **columns})
    bert = make_bert(tmp_path / "bert")
    (tmp_path / "texts").mkdir()
    texts = write_toys(tmp_path / "texts", "text")
    refused = refusal(**{"training.mix": "mixup", "modality": "text", "backbone": str(bert), "data": str(texts)})
    assert "cannot be mixed by" in refused
    for fields in ({"method": "lp-ft"}, {"method": "head", "training.features": "every step"}):
        orchestrator.plan(backbone=str(tiny_resnet), data=str(flat_digits), **{"training.mix": "mixup", **fields})


def test_a_plugin_of_its_own_may_mix(tiny_resnet: Path, flat_digits: Path) -> None:
    def rolled(inputs: Any, targets: torch.Tensor) -> Any:
        return {"pixel_values": inputs["pixel_values"].roll(1, 0)}, targets.roll(1, 0)

    image = registry.get("image")
    registry.register(dataclasses.replace(image, name="rolling", mixes={"roll": rolled}))
    try:
        job: dict[str, Any] = {"method": "full", "modality": "rolling", "training.epochs": 1}
        run = train(tiny_resnet, flat_digits, **job, **{"training.mix": "roll"})
    finally:
        registry.unregister("rolling")
    assert run.plan.job.training.mix == "roll"
