"""Method auto: the head at once on stored features, everything from there, and what validation says is kept."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import BertModel

import orchestrator
from orchestrator.errors import InterruptedRunError, JobError
from orchestrator.job import Event, Noted, PhaseBegan
from orchestrator.modality import registry
from tests.tiny import make_bert, make_wav2vec2
from tests.toys import write_toys
from tests.whole.test_train import same, silent, weights_of

JOB: dict[str, Any] = {
    "training": {"epochs": 3, "batch_size": 40, "checkpoint_every_steps": 5}, "scaling": {"threads_per_worker": 1},
    "data.num_train": 160, "data.validation_fraction": 0.2,
}  # fmt: skip


def train(backbone: Path, data: Path, **more: Any) -> orchestrator.Run:
    return orchestrator.finetune(backbone=str(backbone), data=str(data), **{"report": silent, **JOB, **more})


def at_call(number: int) -> Callable[[], bool]:
    """A `stop` that says yes from its so-manieth call on."""
    calls = iter(range(10**9))
    return lambda: next(calls) >= number


def without_clock(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**line, "seconds": 0, "samples_per_s": 0} for line in lines]


def test_it_is_the_default_and_says_what_it_chose(tiny_resnet: Path, digits: Path) -> None:
    run = train(tiny_resnet, digits)
    assert run.plan.job.method == "auto"
    assert [line["epoch"] for line in run.metrics] == [1, 2, 3, 4]
    assert "learning_rate" not in run.metrics[0]  # fitted at once
    first, second = run.lineage["candidates"]
    assert first["validation_accuracy"] == run.metrics[0]["validation_accuracy"]
    assert 0 <= first["cross_validation"] <= 1
    assert second["epoch"] in (2, 3, 4)
    assert run.results["chosen"].startswith(("everything, trained from the probe", "the probe, on the body"))
    assert "validation samples" in run.results["why"]
    assert run.lineage["comparison"]["num_samples"] == run.results["validation"]["num_samples"]


def test_the_probe_is_the_head_and_the_body_is_as_it_was(tiny_resnet: Path, digits: Path) -> None:
    """Epochs that learn nothing are not preferred by a validation that can tell: what is exported is the probe's."""
    from safetensors.torch import load_file

    from orchestrator.probing.probe import fit_probe

    run = train(tiny_resnet, digits, **{"training.learning_rate": 1e-12, "training.precision": "fp32"})
    after, before = weights_of(run), load_file(tiny_resnet / "model.safetensors")
    for name, tensor in before.items():
        if "classifier" not in name and "num_batches" not in name and "running" not in name:
            assert torch.allclose(after[name], tensor, atol=1e-6), name
    features, targets = features_of(run, tiny_resnet)
    probe = fit_probe(features, targets, "single-label", num_classes=10)
    assert run.lineage["candidates"][0]["strength"] == probe.strength
    logits = functional.linear(features, after["classifier.1.weight"], after["classifier.1.bias"])
    assert float((logits.argmax(1) == probe(features).argmax(1)).float().mean()) > 0.99


def test_an_output_that_hardly_varies_does_not_throw_the_network_about(
    tiny_vit: Path, digits: Path, tmp_path: Path
) -> None:
    """As one of all-MiniLM-L6-v2's: a probe that brought it to the others' scale gave it a weight of 1e7."""
    from safetensors.torch import load_file, save_file

    backbone = shutil.copytree(tiny_vit, tmp_path / "dead")
    weights = load_file(backbone / "model.safetensors")
    weights["vit.layernorm.weight"][0], weights["vit.layernorm.bias"][0] = -1.5e-9, -8.7e-8
    save_file(weights, backbone / "model.safetensors", metadata={"format": "pt"})
    run = train(backbone, digits, method="lp-ft")
    assert max(line["train_loss"] for line in run.metrics) < 2 * math.log(10)


def test_the_body_is_trained_behind_a_head_that_is_as_unsure_as_it_has_to_be(tiny_resnet: Path, digits: Path) -> None:
    """Of few samples the fit has all right, and the first epoch begins with a loss that is no smaller than others'."""
    training = {**JOB["training"], "loss": "task", "learning_rate": 1e-12}
    run = train(tiny_resnet, digits, method="lp-ft", training=training, **{"data.num_train": 60})
    (first, _) = run.lineage["candidates"]
    fitted, behind = run.metrics[0]["train_loss"], run.metrics[1]["train_loss"]
    assert first["temperature"] > 1
    assert behind > 1.5 * fitted


def features_of(run: orchestrator.Run, backbone: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers' own network gives for the run's training samples."""
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel

    from orchestrator.data import Samples, table_of

    folder = table_of(run)
    assert folder is not None
    samples = Samples(folder, ("image",))
    rows = samples.rows("train")
    processor, body = AutoImageProcessor.from_pretrained(backbone), AutoModel.from_pretrained(backbone).eval()
    images = [Image.open(samples.place(int(row))).convert("RGB") for row in rows]
    with torch.no_grad():
        pooled = body(**processor(images, return_tensors="pt")).pooler_output
    return pooled.flatten(1), torch.from_numpy(samples.targets[rows])


@pytest.mark.slow
def test_it_goes_on_wherever_it_was_stopped(tiny_resnet: Path, digits: Path) -> None:
    whole = train(tiny_resnet, digits, name="whole")
    phases = []
    for number in (0, 6, 8, 11, 13, 17):  # over the body, at validations, in measured steps, in others
        name, notes = f"stopped-{number}", list[Event]()
        for stop in (at_call(number), None):
            try:
                run = train(tiny_resnet, digits, name=name, stop=stop, report=notes.append)
            except InterruptedRunError:
                assert stop is not None
        assert same(weights_of(whole), weights_of(run)), number
        assert without_clock(run.metrics) == without_clock(whole.metrics)
        assert run.lineage["candidates"] == whole.lineage["candidates"]
        for key in ("test", "chosen", "why", "best_epoch"):
            assert run.results[key] == whole.results[key], (number, key)
        phases.append([event.text for event in notes if isinstance(event, PhaseBegan) and "training" in event.text])
    assert any(texts.count("training the head") == 2 for texts in phases)
    assert any(texts.count("training everything") == 2 for texts in phases)


def test_what_fits_the_budget_is_decided_once(tiny_resnet: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 100 s, of which an hour has time for nine epochs; the clock of who goes on says something else."""
    from orchestrator.training import phase

    def of(seconds: float) -> None:
        def measured(take: Callable[[int], object]) -> list[float]:
            take(0)
            return [seconds]

        monkeypatch.setattr(phase, "seconds_of", measured)

    job = {"training": {"batch_size": 40, "checkpoint_every_steps": 3}}
    of(100.0)
    notes: list[Event] = []
    whole = train(tiny_resnet, digits, name="whole", report=notes.append, **job)
    planned = whole.plan.recipe.phases[1]
    assert planned.epochs > 20
    epochs = len(whole.metrics) - 1
    assert 3 <= epochs < planned.epochs
    assert whole.results["num_epochs"] == 1 + epochs
    (said,) = [one.text for one in notes if isinstance(one, Noted) and "--budget" in one.text]
    assert f"of {planned.epochs} the budget of 60 minutes has time for {epochs}" in said
    with pytest.raises(InterruptedRunError):
        train(tiny_resnet, digits, name="cut", stop=at_call(24), **job)
    of(1e-3)
    cut = train(tiny_resnet, digits, name="cut", **job)
    assert same(weights_of(whole), weights_of(cut))
    assert without_clock(cut.metrics) == without_clock(whole.metrics)


def test_a_budget_of_not_one_epoch_keeps_the_probe(tiny_resnet: Path, digits: Path) -> None:
    notes: list[Event] = []
    run = train(tiny_resnet, digits, report=notes.append, **{"training.budget_min": 1e-6, "training.epochs": 5})
    assert [line["epoch"] for line in run.metrics] == [1]
    assert run.results["best_epoch"] == 1
    assert run.results["chosen"] == "the probe, on the body as it was."
    assert "budget" in run.results["why"]
    assert any("has time for 0" in one.text for one in notes if isinstance(one, Noted) and one.is_warning)
    full = train(tiny_resnet, digits, method="full", **{"training.budget_min": 1e-6})
    assert len(full.metrics) == 1  # there is nothing else to keep


def test_steps_that_were_measured_leave_nothing_behind(tiny_resnet: Path, digits: Path) -> None:
    measured = train(tiny_resnet, digits, name="measured", **{"training.budget_min": 1000.0})
    free = train(tiny_resnet, digits, name="free")
    assert measured.plan.recipe.budget_s is not None
    assert free.plan.recipe.budget_s is None
    assert same(weights_of(measured), weights_of(free))


def test_of_few_validation_samples_the_luckiest_epoch_is_not_looked_for(tiny_resnet: Path, digits: Path) -> None:
    """Unless it is worse than the probe beyond noise, the last epoch is kept, whose rate was the lowest."""
    training = {"epochs": 6, "batch_size": 40, "learning_rate": 3e-5, "seed": 1, "loss": "task"}
    run = train(tiny_resnet, digits, training=training, **{"data.num_train": 120, "data.validation_fraction": 0.07})
    ranks = [(line["validation_accuracy"], -line["validation_loss"]) for line in run.metrics]
    assert max(ranks[1:]) > ranks[-1], "an earlier epoch looks better"
    assert run.results["best_epoch"] == len(run.metrics) == 7
    assert run.lineage["candidates"][1]["epoch"] == 7
    difference = run.metrics[-1]["validation_accuracy"] - run.metrics[0]["validation_accuracy"]
    assert run.lineage["comparison"]["difference"] == pytest.approx(difference)


def test_of_few_labels_none_is_held_back(tiny_resnet: Path, digits: Path, tmp_path: Path) -> None:
    rows = [(file, file.parent.name) for file in sorted((digits / "train").rglob("*.png"))]
    table = tmp_path / "few.jsonl"
    few = [{"path": str(file.relative_to(digits)), "label": label, "split": "train"} for file, label in rows[::6]]
    test = [
        {"path": str(file.relative_to(digits)), "label": file.parent.name, "split": "test"}
        for file in sorted((digits / "test").rglob("*.png"))
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in few + test))
    data = {"path": str(table), "root": str(digits), "split_column": "split"}
    job: dict[str, Any] = {**JOB, "backbone": str(tiny_resnet), "data": data, "report": silent}
    del job["data.num_train"], job["data.validation_fraction"]
    run = orchestrator.finetune(**job)
    assert run.plan.data.num_samples["validation"] == 0
    assert any("no validation split" in note for note in run.plan.data.notes)
    assert run.results["best_epoch"] == 4  # the last
    assert run.results["chosen"].endswith(": epoch 4 of 4.")  # as the list of epochs counts them, the probe's too
    assert "none held back" in run.results["why"]
    asked = orchestrator.plan(backbone=str(tiny_resnet), data={**data, "validation_fraction": 0.2})
    assert asked.data.num_samples["validation"] > 0
    head = orchestrator.plan(backbone=str(tiny_resnet), data=data, method="head")
    assert head.data.num_samples["validation"] > 0


@pytest.mark.parametrize("modality", ["text", "audio"])
@pytest.mark.parametrize("task", ["single-label", "multi-label", "regression"])
def test_every_task_of_texts_and_recordings(modality: str, task: str, tmp_path: Path) -> None:
    backbone = {"text": make_bert, "audio": make_wav2vec2}[modality](tmp_path / "backbone")
    data = tmp_path / "data"
    data.mkdir()
    table = write_toys(data, modality, task)
    columns = {"regression": {"label_column": ("words", "height")}}.get(task, {})
    run = orchestrator.finetune(
        modality=modality, backbone=str(backbone), task=task, report=silent,
        data={"path": str(table), "test_fraction": 0.25, "validation_fraction": 0.25, **columns},
        training={"epochs": 2, "batch_size": 8}, scaling={"threads_per_worker": 1},
    )  # fmt: skip
    assert len(run.metrics) == 3
    assert run.plan.recipe.phases[0].solver == "probe"
    assert run.lineage["candidates"][0]["figure"] == {"multi-label": "macro_f1", "regression": "r2"}.get(
        task, "accuracy"
    )
    assert ("accuracy" if task == "single-label" else "loss") in run.results["why"]
    (sample,) = [one for one in registry.get(modality).toy(1)]  # type: ignore[misc]
    said = orchestrator.predict(run, [sample[0]["text"].decode()] if modality == "text" else [data / "0.wav"])
    assert said[0].problem is None or not said[0].problem


def test_a_head_of_several_layers_is_trained_in_steps(tmp_path: Path) -> None:
    backbone = make_bert(tmp_path / "backbone")
    body = BertModel.from_pretrained(backbone, add_pooling_layer=False)
    body.save_pretrained(backbone)  # its pooler is new, and head
    data = tmp_path / "data"
    data.mkdir()
    table, notes = write_toys(data, "text"), list[Event]()
    run = orchestrator.finetune(
        modality="text", backbone=str(backbone), report=notes.append, settings={"head": "native"},
        data={"path": str(table), "test_fraction": 0.25, "validation_fraction": 0.25},
        training={"epochs": 1, "batch_size": 24}, scaling={"threads_per_worker": 1},
    )  # fmt: skip
    assert any("not one linear layer" in one.text for one in notes if isinstance(one, Noted))
    assert len(run.metrics) == 41  # 40 of the head, one of everything
    assert run.results["num_epochs"] == 41
    assert run.results["chosen"].startswith(("everything, trained from the new last layer", "the new last layer"))


def test_a_network_without_a_cut_is_trained_in_steps(
    tiny_resnet: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.features.stage.find_cut", lambda *_: (None, 1.0))
    run = train(tiny_resnet, digits)
    assert run.lineage["features"] == "every step"
    assert len(run.metrics) == 43
    assert "train_accuracy" in run.metrics[0]


def test_features_in_every_step_and_views_have_a_meaning(tiny_resnet: Path, flat_digits: Path) -> None:
    def phases(**more: Any) -> tuple[Any, ...]:
        return orchestrator.plan(backbone=str(tiny_resnet), data=str(flat_digits), **more).recipe.phases

    probe, later = phases()
    assert (probe.solver, probe.source, probe.num_steps) == ("probe", "features", 1)
    assert later.must_win
    slow = phases(training={"features": "every step"})[0]
    assert (slow.solver, slow.source, slow.epochs) == ("steps", "samples", 40)
    augmented = phases(settings={"augment": "light"})[0]
    assert (augmented.solver, augmented.source) == ("probe", "features")  # of the samples as they are
    views = phases(settings={"augment": "light"}, training={"views": 2})[0]
    assert (views.solver, views.source, views.epochs) == ("steps", "features", 40)
    asked = phases(training={"epochs": 7, "learning_rate": 1e-5, "batch_norm": "train"})
    assert (asked[0], asked[1].epochs, asked[1].learning_rate, asked[1].batch_norm) == (probe, 7, 1e-5, "train")


def test_a_budget_is_for_what_takes_long(tiny_resnet: Path, flat_digits: Path) -> None:
    with pytest.raises(JobError, match="method head has none") as refused:
        orchestrator.plan(backbone=str(tiny_resnet), data=str(flat_digits), method="head", budget_min=3)
    assert "leave training.budget_min" in refused.value.mend


def test_groups_stay_together_in_the_folds(tiny_resnet: Path, digits: Path, tmp_path: Path) -> None:
    """Labels that only the writer tells: other writers' samples say nothing of them, and the folds see that."""
    files = sorted((digits / "train").rglob("*.png"))[:200]
    rows = [
        {"path": str(file.relative_to(digits)), "label": "ab"[i // 20 % 2], "writer": f"w{i // 20}"}
        for i, file in enumerate(files)
    ]
    table = tmp_path / "groups.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job: dict[str, Any] = {
        "backbone": str(tiny_resnet), "report": silent, "scaling": {"threads_per_worker": 1}, "epochs": 1,
        "data": {"path": str(table), "root": str(digits), "test_fraction": 0.2, "validation_fraction": 0.0},
    }  # fmt: skip
    torn, kept = (orchestrator.finetune(**job, **more) for more in ({}, {"data.group_column": "writer"}))
    assert torn.lineage["candidates"][0]["cross_validation"] > kept.lineage["candidates"][0]["cross_validation"] + 0.2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auto", pytest.param("full", marks=pytest.mark.long)])
def test_refitting_is_training_on_all_with_what_was_chosen(tiny_resnet: Path, digits: Path, method: str) -> None:
    job = {"method": method, "training": {**JOB["training"], "epochs": 4, "refit": True, "precision": "fp32"}}
    whole = train(tiny_resnet, digits, name="whole", **job)
    best = whole.lineage["chosen_epoch"]
    first = {"auto": 5, "full": 4}[method]
    assert [line["epoch"] for line in whole.metrics] == list(range(1, first + best + 1))
    assert all("validation_loss" in line for line in whole.metrics[:first])
    assert not any("validation_loss" in line for line in whole.metrics[first:])
    assert "validation" not in whole.results  # they were trained on
    counts = whole.plan.data.num_samples
    assert f"{counts['train'] + counts['validation']} samples" in whole.results["refitted"]
    # The same as a job that held nothing back and knew how long to train, but for the order of its samples.
    for number in (8, 20, 30):
        for stop in (at_call(number), None):
            try:
                cut = train(tiny_resnet, digits, name=f"cut-{number}", stop=stop, **job)
            except InterruptedRunError:
                assert stop is not None
        assert same(weights_of(whole), weights_of(cut)), number
        assert without_clock(cut.metrics) == without_clock(whole.metrics)


def test_refitting_begins_from_the_pretrained_weights(
    tiny_resnet: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    from orchestrator.training import loop

    begin, seen = loop.begin_refit, dict[str, torch.Tensor]()

    def looking(session: Any, initial: Any) -> bool:
        before = {name: one.clone() for name, one in session.network.module.state_dict().items()}
        begun = begin(session, initial)
        after = {name: one.clone() for name, one in session.network.module.state_dict().items()}
        seen.update({name: after[name] for name in after if not torch.equal(before[name], after[name])})
        return begun

    monkeypatch.setattr(loop, "begin_refit", looking)
    train(tiny_resnet, digits, method="full", training={**JOB["training"], "epochs": 1, "refit": True})
    pretrained = load_file(tiny_resnet / "model.safetensors")
    body = [name for name in seen if not name.startswith("classifier")]
    assert len(body) > 10
    assert all(torch.equal(seen[name], pretrained[name]) for name in body)


def test_refitting_wants_something_held_back(tiny_resnet: Path, flat_digits: Path) -> None:
    nothing = orchestrator.plan(
        backbone=str(tiny_resnet), data=str(flat_digits), refit=True, **{"data.validation_fraction": 0}
    )
    assert any("training.refit is not used" in line for line in nothing.warnings)
    with pytest.raises(JobError, match=r"no random views \(training\.views\)"):
        orchestrator.plan(
            backbone=str(tiny_resnet), data=str(flat_digits), method="head", settings={"augment": "light"},
            training={"refit": True, "views": 2}, **{"data.validation_fraction": 0.2},
        )  # fmt: skip
