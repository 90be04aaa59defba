"""The gate decides from metadata: what it lets through, and the reason of each refusal."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import orchestrator
from orchestrator.backbone import read_card
from orchestrator.errors import REASONS, JobError, PluginError, RefusedError
from orchestrator.gate import decide, planning
from orchestrator.gate.resolve import in_head
from orchestrator.job.plans import BackboneRow
from orchestrator.modality import Profile, registry

Files = Callable[..., Path]

RESNET = {"model_type": "resnet", "num_channels": 3}
PROCESSOR = {"size": {"shortest_edge": 224}, "crop_pct": 0.875}
TIMM = {"architecture": "resnet18", "num_classes": 1000, "pretrained_cfg": {"input_size": [3, 224, 224]}}


def weights(*names: str) -> bytes:
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]} for i, name in enumerate(names)}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8 * len(names))


def refusal(backbone: Path | str, modality: str = "image", **more: object) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        planning.inspect(str(backbone), modality, **more)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    assert caught.value.reason in REASONS
    return caught.value


@pytest.mark.parametrize(
    ("files", "reason", "words"),
    [
        ({}, "no_config", "save_pretrained"),
        (
            {"adapter_config": {"base_model_name_or_path": "org/base"}},
            "adapter_only",
            "use its base: org/base",
        ),
        ({"model.gguf": b"GGUF"}, "gguf_only", "converted from"),
        ({"config.json": b"{broken"}, "bad_config", "config.json is not JSON"),
        ({"config": [1]}, "bad_config", "holds a list"),
        ({"config.json": b"[" * 100_000}, "bad_config", "is not JSON"),
        ({"config": RESNET, "processor_config": {"image_processor": "ViT"}}, "bad_config", "not an object"),
        ({"config": {"num_labels": 3}}, "no_model_type", "without running code"),
        ({"config": {"model_type": 7}}, "bad_config", "not a word"),
        ({"config": {"pretrained_cfg": {}}}, "bad_config", "names no architecture"),
        ({"config": {"model_type": "from-the-future"}}, "unknown_type", "'from-the-future'"),
        ({"config": {"model_type": "x", "auto_map": {"AutoModel": "m.py"}}}, "unknown_type", "is never run"),
        ({"config": {"architecture": "resnet9000", "pretrained_cfg": {}}}, "unknown_type", "'resnet9000'"),
        ({"config": {"model_type": "blip"}}, "two_modalities", "image and text"),
        ({"config": {"model_type": "yolos"}}, "no_head", "its output is boxes"),
        ({"config": {"model_type": "imagegpt"}}, "unsupported", "colours"),
        ({"config": {"model_type": "wav2vec2"}}, "wrong_modality", "--modality audio"),
        ({"config": {"model_type": "bert"}}, "wrong_modality", "--modality text"),
        ({"config": {**RESNET, "quantization_config": {"bits": 4}}}, "quantised", "quantised from"),
        ({"config": RESNET, "pytorch_model.bin": b"x"}, "pickle_only", "can run code"),
        ({"config": RESNET, "model.gguf": b"x"}, "gguf_only", "GGUF"),
        ({"config": RESNET}, "no_weights", "scratch"),
        ({"config": RESNET, "model.safetensors": b"x"}, "no_processor", "preprocessor_config.json"),
    ],
)
def test_every_form_that_is_refused(card_files: Files, files: dict[str, object], reason: str, words: str) -> None:
    error = refusal(card_files(**files))
    assert error.reason == reason
    assert words in str(error)


def test_a_known_type_is_accepted(card_files: Files) -> None:
    directory = card_files(config=RESNET, preprocessor_config=PROCESSOR, **{"model.safetensors": b""})
    card = orchestrator.check(str(directory), "image")
    assert (card.library, card.model_type, card.kind) == ("transformers", "resnet", "directory")
    timm = card_files("timm", config=TIMM, **{"model.safetensors": b""})
    assert orchestrator.check(str(timm), "image").library == "timm"
    assert refusal(timm, "text").reason == "wrong_modality"
    assert refusal(timm, "audio").reason == "wrong_modality"


@pytest.mark.parametrize(
    ("config", "preprocessor", "size", "outcome"),
    [
        (RESNET, PROCESSOR, 64, [64, 64]),
        (RESNET, PROCESSOR, None, [224, 224]),
        (RESNET, {"do_center_crop": True, "crop_size": 96, "size": {"shortest_edge": 128}}, None, [96, 96]),
        ({"model_type": "vit", "image_size": 32}, {"size": {"height": 32, "width": 32}}, None, [32, 32]),
        ({"model_type": "vit", "image_size": 32}, {"size": {"height": 32, "width": 32}}, 64, "fixed_size"),
        ({"model_type": "vit", "image_size": 32}, {"size": {"height": 32, "width": 32}}, 32, [32, 32]),
        (TIMM, None, 64, [64, 64]),
        (
            {**TIMM, "pretrained_cfg": {"input_size": [3, 96, 96], "fixed_input_size": True}},
            None,
            64,
            "fixed_size",
        ),
        ({**TIMM, "pretrained_cfg": {"input_size": [4, 96, 96]}}, None, None, "channels"),
        ({**TIMM, "pretrained_cfg": {"input_size": "large"}}, None, None, "bad_config"),
        ({**RESNET, "num_channels": 12}, PROCESSOR, None, "channels"),
        (RESNET, {"do_resize": True}, None, [384, 384]),  # what its processor does where the file says nothing
        ({"model_type": "bit"}, {"size": {"shortest_edge": 256}}, None, [224, 224]),
        (RESNET, {"size": 224, "feature_extractor_type": "ConvNextFeatureExtractor"}, None, [224, 224]),
        (RESNET, {"size": {"height": None, "width": 3}}, None, "bad_config"),
        (RESNET, {"size": {"height": "x", "width": 3}}, None, "bad_config"),
        (RESNET, {"size": 0}, None, "bad_config"),
        (RESNET, {"size": 224, "feature_extractor_type": "Wav2Vec2FeatureExtractor"}, None, "bad_config"),
        ({**RESNET, "num_channels": "three"}, PROCESSOR, None, "bad_config"),
        ({**RESNET, "vision_config": "x", "num_channels": None}, PROCESSOR, None, "bad_config"),
        ({"model_type": "vit", "image_size": 384}, {"size": 224}, None, "bad_config"),
        ({"model_type": "swin", "image_size": 224}, {"size": 224}, 64, "fixed_size"),
        ({"model_type": "swin", "image_size": 224}, {"size": 224}, 256, [256, 256]),
        ({**TIMM, "pretrained_cfg": {"input_size": [3, 0, 0]}}, None, None, "bad_config"),
    ],
)
def test_the_input_size(
    card_files: Files, config: dict[str, object], preprocessor: object, size: int | None, outcome: object
) -> None:
    files = {"config": config, "model.safetensors": b""}
    if preprocessor is not None:
        files["preprocessor_config"] = preprocessor
    directory = card_files(**files)
    settings = {} if size is None else {"size": size}
    if isinstance(outcome, str):
        assert refusal(directory, settings=settings).reason == outcome
    else:
        fit = planning.inspect(str(directory), "image", None, settings).fit
        assert fit is not None
        assert fit.input["size"] == outcome


def test_what_is_done_to_the_input_is_said(card_files: Files, flat_digits: Path) -> None:
    directory = card_files(config=RESNET, preprocessor_config=PROCESSOR, **{"model.safetensors": b""})
    fit = planning.inspect(str(directory), "image", str(flat_digits)).fit
    assert fit is not None
    assert [str(one) for one in fit.adaptations] == ["channels: L -> RGB", "resize: 8 x 8 -> 224 x 224"]
    assert "enlarged more than 3 times" in fit.warnings[0]


@pytest.mark.parametrize(("num_small", "says"), [(1, False), (3, True)])
def test_one_small_image_among_many_is_no_reason_for_a_smaller_size(
    card_files: Files, num_small: int, says: bool
) -> None:
    directory = card_files(config=RESNET, preprocessor_config=PROCESSOR, **{"model.safetensors": b""})
    facts = [{"width": size, "height": size, "mode": "RGB"} for size in [8] * num_small + [224] * 20]
    plugin, card = registry.get("image"), read_card(str(directory))
    fit = decide.fit(card, decide.match(card, plugin, {}), plugin, {}, Profile.of(facts))
    assert ("enlarged more than 3 times" in str(fit.warnings)) is says


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    assert refusal("./nothing").reason == "not_found"
    assert refusal("a/b/c").reason == "not_found"
    (tmp_path / "file").write_text("x")
    assert "name its directory" in refusal(tmp_path / "file").mend


def test_an_unknown_modality_and_unknown_settings(card_files: Files) -> None:
    assert "audio, image, text" in refusal("x/y", "smell").expected
    assert "pip install" in refusal("x/y", "smell").mend
    assert refusal("x/y", "imge").mend == "did you mean image?"
    directory = card_files(config=RESNET, preprocessor_config=PROCESSOR, **{"model.safetensors": b""})
    with pytest.raises(JobError, match=r"unknown key settings\.sise for image"):
        planning.inspect(str(directory), "image", None, {"sise": 3})
    with pytest.raises(JobError, match=r"settings\.size = 3"):
        planning.inspect(str(directory), "image", None, {"size": 3})


def test_a_run_of_a_plugin_that_is_not_here_names_the_plugin(
    tiny_resnet: Path, flat_digits: Path, tmp_path: Path
) -> None:
    plan = orchestrator.plan(backbone=str(tiny_resnet), data=str(flat_digits), method="head").model_dump(mode="json")
    run = tmp_path / "run"
    shutil.copytree(tiny_resnet, run / "model")
    config = json.loads((run / "model" / "config.json").read_text())
    (run / "model" / "config.json").write_text(json.dumps({**config, "model_type": "accel-cnn"}))
    plan["job"]["modality"] = "accel"
    (run / "plan.json").write_text(json.dumps(plan))
    for name in ("results.json", "lineage.json"):
        (run / name).write_text("{}")
    with pytest.raises(PluginError, match="run: there is no modality 'accel'") as caught:
        planning.inspect(str(run), "image")
    assert "pip install the distribution that brings it" in caught.value.mend


def test_training_with_a_declaration_says_that_it_is_not_built(card_files: Files, flat_digits: Path) -> None:
    declared = dataclasses.replace(
        registry.get("image"), name="scans", decode=None, measure=None, fit=None, build=None, batch=None
    )
    registry.register(declared)
    try:
        directory = card_files(config=RESNET, **{"model.safetensors": b""})
        assert orchestrator.check(str(directory), "scans").model_type == "resnet"
        with pytest.raises(RefusedError) as caught:
            orchestrator.plan(modality="scans", backbone=str(directory), data=str(flat_digits))
        assert caught.value.reason == "not_built"
    finally:
        registry.unregister("scans")


def test_a_fault_in_the_plugins_settings_has_its_place_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("backbone: a/b\ndata: x\nsettings:\n  sise: 3\n")
    with pytest.raises(JobError, match=r"job\.yaml:4: unknown key settings\.sise for image") as caught:
        orchestrator.plan(tmp_path / "job.yaml")
    assert caught.value.mend == "did you mean size?"
    with pytest.raises(JobError, match=r"^settings\.size = 'x'"):
        orchestrator.plan(tmp_path / "job.yaml", settings={"size": "x", "sise": 3})


# --- the plan ---


def test_a_plan_counts_parameters_from_the_header(tiny_resnet: Path, flat_digits: Path) -> None:
    import torch
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(tiny_resnet, num_labels=10, ignore_mismatched_sizes=True)
    total = sum(p.numel() for p in model.parameters())
    head = sum(p.numel() for p in model.classifier.parameters())
    assert isinstance(model, torch.nn.Module)
    plan = orchestrator.plan(backbone=str(tiny_resnet), data=str(flat_digits), method="head")
    assert plan.parameters is not None
    assert (plan.parameters.total, plan.parameters.trained, plan.parameters.frozen) == (
        total,
        head,
        total - head,
    )
    full = orchestrator.plan(backbone=str(tiny_resnet), data=str(flat_digits), method="full")
    assert full.parameters is not None
    assert full.parameters.optimizer_bytes == 2 * full.parameters.gradients_bytes == 8 * total
    assert plan.name.startswith(f"image-{tiny_resnet.name}-head-")
    assert plan.recipe.needs_features
    assert not full.recipe.needs_features
    assert plan.backbone.commit is not None
    assert plan.backbone.commit.startswith("sha256:")


def test_a_plan_is_json_and_back(tiny_resnet: Path, flat_digits: Path) -> None:
    plan = orchestrator.plan(
        backbone=str(tiny_resnet), data=str(flat_digits), method="head", settings={"augment": "light"}
    )
    assert type(plan).model_validate_json(plan.model_dump_json()) == plan
    assert not plan.recipe.needs_features


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scaling": {"num_workers": 64}}, "64 workers x 1 threads are more than"),
        ({"scaling": {"num_extractors": 64}}, "64 extractors x 1 threads are more than"),
        (
            {"scaling": {"num_workers": 2, "address": "auto"}, "training": {"num_microbatches": 1}},
            "leaves workers idle",
        ),
        ({"training": {"batch_size": 2, "num_microbatches": 2}, "method": "full"}, "microbatches of 1"),
        ({"training": {"batch_norm": "train"}, "method": "head"}, "would change a frozen body"),
    ],
)
def test_what_cannot_be_scheduled(tiny_resnet: Path, flat_digits: Path, fields: dict[str, object], words: str) -> None:
    with pytest.raises(RefusedError) as caught:
        orchestrator.plan(backbone=str(tiny_resnet), data=str(flat_digits), **fields)
    assert words in str(caught.value)


def test_what_is_for_a_frozen_body_alone_is_said_to_be_unused(tiny_resnet: Path, flat_digits: Path) -> None:
    scaling = {"address": "auto", "num_extractors": 1}  # asked for at a cluster, which nobody joins here
    job: dict[str, Any] = {
        "backbone": str(tiny_resnet), "data": str(flat_digits), "feature_store": "memory://features", "scaling": scaling
    }  # fmt: skip
    head = orchestrator.plan(**job, method="head")
    assert (head.ray, head.num_extractors) == (True, 1)
    full = orchestrator.plan(**job, method="full")
    assert full.num_extractors == 0
    unused = [line.split(" is not used")[0] for line in full.warnings if line not in head.warnings]
    assert unused == ["feature_store", "scaling.num_extractors"]
    unasked = orchestrator.plan(**{**job, "feature_store": "xyz://nobody/opens/this"}, method="full")
    assert unasked.warnings == full.warnings
    slow = orchestrator.plan(**job, method="head", training={"features": "every step"})
    assert slow.warnings == full.warnings
    # Who computes features, and where else they are kept, says nothing of what is learnt.
    plain = orchestrator.plan(
        backbone=str(tiny_resnet), data=str(flat_digits), method="head", scaling={"address": "auto"}
    )
    assert plain.job.digest() == head.job.digest()


def test_a_broken_header_is_refused(card_files: Files, flat_digits: Path) -> None:
    whole = weights("a.weight", "b.weight")
    for i, content in enumerate((b"", b"\xff" * 8, whole[:40], whole[:-4], struct.pack("<Q", 2) + b"[]")):
        directory = card_files(f"b{i}", config=RESNET, preprocessor_config=PROCESSOR, **{"model.safetensors": content})
        with pytest.raises(RefusedError) as caught:
            orchestrator.plan(backbone=str(directory), data=str(flat_digits))
        assert caught.value.reason == "bad_config"


def test_head_tensors_are_found_by_module() -> None:
    row = BackboneRow(head=("timm_model.head.fc",))
    assert in_head("head.fc.weight", row)
    assert in_head("timm_model.head.fc.bias", row)
    assert not in_head("head.fc2.weight", row)
    assert not in_head("stages.head.fc.weight", row)


# --- lean ---


def test_a_refusal_imports_neither_torch_nor_ray_and_is_fast(card_files: Files) -> None:
    directory = card_files(config=RESNET, preprocessor_config=PROCESSOR, **{"model.safetensors": b""})
    program = (
        "import sys; from orchestrator.terminal import cli; code = cli.run(sys.argv[1:]); "
        "heavy = {'torch', 'ray', 'transformers', 'timm', 'numpy', 'pyarrow', 'huggingface_hub'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    seconds = []
    for _ in range(5):
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", program, "check", str(directory), "--modality", "audio", "--json"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        seconds.append(time.monotonic() - start)
        assert done.returncode == 2, done.stderr
        assert json.loads(done.stdout)["reason"] == "wrong_modality"
    print(f"median {statistics.median(seconds):.2f} s")  # the limit is held by tests/benchmarks/refusal.py


def test_importing_a_plugin_imports_no_torch() -> None:
    for name in ("image", "audio", "text"):
        program = f"import sys, orchestrator_{name}; assert not {{'torch', 'ray', 'PIL'}} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", program], check=True)


def test_every_row_names_a_head_or_is_not_trainable() -> None:
    rules = registry.get("image").rules
    assert len(rules.timm) > 1000
    for row in (*rules.accepts.values(), *rules.timm.values()):
        assert row.head
        assert set(row.inputs) <= {"pixel_values"}
    for modality in registry.available().values():
        assert not set(modality.rules.accepts) & set(modality.rules.refuses)
        assert {rule.reason for rule in modality.rules.refuses.values()} <= set(REASONS)


def test_a_setting_of_the_modality_is_understood_without_its_group(tiny_resnet: Path, tmp_path: Path) -> None:
    """As the command line's --size does it; what neither the job nor the modality knows is refused."""
    data = tmp_path / "data"
    for i in range(20):
        file = data / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i, 2 * i, 255 - i)).save(file)
    (tmp_path / "job.yaml").write_text(f"backbone: {tiny_resnet}\ndata: {data}\nsize: 64\nepochs: 2\n")
    for plan in (orchestrator.plan(tmp_path / "job.yaml"),
                 orchestrator.plan(backbone=str(tiny_resnet), data=str(data), size=64, epochs=2)):  # fmt: skip
        assert plan.job.settings == {"size": 64}
        assert plan.recipe.phases[-1].epochs == 2
    for won in ({"size": 32}, {"settings.size": 32}, {"settings": {"size": 32}}):  # over the file, whatever the name
        assert orchestrator.plan(tmp_path / "job.yaml", **won).job.settings == {"size": 32}
    (tmp_path / "dotted.yaml").write_text(f"backbone: {tiny_resnet}\ndata: {data}\nsettings:\n  size: 64\n")
    assert orchestrator.plan(tmp_path / "dotted.yaml", size=32).job.settings == {"size": 32}
    for both in ({"settings": {"size": 32}}, {"settings.size": 32}):
        with pytest.raises(JobError, match=r"size is settings\.size, and both are set"):
            orchestrator.plan(backbone=str(tiny_resnet), data=str(data), size=64, **both)
    (tmp_path / "both.yaml").write_text("backbone: x\ndata: y\nsize: 1\nsettings:\n  size: 64\n")
    with pytest.raises(JobError, match=r"size is settings\.size, and both are set"):
        orchestrator.plan(tmp_path / "both.yaml", size=3)
    with pytest.raises(JobError, match=r"unknown key max_seconds"):
        orchestrator.plan(backbone=str(tiny_resnet), data=str(data), max_seconds=3)
    (tmp_path / "job.yaml").write_text(f"backbone: {tiny_resnet}\ndata: {data}\nsize: 1\n")
    with pytest.raises(JobError, match=r"job\.yaml:3: settings\.size = 1"):
        orchestrator.plan(tmp_path / "job.yaml")
