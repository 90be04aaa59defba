"""Trials of heads: make bench NAME=search

4,000 MNIST digits, ImageNet EfficientNet-Lite0, 96 px, batch 256, 10 epochs; rates and decays are drawn. A search
with 16 and with 100 trials on a new storage, against one run of the method `head` there: one pass of the body and one
head. 1,000 trials are reported. The same 16 as Ray Tune trials of a plain torch function that runs the body in every
step, as a user would write it: a few of them for an epoch are timed (`--peer-trials`, `--peer-epochs`) and scaled.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import THREADS, in_turn, middle, options, paired, report, same_settings, silent
from tests.benchmarks.peers import DIGITS, files_of, image_collate, make_digits

SIZE, EPOCHS, BATCH_SIZE = 96, 10, 256
GOAL_16, GOAL_100, GOAL_PEER = 1.25, 3, 50
SPACE: dict[str, Any] = {"learning_rate": {"loguniform": [1e-4, 1e-1]}, "weight_decay": {"loguniform": [1e-4, 1e-1]}}


def job(storage: str) -> dict[str, Any]:
    """What all sides train."""
    return {
        "backbone": str(DIGITS / "backbone"), "data": {"path": str(DIGITS / "data")}, "method": "head",
        "training": {"epochs": EPOCHS, "batch_size": BATCH_SIZE}, "settings": {"size": SIZE}, "storage": storage,
    }  # fmt: skip


def one_run(storage: str) -> float:
    """One pass of the body and one head; its accuracy on the validation split."""
    import orchestrator

    run = orchestrator.finetune(job(storage), report=silent)
    return float(run.results["validation"]["accuracy"])


def searched(storage: str, num_trials: int) -> float:
    """A search; the best accuracy on the validation split."""
    import orchestrator

    result = orchestrator.search(job(storage), SPACE, num_trials=num_trials, report=silent)
    assert result.best is not None
    assert len(result.trials) == num_trials
    return float(result.best.score or 0)


def peer(num_trials: int, epochs: int) -> float:
    """Ray Tune trials of a plain function, all cores in use; seconds without starting Ray."""
    import ray
    from ray import tune

    def train(config: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModel

        torch.set_num_threads(1)
        body = AutoModel.from_pretrained(DIGITS / "backbone").eval().to(memory_format=torch.channels_last)
        head = torch.nn.Linear(1280, 10)
        optimizer = torch.optim.AdamW(head.parameters(), lr=config["lr"], weight_decay=config["weight_decay"])
        files, collate = files_of(DIGITS / "data" / "train")[400:], image_collate(SIZE)
        held_back = files_of(DIGITS / "data" / "train")[:400]
        for _ in range(epochs):
            order = torch.randperm(len(files)).tolist()
            for start in range(0, len(order), BATCH_SIZE):
                batch = collate([files[i] for i in order[start : start + BATCH_SIZE]])
                with torch.no_grad():
                    pixels = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
                    features = body(pixel_values=pixels).pooler_output
                loss = torch.nn.functional.cross_entropy(head(features.flatten(1)), batch["labels"])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            right = 0
            with torch.no_grad():
                for start in range(0, len(held_back), BATCH_SIZE):
                    batch = collate(held_back[start : start + BATCH_SIZE])
                    logits = head(body(pixel_values=batch["pixel_values"]).pooler_output.flatten(1))
                    right += int((logits.argmax(-1) == batch["labels"]).sum())
            tune.report({"accuracy": right / len(held_back)})

    ray.init(num_cpus=THREADS, logging_level="ERROR", log_to_driver=False)
    space = {"lr": tune.loguniform(1e-4, 1e-1), "weight_decay": tune.loguniform(1e-4, 1e-1)}
    with tempfile.TemporaryDirectory() as folder:
        tuner = tune.Tuner(
            train, param_space=space, tune_config=tune.TuneConfig(num_samples=num_trials),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        )  # fmt: skip
        started = time.monotonic()
        tuner.fit()
        seconds = time.monotonic() - started
    ray.shutdown()
    return seconds


def main() -> None:
    parser = options(__doc__, 3)
    parser.add_argument("--peer-trials", type=int, default=2, help="of 16: so many are timed, and scaled")
    parser.add_argument("--peer-epochs", type=int, default=1, help="of 10: likewise; 0 leaves the peer out")
    parser.add_argument("--most", type=int, default=1000, help="trials of the largest search; 0 leaves it out")
    given = parser.parse_args()
    make_digits()
    same_settings()
    with tempfile.TemporaryDirectory() as folder:
        one_run(f"{folder}/warm-up")
        sides = {
            "one": lambda i: one_run(str(Path(folder) / f"one-{i}")),
            "16": lambda i: searched(str(Path(folder) / f"16-{i}"), 16),
            "100": lambda i: searched(str(Path(folder) / f"100-{i}"), 100),
        }
        seconds, found = in_turn(sides, given.repeats)
        most = 0.0
        if given.most:
            started = time.monotonic()
            searched(str(Path(folder) / "most"), given.most)
            most = time.monotonic() - started
            print(f"{given.most} trials: {most:.1f} s")
    rows = [
        ("16 trials over one run", paired(seconds["16"], seconds["one"]), GOAL_16, False),
        ("100 trials over one run", paired(seconds["100"], seconds["one"]), GOAL_100, False),
    ]
    peer_s = 0.0
    if given.peer_epochs:
        peer_s = peer(given.peer_trials, given.peer_epochs) * 16 / given.peer_trials * EPOCHS / given.peer_epochs
        rows.append(("16 Ray Tune trials that run the body over ours", peer_s / middle(seconds["16"]), GOAL_PEER, True))
    report(
        "search", rows, seconds=seconds, found=found, most={"trials": given.most, "seconds": round(most, 1)},
        peer_s=round(peer_s, 1),
    )  # fmt: skip


if __name__ == "__main__":
    main()
