"""Trials of full fine-tuning on Ray Tune: make bench NAME=search-ray

8 trials of the method `full`, 400 MNIST digits, EfficientNet-Lite0, 48 px, 6 epochs at most, ASHA with the epochs 1, 2
and 4 as rungs, on all cores; against the same trials by hand, one after the other in one process, each for as many
epochs as ASHA gave it. Both begin with imports done; ours starts Ray. Goal: at most 1.3 times as long.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from typing import Any

from ray.tune.schedulers import ASHAScheduler

from tests.benchmarks.harness import middle, options, report, same_settings, silent
from tests.benchmarks.peers import DIGITS, make_digits

GOAL, EPOCHS, NUM_TRIALS = 1.3, 6, 8
SPACE: dict[str, Any] = {"learning_rate": {"loguniform": [1e-4, 1e-2]}, "weight_decay": [0.0, 0.05]}


def job(storage: str) -> dict[str, Any]:
    """What both sides train."""
    return {
        "backbone": str(DIGITS / "backbone"), "data": {"path": str(DIGITS / "data"), "num_train": 400},
        "method": "full", "training": {"epochs": EPOCHS, "batch_size": 16}, "settings": {"size": 48},
        "storage": storage,
    }  # fmt: skip


def by_hand(result: Any, storage: str) -> float:
    """The trials of a search one after the other with the same budgets; seconds."""
    import orchestrator
    from orchestrator.errors import InterruptedRunError
    from orchestrator.job import EpochEnded, Event

    started = time.monotonic()
    for trial in result.trials:
        ended: list[Event] = []

        def over(ended: list[Event] = ended, budget: int = len(trial.lines)) -> bool:
            return sum(isinstance(event, EpochEnded) for event in ended) >= budget

        with contextlib.suppress(InterruptedRunError):
            orchestrator.finetune(job(storage), **trial.config, name=f"t{trial.number}", report=ended.append, stop=over)
    orchestrator.finetune(job(storage), **result.best.config, name=f"t{result.best.number}", report=silent)
    return time.monotonic() - started


def main() -> None:
    given = options(__doc__, 3).parse_args()
    import orchestrator

    make_digits()
    same_settings()
    ours, hand, epochs = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        warm = {**job(f"{folder}/warm"), "data": {"path": str(DIGITS / "data"), "num_train": 40}}
        orchestrator.finetune(warm, epochs=1, report=silent)
        for repeat in range(given.repeats):
            started = time.monotonic()
            scheduler = ASHAScheduler(max_t=EPOCHS, grace_period=1, reduction_factor=2)
            result = orchestrator.search(
                job(f"{folder}/ours-{repeat}"), SPACE, num_trials=NUM_TRIALS, scheduler=scheduler, seed=repeat,
                report=silent,
            )  # fmt: skip
            ours.append(time.monotonic() - started)
            epochs.append([len(trial.lines) for trial in result.trials])
            hand.append(by_hand(result, f"{folder}/hand-{repeat}"))
            print(f"{repeat + 1}. ours {ours[-1]:.1f} s, by hand {hand[-1]:.1f} s, epochs {epochs[-1]}", flush=True)
    ratio = middle([one / other for one, other in zip(ours, hand, strict=True)])
    report("search-ray", [("ours over trials by hand", ratio, GOAL, False)], ours_s=ours, hand_s=hand, epochs=epochs)


if __name__ == "__main__":
    main()
