"""Full fine-tuning in its steady state against a plain torch loop: make bench NAME=full

EfficientNet-Lite0, digits at 96 px, batches of 32, AdamW, cross-entropy, channels last, no checkpoint meanwhile; both
read, decode and prepare the files of each batch in as many threads. In one process, in turn, some 10 s each: our run
pauses in the callback that it tells its steps to. Goals: 0.90 of the loop's samples a second, 0.95 of its samples a
CPU second.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.job import Advanced
from tests.benchmarks import plain
from tests.benchmarks.harness import options, paired, report, same_settings, silent
from tests.benchmarks.peers import BATCH_SIZE, DIGITS, make_digits

GOAL, GOAL_CPU, REPEATS = 0.90, 0.95, 15
SIZE, LENGTH_S, WARM_UP_STEPS = 96, 10.0, 5


@dataclass(frozen=True)
class Stretch:
    """Some steps of one side, one after the other."""

    seconds: float
    cpu_s: float
    samples: int

    def __str__(self) -> str:
        return f"{self.samples / self.seconds:.1f} samples/s, {self.samples / self.cpu_s:.1f} a CPU second"


def clocks() -> tuple[float, float]:
    """Seconds on the wall, seconds of this process's threads."""
    return time.monotonic(), time.process_time()


@dataclass
class InTurn:
    """Our run's callback: after a stretch of our steps it runs the loop for as long, then lets our run go on."""

    loop: Iterator[int]
    pairs: int
    length_s: float
    ours: list[Stretch] = field(default_factory=list)
    peer: list[Stretch] = field(default_factory=list)
    num_steps: int = -WARM_UP_STEPS
    began: tuple[float, float] = (0.0, 0.0)

    @property
    def enough(self) -> bool:
        """Whether all pairs are measured."""
        return len(self.peer) == self.pairs

    def __call__(self, event: object) -> None:
        if not isinstance(event, Advanced):
            return
        self.num_steps += 1
        if self.num_steps <= 0:
            self.began = clocks()
            return
        wall, cpu = (now - then for now, then in zip(clocks(), self.began, strict=True))
        if wall < self.length_s:
            return
        self.ours.append(Stretch(wall, cpu, self.num_steps * BATCH_SIZE))
        self.peer.append(self._run_loop())
        print(f"{len(self.ours)}. ours {self.ours[-1]}; loop {self.peer[-1]}", flush=True)
        if self.enough:
            raise StopIteration("all pairs are measured")
        self.num_steps, self.began = 0, clocks()

    def _run_loop(self) -> Stretch:
        began, samples, wall, cpu = clocks(), 0, 0.0, 0.0
        while wall < self.length_s:
            samples += next(self.loop)
            wall, cpu = (now - then for now, then in zip(clocks(), began, strict=True))
        return Stretch(wall, cpu, samples)


def ours(storage: str, epochs: int, data: Path = DIGITS / "data", size: int = SIZE, events: Any = silent) -> Any:
    """Train everything through the public API; the run."""
    import orchestrator

    return orchestrator.finetune(
        backbone=str(DIGITS / "backbone"),
        data={"path": str(data), "validation_fraction": 0.0},
        method="full",
        training={"epochs": epochs, "batch_size": BATCH_SIZE, "clip_norm": None, "checkpoint_every_s": 1e9},
        settings={"size": size, "augment": "none"},  # as the plain loop
        storage=storage,
        report=events,
    )


def main() -> None:
    parser = options(__doc__, REPEATS)
    parser.add_argument("--length", type=float, default=LENGTH_S, help="seconds of a stretch")
    given = parser.parse_args()
    make_digits()
    same_settings()
    from orchestrator import OrchestratorError

    turns = InTurn(plain.steps(plain.digits(), SIZE, BATCH_SIZE), given.repeats, given.length)
    for _ in range(WARM_UP_STEPS):
        next(turns.loop)
    with tempfile.TemporaryDirectory() as folder:
        try:
            ours(folder, 1000, events=turns)
        except OrchestratorError:  # the run's word for what its callback raised
            if not turns.enough:
                raise
    by_time, by_cpu = (
        paired(
            [one.samples / getattr(one, what) for one in turns.ours],
            [one.samples / getattr(one, what) for one in turns.peer],
        )
        for what in ("seconds", "cpu_s")
    )
    report(
        "full",
        [
            ("our samples a second over the loop's", by_time, GOAL, True),
            ("our samples a CPU second over the loop's", by_cpu, GOAL_CPU, True),
        ],
        ours_s=[round(one.seconds, 3) for one in turns.ours],
        peer_s=[round(one.seconds, 3) for one in turns.peer],
        ours_cpu_s=[round(one.cpu_s, 3) for one in turns.ours],
        peer_cpu_s=[round(one.cpu_s, 3) for one in turns.peer],
        ours_samples=[one.samples for one in turns.ours],
        peer_samples=[one.samples for one in turns.peer],
    )


if __name__ == "__main__":
    main()
