"""What the benchmarks are held against: HF Trainer with a frozen body, and the data that both sides read."""

from __future__ import annotations

import contextlib
import csv
import io
import random
import runpy
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.harness import ROOT, THREADS

if TYPE_CHECKING:
    import torch
    from torch import nn

DIGITS, GLOSSES = ROOT / "examples" / "digits", ROOT / "examples" / "glosses"
BATCH_SIZE = 32
File = tuple[Path, int]


def make_digits() -> None:
    """4,000 digits to train on and 1,000 to test on, and EfficientNet-Lite0."""
    for script, directory in (("make_backbone", DIGITS / "backbone"), ("make_data", DIGITS / "data")):
        runpy.run_path(str(DIGITS / f"{script}.py"))[script](directory)


def make_glosses(num_train: int = 2000, num_test: int = 1000) -> Path:
    """A table of glosses with their splits, and MiniLM."""
    if not (GLOSSES / "backbone" / "model.safetensors").is_file():  # else it would be written under who reads it
        runpy.run_path(str(GLOSSES / "make_backbone.py"))["make_backbone"]()
    source = GLOSSES / "data" / "glosses.csv"
    if not source.is_file():
        runpy.run_path(str(GLOSSES / "make_data.py"))["make_data"]()
    table = source.with_name(f"glosses-{num_train}-{num_test}.csv")
    with source.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    random.Random(0).shuffle(rows)
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label", "split"))
        for number, row in enumerate(rows[: num_train + num_test]):
            writer.writerow((row["text"], row["label"], "train" if number < num_train else "test"))
    return table


def files_of(directory: Path) -> list[File]:
    """(file, class) of a folder of class folders."""
    names = sorted(child.name for child in directory.iterdir() if child.is_dir())
    return [(file, label) for label, name in enumerate(names) for file in sorted((directory / name).iterdir())]


def glosses_of(table: Path, split: str) -> list[tuple[str, int]]:
    """(text, class) of a split."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = sorted({row["label"] for row in rows})
    return [(row["text"], names.index(row["label"])) for row in rows if row["split"] == split]


def image_processor(size: int) -> Any:
    """The backbone's own, at another input size."""
    from transformers import AutoConfig
    from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

    config = AutoConfig.from_pretrained(DIGITS / "backbone")
    settings = {**config.pretrained_cfg, "input_size": [3, size, size]}
    return TimmWrapperImageProcessor(settings, architecture=config.architecture)


def image_collate(size: int) -> Callable[[Sequence[File]], dict[str, torch.Tensor]]:
    """Files -> {"pixel_values", "labels"}, read and prepared in as many threads as there are cores."""
    import torch
    from PIL import Image

    processor, pool = image_processor(size), ThreadPoolExecutor(THREADS)

    def load(file: File) -> Any:
        return Image.open(io.BytesIO(file[0].read_bytes())).convert("RGB")

    def collate(files: Sequence[File]) -> dict[str, torch.Tensor]:
        pixels = processor(list(pool.map(load, files)), return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([label for _, label in files])}

    return collate


def mean_pool(body: nn.Module, inputs: Any) -> torch.Tensor:
    """The mean over a text's tokens, float32 [texts, width]."""
    tokens = body(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).to(tokens.dtype)
    return (tokens * mask).sum(dim=1) / mask.sum(dim=1)  # type: ignore[no-any-return]


def frozen(body: nn.Module, features: Callable[[nn.Module, Any], torch.Tensor], width: int, num: int) -> nn.Module:
    """A body in eval mode and without gradients, with one new layer; what Trainer can train."""
    from torch import nn

    class Frozen(nn.Module):
        accepts_loss_kwargs = False  # Trainer would pass the number of samples on to the body

        def __init__(self) -> None:
            super().__init__()
            self.body = body.requires_grad_(False)
            self.head = nn.Linear(width, num)

        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.body.eval()  # Trainer asks for train mode in every step
            return self

        def forward(self, labels: torch.Tensor, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.head(features(self.body, inputs))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    return Frozen()


def train_with_hf(
    model: nn.Module, train: Sequence[Any], test: Sequence[Any], epochs: int, rate: float, seed: int, **more: Any
) -> float:
    """Test accuracy after HF Trainer's training, with its own data loader; evaluated once and saved, as ours is."""
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        settings = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=BATCH_SIZE, per_device_eval_batch_size=64,
            num_train_epochs=epochs, learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=0.1,
            weight_decay=0.01, max_grad_norm=1.0, seed=seed, use_cpu=True, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, remove_unused_columns=False, label_names=["labels"],
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=settings, train_dataset=train, eval_dataset=test,
            compute_metrics=lambda found: {"accuracy": float((found[0].argmax(-1) == found[1]).mean())}, **more,
        )  # fmt: skip
        trainer.train()
        accuracy = float(trainer.evaluate()["eval_accuracy"])
        trainer.save_model()
    return accuracy
