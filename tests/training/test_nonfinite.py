"""A loss that is not finite: the samples of the batch that it comes of, and who is to blame."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import orchestrator
from orchestrator.errors import TrainingError
from orchestrator.modality import Collate, Plan, registry
from tests.devices import both
from tests.whole.test_train import silent


@pytest.fixture
def dividing() -> Iterator[None]:
    """Image plugins that divide each image by its deviation, which a black one has not; the one adds a little to it."""
    image = registry.get("image")
    assert image.batch is not None
    of_images = image.batch

    def batch_with(least: float) -> Any:
        def batch(plan: Plan, directory: Path) -> Collate:
            collate = of_images(plan, directory)

            def divided(decoded: Sequence[Any], train: bool) -> dict[str, torch.Tensor]:
                pixels = collate(decoded, train)["pixel_values"]
                return {"pixel_values": pixels / (pixels.std(dim=(1, 2, 3), keepdim=True) + least)}

            return divided

        return batch

    names = {"divided": 0.0, "divided_and_a_little": 1e-38}
    for name, least in names.items():
        registry.register(dataclasses.replace(image, name=name, batch=batch_with(least)))
    yield
    for name in names:
        registry.unregister(name)


@pytest.fixture
def with_a_black_one(flat_digits: Path, tmp_path: Path) -> Path:
    """The digits with one black image in training."""
    from PIL import Image

    data = tmp_path / "data"
    shutil.copytree(flat_digits, data / "train")
    Image.new("L", (8, 8), 0).save(data / "train" / "3" / "black.png")
    (data / "validation").mkdir()
    for folder in (data / "train").iterdir():
        (data / "validation" / folder.name).mkdir()
        file = sorted(folder.glob("0*.png"))[0]
        file.rename(data / "validation" / folder.name / file.name)
    return data


def blamed(backbone: Path, data: Path, **fields: Any) -> TrainingError:
    fields = {"method": "full", "training": {"epochs": 3}, **fields}
    with pytest.raises(TrainingError, match="the loss is") as caught:
        orchestrator.finetune(backbone=str(backbone), data=str(data), report=silent, **fields)
    return caught.value


@pytest.mark.usefixtures("dividing")
def test_an_input_that_is_no_number_is_named(tiny_resnet: Path, with_a_black_one: Path) -> None:
    error = blamed(tiny_resnet, with_a_black_one, modality="divided")
    assert "an input is to blame, which is not finite" in error.message
    assert str(with_a_black_one / "train" / "3" / "black.png") in error.message
    assert "mend or remove" in error.mend


@pytest.mark.usefixtures("dividing")
@both
def test_an_input_that_overflows_in_the_network_is_named(
    tiny_resnet: Path, with_a_black_one: Path, device: str
) -> None:
    training = {"batch_norm": "frozen", "batch_size": 300, "precision": "fp32"}
    job: dict[str, Any] = {"modality": "divided_and_a_little", "training": training, "scaling": {"device": device}}
    error = blamed(tiny_resnet, with_a_black_one, **job)
    assert "an input is to blame: with its weights as they began" in error.message
    assert "black.png" in error.message
    job["training"] |= {"batch_size": 16, "checkpoint_every_steps": 1, "seed": 5}  # not in the first step
    error = blamed(tiny_resnet, with_a_black_one, **job)
    assert "an input is to blame: with the weights of step" in error.message
    assert "black.png" in error.message


@pytest.mark.parametrize("every", [None, 1])
def test_a_rate_that_is_too_high_is_said(every: int | None, tiny_resnet: Path, flat_digits: Path) -> None:
    training = {"epochs": 9, "optimizer": "sgd", "learning_rate": 1e30, "clip_norm": None}
    error = blamed(tiny_resnet, flat_digits, training={**training, "checkpoint_every_steps": every})
    assert "the learning rate of 1e+30 is to blame" in error.message
    assert "training.learning_rate = 1e+29" in error.mend
    assert "clip_norm" in error.mend
    assert f" {flat_digits}/" in error.message  # the batch, or those of it for which the network gives no number


@pytest.mark.parametrize("method", ["head", "full"])
def test_weights_that_are_no_numbers_are_the_backbones_fault(
    method: str, tiny_resnet: Path, flat_digits: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_resnet, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    name = next(name for name in weights if "convolution.weight" in name)
    weights[name].view(-1)[0] = torch.nan
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    error = blamed(tmp_path / "broken", flat_digits, method=method)
    assert f"the backbone's weights are to blame: {name}" in error.message
