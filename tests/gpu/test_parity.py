"""The same on a GPU as on the CPU, in float32: forward, training, going on, features, two ranks over NCCL.

    python -m pytest -m gpu -rs tests

Skipped, and said to be, where torch finds no GPU. Tests that run on both stand elsewhere (`tests.devices.both`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import orchestrator
from orchestrator.errors import InterruptedRunError
from orchestrator.modality import registry
from orchestrator.network import channels_last, find_device, freeze, make_optimizer, on_device, set_mode, start_worker
from tests.devices import on_a_gpu
from tests.network.test_strategy import assert_as_one, on_two_ranks
from tests.tiny import WORDS, make_bert

pytestmark = on_a_gpu
TOLERANCE = 1e-4  # relative to the largest, of sums in another order


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 short texts of two classes."""
    file = tmp_path_factory.mktemp("texts") / "texts.csv"
    words = WORDS.split()
    lines = [f"{words[i % 20]} {words[(i + 3) % 20]} {words[i % 7]},{'ab'[i % 2]}" for i in range(60)]
    file.write_text("text,label\n" + "\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory, tiny_resnet: Path, tiny_vit: Path) -> dict[str, Path]:
    """Convolutions with BatchNorm, attention on images, attention on texts."""
    return {"resnet": tiny_resnet, "vit": tiny_vit, "bert": make_bert(tmp_path_factory.mktemp("bert"))}


def job(device: str, **fields: Any) -> dict[str, Any]:
    training = {"epochs": 2, "batch_size": 16, "precision": "fp32", **fields.pop("training", {})}
    return {"method": "head", "training": training, "scaling": {"device": device}, "report": lambda _: None, **fields}


def both(**fields: Any) -> tuple[orchestrator.Run, orchestrator.Run]:
    """The same job on the CPU and on the GPU."""
    cpu, gpu = (orchestrator.finetune(**job(device, name=device, **fields)) for device in ("cpu", "gpu"))
    return cpu, gpu


def assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        error = (ours[name].double() - tensor.double()).abs().max()
        assert error <= tolerance * tensor.abs().max().clamp(min=1.0), name


@pytest.mark.parametrize("name", ["resnet", "vit", "bert"])
def test_logits_are_the_cpus(name: str, backbones: dict[str, Path], flat_digits: Path, texts: Path) -> None:
    modality, data = ("text", texts) if name == "bert" else ("image", flat_digits)
    plan = orchestrator.plan(modality=modality, backbone=str(backbones[name]), data=str(data))
    plugin = registry.get(modality)
    assert plugin.build is not None
    assert plugin.batch is not None
    assert plugin.decode is not None
    assert plugin.toy is not None
    decoded = [plugin.decode(sample) for sample, _ in plugin.toy(8)]
    inputs = plugin.batch(plan, backbones[name])(decoded, False)
    logits = []
    for device in (torch.device("cpu"), find_device("gpu")):
        with start_worker(2, device):  # float32 is float32 there, whatever the caller allows
            network = plugin.build(plan, backbones[name])
            network.module.to(device, memory_format=torch.channels_last)
            set_mode(network, plan.recipe.phases[0], training=False)
            with torch.no_grad():
                logits.append(network.logits(channels_last(on_device(inputs, device))).cpu())
    assert logits[1].dtype == torch.float32
    assert_near({"logits": logits[1]}, {"logits": logits[0]}, TOLERANCE)


def test_training_gives_what_it_gives_on_the_cpu(tiny_resnet: Path, flat_digits: Path) -> None:
    cpu, gpu = both(backbone=str(tiny_resnet), data=str(flat_digits), method="full")
    ours, theirs = (run.results["validation"] for run in (gpu, cpu))
    assert abs(ours["loss"] - theirs["loss"]) <= 0.02 * theirs["loss"]
    # AdamW moves a parameter by its rate in each step, however small the gradient: 1e-3, some 30 times.
    assert_near(load_file(gpu.model / "model.safetensors"), load_file(cpu.model / "model.safetensors"), tolerance=0.03)


def test_features_are_the_cpus(tiny_resnet: Path, flat_digits: Path) -> None:
    """A head on stored features: of a body that ran on the GPU, cut where the proof holds there too."""
    cpu, gpu = both(backbone=str(tiny_resnet), data=str(flat_digits), method="head")
    assert gpu.lineage["features"] == "once"
    assert gpu.lineage["cut_error"] <= TOLERANCE
    assert_near(load_file(gpu.model / "model.safetensors"), load_file(cpu.model / "model.safetensors"), tolerance=0.01)


def after(num_steps: int) -> Callable[[], bool]:
    """Whether so many steps were made."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked >= num_steps

    return stop


def test_a_stopped_run_goes_on_with_its_fused_optimizer(tiny_resnet: Path, flat_digits: Path) -> None:
    training = {"deterministic": True}
    fields = job("gpu", backbone=str(tiny_resnet), data=str(flat_digits), method="full", training=training)
    whole = orchestrator.finetune(**fields, name="whole")
    with pytest.raises(InterruptedRunError):
        orchestrator.finetune(**fields, name="cut", stop=after(5))
    cut = orchestrator.finetune(**fields, name="cut")
    assert_near(load_file(cut.model / "model.safetensors"), load_file(whole.model / "model.safetensors"), tolerance=0.0)


def test_the_optimizer_is_fused(tiny_resnet: Path, flat_digits: Path) -> None:
    plugin = registry.get("image")
    plan = orchestrator.plan(backbone=str(tiny_resnet), data=str(flat_digits), method="full")
    assert plugin.build is not None
    network = plugin.build(plan, tiny_resnet)
    network.module.to("cuda")
    phase = plan.recipe.phases[0]
    freeze(network, phase)
    optimizer, _ = make_optimizer(network, plan.job.training, phase)
    assert optimizer.defaults["fused"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two ranks over NCCL need two GPUs")
@pytest.mark.parametrize("name", ["gradients", "gradients in one bucket"])
def test_two_ranks_over_nccl_learn_from_the_gradients_of_one(tmp_path: Path, name: str) -> None:
    two = on_two_ranks(tmp_path, "nccl")
    assert_as_one(two, name, tolerance=1e-5)
    new = {"last.weight", "last.bias", "first.weight", "scale", "counter"}
    assert all(torch.equal(two[1]["after"][key], two[0]["before"][key]) for key in new)
