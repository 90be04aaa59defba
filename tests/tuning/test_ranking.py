"""rank: real backbones, good, random and unusable ones, through the gate and the race; what it leaves behind."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import orchestrator
from orchestrator.errors import InterruptedRunError, JobError, RefusedError, TrainingError
from orchestrator.job import Event, Noted, PhaseBegan
from orchestrator.tuning import standings
from tests.hub_server import Hub, Repository
from tests.tiny import make_bert
from tests.toys import write_toys

ONE_THREAD = {"threads_per_worker": 1}


def silent(_event: Event) -> None:
    pass


def ranked(*backbones: object, **fields: Any) -> orchestrator.RankTable:
    fields = {"report": silent, "scaling": ONE_THREAD, **fields}
    return orchestrator.rank([str(one) for one in backbones], **fields)


@pytest.fixture(scope="session")
def random_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("random-bert"))


@pytest.fixture(scope="session")
def broken(tiny_resnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole by all that can be read of it, and what it computes is no number."""
    directory = shutil.copytree(tiny_resnet, tmp_path_factory.mktemp("broken") / "broken-resnet")
    tensors = load_file(directory / "model.safetensors")
    name = next(name for name in tensors if name.endswith("convolution.weight"))
    tensors[name] = torch.full_like(tensors[name], math.nan)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.long
def test_the_better_one_is_first_and_its_training_computes_no_features(
    efficientnet: Path, tiny_resnet: Path, tiny_vit: Path, random_bert: Path, broken: Path, digits: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """On 64 samples first, so that who is clearly behind leaves before the others are run on all."""
    monkeypatch.setattr(standings, "_LEAST", 64)
    monkeypatch.setattr(standings, "_LEAST_A_CLASS", 1)
    table = ranked(tiny_resnet, random_bert, efficientnet, broken, tiny_vit, data=str(digits))
    assert [row.state for row in table.rows[-2:]] == ["failed", "refused"]
    assert table.best is table[str(efficientnet)]
    assert table.largest is table.best
    assert table.best.score is not None
    assert table.best.interval is not None
    assert table.best.interval[0] < table.best.score < table.best.interval[1]
    assert table.best.score > 0.8
    assert table.best.full_is_measured
    assert (table.figure, table.num_samples) == ("accuracy", 400)  # of the test split not one
    refused, failed = table[str(random_bert)], table[str(broken)]
    assert refused.problem is not None
    assert refused.problem["reason"] == "wrong_modality"
    assert failed.problem is not None
    assert "not finite" in failed.problem["message"]
    for backbone in (tiny_resnet, tiny_vit):
        row = table[str(backbone)]
        assert row.behind is not None
        assert row.behind > 0.1
        assert row.is_beyond_noise
        assert row.neighbours is not None
        assert row.full_minutes is not None
        assert row.num_samples < 400 or row.state == "ranked"
    assert {row.state for row in table.rows[1:3]} <= {"left", "ranked"}
    assert "left" in {row.state for row in table.rows}
    assert [path.name for path in Path("runs").iterdir() if path.name not in (".features", ".data")] == []
    run = orchestrator.finetune(
        backbone=str(efficientnet), data=str(digits), method="head", report=silent, scaling=ONE_THREAD,
        training={"epochs": 1},
    )  # fmt: skip
    assert run.lineage["num_computed"] == 0


@pytest.mark.parametrize("task", ["multi-label", "regression"])
def test_the_other_tasks(task: str, tiny_resnet: Path, tiny_vit: Path) -> None:
    labels = ["words", "height"] if task == "regression" else "label"
    data = {"path": str(write_toys(Path(), "image", task)), "label_column": labels}
    table = ranked(tiny_resnet, tiny_vit, data=data, task=task)
    assert table.figure == {"multi-label": "macro_f1", "regression": "r2"}[task]
    assert [row.state for row in table.rows] == ["ranked", "ranked"]
    assert all(row.score is not None for row in table.rows)
    if task == "regression":
        assert len(json.dumps(table.as_dict(), allow_nan=False)) > 100


def test_texts_are_counted_for_each_tokenizer(random_bert: Path, tmp_path: Path) -> None:
    """Of another tokenizer a text has other tokens: so the data is looked at again, and each has its own input."""
    from transformers import BertConfig

    from tests.conftest import save_backbone
    from tests.tiny import make_bpe_tokenizer

    tokenizer = make_bpe_tokenizer(["<pad>", "<unk>"], pad_token="<pad>", unk_token="<unk>")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64,
    )  # fmt: skip
    other = save_backbone(tmp_path / "of-pieces", config, tokenizer, "BertForSequenceClassification")
    read: list[str] = []

    def report(event: Event) -> None:
        if isinstance(event, PhaseBegan) and event.text == "reading the data":
            read.append(event.text)

    data = str(write_toys(tmp_path, "text"))
    table = ranked(random_bert, random_bert, other, data=data, modality="text", report=report)
    assert len(table.rows) == 2
    assert len(read) == 2
    for row in table.rows:
        run = orchestrator.finetune(
            backbone=row.backbone, data=data, modality="text", method="head", report=silent,
            training={"epochs": 1},
        )  # fmt: skip
        # Of the best all is stored; of the other all but the test split, which chooses nothing.
        of_best = row is table.best
        assert run.lineage["num_computed"] == (0 if of_best else run.plan.data.num_samples["test"])


def test_rows_of_a_program_are_kept_for_the_training(tiny_resnet: Path, tiny_vit: Path, digits: Path) -> None:
    files = sorted((digits / "train").glob("*/*.png"))[:60]
    rows = [{"image": file.read_bytes(), "label": file.parent.name} for file in files]
    table = ranked(tiny_resnet, tiny_vit, data=rows)
    run = orchestrator.finetune(
        backbone=table.best.backbone, data=rows, method="head", report=silent, training={"epochs": 1}
    )
    assert run.lineage["num_computed"] == 0


# --- stopped ---


def test_stopped_it_goes_on_with_what_is_stored(tiny_resnet: Path, tiny_vit: Path, flat_digits: Path) -> None:
    told: list[Event] = []

    def report(event: Event) -> None:
        told.append(event)
        if isinstance(event, PhaseBegan) and "a probe" in event.text:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(InterruptedRunError, match=r"features that were computed are kept.*the same command goes on"):
        ranked(tiny_resnet, tiny_vit, data=str(flat_digits), report=report)
    assert not list(Path("runs").glob(".rank*"))
    assert not any("tiny-vit" in event.text for event in told if isinstance(event, PhaseBegan) if "probe" in event.text)
    num_before = len(list(Path("runs").glob(".features/*/*/*.safetensors")))
    assert num_before > 0
    table = ranked(tiny_resnet, tiny_vit, data=str(flat_digits))
    assert table[str(tiny_resnet)].samples_per_s is None  # nothing of it was computed again
    assert table[str(tiny_vit)].samples_per_s is not None


# --- bad input ---


def test_what_is_no_ranking(tiny_resnet: Path, flat_digits: Path) -> None:
    data = str(flat_digits)
    with pytest.raises(JobError, match=r"no backbone to rank.*from_hub"):
        ranked(data=data)
    with pytest.raises(JobError, match=r"one text.*a list"):
        orchestrator.rank("org/name", data=data)
    for name, value in (("method", "full"), ("name", "mine"), ("backbone", "org/name")):
        with pytest.raises(JobError, match=rf"{name} is set.*leave {name} out"):
            ranked(tiny_resnet, data=data, **{name: value})
    with pytest.raises(JobError, match="num_samples = 1"):
        ranked(tiny_resnet, data=data, num_samples=1)
    with pytest.raises(JobError, match="runs in this process"):
        ranked(tiny_resnet, data=data, scaling={"num_workers": 2})
    with pytest.raises(JobError, match=r"settings\.sise"):
        ranked(tiny_resnet, data=data, settings={"sise": 3})
    with pytest.raises(RefusedError, match="nowhere"):
        ranked(tiny_resnet, data="nowhere")
    for query in ("image classification", "image-classification, small", "< 100M", "image-classification, < many"):
        with pytest.raises(JobError, match=r"neither a task nor a bound.*< 100M"):
            ranked(data=data, from_hub=query)
    assert not Path("runs").exists()


def test_where_all_fail_it_fails(broken: Path, flat_digits: Path) -> None:
    with pytest.raises(TrainingError, match=r"each of 1 backbones failed.*not finite"):
        ranked(broken, data=str(flat_digits))
    assert not list(Path("runs").glob(".rank*"))


# --- of the Hub ---


def test_candidates_of_the_hub(
    hub: Hub, tiny_resnet: Path, tiny_vit: Path, flat_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most downloaded first, over pages of two; gated ones with their reason; larger ones not at all."""

    def put(name: str, directory: Path, downloads: int, tag: str = "image-classification", gated: bool = False) -> None:
        files = {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}
        hub.repositories[name] = Repository(files, files_gated=gated, pipeline_tag=tag, downloads=downloads)

    put("org/gated", tiny_resnet, 9_000, gated=True)
    put("org/resnet", tiny_resnet, 800)
    put("org/vit", tiny_vit, 700)
    put("org/beyond", tiny_resnet, 6)
    put("org/texts", tiny_vit, 9_999, tag="text-classification")
    num_resnet, num_vit = (hub.repositories[name].num_parameters or 0 for name in ("org/resnet", "org/vit"))
    table = ranked(from_hub="image-classification, < 100K", num_from_hub=2, data=str(flat_digits))
    rows = {row["backbone"]: row for row in json.loads(json.dumps(table.as_dict()))["rows"]}
    assert set(rows) == {"org/gated", "org/resnet", "org/vit"}
    assert rows["org/gated"]["problem"]["reason"] == "gated"
    assert all(rows[name]["state"] == "ranked" for name in ("org/resnet", "org/vit"))
    asked = [path for _, path, _ in hub.requests if path.startswith("/api/models?")]
    assert "num_parameters=max%3A100000" in asked[0]
    smaller = min(num_resnet, num_vit) + 1
    table = ranked(from_hub=f"image-classification, < {smaller}", data=str(flat_digits), num_from_hub=1)
    assert [row.state for row in table.rows if row.state == "ranked"] == ["ranked"]
    with pytest.raises(RefusedError, match="no model for"):
        ranked(from_hub="image-classification, > 1B", data=str(flat_digits))
    with pytest.raises(JobError, match="does not answer"):
        ranked(from_hub="no-such-task", data=str(flat_digits))
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(RefusedError, match="did not accept the token"):
        ranked(from_hub="image-classification", data=str(flat_digits))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RefusedError, match="the Hub cannot be asked") as refused:
        ranked(from_hub="image-classification", data=str(flat_digits))
    assert refused.value.reason == "offline"


def test_what_is_told_while_it_runs(tiny_resnet: Path, tiny_vit: Path, flat_digits: Path) -> None:
    told: list[Event] = []
    table = ranked(tiny_resnet, tiny_vit, data=str(flat_digits), report=told.append)
    notes = [event.text for event in told if isinstance(event, Noted)]
    assert notes == [f"on 270 samples: {table.rows[0].name} {table.rows[0].score:.3f}, "
                     f"{table.rows[1].name} {table.rows[1].score:.3f}"]  # fmt: skip
    phases = [event for event in told if isinstance(event, PhaseBegan)]
    for row in table.rows:
        (body,) = [event for event in phases if event.text == f"{row.name}: running the frozen body once"][:1]
        assert body.total == 270


def test_a_ranking_needs_nothing_of_ray(tiny_resnet: Path, tiny_vit: Path, flat_digits: Path) -> None:
    program = (
        "import sys, orchestrator\n"
        "orchestrator.rank(sys.argv[1:3], data=sys.argv[3], report=lambda _: None)\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'ray'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny_resnet), str(tiny_vit), str(flat_digits)],
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.stdout == "[]\n", done.stderr
