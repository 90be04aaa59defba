"""The code of a model card, run where this package cannot be imported, says what `predict` says."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

import orchestrator
from orchestrator.job import Method
from orchestrator.modality import registry
from tests.conftest import save_backbone
from tests.tiny import make_bert, make_wav2vec2
from tests.toys import write_toys

TASKS = ("single-label", "multi-label", "regression")
ALONE = """
import contextlib, io, json, os, sys
sys.modules["orchestrator"] = sys.modules["peft"] = None  # an import of them fails
for name in ("image", "audio", "text"):
    sys.modules[f"orchestrator_{name}"] = None
for place, code in json.load(sys.stdin):
    os.chdir(place)
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, names)
    print(json.dumps([{k: float(v) for k, v in names["scores"].items()}, said.getvalue()]))
"""


def make_dinov3(directory: Path) -> Path:
    from transformers import DINOv3ViTConfig, DINOv3ViTImageProcessor

    config = DINOv3ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    return save_backbone(directory, config, DINOv3ViTImageProcessor(size={"height": 32, "width": 32}), "DINOv3ViTModel")


def make_grey_vit(directory: Path) -> Path:
    from transformers import ViTConfig, ViTImageProcessor

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4,
        num_channels=1,
    )  # fmt: skip
    processor = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5])
    return save_backbone(directory, config, processor)


def make_clap(directory: Path) -> Path:
    from transformers import ClapAudioConfig, ClapFeatureExtractor

    config = ClapAudioConfig(
        patch_embeds_hidden_size=16, depths=[1, 1, 1, 1], num_attention_heads=[2, 2, 2, 2], hidden_size=128,
        num_hidden_layers=4, enable_fusion=True,
    )  # fmt: skip
    return save_backbone(directory, config, ClapFeatureExtractor(), "ClapAudioModel")


# Head -> (modality, its backbone, the plugin's settings).
HEADS: dict[str, tuple[str, Callable[[Path], Path], dict[str, Any]]] = {
    "image, pooled": ("image", make_dinov3, {}),
    "image, one channel": ("image", make_grey_vit, {"background": "black"}),
    "audio": ("audio", make_wav2vec2, {"max_seconds": 0.5}),
    "audio, pooled": ("audio", make_clap, {"max_seconds": 0.5}),
    "text": ("text", make_bert, {"head": "native"}),
    "text, pooled": ("text", make_bert, {"head": "pooled"}),
    "texts in pairs": ("text", make_bert, {"head": "native"}),
    "texts in pairs, pooled": ("text", make_bert, {"head": "pooled"}),
}
SOME = ("image", "audio", "text, pooled")  # in `make test`


def trained(head: str, backbone: Path, modality: str, settings: dict[str, Any], task: str) -> orchestrator.Run:
    pairs = head.startswith("texts")
    (Path.cwd() / task).mkdir()
    data: dict[str, Any] = {"path": str(write_toys(Path.cwd() / task, modality, task, pairs))}
    if task == "regression":
        data["label_column"] = ["words", "height"]
    if modality == "text":
        data["input_column"] = ["text", "other"] if pairs else "text"
    return orchestrator.finetune(
        method="head",
        modality=modality, backbone=str(backbone), task=task, settings=settings, data=data, report=lambda _: None,
        training={"epochs": 2, "batch_size": 8}, scaling={"threads_per_worker": 1}, name=task,
    )  # fmt: skip


def picture(mode: str, form: str = "PNG", **more: Any) -> bytes:
    rng, out = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (24, 40, 4), dtype=np.uint8)).convert(mode).save(out, form, **more)
    return out.getvalue()


def asked(modality: str, pairs: bool) -> list[Any]:
    """Inputs for `predict`: turned and transparent images, recordings of another rate, long texts."""
    if pairs:
        return [("rice and bread", "the rain"), ("snow", "a cold day and hot soup " * 10)]
    if modality == "text":
        return ["rice and bread", "the rain falls", "a cold day and hot soup " * 10]
    if modality == "image":
        exif = Image.Exif()
        exif[0x0112] = 6
        given = [picture("RGBA"), picture("RGB", "JPEG", exif=exif), picture("P"), picture("LA")]
    else:
        import soundfile

        given = []
        for rate, num in ((16_000, 6_000), (22_050, 40_000)):
            out = io.BytesIO()
            rng = np.random.default_rng(rate)
            soundfile.write(out, rng.uniform(-0.5, 0.5, (num, 2)), rate, format="WAV", subtype="PCM_16")
            given.append(out.getvalue())
    files = []
    for i, content in enumerate(given):
        files.append(Path.cwd() / f"asked-{i}{registry.get(modality).sample[0].suffixes[0]}")
        files[-1].write_bytes(content)
    return files


def code_of(run: orchestrator.Run, given: Any) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (run.model / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    if isinstance(given, tuple):
        wanted = {'"a text"': given[0], '"another"': given[1]}
    else:
        wanted = {'"a file"' if isinstance(given, Path) else '"a text"': str(given)}
    for old, new in wanted.items():
        assert code.count(old) == 1, code
        code = code.replace(old, json.dumps(new))
    return str(code)


def run_alone(cards: list[tuple[str, str]]) -> list[tuple[dict[str, float], str]]:
    """(scores, what was printed) of each (directory, code)."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], input=json.dumps(cards), env=environment, capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.parametrize(
    "head", [pytest.param(one, marks=() if one in SOME else pytest.mark.long) for one in ("image", *HEADS)]
)
def test_the_cards_code_says_what_predict_says(head: str, tiny_vit: Path, tmp_path: Path) -> None:
    modality, make, settings = HEADS.get(head, ("image", lambda _: tiny_vit, {}))
    backbone = make(tmp_path / "backbone")
    given = asked(modality, head.startswith("texts"))
    ours, cards = [], []
    for task in TASKS:
        run = trained(head, backbone, modality, settings, task)
        for one, said in zip(given, orchestrator.predict(run, given, top=10), strict=True):
            assert not said.problem
            ours.append((task, said))
            cards.append((str(run.model), code_of(run, one)))
        assert str(tmp_path) not in (run.model / "README.md").read_text(encoding="utf-8")
    for (task, said), (scores, printed) in zip(ours, run_alone(cards), strict=True):
        assert dict(said.top) == pytest.approx(scores, rel=1e-4, abs=1e-4), (task, printed)
        if task == "single-label":
            assert printed.startswith(said.label)
        elif task == "multi-label":
            assert printed.startswith(repr([name for name in scores if name in said.label.split(" + ")]))


@pytest.mark.slow
@pytest.mark.parametrize("level", [pytest.param(None, marks=pytest.mark.long), 4000])
def test_the_cards_code_reads_16_bits_as_predict_does(level: int | None, tiny_vit: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for i in range(24):
        file = data / ("dark" if i % 2 else "bright") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(i).integers(0, 2000 + 2000 * (i % 2), (16, 16), dtype=np.uint16)
        Image.fromarray(values).save(file)
    run = orchestrator.finetune(
        method="head", backbone=str(tiny_vit), data=str(data), settings={"white_level": level}, report=lambda _: None,
        training={"epochs": 2, "batch_size": 8}, scaling={"threads_per_worker": 1},
    )  # fmt: skip
    (said,) = orchestrator.predict(run, file)
    ((scores, _),) = run_alone([(str(run.model), code_of(run, file))])
    assert dict(said.top) == pytest.approx(scores, abs=1e-4)


@pytest.mark.slow
def test_the_model_of_each_recipe_is_served_where_this_package_is_not(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    backbone, table = make_bert(tmp_path / "backbone"), write_toys(tmp_path, "text")
    given, ours, cards = "the rain falls", [], []
    for method in get_args(Method):
        run = orchestrator.finetune(
            method=method, modality="text", backbone=str(backbone), data=str(table), settings={"head": "native"},
            training={"epochs": 2, "batch_size": 8}, scaling={"threads_per_worker": 1}, report=lambda _: None,
        )  # fmt: skip
        ours.extend(orchestrator.predict(run, [given], top=10))
        cards.append((str(run.model), code_of(run, given)))
    for method, said, (scores, _) in zip(get_args(Method), ours, run_alone(cards), strict=True):
        assert dict(said.top) == pytest.approx(scores, rel=1e-4, abs=1e-4), method
