"""From the start of the process to the first optimizer step of full fine-tuning: make bench NAME=start

200 digits, EfficientNet-Lite0, 96 px; processes of their own, all imports included: a plain torch loop, ours in its
process, ours with one worker on Ray (`--address local`). Goals: in its process at most 1.3 times the plain loop's,
on Ray at most 10 s more than in its process.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path

from tests.benchmarks.harness import in_turn, middle, options, process, report, same_settings
from tests.benchmarks.peers import BATCH_SIZE, DIGITS, make_digits

GOAL, GOAL_RAY_S, REPEATS = 1.3, 10.0, 5
SIZE, NUM_TRAIN, NUM_TEST = 96, 160, 40


def make_few(out: Path) -> Path:
    """Some of the digits, in the same folders."""
    for split, num in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        for folder in sorted((DIGITS / "data" / split).iterdir()):
            (out / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[: num // 10]:
                shutil.copy(file, out / split / folder.name)
    return out


def ours(data: Path, storage: str, address: str | None) -> float:
    """time.monotonic() of the first step; the run goes on to its end."""
    import orchestrator
    from orchestrator.job import Advanced

    first: list[float] = []

    def told(event: object) -> None:
        if isinstance(event, Advanced):
            first.append(time.monotonic())

    orchestrator.finetune(
        backbone=str(DIGITS / "backbone"),
        data={"path": str(data), "validation_fraction": 0.0},
        method="full",
        training={"epochs": 1, "batch_size": BATCH_SIZE},
        settings={"size": SIZE},
        scaling={"address": address},
        storage=storage,
        report=told,
    )
    return first[0]


def peer(data: Path) -> float:
    """time.monotonic() of the plain loop's first step."""
    from tests.benchmarks import plain

    same_settings()
    next(plain.steps(plain.digits(data=data), SIZE, BATCH_SIZE))
    return time.monotonic()


def main() -> None:
    given = options(__doc__, REPEATS).parse_args()
    if given.side:
        storage = Path(given.storage)
        address = "local" if given.side == "ray" else None
        data = storage.parent / "data"
        first = peer(data) if given.side == "peer" else ours(data, str(storage), address)
        print(json.dumps({"first": first}))
        return
    make_digits()
    with tempfile.TemporaryDirectory() as folder:
        make_few(Path(folder) / "data")

        def side(name: str, repeat: int) -> float:
            done = process("start", "--side", name, "--storage", f"{folder}/{name}-{repeat}")
            return round(float(done.answer["first"]) - done.started, 3)

        for name in ("peer", "ours"):  # files into the page cache
            side(name, -1)
        sides = {name: lambda i, name=name: side(name, i) for name in ("peer", "ours", "ray")}
        _, found = in_turn(sides, given.repeats, lambda first: f"first step after {first:.2f} s")
    more = middle([middle(found["ray"]) - middle(found["ours"])])
    report(
        "start",
        [
            (
                "in its process over the plain loop",
                middle([middle(found["ours"]) / middle(found["peer"])]),
                GOAL,
                False,
            ),
            ("seconds more on Ray", more, GOAL_RAY_S, False),
        ],
        ours_s=found["ours"],
        ray_s=found["ray"],
        peer_s=found["peer"],
    )


if __name__ == "__main__":
    main()
