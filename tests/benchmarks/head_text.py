"""A new last layer on a frozen body, texts: make bench NAME=head-text

2,000 glosses of WordNet, 25 classes, all-MiniLM-L6-v2 with its tokens' mean on both sides, 10 epochs, 1,000 test
glosses; both sides in this process, after a warm-up. Ours runs the body once for each gloss (the storage is new); HF
Trainer in every step, with the batches padded to their longest, as its collator does. Goal: 40 times as fast, with an
accuracy at most half a point lower.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import options, report_heads, same_settings, silent
from tests.benchmarks.peers import BATCH_SIZE, GLOSSES, frozen, glosses_of, make_glosses, mean_pool, train_with_hf

GOAL, REPEATS = 40, 3
RATE = 1e-2
MAX_TOKENS = 256  # as many as this backbone says that it takes


def ours(table: Path, storage: str, epochs: int, seed: int) -> dict[str, Any]:
    """Train through the public API; accuracy and what its parts took."""
    import orchestrator

    run = orchestrator.finetune(
        modality="text",
        backbone=str(GLOSSES / "backbone"),
        data={"path": str(table), "split_column": "split", "validation_fraction": 0.0},
        method="head",
        training={"epochs": epochs, "batch_size": BATCH_SIZE, "seed": seed, "learning_rate": RATE},
        storage=storage,
        report=silent,
    )
    return {"accuracy": run.accuracy, "features_s": run.lineage.get("features_s"), "loop_s": run.results["seconds"]}


def peer(table: Path, epochs: int, seed: int) -> dict[str, Any]:
    """The same with HF Trainer; accuracy."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(GLOSSES / "backbone")
    splits = []
    for split in ("train", "test"):
        samples = glosses_of(table, split)
        tokens = tokenizer([text for text, _ in samples], truncation=True, max_length=MAX_TOKENS)
        splits.append(
            [
                {"labels": label, "input_ids": ids, "attention_mask": mask}
                for (_, label), ids, mask in zip(samples, tokens["input_ids"], tokens["attention_mask"], strict=True)
            ]
        )
    body = AutoModel.from_pretrained(GLOSSES / "backbone", add_pooling_layer=False)
    model = frozen(body, mean_pool, body.config.hidden_size, 1 + max(one["labels"] for one in splits[0]))
    return {"accuracy": train_with_hf(model, *splits, epochs, RATE, seed, processing_class=tokenizer)}


def main() -> None:
    parser = options(__doc__, REPEATS)
    parser.add_argument("--epochs", type=int, default=10)
    given = parser.parse_args()
    few, table = make_glosses(200, 64), make_glosses()
    same_settings()
    with tempfile.TemporaryDirectory() as folder:
        ours(few, f"{folder}/warm-up", 1, 0)
        peer(few, 1, 0)
        sides = {
            "ours": lambda i: ours(table, f"{folder}/{i}", given.epochs, i),
            "peer": lambda i: peer(table, given.epochs, i),
        }
        report_heads("head-text", sides, given.repeats, GOAL)


if __name__ == "__main__":
    main()
