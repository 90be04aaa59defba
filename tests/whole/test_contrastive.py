"""Few texts: the body learns by what is alike, and a head is fitted to what it gives at the end of each epoch."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import orchestrator
from orchestrator.errors import InterruptedRunError, TrainingError
from orchestrator.job import Event, Noted
from orchestrator.probing import fit_probe
from tests.tiny import SENTENCES, make_bert
from tests.whole.test_auto import at_call, without_clock
from tests.whole.test_train import same, silent, weights_of

CLASSES = ("weather", "food")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """60 texts of two kinds, of the words that the tokenizer knows."""
    table = tmp_path / "texts.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        for i in range(60):
            kind, half = i % 2, len(SENTENCES) // 2
            one, other = (SENTENCES[half * kind + (i // 2 + more) % half] for more in (0, 1 + i // 20))
            writer.writerow((f"{one} {other} {i % 7 * 'and '}", CLASSES[kind]))
    return table


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return make_bert(tmp_path / "bert")


def train(bert: Path, texts: Path, **more: Any) -> orchestrator.Run:
    job: dict[str, Any] = {
        "modality": "text", "backbone": str(bert), "report": silent, "scaling": {"threads_per_worker": 1},
        "data": {"path": str(texts), "test_fraction": 0.2, "validation_fraction": 0.2},
        "training": {
            "loss": "contrastive", "epochs": 3, "batch_size": 8, "precision": "fp32", "checkpoint_every_steps": 2,
        },
    }  # fmt: skip
    return orchestrator.finetune(**{**job, **more})


def test_the_head_is_what_fits_what_the_body_gives_by_now(bert: Path, texts: Path) -> None:
    """The exported model's own features, in transformers' hands, and the layer that a probe of strength .01 has."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run = train(
        bert, texts, method="lp-ft", data={"path": str(texts), "test_fraction": 0.2, "validation_fraction": 0.0}
    )
    assert [phase.loss for phase in run.plan.recipe.phases] == ["task", "contrastive"]
    assert run.results["best_epoch"] == 4
    model = AutoModelForSequenceClassification.from_pretrained(run.path / "model").eval()
    before = AutoModelForSequenceClassification.from_pretrained(bert).eval()
    assert not torch.equal(
        model.bert.encoder.layer[0].output.dense.weight, before.bert.encoder.layer[0].output.dense.weight
    )
    tokenizer = AutoTokenizer.from_pretrained(run.path / "model")
    from orchestrator.data import Samples, table_of

    folder = table_of(run)
    assert folder is not None
    samples = Samples(folder, ("text",))
    rows = samples.rows("train")
    read = [samples.read(int(row))["text"].decode() for row in rows]
    with torch.no_grad():
        features = model.bert(**tokenizer(read, padding=True, return_tensors="pt")).pooler_output
    targets = torch.from_numpy(samples.targets[rows])
    probe = fit_probe(features, targets, "single-label", num_classes=2, strengths=[0.01])
    ours = functional.linear(features, model.classifier.weight, model.classifier.bias)
    assert torch.allclose(ours, probe(features), atol=1e-2)
    assert float((ours.argmax(1) == targets).float().mean()) == pytest.approx(run.metrics[-1]["train_accuracy"])
    assert ["train_accuracy" in line for line in run.metrics] == [True, False, False, True]  # nobody would look at it


def test_it_goes_on_wherever_it_was_stopped(bert: Path, texts: Path) -> None:
    whole = train(bert, texts, name="whole")
    assert whole.plan.recipe.phases[1].loss == "contrastive"
    for number in (6, 9, 11, 13, 16):
        with pytest.raises(InterruptedRunError):
            train(bert, texts, name=f"stopped-{number}", stop=at_call(number))
        run = train(bert, texts, name=f"stopped-{number}")
        assert same(weights_of(whole), weights_of(run)), number
        assert without_clock(run.metrics) == without_clock(whole.metrics)
        assert run.lineage["candidates"] == whole.lineage["candidates"]


def test_a_budget_and_refitting_go_with_it(bert: Path, texts: Path) -> None:
    free, measured = (
        train(bert, texts, name=name, method="lp-ft", **more)
        for name, more in (("free", {}), ("measured", {"training.budget_min": 1000.0}))
    )
    assert same(weights_of(free), weights_of(measured))
    assert "epochs" in measured.lineage["decided"]["1"]
    again = train(bert, texts, name="again", **{"training.refit": True})
    assert "refitted" in again.results
    assert [phase.loss for phase in again.plan.recipe.phases] == ["task", "contrastive"] * 2


def test_where_no_head_can_be_fitted_the_task_is_learnt(bert: Path, texts: Path) -> None:
    from transformers import BertModel

    BertModel.from_pretrained(bert, add_pooling_layer=False).save_pretrained(bert)  # its pooler is new, and head
    notes: list[Event] = []
    run = train(bert, texts, settings={"head": "native"}, report=notes.append)
    assert any("trained by the task's loss" in one.text for one in notes if isinstance(one, Noted))
    assert run.lineage["decided"]["1"]["loss"] == "task"
    assert run.results["chosen"].startswith(("everything, trained from the new", "the new last layer"))


@pytest.mark.parametrize("batch_size", [8, 48])
def test_weights_that_a_step_made_infinite_are_the_rates_fault(bert: Path, texts: Path, batch_size: int) -> None:
    """Of 48 a batch is an epoch: the head would be fitted to what is no number before the next loss is seen."""
    with pytest.raises(TrainingError, match=r"the learning rate of .* is to blame") as raised:
        train(bert, texts, method="lp-ft", **{"training.learning_rate": 1e30, "training.batch_size": batch_size})
    assert "lower it" in raised.value.mend
