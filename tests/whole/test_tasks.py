"""Several labels and numbers on real digits and on tones; class weights on classes of unequal size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import transformers

import orchestrator
from orchestrator.job.spec import Data
from orchestrator.modality import registry
from orchestrator.predictor import output
from tests.conftest import save_backbone
from tests.plugins.test_audio import RATE, WAVE, encoded, tone

KINDS = {"even": "02468", "loop": "0689", "large": "56789"}


def train(backbone: Path, table: Path, **job: Any) -> orchestrator.Run:
    return orchestrator.finetune(
        backbone=str(backbone),
        data={"path": str(table), **job.pop("data")},
        report=lambda _: None,
        **{"method": "head", **job},
    )


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def kinds(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each digit with what it is (even, with a loop, large), its value and what is missing to a hundred."""
    rows = []
    for file in sorted(digits.rglob("*.png")):
        value = int(file.parent.name)
        named = [kind for kind, which in KINDS.items() if file.parent.name in which]
        rows.append({"path": str(file.relative_to(digits)), "kinds": named, "value": value, "rest": 100 - value,
                     "split": file.relative_to(digits).parts[0]})  # fmt: skip
    return write(tmp_path_factory.mktemp("kinds") / "kinds.jsonl", rows)


@pytest.mark.slow
def test_several_labels_an_image(tiny_resnet: Path, kinds: Path, digits: Path) -> None:
    data = {"root": str(digits), "label_column": "kinds", "split_column": "split"}
    run = train(
        tiny_resnet, kinds, data=data, task="multi-label", method="full",
        training={"epochs": 12, "learning_rate": 3e-3, "class_weights": "auto"},
    )  # fmt: skip
    assert run.plan.classes == ("even", "large", "loop")
    found = run.figures
    assert found["average_precision"] > 0.8
    low, high = found["average_precision_95"]
    assert low < found["average_precision"] < high
    files = sorted((digits / "test").rglob("*.png"))[:20]
    ours = orchestrator.predict(run, files)
    pipe = transformers.pipeline("image-classification", model=str(run.model))
    for one, theirs in zip(ours, pipe([str(file) for file in files]), strict=True):
        scores = {row["label"]: row["score"] for row in theirs}
        assert {k: pytest.approx(v, abs=1e-5) for k, v in one.top} == scores  # probabilities of their own, not of one
        assert one.labels == tuple(kind for kind in run.plan.classes if scores[kind] > 0.5)
        assert one.as_dict()["labels"] == list(one.labels)
    written_as_lists(run, files, [list(one.labels or ()) for one in ours])
    assert {kind for kind in KINDS if files[0].parent.name in KINDS[kind]} == {"even", "loop"}


def written_as_lists(run: orchestrator.Run, files: list[Path], labels: list[list[str]]) -> None:
    """Classes may hold any text, so that no joined one could be taken apart again."""
    pictures = [str(file) for file in files]
    output.write(run, pictures, "said.jsonl")
    lines = Path("said.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["labels"] for line in lines] == labels
    output.write(run, pictures, "said.parquet")
    assert pyarrow.parquet.read_table("said.parquet")["labels"].to_pylist() == labels
    output.write(run, pictures, "said.csv")
    header, first, *_ = Path("said.csv").read_text(encoding="utf-8").splitlines()
    assert "labels" not in header.split(",")
    assert " + ".join(labels[0]) in first


@pytest.mark.slow
@pytest.mark.parametrize("method", ["head", pytest.param("full", marks=pytest.mark.long)])
def test_numbers_of_an_image(efficientnet: Path, kinds: Path, digits: Path, method: str) -> None:
    data = {"root": str(digits), "label_column": ["value", "rest"], "split_column": "split"}
    run = train(
        efficientnet, kinds, data=data, task="regression", method=method, settings={"size": 32},
        training={"epochs": 30 if method == "head" else 5},
    )  # fmt: skip
    assert run.figures["r2"] > 0.3
    low, high = run.figures["scaled_mae_95"]
    assert low < run.figures["scaled_mae"] < high
    assert run.figures["mae"] is None  # of both together: each has its own
    assert 0 < run.figures["per_class"]["value"]["mae"] < 50
    card = (run.model / "README.md").read_text()
    assert "| target | MAE | RMSE | R2 | scaled MAE |" in card
    assert "| rest |" in card
    file = sorted((digits / "test").rglob("*.png"))[0]
    (ours,) = orchestrator.predict(run, [file])
    assert [name for name, _ in ours.top] == ["value", "rest"]
    assert ours.top[0][1] + ours.top[1][1] == pytest.approx(100, abs=10)  # in their own units
    pipe = transformers.pipeline("image-classification", model=str(run.model), function_to_apply="none")
    theirs = {one["label"]: one["score"] for one in pipe(str(file))}
    assert theirs == {name: pytest.approx(value, rel=1e-4, abs=1e-3) for name, value in ours.top}


@pytest.mark.slow
def test_several_labels_and_numbers_of_a_recording(tmp_path: Path) -> None:
    config = transformers.HubertConfig(**WAVE, feat_extract_norm="layer", do_stable_layer_norm=True)
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=False)
    backbone = save_backbone(tmp_path / "hubert", config, extractor, "HubertForSequenceClassification")
    random, rows = np.random.default_rng(0), []
    for i in range(160):
        low, high = random.random(2) < 0.5
        pitch = random.uniform(1000, 2000)
        samples = 0.01 * random.standard_normal((1600, 1)) + low * tone(250, 0.2) + high * tone(pitch, 0.2)
        (tmp_path / f"{i}.wav").write_bytes(encoded(samples.astype(np.float32)))
        named = [name for name, on in (("low", low), ("high", high)) if on]
        rows.append({"path": f"{i}.wav", "label": named, "num": float(low) + float(high)})
    table = write(tmp_path / "t.jsonl", rows)
    held = {"test_fraction": 0.3}
    rate = {"epochs": 15, "learning_rate": 3e-3}
    many = train(backbone, table, modality="audio", data=held, task="multi-label", method="full", training=rate)
    assert many.figures["average_precision"] > 0.9
    data = {**held, "label_column": "num"}
    num = train(backbone, table, modality="audio", data=data, task="regression", method="full", training=rate)
    assert num.figures["r2"] > 0.5
    spec = Data(path=str(table), label_column="num")
    assert orchestrator.evaluate(num, spec)["mae"] < np.std([row["num"] for row in rows])


@pytest.mark.slow
def test_class_weights_help_the_rare_class(efficientnet: Path, digits: Path) -> None:
    """Real digits, one class with a tenth of the other's samples: its recall rises, and the plan shows the weights."""
    rows = [
        {"path": str(file), "label": "three" if file.parent.name == "3" else "other", "split": part}
        for part in ("train", "test")
        for file in sorted((digits / part).rglob("*.png"))
    ]
    table = write(Path("rare.jsonl"), rows)
    job: dict[str, Any] = {"settings": {"size": 32}, "method": "head"}
    found = {}
    for weights in ("none", "auto"):
        data = {"root": str(digits), "split_column": "split"}
        training = {"epochs": 10, "class_weights": weights}
        found[weights] = train(efficientnet, table, data=data, training=training, **job)
    assert found["none"].plan.class_weights == ()
    counts = found["auto"].plan.data.per_class["train"]
    assert found["auto"].plan.class_weights == pytest.approx([sum(counts) / (2 * n) for n in counts])
    assert counts[1] < counts[0] / 5
    recall = {key: run.figures["per_class"]["three"] for key, run in found.items()}
    assert recall["auto"] > recall["none"]


def test_every_modality_has_every_task() -> None:
    for name in ("image", "audio", "text"):
        assert [task.name for task in registry.get(name).tasks] == ["single-label", "multi-label", "regression"]
