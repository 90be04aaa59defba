"""The main job in this process: what is learnt, what stays frozen, and what survives an interruption."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import orchestrator
from orchestrator.errors import (
    ChangedError,
    DataError,
    InterruptedRunError,
    RefusedError,
    TrainingError,
)
from orchestrator.job import Advanced, EpochEnded, Event, Noted, PhaseBegan
from tests.held import held

Cli = Callable[..., subprocess.CompletedProcess[str]]


def silent(_event: Event) -> None:
    pass


def train(backbone: Path, data: Path, **fields: Any) -> orchestrator.Run:
    fields.setdefault("training", {"epochs": 2})
    fields.setdefault("method", "head")
    fields.setdefault("report", silent)
    return orchestrator.finetune(backbone=str(backbone), data=str(data), **fields)


def weights_of(run: orchestrator.Run) -> dict[str, torch.Tensor]:
    return load_file(run.model / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("backbone", ["tiny_resnet", "tiny_vit"])
def test_frozen_is_frozen(backbone: str, request: pytest.FixtureRequest, digits: Path) -> None:
    directory = request.getfixturevalue(backbone)
    before = load_file(directory / "model.safetensors")
    run = train(directory, digits, training={"epochs": 3, "learning_rate": 0.05})
    after = weights_of(run)
    for name, tensor in before.items():
        if name.startswith("classifier"):
            assert after[name].shape[0] == 10
            if after[name].shape == tensor.shape:  # the ViT had 10 classes before: its old head is not kept
                assert not torch.equal(after[name], tensor)
        else:
            assert torch.equal(after[name], tensor), name
    assert run.lineage["features"] == "once"
    assert run.lineage["cut_error"] <= 1e-4
    assert all(name.startswith("classifier") for name in run.lineage["new_tensors"])


def test_frozen_is_frozen_after_a_resume(tiny_resnet: Path, digits: Path) -> None:
    options = {"training": {"epochs": 3, "learning_rate": 0.05, "checkpoint_every_steps": 2}}
    asked: list[int] = []

    def interrupt(event: Event) -> None:
        if isinstance(event, EpochEnded) and not asked:  # an epoch of the head is done
            asked.append(1)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(InterruptedRunError):
        train(tiny_resnet, digits, name="stopped", report=interrupt, **options)
    notes: list[str] = []
    run = train(
        tiny_resnet, digits, name="stopped", report=lambda event: notes.append(getattr(event, "text", "")), **options
    )
    assert any("going on from step" in note for note in notes)
    after = weights_of(run)
    for name, tensor in load_file(tiny_resnet / "model.safetensors").items():
        assert name.startswith("classifier") or torch.equal(after[name], tensor), name
    assert same(after, weights_of(train(tiny_resnet, digits, name="whole", **options)))


def test_full_moves_everything(tiny_resnet: Path, digits: Path) -> None:
    before = load_file(tiny_resnet / "model.safetensors")
    run = train(tiny_resnet, digits, method="full")
    after = weights_of(run)
    moved = [
        name for name in before if before[name].shape != after[name].shape or not torch.equal(before[name], after[name])
    ]
    assert len(moved) == len(before)
    frozen = train(tiny_resnet, digits, method="full", training={"epochs": 2, "batch_norm": "frozen"})
    for name, tensor in weights_of(frozen).items():
        if "running" in name or "tracked" in name:
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(("precision", "format"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_the_features_and_the_slow_way_learn_the_same(
    precision: str, format: str, tiny_resnet: Path, digits: Path
) -> None:
    job = {"training": {"epochs": 2, "precision": precision}}
    quick = train(tiny_resnet, digits, **job)
    slow = train(tiny_resnet, digits, **job, **{"training.features": "every step"})
    assert (quick.lineage["features"], slow.lineage["features"]) == ("once", "every step")
    assert quick.lineage["format"] == format
    for name, tensor in weights_of(quick).items():
        assert torch.allclose(tensor, weights_of(slow)[name], atol=1e-5), name
    assert quick.results["test"]["confusion"] == slow.results["test"]["confusion"]


def test_a_trained_backbone_beats_random_weights(efficientnet: Path, digits: Path) -> None:
    small = {"path": str(digits), "num_train": 100, "validation_fraction": 0.0}
    more = {"settings": {"size": 32}, "data": small}
    head = orchestrator.finetune(backbone=str(efficientnet), method="head", report=silent, **more)
    scratch = orchestrator.pretrain(backbone=str(efficientnet), report=silent, training={"epochs": 4}, **more)
    assert head.accuracy > 0.6
    assert head.accuracy > scratch.accuracy + 0.2


def test_a_run_holds_what_it_should(tiny_resnet: Path, digits: Path) -> None:
    run = train(tiny_resnet, digits, training={"epochs": 3})
    assert {child.name for child in run.path.iterdir()} >= {
        "job.yaml", "plan.json", "lineage.json", "metrics.jsonl", "results.json", "checkpoints", "model", "tensorboard",
    }  # fmt: skip
    assert [line["epoch"] for line in run.metrics] == [1, 2, 3]
    events = b"".join(file.read_bytes() for file in (run.path / "tensorboard").iterdir())
    assert events.count(b"validation_accuracy") == 3
    results = run.results
    assert results["test"]["num_samples"] == sum(map(sum, results["test"]["confusion"])) == 200
    low, high = results["test"]["accuracy_95"]
    assert low < results["test"]["accuracy"] < high
    card = (run.model / "README.md").read_text()
    assert "[More Information Needed]" not in card
    assert f"{results['test']['accuracy']:.3f}" in card
    assert json.loads((run.model / "config.json").read_text())["id2label"]["3"] == "3"
    assert orchestrator.finetune(run.path / "job.yaml", report=silent).path == run.path


def test_the_same_call_returns_the_finished_run_and_fresh_starts_over(tiny_resnet: Path, digits: Path) -> None:
    run = train(tiny_resnet, digits)
    before = (run.path / "results.json").stat().st_mtime_ns
    assert train(tiny_resnet, digits).path == run.path
    assert (run.path / "results.json").stat().st_mtime_ns == before
    weights = weights_of(run)
    again = train(tiny_resnet, digits, fresh=True)
    assert (again.path / "results.json").stat().st_mtime_ns > before
    assert same(weights, weights_of(again))


def test_what_changed_underneath_is_refused(tiny_resnet: Path, flat_digits: Path, tmp_path: Path) -> None:
    import shutil

    data = tmp_path / "data"
    shutil.copytree(flat_digits, data)
    train(tiny_resnet, data)
    file = next(data.glob("3/*.png"))
    (data / "4" / "moved.png").write_bytes(file.read_bytes())
    file.unlink()
    with pytest.raises(ChangedError, match="the data of the run"):
        train(tiny_resnet, data)
    assert train(tiny_resnet, data, fresh=True).finished
    with pytest.raises(ChangedError, match="the job of the run"):
        train(
            tiny_resnet,
            data,
            name=orchestrator.plan(
                backbone=str(tiny_resnet), data=str(data), method="head", training={"epochs": 2}
            ).name,
            method="full",
        )


def test_pretrain_then_finetune_on_other_classes(tiny_resnet: Path, digits: Path, tmp_path: Path) -> None:
    import shutil

    for kind, names in (("first", "01234"), ("second", "56789")):
        for split in ("train", "test"):
            for name in names:
                shutil.copytree(digits / split / name, tmp_path / kind / split / name)
    base = orchestrator.pretrain(
        backbone=str(tiny_resnet),
        data=str(tmp_path / "first"),
        name="base",
        training={"epochs": 8},
        report=silent,
    )
    assert base.lineage["new_tensors"] == "all"
    run = train(base.path, tmp_path / "second", method="full", training={"epochs": 8})
    assert run.results["test"]["accuracy"] > 0.4
    chain = run.lineage["backbone"]
    assert (chain["kind"], chain["lineage"]["method"]) == ("run", "scratch")
    assert chain["lineage"]["classes"] == list("01234")
    assert run.lineage["classes"] == list("56789")
    unfinished = tmp_path / "runs" / "base"
    (unfinished / "results.json").unlink()
    with pytest.raises(RefusedError, match="has not finished"):
        train(unfinished, tmp_path / "second")


def test_a_checkpoint_that_does_not_fit_its_config_is_an_error(tiny_resnet: Path, digits: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import save_file

    tensors = load_file(tiny_resnet / "model.safetensors")
    name = next(key for key in tensors if "encoder" in key and key.endswith("convolution.weight"))
    for kind, change, words in (
        ("missing", {}, "is missing"),
        ("shape", {name: torch.zeros(3, 3, 3, 3)}, "has another shape"),
        ("more", {name: tensors[name], "resnet.encoder.stages.9.weight": torch.zeros(2)}, "no place for"),
    ):
        directory = tmp_path / kind
        shutil.copytree(tiny_resnet, directory)
        rest = {key: value for key, value in tensors.items() if key != name}
        save_file({**rest, **change}, directory / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(RefusedError, match=words) as refused:  # from the headers alone, before the start
            train(directory, digits)
        assert refused.value.reason == "bad_config"


def test_a_base_checkpoint_without_a_head_gets_one(digits: Path, tmp_path: Path) -> None:
    from transformers import PoolFormerConfig, PoolFormerImageProcessor

    from tests.conftest import save_backbone

    config = PoolFormerConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_encoder_blocks=4, mlp_ratio=2.0)
    processor = PoolFormerImageProcessor(
        size={"shortest_edge": 32}, crop_pct=1.0, crop_size={"height": 32, "width": 32}
    )
    directory = save_backbone(tmp_path / "base", config, processor, "PoolFormerModel")
    run = train(directory, digits)
    # The norm in front of the classifier is random too, so it is head, and never frozen.
    assert run.lineage["head"] == ["norm", "classifier"]
    assert {name.split(".")[0] for name in run.lineage["new_tensors"]} == {"norm", "classifier"}
    assert (run.lineage["features"], run.lineage["cut"]) == ("once", "into norm")


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["test_vit", "test_resnet"])
def test_a_repository_as_timm_saves_it(architecture: str, digits: Path, tmp_path: Path) -> None:
    import timm

    model = timm.create_model(architecture, pretrained=False, num_classes=5)
    timm.models.save_for_hf(model, tmp_path / "saved", model_args={"num_classes": 5}, safe_serialization=True)
    for method in ("head", "full"):
        run = train(tmp_path / "saved", digits, method=method, training={"epochs": 1})
        assert run.results["test"]["num_samples"] == 200
        assert run.lineage["features"] == ("once" if method == "head" else "every step")
    assert train(run.path, digits, training={"epochs": 1}).lineage["backbone"]["kind"] == "run"


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("resnet", {"size": 224, "feature_extractor_type": "ConvNextFeatureExtractor", "crop_pct": 0.875}),
        ("deit", {"size": 256, "crop_size": 224, "do_center_crop": True}),
        ("deit", {"size": {"height": 256, "width": 256}, "crop_size": {"height": 224, "width": 224}}),
        ("bit", {"size": {"shortest_edge": 256}}),
        ("mobilevit", {"size": {"shortest_edge": 288}, "crop_size": {"height": 256, "width": 256}}),
        ("levit", {"size": 224}),
    ],
)
def test_images_are_prepared_as_the_backbones_own_processor_does(
    model_type: str, settings: dict[str, Any], card_files: Callable[..., Path], digits: Path
) -> None:
    """Files of every age that the Hub holds; with the backbone's own size nothing is changed."""
    import numpy as np
    from PIL import Image
    from transformers import AutoImageProcessor

    from orchestrator_image.network import make_collate

    directory = card_files(config={"model_type": model_type}, preprocessor_config=settings)
    plan = orchestrator.plan(backbone=str(directory), data=str(digits), method="scratch")
    pixels = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    ours = make_collate(plan, directory)([image], False)["pixel_values"]
    theirs = AutoImageProcessor.from_pretrained(directory)(image, return_tensors="pt")["pixel_values"]
    assert list(ours.shape[-2:]) == plan.input["size"]
    assert torch.equal(ours, theirs)
    if model_type in ("resnet", "bit"):
        smaller = orchestrator.plan(backbone=str(directory), data=str(digits), method="scratch", settings={"size": 64})
        assert list(make_collate(smaller, directory)([image], False)["pixel_values"].shape[-2:]) == [64, 64]


def test_batch_norm_inside_the_head_is_in_the_checkpoint() -> None:
    from torch import nn

    from orchestrator.training.checkpoint import trained_tensors

    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module[0].requires_grad_(False)
    kept = trained_tensors(module, ("1",))
    assert {"1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"} == set(kept)


def test_a_run_goes_on_by_the_plan_that_it_began_with(
    tiny_resnet: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Advanced):
            os.kill(os.getpid(), signal.SIGTERM)

    job = {"backbone": str(tiny_resnet), "data": str(digits), "method": "full", "training": {"epochs": 1}}
    with pytest.raises(InterruptedRunError):
        orchestrator.finetune(job, report=stop)
    began = orchestrator.plan(job)
    monkeypatch.setattr("orchestrator.gate.planning.num_cores", lambda: began.threads_per_worker + 1)
    assert orchestrator.plan(job).threads_per_worker == began.threads_per_worker + 1
    run = orchestrator.finetune(job, report=silent)
    assert run.lineage["threads_per_worker"] == began.threads_per_worker


def test_nothing_held_back_is_said(tiny_resnet: Path, flat_digits: Path) -> None:
    notes: list[str] = []
    run = orchestrator.finetune(
        method="head",
        backbone=str(tiny_resnet),
        data={"path": str(flat_digits), "validation_fraction": 0.0, "test_fraction": 0.0},
        training={"epochs": 1},
        report=lambda event: notes.append(getattr(event, "text", "")),
    )
    assert any("nothing is held back" in note for note in notes)
    with pytest.raises(RefusedError, match="held no sample back"):
        _ = run.accuracy


def test_evaluating_takes_the_test_split_where_there_is_one_and_skips_by_name(
    tiny_resnet: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    run = train(tiny_resnet, digits)
    assert orchestrator.evaluate(run, str(digits))["num_samples"] == 200
    monkeypatch.setattr("orchestrator.data.ingest.NUM_MEASURED_ALL", 10)
    monkeypatch.setattr("orchestrator.data.ingest.NUM_MEASURED", 1)
    shutil.copytree(digits / "test", tmp_path / "later")
    victim = sorted((tmp_path / "later" / "5").iterdir())[-1]
    victim.write_bytes(b"no image")
    with pytest.raises(DataError, match=victim.name):
        orchestrator.evaluate(run, str(tmp_path / "later"))
    spec = orchestrator.Job(backbone="-", data={"path": str(tmp_path / "later"), "on_bad_sample": "skip"}).data
    figures = orchestrator.evaluate(run, spec)
    assert (figures["num_samples"], figures["num_skipped"]) == (199, 1)


def test_a_processor_that_resizes_by_the_shorter_edge_alone(tiny_resnet: Path, tmp_path: Path) -> None:
    import shutil

    from PIL import Image
    from transformers import pipeline

    directory = tmp_path / "edge"
    shutil.copytree(tiny_resnet, directory)
    settings = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 32}, "do_center_crop": False}
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    for i in range(20):
        file = tmp_path / "data" / ("a" if i % 2 else "b") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30 + 5 * i, 60), (10 * i,) * 3).save(file)
    run = train(directory, tmp_path / "data", training={"epochs": 1})
    (ours,) = orchestrator.predict(run, [file])
    theirs = {e["label"]: e["score"] for e in pipeline("image-classification", model=str(run.model))(str(file))}
    assert all(abs(theirs[name] - score) < 1e-4 for name, score in ours.top)


def test_gradient_accumulation_is_the_large_batch(tiny_vit: Path, digits: Path) -> None:
    whole = {"epochs": 1, "batch_size": 40, "optimizer": "sgd", "learning_rate": 0.1, "batch_norm": "frozen"}
    import shutil

    quiet = Path("no-dropout")
    shutil.copytree(tiny_vit, quiet)
    config = json.loads((quiet / "config.json").read_text())
    (quiet / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": 0.0}))
    as_they_are = {"augment": "none"}  # what is random depends on the part of the batch
    one = train(quiet, digits, method="full", training=whole, settings=as_they_are)
    four = train(quiet, digits, method="full", training={**whole, "num_microbatches": 4}, settings=as_they_are)
    for name, tensor in weights_of(one).items():
        assert torch.allclose(tensor, weights_of(four)[name], atol=1e-5), name


def test_augmentation_changes_the_samples_and_is_repeatable(tiny_resnet: Path, digits: Path) -> None:
    plain = train(tiny_resnet, digits, method="full", settings={"augment": "none"})
    default = train(tiny_resnet, digits, method="full")
    first = train(tiny_resnet, digits, method="full", settings={"augment": "light"})
    again = train(tiny_resnet, digits, method="full", settings={"augment": "light"}, fresh=True)
    assert not same(weights_of(plain), weights_of(first))
    assert same(weights_of(first), weights_of(again))
    assert same(weights_of(first), weights_of(default))


def test_sgd_bf16_and_a_rate_for_the_head_alone(tiny_resnet: Path, digits: Path) -> None:
    before = load_file(tiny_resnet / "model.safetensors")
    still = {"epochs": 1, "optimizer": "sgd", "learning_rate": 1e-12, "head_learning_rate": 0.1, "weight_decay": 0.0}
    after = weights_of(train(tiny_resnet, digits, method="full", training={**still, "batch_norm": "frozen"}))
    for name, tensor in before.items():
        if not name.startswith("classifier") and tensor.is_floating_point():
            assert torch.allclose(after[name], tensor, atol=1e-8), name
    exact = {"epochs": 1, "optimizer": "sgd"}
    fp32 = train(tiny_resnet, digits, method="full", training={**exact, "precision": "fp32"})
    bf16 = train(tiny_resnet, digits, method="full", training={**exact, "precision": "bf16"})
    assert not same(weights_of(fp32), weights_of(bf16))
    assert abs(fp32.metrics[0]["train_loss"] - bf16.metrics[0]["train_loss"]) < 0.05


def test_a_loss_that_explodes_says_so(tiny_resnet: Path, digits: Path) -> None:
    with pytest.raises(TrainingError, match="the loss is") as caught:
        train(
            tiny_resnet, digits, method="full",
            training={"epochs": 9, "optimizer": "sgd", "learning_rate": 1e30, "clip_norm": None},
        )  # fmt: skip
    assert "learning_rate" in caught.value.mend


def test_a_file_that_breaks_while_training(tiny_resnet: Path, flat_digits: Path, tmp_path: Path) -> None:
    """Of a large data set only some files are looked at before the start; the rest is met on the way."""
    import shutil

    data = tmp_path / "data"
    shutil.copytree(flat_digits, data)
    victims = sorted(data.glob("3/*.png"))[:2]

    def spoil(event: Event) -> None:
        if event == PhaseBegan("loading the backbone"):
            for victim in victims:
                victim.write_bytes(b"no image")

    job = {"backbone": str(tiny_resnet), "data": str(data), "method": "head", "training": {"epochs": 2}}
    with pytest.raises(TrainingError, match="is no image that Pillow can read") as caught:
        orchestrator.finetune(job, report=spoil)
    assert str(victims[0].parent) in caught.value.message
    for victim in victims:
        shutil.copy(flat_digits / "3" / victim.name, victim)
    for method in ("head", "full"):
        run = orchestrator.finetune(job, method=method, report=spoil, **{"data.on_bad_sample": "skip"})
        assert run.results["num_skipped"] == 2
        skipped = [json.loads(line) for line in (run.path / "skipped.jsonl").read_text().splitlines()]
        assert [line["place"] for line in skipped] == [str(victim) for victim in victims]
        for victim in victims:
            shutil.copy(flat_digits / "3" / victim.name, victim)


def test_a_damaged_run_is_said_to_be_damaged(tiny_resnet: Path, flat_digits: Path, cli: Cli) -> None:
    import shutil

    run = train(tiny_resnet, flat_digits, name="good", training={"epochs": 1})
    for name, reads in (
        ("results.json", lambda: orchestrator.predict("runs/bad", [])),
        ("plan.json", lambda: train(tiny_resnet, flat_digits, name="bad", training={"epochs": 1})),
        ("lineage.json", lambda: train(Path("runs/bad"), flat_digits)),
        ("model", lambda: train(Path("runs/bad"), flat_digits)),
    ):
        shutil.rmtree("runs/bad", ignore_errors=True)
        shutil.copytree(run.path, "runs/bad")
        if name == "model":
            shutil.rmtree("runs/bad/model")
        else:
            Path("runs/bad", name).write_text('{"cut')
        with pytest.raises(RefusedError) as caught:
            reads()
        assert caught.value.reason == "damaged"
        rows = json.loads(cli("runs", "--json").stdout)
        states = {"results.json": "damaged", "model": "damaged"}
        assert rows[0]["state"] == states.get(name, "finished")
    assert train(tiny_resnet, flat_digits, name="bad", training={"epochs": 1}).model.is_dir()  # written again
    assert same(weights_of(orchestrator.open_run("runs/bad")), weights_of(run))
    (Path("runs/bad/model/model.safetensors")).write_bytes(b"cut")
    with pytest.raises(RefusedError) as caught:
        orchestrator.predict("runs/bad", [])
    assert caught.value.reason == "damaged"
    (run.path / "metrics.jsonl").open("a").write('{"epoch": 2, "st')
    assert [line["epoch"] for line in run.metrics] == [1]


def test_starting_over_removes_nothing_but_runs(tiny_resnet: Path, flat_digits: Path) -> None:
    import shutil

    shutil.copytree(flat_digits, "photos")
    shutil.copytree(flat_digits, "others")
    before = sorted(Path().rglob("*.png"))
    for name, data, words in (
        ("photos", "photos", "lie in one another"),
        ("others", "photos", "is no run of ours, and not empty"),
        ("3", "photos", "lie in one another"),
    ):
        storage = "photos" if name == "3" else "."
        with pytest.raises(RefusedError, match=words):
            train(tiny_resnet, Path(data), storage=storage, name=name, fresh=True)
    run = train(tiny_resnet, Path("photos"), name="mine", training={"epochs": 1})
    (run.path / "my-notes.txt").write_text("keep me")
    train(tiny_resnet, Path("photos"), name="mine", training={"epochs": 1}, fresh=True)
    assert (run.path / "my-notes.txt").read_text() == "keep me"
    assert sorted(Path().rglob("*.png")) == before


def test_one_place_is_one_run_from_any_directory(
    tiny_resnet: Path, flat_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    shutil.copytree(flat_digits, "photos")
    run = train(tiny_resnet, Path("photos"), training={"epochs": 1})
    assert (
        orchestrator.plan(backbone=str(tiny_resnet), data="photos/", method="head", training={"epochs": 1}).name
        == run.name
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert orchestrator.finetune(run.path / "job.yaml", report=silent).path == run.path
    with pytest.raises(ChangedError, match=r"training\.epochs: 1 -> 2"):
        orchestrator.finetune(run.path / "job.yaml", report=silent, **{"training.epochs": 2})


def test_two_processes_cannot_work_on_one_run(tiny_resnet: Path, digits: Path, cli_process: Cli) -> None:
    run = train(tiny_resnet, digits, name="shared")
    with held(run.path):
        done = cli_process(
            "finetune",
            "--backbone",
            tiny_resnet,
            "--data",
            digits,
            "--name",
            "shared",
            "--epochs",
            2,
            "--json",
        )
    assert done.returncode == 2
    assert json.loads(done.stdout)["reason"] == "busy"


def test_a_storage_that_is_a_file_is_no_stack_trace(tiny_resnet: Path, digits: Path, cli: Cli) -> None:
    Path("taken").write_text("x")
    done = cli("finetune", "--backbone", tiny_resnet, "--data", digits, "--storage", "taken", "--json")
    assert done.returncode == 2
    assert "taken" in json.loads(done.stdout)["message"]


def test_too_few_samples_are_refused_before_loading(tiny_resnet: Path, digits: Path) -> None:
    with pytest.raises(DataError, match="leaves classes without a sample"):
        train(tiny_resnet, digits, **{"data.num_train": 3})


# --- predict, evaluate, export ---


def test_predict_evaluate_and_pipeline_agree(tiny_vit: Path, digits: Path, cli: Cli) -> None:
    run = train(tiny_vit, digits, method="full", training={"epochs": 4})
    files = sorted((digits / "test").glob("*/*.png"))[:20]
    ours = orchestrator.predict(run, files, top=10)
    assert orchestrator.predict(run, str(files[0]))[0].label == ours[0].label
    assert orchestrator.evaluate(run, str(digits / "train"))["num_seen"] == 400
    figures = orchestrator.evaluate(run, str(digits / "test"))
    assert figures["num_seen"] == 0
    assert figures["confusion"] == run.results["test"]["confusion"]
    program = (
        "import sys, json\n"
        "sys.modules['orchestrator'] = sys.modules['orchestrator_image'] = None\n"
        "from transformers import pipeline\n"
        "serve = pipeline('image-classification', model=sys.argv[1], top_k=10)\n"
        "print(json.dumps(serve(sys.argv[2:])))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(run.model), *map(str, files)],
        capture_output=True,
        text=True,
        check=True,
    )
    for one, theirs in zip(ours, json.loads(done.stdout), strict=True):
        assert one.label == theirs[0]["label"]
        scores = {entry["label"]: entry["score"] for entry in theirs}
        assert all(abs(scores[name] - score) < 1e-4 for name, score in one.top)
    for place in ("photos/b/1.png", "photos/a.PNG", "photos/.hidden.png", "photos/.trash/1.png", "photos/notes.txt"):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).write_bytes(files[0].read_bytes())
    below = orchestrator.predict(run, ["photos", files[0]])
    assert [(one.input, one.label) for one in below] == [
        (place, ours[0].label) for place in ("photos/a.PNG", "photos/b/1.png", str(files[0]))
    ]
    Path("empty").mkdir()
    assert "is a folder, and holds no file of .png, .jpg" in orchestrator.predict(run, "empty")[0].problem
    listed = cli("predict", run.path, "-", "--json", input=f"{files[0]}\n\n{files[1]}\r\n")
    assert [row["input"] for row in json.loads(listed.stdout)] == [str(files[0]), "", str(files[1])]
    wrong = Path("wrong.png")
    wrong.write_bytes(b"nothing")
    found = cli("predict", run.path, files[0], wrong, "gone.png", "--json")
    assert found.returncode == 1
    rows = json.loads(found.stdout)
    assert rows[0]["label"] == ours[0].label
    assert "is no image" in rows[1]["problem"]
    assert "No such file" in rows[2]["problem"]


def test_the_timm_export_serves_through_pipeline(efficientnet: Path, digits: Path) -> None:
    run = train(efficientnet, digits, settings={"size": 32}, training={"epochs": 3})
    files = [str(file) for file in sorted((digits / "test").glob("*/*.png"))[:10]]
    from transformers import pipeline

    serve = pipeline("image-classification", model=str(run.model), top_k=10)
    for one, theirs in zip(orchestrator.predict(run, files, top=10), serve(files), strict=True):
        scores = {entry["label"]: entry["score"] for entry in theirs}
        assert one.label == theirs[0]["label"]
        assert all(abs(scores[name] - score) < 1e-4 for name, score in one.top)


def test_evaluating_with_a_class_that_was_never_learnt(tiny_resnet: Path, digits: Path, tmp_path: Path) -> None:
    import shutil

    run = train(tiny_resnet, digits)
    shutil.copytree(digits / "test" / "1", tmp_path / "new" / "one")
    with pytest.raises(DataError, match="never learnt"):
        orchestrator.evaluate(run, str(tmp_path / "new"))


# --- interruptions ---

LONG = (
    "--set", "training.checkpoint_every_steps=5", "--set", "scaling.threads_per_worker=1",
    "--epochs", "15", "--method", "full", "--batch-size", "16",
)  # fmt: skip


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_device_auto_says_what_it_is(tiny_resnet: Path, flat_digits: Path) -> None:
    notes: list[Event] = []
    train(tiny_resnet, flat_digits, training={"epochs": 1}, report=notes.append)
    assert Noted("device auto: no GPU here, so on the CPU") in notes
    notes.clear()
    train(tiny_resnet, flat_digits, name="asked", training={"epochs": 1}, report=notes.append, device="cpu")
    assert "device" not in str([one for one in notes if isinstance(one, Noted)])


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.terminal.cli", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_checkpoint(process: subprocess.Popen[str], run: Path, number: int = 1) -> None:
    for _ in range(36000):
        if len(list(run.glob("checkpoints/step-*/.manifest.json"))) >= number:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError("no checkpoint in three minutes")


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [signal.SIGKILL, *(pytest.param(one, marks=pytest.mark.long) for one in (signal.SIGINT, signal.SIGTERM))]
)
def test_an_interrupted_run_ends_as_if_it_never_was(
    how: signal.Signals, uninterrupted: orchestrator.Run, tiny_resnet: Path, digits: Path, cli: Cli
) -> None:
    command = ["finetune", "--backbone", tiny_resnet, "--data", digits, *LONG]
    process = start(*command, "--name", "cut")
    wait_for_checkpoint(process, Path("runs/cut"))
    time.sleep(0.2)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == (130 if how != signal.SIGKILL else -signal.SIGKILL), stderr
    assert not Path("runs/cut/results.json").exists()
    if how != signal.SIGKILL:
        assert "the same command goes on" in stderr
    steps = [int(p.parent.name[5:]) for p in Path("runs/cut").glob("checkpoints/step-*/.manifest.json")]
    assert 0 < max(steps) < 15 * 23
    done = cli(*command, "--name", "cut")
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stderr
    whole, cut = uninterrupted, orchestrator.open_run("runs/cut")
    assert same(weights_of(whole), weights_of(cut))
    keys = ("epoch", "step", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
    assert [[line[k] for k in keys] for line in whole.metrics] == [[line[k] for k in keys] for line in cut.metrics]


@pytest.mark.slow
def test_of_damaged_checkpoints_the_newest_whole_one_counts(
    uninterrupted: orchestrator.Run, tiny_resnet: Path, digits: Path, cli: Cli
) -> None:
    command = ["finetune", "--backbone", tiny_resnet, "--data", digits, *LONG]
    process = start(*command, "--name", "cut")
    wait_for_checkpoint(process, Path("runs/cut"), number=2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    places = sorted(Path("runs/cut/checkpoints").glob("step-*"))
    committed = [place for place in places if (place / ".manifest.json").exists()]
    content = bytearray((committed[-1] / "weights.safetensors").read_bytes())
    content[-3] ^= 1
    (committed[-1] / "weights.safetensors").write_bytes(content)
    assert len(committed) > 1
    done = cli(*command, "--name", "cut")
    assert f"going on from step {int(committed[-2].name[5:])} " in done.stderr
    assert same(weights_of(uninterrupted), weights_of(orchestrator.open_run("runs/cut")))
    for place in Path("runs/cut/checkpoints").glob("step-*"):
        (place / "state.json").write_text("{}")
    (Path("runs/cut") / "results.json").unlink(missing_ok=True)
    done = cli(*command, "--name", "cut", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["reason"] == "checkpoint"
    assert "--fresh" in json.loads(done.stdout)["mend"]


def test_no_signal_handler_is_left_behind(tiny_resnet: Path, digits: Path) -> None:
    before = signal.getsignal(signal.SIGINT), torch.get_num_threads()
    train(tiny_resnet, digits)
    assert (signal.getsignal(signal.SIGINT), torch.get_num_threads()) == before


def test_an_interruption_before_the_first_step_is_said_and_leaves_nothing(tiny_resnet: Path, digits: Path) -> None:
    """Ctrl-C while the data is read: typer turns it into an exit code in silence."""
    command = [
        sys.executable, "-c",
        "import signal, sys; from orchestrator.terminal import cli; from orchestrator.data import ingest;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"  # a shell's background jobs ignore Ctrl-C
        "ingest._remember = lambda *_: signal.raise_signal(signal.SIGINT);"  # in the main thread, as Ctrl-C comes
        "sys.exit(cli.run(sys.argv[1:]))",
        "finetune", "--backbone", str(tiny_resnet), "--data", str(digits), "--name", "early",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 130
    assert "the same command goes on" in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path("runs").exists()


def test_starting_over_with_labels_that_cannot_be_written_leaves_the_old_run(
    tiny_resnet: Path, flat_digits: Path
) -> None:
    run = orchestrator.finetune(
        method="head",
        backbone=str(tiny_resnet),
        data=str(flat_digits),
        training={"epochs": 1},
        name="kept",
        report=lambda _: None,
    )
    before = run.results
    files = sorted(flat_digits.rglob("*.png"))[:40]
    rows = [{"path": str(file), "label": "\ud800" if i % 2 else "b"} for i, file in enumerate(files)]
    Path("half.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RefusedError, match="half a character"):
        orchestrator.finetune(
            method="head",
            backbone=str(tiny_resnet), data={"path": "half.jsonl", "root": str(flat_digits)}, name="kept", fresh=True,
            report=lambda _: None,
        )  # fmt: skip
    assert run.results == before
    assert run.finished


def test_after_an_interrupted_fresh_start_the_mend_is_without_fresh(tiny_resnet: Path, digits: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, EpochEnded):
            signal.raise_signal(signal.SIGINT)

    job: dict[str, Any] = {"backbone": str(tiny_resnet), "data": str(digits), "method": "full", "name": "anew"}
    with pytest.raises(orchestrator.OrchestratorError) as caught:
        orchestrator.finetune(**job, training={"epochs": 3}, fresh=True, report=stop)
    assert caught.value.mend == "the same command without --fresh goes on from there"
    notes: list[Event] = []
    orchestrator.finetune(**job, training={"epochs": 3}, report=notes.append)
    assert any("going on from step" in event.text for event in notes if isinstance(event, Noted))


def test_a_run_of_an_earlier_layout(tiny_resnet: Path, flat_digits: Path) -> None:
    """It had its sample table directly in the run: its model serves as any, but it cannot be gone on with."""
    from orchestrator.data import table_of

    run = train(tiny_resnet, flat_digits, training={"epochs": 1})
    table = table_of(run)
    assert table is not None
    (run.path / "samples.arrow").write_bytes((table / "samples.arrow").read_bytes())
    (run.path / "samples.json").unlink()
    figures = orchestrator.evaluate(run, str(flat_digits))
    assert figures["num_seen"] is None
    assert "nothing tells whether it was trained on these" in figures["notes"][0]
    assert orchestrator.plan(backbone=str(run.path), data=str(flat_digits)).backbone.kind == "run"
    assert train(tiny_resnet, flat_digits, training={"epochs": 1}).path == run.path  # finished is finished
    for gone in ("results.json", "samples.arrow"):
        (run.path / gone).unlink()
        with pytest.raises(RefusedError, match="and cannot be gone on with") as caught:
            train(tiny_resnet, flat_digits, training={"epochs": 1})
        assert (caught.value.reason, "--fresh" in caught.value.mend) == ("damaged", True)
    assert train(tiny_resnet, flat_digits, training={"epochs": 1}, fresh=True).finished


def test_a_run_without_its_sample_table_makes_it_again(tiny_resnet: Path, digits: Path) -> None:
    """As it has to where the run alone was copied to another storage; another table is none to go on with."""

    def stop(event: Event) -> None:
        if isinstance(event, EpochEnded):
            signal.raise_signal(signal.SIGINT)

    job: dict[str, Any] = {"name": "a", "method": "full", "training": {"epochs": 2, "checkpoint_every_steps": 2}}
    with pytest.raises(InterruptedRunError):
        train(tiny_resnet, digits, report=stop, **job)
    shutil.rmtree("runs/.data")
    reference = Path("runs/a/samples.json")
    said = reference.read_text()
    reference.write_text(json.dumps({"table": "0" * 32}))
    with pytest.raises(RefusedError, match="lost its samples, and its data gives others") as caught:
        train(tiny_resnet, digits, **job)
    assert caught.value.reason == "damaged"
    assert not any(file.is_file() and file.name != ".lock" for file in Path("runs/.data").rglob("*"))
    reference.write_text(said)
    notes: list[str] = []
    run = train(tiny_resnet, digits, report=lambda event: notes.append(getattr(event, "text", "")), **job)
    assert any("made again from the data" in note for note in notes)
    assert any("going on from step" in note for note in notes)
    assert (run.finished, reference.read_text()) == (True, said)


def test_evaluating_takes_columns_as_the_run_had_them(tmp_path: Path) -> None:
    """Targets by their names, whatever their order; what is open as the run had it."""
    from tests.tiny import make_bert

    def table(name: str, **columns: str) -> Path:
        lines = [{columns.get(key, key): value for key, value in row.items()} for row in rows]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / name

    rows: list[dict[str, Any]] = [{"words": f"rain {i}", "low": i, "high": 1000 + i} for i in range(100)]
    job: dict[str, Any] = {"modality": "text", "training": {"epochs": 1}, "task": "regression"}
    job["data.input_column"], job["data.label_column"] = "words", ["low", "high"]
    backbone = make_bert(tmp_path / "bert")
    run = train(backbone, table("t.jsonl"), **job)
    open_ = orchestrator.evaluate(run, tmp_path / "t.jsonl")
    assert (open_["num_seen"], open_["notes"]) == (90, [])
    spec = orchestrator.job.spec.Data
    turned = orchestrator.evaluate(run, spec(path=str(tmp_path / "t.jsonl"), label_column=("high", "low")))
    assert turned["per_class"] == open_["per_class"]
    other = table("o.jsonl", low="small", words="text")
    found = orchestrator.evaluate(run, spec(path=str(other), label_column=("small", "high")))
    assert (found["per_class"], found["notes"]) == (
        open_["per_class"],
        ["the target 'low' is compared with the column 'small'"],
    )
    with pytest.raises(DataError, match="'high' would be compared with what the model says of 'low'"):
        orchestrator.evaluate(run, spec(path=str(other), label_column=("high", "small")))


def test_evaluating_cuts_cells_as_the_run_did(tmp_path: Path) -> None:
    from tests.tiny import make_bert

    lines = "".join(f"rain {i};,{('a/b', 'b', 'a')[i % 3]}\n" for i in range(40))
    (tmp_path / "t.csv").write_text("text,kinds\n" + lines)
    job: dict[str, Any] = {"modality": "text", "training": {"epochs": 1}, "task": "multi-label"}
    job["data.label_column"], job["data.label_separator"] = "kinds", "/"
    run = train(make_bert(tmp_path / "bert"), tmp_path / "t.csv", **job)
    assert run.plan.classes == ("a", "b")
    assert orchestrator.evaluate(run, tmp_path / "t.csv")["num_samples"] == 40


def test_what_a_run_has_seen_is_counted_by_contents_that_the_tables_know(
    tiny_resnet: Path, flat_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.data.samples import Samples

    files = sorted(flat_digits.glob("[01]/*.png"))
    held = [{"image": file.read_bytes(), "label": file.parent.name} for file in files]
    run = orchestrator.finetune(
        method="head",
        backbone=str(tiny_resnet),
        data=held,
        training={"epochs": 1},
        report=silent,
        **{"data.test_fraction": 0},
    )
    read = []
    whole = Samples.read
    monkeypatch.setattr(Samples, "read", lambda self, row: (read.append(row), whole(self, row))[1])
    one = held[3]["image"]
    some = [held[3], {**held[3], "image": one + bytes(9)}, {**held[4], "image": one[:-1] + b"\0"}]
    assert orchestrator.evaluate(run, some)["num_seen"] == 1
    assert len(read) == 3  # decoded; the tables know what contents they hold


def test_a_start_that_is_refused_leaves_no_run(tiny_resnet: Path, digits: Path) -> None:
    """Else the next one would go on with it: in as many parts as its workers would have been, say."""
    with pytest.raises(RefusedError, match="no Ray cluster to join"):
        train(tiny_resnet, digits, scaling={"num_workers": 2, "address": "127.0.0.1:1"})
    assert [place.name for place in Path("runs").glob("[!.]*")] == []


def test_a_cluster_that_the_environment_names_is_not_passed_by_in_silence(
    tiny_resnet: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    notes: list[Event] = []
    train(tiny_resnet, digits, training={"epochs": 1}, report=notes.append)
    assert [one for one in notes if isinstance(one, Noted) and "--address auto joins that cluster" in one.text]
