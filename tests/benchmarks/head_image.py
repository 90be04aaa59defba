"""A new last layer on a frozen body, images: make bench NAME=head-image

4,000 MNIST digits, ImageNet EfficientNet-Lite0, 96 px, 10 epochs, 1,000 test digits; both sides in this process, after
a warm-up. Ours runs the body once for each digit (the storage is new, so nothing is stored yet); HF Trainer, as it is
used, in every step: body frozen and in eval mode, same batch size and rate, its own data loader. Goal: 15 times as
fast, with an accuracy at most half a point lower.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import options, report_heads, same_settings, silent
from tests.benchmarks.peers import BATCH_SIZE, DIGITS, files_of, frozen, image_collate, make_digits, train_with_hf

GOAL, REPEATS = 15, 3
SIZE, RATE = 96, 3e-3


def ours(storage: str, epochs: int, seed: int, num_train: int | None = None, rate: float = RATE) -> dict[str, Any]:
    """Train through the public API; accuracy and what its parts took."""
    import orchestrator

    run = orchestrator.finetune(
        backbone=str(DIGITS / "backbone"),
        data={"path": str(DIGITS / "data"), "validation_fraction": 0.0, "num_train": num_train},
        method="head",
        training={"epochs": epochs, "batch_size": BATCH_SIZE, "seed": seed, "learning_rate": rate},
        settings={"size": SIZE},
        storage=storage,
        report=silent,
    )
    return {"accuracy": run.accuracy, "features_s": run.lineage.get("features_s"), "loop_s": run.results["seconds"]}


def peer(epochs: int, seed: int, num_train: int | None = None) -> dict[str, Any]:
    """The same with HF Trainer; accuracy."""
    import torch
    from transformers import AutoModel

    torch.manual_seed(seed)
    train, test = files_of(DIGITS / "data" / "train"), files_of(DIGITS / "data" / "test")
    body = AutoModel.from_pretrained(DIGITS / "backbone")
    model = frozen(body, lambda net, inputs: net(**inputs).pooler_output, 1280, 10)
    some = train[:num_train]
    return {"accuracy": train_with_hf(model, some, test, epochs, RATE, seed, data_collator=image_collate(SIZE))}


def main() -> None:
    parser = options(__doc__, REPEATS)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=RATE, help="ours alone")
    given = parser.parse_args()
    make_digits()
    if given.side == "ours":
        print(json.dumps(ours(given.storage, given.epochs, given.seed, rate=given.rate)))
        return
    same_settings()
    if given.side == "peer":
        print(json.dumps(peer(given.epochs, given.seed)))
        return
    with tempfile.TemporaryDirectory() as folder:
        ours(f"{folder}/warm-up", 1, 0, num_train=64)
        peer(1, 0, num_train=64)
        sides = {
            "ours": lambda i: ours(str(Path(folder) / f"{i}"), given.epochs, i),
            "peer": lambda i: peer(given.epochs, i),
        }
        report_heads("head-image", sides, given.repeats, GOAL)


if __name__ == "__main__":
    main()
