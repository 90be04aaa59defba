"""The ways that the benchmark `accuracy` compares: ours, and other libraries as their documentation has it."""

from __future__ import annotations

import contextlib
import csv
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tests.benchmarks.harness import ROOT, silent
from tests.benchmarks.peers import DIGITS, GLOSSES, image_collate, mean_pool

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

SPEECH = ROOT / "examples" / "speech"
VOICE = SPEECH / "backbone" / "resemblyzer"
SIZE = 64
"""Pixels."""
MAX_TOKENS = 256
FASTAI_EPOCHS = 10
Row = tuple[str, str]
"""(a file or a text, its label)"""


@dataclass(frozen=True)
class Data:
    """The same for every way."""

    train: list[Row]
    test: list[Row]
    group: Callable[[str], str] | None = None
    """A sample -> what must not be on both sides of a split, where there is such a thing."""

    @property
    def names(self) -> list[str]:
        """Of the classes."""
        return sorted({label for _, label in self.train})

    def numbered(self, rows: Sequence[Row]) -> list[tuple[str, int]]:
        """With classes as numbers."""
        number = {name: i for i, name in enumerate(self.names)}
        return [(sample, number[label]) for sample, label in rows]


def use_threads(num: int) -> None:
    """For torch, and what else asks the environment."""
    os.environ["OMP_NUM_THREADS"] = str(num)
    import torch

    torch.set_num_threads(num)


def ours(
    modality: str, job: dict[str, Any], data: Data, way: str, seed: int, folder: Path, threads: int
) -> dict[str, Any]:
    """This package with nothing said but the method; `auto,training.epochs=40` says more."""
    import orchestrator
    from orchestrator.job import parse_setting

    method, *settings = way.split(",")

    if modality == "speech":
        orchestrator.register(_speech().modality)
    table = folder / "table.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("sample", "label", "split", "group"))
        for split, rows in (("train", data.train), ("test", data.test)):
            writer.writerows((*row, split, data.group(row[0]) if data.group else "") for row in rows)
    columns = {"input_column": "sample", "split_column": "split", **({"group_column": "group"} if data.group else {})}
    run = orchestrator.finetune(
        modality=modality, **job, method=method, storage=str(folder / "runs"), report=silent,
        data={"path": str(table), **columns, "seed": seed},
        scaling={"threads_per_worker": threads},
        **{"training.seed": seed, **dict(parse_setting(one) for one in settings)},
    )  # fmt: skip
    kept = ("best_epoch", "num_epochs", "chosen", "why")
    probe = {
        name: one[name] for one in run.lineage["candidates"] for name in ("strength", "cross_validation") if name in one
    }
    return {"accuracy": run.accuracy, **{name: run.results[name] for name in kept if name in run.results}, **probe}


def hf(modality: str, data: Data, seed: int, folder: Path) -> dict[str, Any]:
    """transformers' Trainer with its defaults: 3 epochs, batches of 8, 5e-5 falling to 0."""
    import torch
    import transformers
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    transformers.set_seed(seed)
    num = len(data.names)
    train, test = (data.numbered(rows) for rows in (data.train, data.test))
    more: dict[str, Any] = {}
    if modality == "speech":
        collate = _sound_collate()
        more["data_collator"] = collate
        model = _voice_for_trainer(num)
    elif modality == "image":
        collate = image_collate(SIZE)
        more["data_collator"] = lambda rows: collate([(Path(file), label) for file, label in rows])
        model = transformers.AutoModelForImageClassification.from_pretrained(
            DIGITS / "backbone", num_labels=num, ignore_mismatched_sizes=True
        )
    else:
        tokenizer = more["processing_class"] = AutoTokenizer.from_pretrained(GLOSSES / "backbone")
        train, test = (_tokens(tokenizer, rows) for rows in (train, test))
        model = transformers.AutoModelForSequenceClassification.from_pretrained(GLOSSES / "backbone", num_labels=num)
    settings = TrainingArguments(
        output_dir=str(folder), seed=seed, use_cpu=not torch.cuda.is_available(), report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, remove_unused_columns=False, label_names=["labels"],
        per_device_eval_batch_size=64,
    )  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        trainer = Trainer(
            model=model, args=settings, train_dataset=train, eval_dataset=test,
            compute_metrics=lambda found: {"accuracy": float((found[0].argmax(-1) == found[1]).mean())}, **more,
        )  # fmt: skip
        trainer.train()
        return {"accuracy": float(trainer.evaluate()["eval_accuracy"])}


def _tokens(tokenizer: Any, rows: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    tokens = tokenizer([text for text, _ in rows], truncation=True, max_length=MAX_TOKENS)
    columns = zip(rows, tokens["input_ids"], tokens["attention_mask"], strict=True)
    return [{"labels": label, "input_ids": ids, "attention_mask": mask} for (_, label), ids, mask in columns]


def logistic(modality: str, data: Data, seed: int, _folder: Path) -> dict[str, Any]:
    """scikit-learn's LogisticRegressionCV on standardised features; of one sample a class LogisticRegression."""
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    extract = {"image": _image_features, "text": _text_features, "speech": _sound_features}[modality]
    train, test = (extract([sample for sample, _ in rows]) for rows in (data.train, data.test))
    labels = [label for _, label in data.train]
    fewest = min(labels.count(name) for name in data.names)
    if fewest < 2:
        model = LogisticRegression(max_iter=1000, random_state=seed)
    else:
        model = LogisticRegressionCV(
            cv=min(5, fewest), max_iter=1000, random_state=seed, l1_ratios=(0,), use_legacy_attributes=False
        )
    fitted = make_pipeline(StandardScaler(), model).fit(train, labels)
    return {"accuracy": float(fitted.score(test, [label for _, label in data.test]))}


def _image_features(files: Sequence[str]) -> np.ndarray[Any, Any]:
    import timm
    import torch
    from safetensors.torch import load_file

    body = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0).eval()
    weights = load_file(DIGITS / "backbone" / "model.safetensors")
    body.load_state_dict({k.removeprefix("timm_model."): v for k, v in weights.items() if "classifier" not in k})
    collate, parts = image_collate(SIZE), []
    with torch.no_grad():
        for start in range(0, len(files), 64):
            parts.append(body(collate([(Path(file), 0) for file in files[start : start + 64]])["pixel_values"]))
    return torch.cat(parts).numpy()


def _text_features(texts: Sequence[str]) -> np.ndarray[Any, Any]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(GLOSSES / "backbone")
    body = AutoModel.from_pretrained(GLOSSES / "backbone", add_pooling_layer=False).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    features: torch.Tensor | None = None
    with torch.no_grad():
        for start in range(0, len(texts), 64):
            some = order[start : start + 64]
            inputs = tokenizer(
                [texts[i] for i in some], truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt"
            )
            part = mean_pool(body, inputs)
            features = torch.zeros(len(texts), part.shape[1]) if features is None else features
            features[some] = part
    assert features is not None
    return features.numpy()


def _sound_features(files: Sequence[str]) -> np.ndarray[Any, Any]:
    import torch

    body, collate, parts = _voice(1), _sound_collate(), []
    body.classifier = torch.nn.Identity()
    with torch.no_grad():
        for start in range(0, len(files), 64):
            inputs = collate([(file, 0) for file in files[start : start + 64]])
            parts.append(body(inputs["input_values"], inputs["lengths"]))
    return torch.cat(parts).numpy()


def _speech() -> ModuleType:
    """The plugin of the example."""
    if str(SPEECH) not in sys.path:
        sys.path.append(str(SPEECH))
    return importlib.import_module("orchestrator_speech")


def _voice(num_classes: int) -> nn.Module:
    """The voice encoder with its weights and a new classifier."""
    from safetensors.torch import load_file

    _speech()
    networks = importlib.import_module("orchestrator_speech.networks")
    body: nn.Module = networks.VoiceEncoder(json.loads((VOICE / "config.json").read_text()), num_classes).eval()
    missing, unexpected = body.load_state_dict(load_file(VOICE / "model.safetensors"), strict=False)
    assert not unexpected
    assert all(name.startswith("classifier") for name in missing)
    return body


def _voice_for_trainer(num_classes: int) -> nn.Module:
    """With a loss, as HF Trainer wants it."""
    import torch

    class WithLoss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.voice = _voice(num_classes)

        def forward(self, input_values: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
            logits = self.voice(input_values, lengths)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    return WithLoss()


def _sound_collate() -> Callable[[Sequence[tuple[str, int]]], dict[str, torch.Tensor]]:
    """Mono at 16 kHz, filled up with zeros at the end."""
    import soundfile
    import soxr
    import torch

    def collate(rows: Sequence[tuple[str, int]]) -> dict[str, torch.Tensor]:
        sounds = []
        for file, _ in rows:
            sound, rate_hz = soundfile.read(file, dtype="float32", always_2d=True)
            sounds.append(torch.from_numpy(soxr.resample(sound.mean(axis=1), rate_hz, 16_000)))
        return {
            "input_values": torch.nn.utils.rnn.pad_sequence(sounds, batch_first=True),
            "lengths": torch.tensor([len(sound) for sound in sounds]),
            "labels": torch.tensor([label for _, label in rows]),
        }

    return collate


def fastai(_modality: str, data: Data, seed: int, _folder: Path) -> dict[str, Any]:
    """fastai's `fine_tune` as `vision_learner` sets it up: its own head, one frozen epoch, then all, 10 epochs."""
    import fastai.callback.progress  # for `no_bar`
    import fastai.callback.schedule  # noqa: F401  # for `fine_tune`
    import timm
    from fastai.data.block import CategoryBlock, DataBlock
    from fastai.data.transforms import ColReader, ColSplitter
    from fastai.learner import Learner
    from fastai.metrics import accuracy
    from fastai.torch_core import params, set_seed
    from fastai.vision.augment import Resize
    from fastai.vision.data import ImageBlock
    from fastai.vision.learner import create_head
    from pandas import DataFrame
    from safetensors.torch import load_file
    from torch import nn

    set_seed(seed, reproducible=True)
    table = DataFrame(
        [(*row, False) for row in data.train] + [(*row, True) for row in data.test],
        columns=["file", "label", "is_valid"],
    )
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock(vocab=data.names)), get_x=ColReader("file"), get_y=ColReader("label"),
        splitter=ColSplitter(), item_tfms=Resize(SIZE), batch_tfms=_fastai_normalise(),
    )  # fmt: skip
    loaders = block.dataloaders(table, bs=min(64, len(data.train)), num_workers=0)
    body = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0, global_pool="")
    weights = load_file(DIGITS / "backbone" / "model.safetensors")
    body.load_state_dict({k.removeprefix("timm_model."): v for k, v in weights.items() if "classifier" not in k})
    model = nn.Sequential(body, create_head(body.num_features, len(data.names)))
    learner = Learner(
        loaders, model, loss_func=nn.CrossEntropyLoss(), metrics=accuracy,
        splitter=lambda one: [params(one[0]), params(one[1])],
    )  # fmt: skip
    with learner.no_bar(), learner.no_logging():
        learner.freeze()
        learner.fine_tune(FASTAI_EPOCHS)
        return {"accuracy": float(learner.validate()[1])}


def _fastai_normalise() -> Any:
    from fastai.data.transforms import Normalize

    return Normalize.from_stats([0.5] * 3, [0.5] * 3)


def setfit(_modality: str, data: Data, seed: int, folder: Path) -> dict[str, Any]:
    """SetFit: pairs of texts, 20 of each kind a text, one epoch; then logistic regression."""
    import numpy as np
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    train, test = (data.numbered(rows) for rows in (data.train, data.test))
    model = SetFitModel.from_pretrained(str(GLOSSES / "backbone"))
    settings = TrainingArguments(
        output_dir=str(folder), num_iterations=20, num_epochs=1, batch_size=16, seed=seed, report_to="none",
        show_progress_bar=False, save_strategy="no",
    )  # fmt: skip
    sets = [
        Dataset.from_dict({"text": [text for text, _ in rows], "label": [n for _, n in rows]}) for rows in (train, test)
    ]
    with contextlib.redirect_stdout(sys.stderr):
        trainer = Trainer(model=model, args=settings, train_dataset=sets[0], eval_dataset=sets[1])
        trainer.train()
        found = trainer.model.predict(
            [text for text, _ in test], as_numpy=True
        )  # `evaluate` asks the Hub for its metric
        return {"accuracy": float((found == np.array([label for _, label in test])).mean())}


PEERS: Mapping[str, Callable[[str, Data, int, Path], dict[str, Any]]] = {
    "hf": hf, "logistic": logistic, "fastai": fastai, "setfit": setfit,
}  # fmt: skip


def is_missing(way: str) -> bool:
    """Whether the way's library is not installed; said once."""
    missing = way in ("fastai", "setfit") and importlib.util.find_spec(way) is None
    if missing:
        print(f"{way} is not installed: left out", file=sys.stderr)
    return missing
