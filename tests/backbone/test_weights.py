"""Weights under any name on the Hub: loaded right, or refused with what to do."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

import orchestrator
from orchestrator.errors import RefusedError
from tests.hub_server import Hub, Repository

Tensors = dict[str, torch.Tensor]
GARBAGE = b"<html>sign in</html>" * 20


@pytest.fixture
def original(tiny_resnet: Path) -> Tensors:
    return load_file(tiny_resnet / "model.safetensors")


def packed(tensors: Tensors) -> bytes:
    return save(tensors, metadata={"format": "pt"})


def in_shards(tensors: Tensors, stem: str, index: str = "", num: int = 2) -> dict[str, bytes]:
    """The tensors in files of `stem`, and an index of that name."""
    names = sorted(tensors)
    parts = [{name: tensors[name] for name in names[i::num]} for i in range(num)]
    files = {f"{stem}-{i + 1:05}-of-{num:05}.safetensors": part for i, part in enumerate(parts)}
    written = {file: packed(part) for file, part in files.items()}
    if index:
        weight_map = {name: file for file, part in files.items() for name in part}
        written[index] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return written


def repository(hub: Hub, tiny_resnet: Path, files: dict[str, bytes]) -> str:
    small = {one.name: one.read_bytes() for one in tiny_resnet.iterdir() if one.suffix == ".json"}
    # A name of its own for each content: the client keeps what it has of a repository.
    name = f"org/named-{hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()[:8]}"
    hub.repositories[name] = Repository({**small, **files})
    return name


def forms(form: str, tensors: Tensors) -> tuple[dict[str, bytes], list[str]]:
    """(files, those of them that hold the weights)."""
    whole, half = packed(tensors), packed({name: one.half() if one.is_floating_point() else one
                                           for name, one in tensors.items()})  # fmt: skip
    other = packed({"visual.conv1.weight": torch.zeros(3)})
    index = "pytorch_model.safetensors.index.json"
    outside = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "../outside.safetensors")}
    found: dict[str, dict[str, bytes]] = {
        "pytorch_model": {"pytorch_model.safetensors": whole},
        "weights": {"weights.safetensors": whole},
        "half": {"model.fp16.safetensors": half},
        "beside others": {"model.safetensors": whole, "model.fp16.safetensors": half, "tf.safetensors": other,
                          "open_clip_model.safetensors": other, "consolidated.safetensors": other},
        "beside open_clip": {"weights.safetensors": whole, "open_clip_model.safetensors": other},
        "shards": in_shards(tensors, "model", "model.safetensors.index.json"),
        "shards without an index": in_shards(tensors, "model"),
        "shards of another name": in_shards(tensors, "pytorch_model", index, 3),
        "an index that leads out": {**in_shards(tensors, "model"),
                                    "model.safetensors.index.json": json.dumps(outside).encode()},
        "a broken index": {**in_shards(tensors, "model"), "model.safetensors.index.json": b"{}"},
    }  # fmt: skip
    files = found[form]
    weights = [name for name in files if name.endswith(".safetensors")]
    return files, [weights[0]] if form.startswith("beside") else weights


FORMS = ("pytorch_model", "weights", "half", "beside others", "beside open_clip", "shards", "shards without an index",
         "shards of another name", "an index that leads out", "a broken index")  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_other_names_are_loaded(
    hub: Hub, tiny_resnet: Path, original: Tensors, flat_digits: Path, form: str
) -> None:
    files, weights = forms(form, original)
    backbone = repository(hub, tiny_resnet, files)
    few = {"path": str(flat_digits), "num_train": 60}
    plan = orchestrator.plan(backbone=backbone, data=few, method="head")
    assert plan.parameters is not None
    assert plan.parameters.frozen == sum(
        one.numel() for name, one in original.items()
        if name.startswith("resnet.") and not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    )  # fmt: skip
    asked = [one for one in hub.requests if one[1].startswith("/large")]
    assert {path.rpartition("/")[2] for _, path, _ in asked} == set(weights)
    assert all(wanted.startswith("bytes=0-") for method, _, wanted in asked if method == "GET")
    hub.requests.clear()
    run = orchestrator.finetune(
        method="head",
        backbone=backbone,
        data=few,
        training={"epochs": 1},
        scaling={"threads_per_worker": 1},
        report=lambda _: None,
    )
    whole = [path for method, path, wanted in hub.requests if path.startswith("/large") and method == "GET"
             and not wanted]  # fmt: skip
    assert sorted(path.rpartition("/")[2] for path in whole) == sorted(weights)
    exported = load_file(run.model / "model.safetensors")
    assert exported.keys() == original.keys()
    for name, tensor in original.items():
        if name.startswith("resnet."):
            assert torch.allclose(exported[name].float(), tensor.float(), atol=1e-2 if form == "half" else 0), name
            assert exported[name].dtype == tensor.dtype


@pytest.mark.parametrize("form", ["pytorch_model", "shards of another name"])
def test_of_a_directory_too(tiny_resnet: Path, original: Tensors, flat_digits: Path, tmp_path: Path, form: str) -> None:
    files, _ = forms(form, original)
    for name, content in {**{f.name: f.read_bytes() for f in tiny_resnet.glob("*.json")}, **files}.items():
        (tmp_path / name).write_bytes(content)
    run = orchestrator.finetune(
        method="head", backbone=str(tmp_path), data={"path": str(flat_digits), "num_train": 60}, training={"epochs": 1},
        scaling={"threads_per_worker": 1}, report=lambda _: None, storage=str(tmp_path / "runs"),
    )  # fmt: skip
    name = "resnet.embedder.embedder.convolution.weight"
    assert torch.equal(load_file(run.model / "model.safetensors")[name], original[name])


def test_timms_networks_too(hub: Hub, flat_digits: Path, tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    whole = (tmp_path / "model.safetensors").read_bytes()
    hub.repositories["org/timm"] = Repository(
        {"config.json": (tmp_path / "config.json").read_bytes(), "pytorch_model.safetensors": whole}
    )
    run = orchestrator.finetune(
        method="head", backbone="org/timm", data={"path": str(flat_digits), "num_train": 30}, settings={"size": 32},
        training={"epochs": 1}, scaling={"threads_per_worker": 1}, report=lambda _: None,
    )  # fmt: skip
    exported = load_file(run.model / "model.safetensors")
    name = "layer1.0.conv1.weight"
    assert torch.equal(exported[name], model.state_dict()[name])


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    # files, reason, words
    "variants": ({"model.fp16.safetensors": b"x", "model.fp32.safetensors": b"x"}, "unsupported", "which of them"),
    "two sets": ({"a-00001-of-00001.safetensors": b"x", "b-00001-of-00001.safetensors": b"x"}, "unsupported",
                 "which of them"),
    "pieces": ({f"shard-0000{i}-model-00001-of-00001.safetensors": b"x" for i in (0, 1)}, "unsupported",
               "consolidate_distributed_checkpoint"),
    "a shard is missing": ({"model-00001-of-00002.safetensors": b"x"}, "bad_config", "lacks shard 2"),
    "open_clip's alone": ({"open_clip_model.safetensors": b"x"}, "no_weights", "another library"),
    "Mistral's beside pickles": ({"consolidated.safetensors": b"x", "model.bin": b"x"}, "pickle_only", "library"),
    "in a folder": ({"unet/model.safetensors": b"x"}, "no_weights", "unet/model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("form", REFUSED)
def test_weights_that_cannot_be_told_apart_are_refused(hub: Hub, tiny_resnet: Path, form: str) -> None:
    files, reason, words = REFUSED[form]
    with pytest.raises(RefusedError) as caught:
        orchestrator.check(repository(hub, tiny_resnet, files), "image")
    assert caught.value.reason == reason
    assert words in str(caught.value)
    assert caught.value.mend
    assert not hub.asked_for(".safetensors")


BROKEN = {"html": GARBAGE, "too large": b"\xff" * 64, "a list": header(b"[]"), "no JSON": header(b"{x"), "empty": b""}


@pytest.mark.parametrize("content", BROKEN)
@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_what_is_no_safetensors_file_is_refused_by_its_header(
    hub: Hub, tiny_resnet: Path, flat_digits: Path, name: str, content: str
) -> None:
    backbone = repository(hub, tiny_resnet, {name: BROKEN[content]})
    with pytest.raises(RefusedError, match="no valid safetensors file") as caught:
        orchestrator.plan(backbone=backbone, data=str(flat_digits))
    assert caught.value.reason == "bad_config"


def test_a_pointer_of_git_lfs_in_the_place_of_weights_is_named(tiny_resnet: Path, tmp_path: Path) -> None:
    """By `check` too, which reads no weights."""
    place = shutil.copytree(tiny_resnet, tmp_path / "cloned")
    (place / "model.safetensors").write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 44815\n"
    )
    with pytest.raises(RefusedError, match="is a pointer of Git LFS") as caught:
        orchestrator.check(str(place), "image")
    assert caught.value.mend == f"fetch it: git -C {place} lfs pull"
