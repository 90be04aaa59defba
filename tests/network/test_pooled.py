"""Bodies without a head in transformers' tables: every row of ours, on a tiny network of the repository's own type.

Each backbone is saved as its type is published (the towers with the whole model around them as well), and compared
with the network that it was saved from.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.backbone import cards as hub
from orchestrator.backbone.weights import read_tensors
from orchestrator.errors import RefusedError, TrainingError
from orchestrator.gate.decide import match
from orchestrator.job.plans import BackboneCard, Plan
from orchestrator.modality import registry
from orchestrator.network.cut import Body, Head, find_cut

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**VIT, "vocab_size": 300}
FLAT = {**VIT, "image_size": 32, "patch_size": 8}
CLIP = {"vision_config": FLAT, "text_config": TEXT}
ALIGN = {
    "image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320,
    "num_hidden_layers": 16,
}  # fmt: skip
SWIN = {
    "patch_embeds_hidden_size": 16, "depths": [1, 1, 1, 1], "num_attention_heads": [2, 2, 2, 2], "hidden_size": 128,
    "num_hidden_layers": 4,
}  # fmt: skip
SQUARE = {"size": {"height": 32, "width": 32}}
CROP = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
DEEP = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
# Type -> (the class that is saved, its config, its processor, the processor's settings).
TINY: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "aimv2": ("Aimv2Model", CLIP, "CLIPImageProcessor", CROP),
    "aimv2_vision_model": ("Aimv2VisionModel", {**FLAT, "use_head": False}, "CLIPImageProcessor", CROP),
    "align": ("AlignModel", {"vision_config": ALIGN, "text_config": TEXT}, "EfficientNetImageProcessor",
              {**SQUARE, "do_center_crop": False}),
    "align_vision_model": ("AlignVisionModel", ALIGN, "EfficientNetImageProcessor",
                           {**SQUARE, "do_center_crop": False}),
    "chinese_clip": ("ChineseCLIPModel", CLIP, "ChineseCLIPImageProcessor", {**CROP, "size": SQUARE["size"]}),
    "chinese_clip_vision_model": ("ChineseCLIPVisionModel", FLAT, "CLIPImageProcessor", CROP),
    "clap": ("ClapModel", {"audio_config": SWIN, "text_config": TEXT}, "ClapFeatureExtractor",
             {"truncation": "rand_trunc"}),
    "clap_audio_model": ("ClapAudioModel", {**SWIN, "enable_fusion": True}, "ClapFeatureExtractor", {}),
    "clip_vision_model": ("CLIPVisionModel", FLAT, "CLIPImageProcessor", CROP),
    "dinov3_convnext": ("DINOv3ConvNextModel", DEEP, "DINOv3ViTImageProcessor", SQUARE),
    "dinov3_vit": ("DINOv3ViTModel", FLAT, "DINOv3ViTImageProcessor", SQUARE),
    "metaclip_2_vision_model": ("MetaClip2VisionModel", FLAT, "CLIPImageProcessor", CROP),
    "mlcd": ("MLCDVisionModel", FLAT, "CLIPImageProcessor", CROP),
    "mlcd_vision_model": ("MLCDVisionModel", FLAT, "CLIPImageProcessor", CROP),
    "pixio": ("PixioModel", FLAT, "BitImageProcessor", CROP),
    "radio": ("RadioModel", {**FLAT, "max_img_size": 64}, "CLIPImageProcessor", CROP),
    "siglip_vision_model": ("SiglipVisionModel", FLAT, "SiglipImageProcessor", SQUARE),
    "tipsv2": ("Tipsv2Model", CLIP, "Tipsv2ImageProcessor", SQUARE),
    "tipsv2_vision_model": ("Tipsv2VisionModel", FLAT, "Tipsv2ImageProcessor", SQUARE),
    "vit_mae": ("ViTMAEForPreTraining", {**FLAT, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
                                         "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16},
                "ViTImageProcessor", SQUARE),
}  # fmt: skip
WHOLE = {"aimv2": "vision_model", "align": "vision_model", "chinese_clip": "vision_model", "clap": "audio_model",
         "tipsv2": "vision_model", "vit_mae": "vit"}  # fmt: skip
CONVOLUTIONS = {"align", "align_vision_model", "dinov3_convnext"}  # of a few pixels they leave nothing
END_TO_END = ["dinov3_vit", *(pytest.param(one, marks=pytest.mark.long) for one in ("aimv2", "clap_audio_model"))]


def rows() -> dict[str, tuple[str, Any]]:
    """Type -> (modality, row), of every row with a pooled head."""
    return {
        model_type: (modality, row)
        for modality in ("image", "audio", "text")
        for model_type, row in registry.get(modality).rules.accepts.items()
        if row.pool and modality != "text"
    }


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """A type -> its tiny backbone as a directory, and the network that was saved in it."""
    made: dict[str, tuple[Path, Any]] = {}

    def make(model_type: str) -> tuple[Path, Any]:
        import torch
        import transformers

        if model_type not in made:
            torch.manual_seed(0)
            name, settings, processor, how = TINY[model_type]
            chosen = getattr(transformers, name)
            config = chosen.config_class(**settings)
            config.model_type = model_type  # mlcd is published under two names
            network = chosen(config).eval()
            with torch.no_grad():
                for parameter in network.parameters():  # transformers leaves some at zero: they would hide a mix-up
                    parameter.add_(0.1 * torch.randn_like(parameter))
                    if parameter.ndim == 4:  # through many convolutions small weights let nothing pass
                        torch.nn.init.kaiming_normal_(parameter)
            directory = tmp_path_factory.mktemp(model_type)
            network.save_pretrained(directory)
            getattr(transformers, processor)(**how).save_pretrained(directory)
            made[model_type] = directory, network
        return made[model_type]

    return make


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each modality's toy samples as class folders."""
    found = {}
    for modality, suffix in (("image", "png"), ("audio", "wav")):
        found[modality] = tmp_path_factory.mktemp(f"toy-{modality}")
        toy = registry.get(modality).toy
        assert toy is not None
        for i, (sample, label) in enumerate(toy(24 if modality == "image" else 10)):
            (found[modality] / label).mkdir(exist_ok=True)
            (found[modality] / label / f"{i:02}.{suffix}").write_bytes(sample[modality])
    return found


def planned(model_type: str, directory: Path, data: dict[str, Path], **more: Any) -> Plan:
    modality, _ = rows()[model_type]
    return orchestrator.plan(
        modality=modality, backbone=str(directory), data=str(data[modality]), method="head", **more
    )


def test_every_row_has_a_tiny_network_here() -> None:
    assert set(rows()) == set(TINY)


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_the_body_is_the_checkpoints_and_the_head_stands_on_it(
    model_type: str, backbones: Callable[[str], tuple[Path, Any]], data: dict[str, Path]
) -> None:
    import torch

    directory, original = backbones(model_type)
    modality = registry.get(rows()[model_type][0])
    plan = planned(model_type, directory, data)
    assert modality.build is not None
    assert modality.batch is not None
    assert modality.decode is not None
    network = modality.build(plan, directory)
    network.module.eval()
    decoded = [modality.decode({modality.name: file.read_bytes()}) for file in sorted(data[modality.name].rglob("*.*"))]
    batch = modality.batch(plan, directory)(decoded[:: len(decoded) // 2], False)

    assert set(network.new) == {"classifier.weight", "classifier.bias"}  # nothing random on the frozen side
    tower = original.get_submodule(WHOLE[model_type]) if model_type in WHOLE else original
    theirs = tower.state_dict()
    for name, value in network.module.body.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    with torch.no_grad():
        whole = network.logits(batch)
        with torch.autocast("cpu", torch.bfloat16):  # as a GPU trains by default
            assert network.logits(batch).isfinite().all()
        cut, error = find_cut(network, batch)
        assert cut is not None
        assert error <= 1e-4
        features = Body(network, cut)(batch)
        torch.testing.assert_close(Head(network, cut)({"features": features}), whole, atol=1e-4, rtol=0)
        torch.testing.assert_close(features, _pooled(model_type, tower, batch), atol=1e-4, rtol=0)
    assert features.std(dim=0).max() > 1e-4  # what comes out depends on what goes in

    counted = sum(parameter.numel() for parameter in network.module.body.parameters())
    unused = sum(theirs[name].numel() for name in set(theirs) - set(network.module.body.state_dict()))
    assert plan.parameters is not None
    assert not plan.parameters.head_known
    if model_type != "vit_mae":  # whose decoder is counted: it stands in the checkpoint beside the encoder
        assert plan.parameters.frozen == counted + unused


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_the_same_head_is_learnt_with_stored_features_and_without(
    model_type: str, backbones: Callable[[str], tuple[Path, Any]], data: dict[str, Path], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    heads = []
    for features in ("once", "every step"):
        run = finetune(rows()[model_type][0], backbones(model_type)[0], data, tmp_path / features, features=features)
        assert run.lineage["features"] == features
        heads.append(load_file(run.model / "head.safetensors"))
    assert set(heads[0]) == set(heads[1]) == {"weight", "bias"}
    for name, tensor in heads[0].items():
        torch.testing.assert_close(tensor, heads[1][name], atol=1e-5, rtol=0)


def _pooled(model_type: str, tower: Any, batch: dict[str, Any]) -> Any:
    """The vector that the row names, of the network that was saved, without any code of ours."""
    if model_type == "vit_mae":
        tower.config.mask_ratio = 0.0
    output = tower(**batch)
    how = {
        "first": lambda: output.last_hidden_state[:, 0],
        "mean": lambda: output.last_hidden_state.mean(dim=1),
        "pooler": lambda: output.pooler_output.reshape(len(output.pooler_output), -1),
        "summary": lambda: output.summary,
    }
    return how[rows()[model_type][1].pool]()


@pytest.mark.parametrize("model_type", [one for one in sorted(TINY) if one not in ("clap", "clap_audio_model")])
def test_another_size_is_taken_or_refused(
    model_type: str, backbones: Callable[[str], tuple[Path, Any]], data: dict[str, Path]
) -> None:
    import torch

    directory, _ = backbones(model_type)
    row, image = rows()[model_type][1], registry.get("image")
    if row.size == "fixed":
        with pytest.raises(RefusedError, match="32 x 32 only") as refused:
            planned(model_type, directory, data, settings={"size": 48})
        assert refused.value.reason == "fixed_size"
        return
    if row.size == "patches":
        with pytest.raises(RefusedError, match="multiple of 8"):
            planned(model_type, directory, data, settings={"size": 50})
    assert image.build is not None
    if model_type in CONVOLUTIONS:
        with pytest.raises(TrainingError, match="cannot take") as failed:
            image.build(planned(model_type, directory, data, settings={"size": 8}), directory)
        assert "larger" in failed.value.mend
    for size in (64 if model_type in CONVOLUTIONS else 16, 48 if row.size == "patches" else 50):
        plan = planned(model_type, directory, data, settings={"size": size})
        with torch.no_grad():
            logits = image.build(plan, directory).logits({"pixel_values": torch.rand(2, 3, size, size)})
        assert logits.shape == (2, 2)


@pytest.mark.parametrize("model_type", END_TO_END)
def test_a_run_is_served_by_its_cards_own_lines(
    model_type: str, backbones: Callable[[str], tuple[Path, Any]], data: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    directory, original = backbones(model_type)
    modality, _ = rows()[model_type]
    run = finetune(modality, directory, data, tmp_path)
    assert {"model.safetensors", "head.safetensors", "config.json"} <= {file.name for file in run.model.iterdir()}
    tower = original.get_submodule(WHOLE[model_type]) if model_type in WHOLE else original
    after = load_file(run.model / "model.safetensors")
    before = {value.numpy().tobytes() for value in tower.state_dict().values()}
    assert all(value.numpy().tobytes() in before for value in after.values())

    file = next(data[modality].rglob("*.*"))
    said = orchestrator.predict(run, [file])[0]
    code = "import json\n" + (run.model / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace('"a file"', repr(str(file))) + "\nprint(json.dumps(scores))"
    done = subprocess.run([sys.executable, "-c", code], cwd=run.model, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown, scores = done.stdout.strip().splitlines()[-2:]
    ours, theirs = dict(said.top), json.loads(scores)
    assert shown.startswith(said.label)
    assert all(abs(ours[name] - theirs[name]) < 1e-5 for name in ours)

    # The head's file is no shard of the body: the run is a backbone like any other.
    card = hub.read_card(str(run.path))
    assert card.weight_files == ("model.safetensors",)
    assert "classifier.weight" not in read_tensors(card)
    if modality == "audio":  # ten seconds of mel bands a sample are not worth the time twice
        return
    again = finetune(modality, run.path, data, tmp_path / "again", method="full", epochs=1)
    assert orchestrator.predict(again, [file])[0].label in ours


def finetune(
    modality: str, backbone: Path, data: dict[str, Path], storage: Path, method: str = "head", **training: Any
) -> orchestrator.Run:
    return orchestrator.finetune(
        modality=modality, backbone=str(backbone), data=str(data[modality]), method=method,
        training={"epochs": 2, "batch_size": 8, **training}, scaling={"threads_per_worker": 1},
        storage=str(storage), report=lambda _: None,
    )  # fmt: skip


def test_the_body_in_shards_and_the_head_beside_them() -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": 1 for i in (1, 2)}
    one = BackboneCard(source="x", kind="directory", name="x", files={"head.safetensors": 1, **shards})
    assert one.weight_files == tuple(sorted(shards))


def test_a_checkpoint_without_the_tower_is_refused(
    backbones: Callable[[str], tuple[Path, Any]], data: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    directory, _ = backbones("aimv2")
    shutil.copytree(directory, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if "layers.1.attention.q_proj" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(RefusedError, match=r"layers\.1\.attention\.q_proj\.weight is missing"):
        planned("aimv2", tmp_path / "cut", data)


@pytest.mark.parametrize(
    "model_type", ["aimv2", "align", "chinese_clip", "clap", "clip", "metaclip_2", "siglip", "tipsv2"]
)
def test_the_text_towers_are_refused(model_type: str) -> None:
    known = {name: registry.get(name) for name in ("image", "audio", "text")}
    one = BackboneCard(source="org/x", kind="hub", name="x", library="transformers", model_type=model_type)
    with pytest.raises(RefusedError, match="together with their captions") as refused:
        match(one, known["text"], known)
    assert refused.value.reason == "two_modalities"


def test_a_tower_whose_file_names_no_processor_gets_its_familys(
    backbones: Callable[[str], tuple[Path, Any]], data: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    directory, _ = backbones("clip_vision_model")
    shutil.copytree(directory, tmp_path / "unnamed")
    file = tmp_path / "unnamed" / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    del settings["image_processor_type"]
    file.write_text(json.dumps(settings))
    image = registry.get("image")
    plan = planned("clip_vision_model", tmp_path / "unnamed", data)
    assert image.batch is not None
    assert image.decode is not None
    picture = next(data["image"].rglob("*.png")).read_bytes()
    batch = image.batch(plan, tmp_path / "unnamed")([image.decode({"image": picture})], False)
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
