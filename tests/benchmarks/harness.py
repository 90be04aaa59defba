"""What the benchmarks share: both sides in turn, medians, processes of their own, one JSON object at the end.

Both sides run on the same machine at the same time of day, one after the other in each repeat, so that what else the
machine does hits both. Beside other work on the same cores set OMP_WAIT_POLICY=PASSIVE: OpenMP's threads otherwise
wait for one another by spinning, and one that is not scheduled makes everything several times slower.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
THREADS = len(os.sched_getaffinity(0))
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1  # of glibc's malloc.h


def options(doc: str | None, repeats: int) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help=f"measured runs a side; default: {repeats}")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # this process is one side, started by the benchmark
    parser.add_argument("--storage", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def same_settings() -> None:
    """The threads and the allocator that our workers run with, for a peer: a job of ours puts them back at its end."""
    import torch

    torch.set_num_threads(THREADS)
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def silent(_event: object) -> None:
    """Takes what a run tells, and shows nothing."""


def in_turn(
    sides: dict[str, Callable[[int], Any]], repeats: int, say: Callable[[Any], str] = str
) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
    """({side: seconds of each repeat}, {side: what it returned}). Every second repeat begins with the last side.

    Each turn begins with `same_settings`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, list[Any]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name in list(sides)[:: 1 if repeat % 2 == 0 else -1]:
            same_settings()
            started = time.monotonic()
            found[name].append(sides[name](repeat))
            seconds[name].append(round(time.monotonic() - started, 3))
            print(f"{repeat + 1}. {name}: {seconds[name][-1]:.2f} s, {say(found[name][-1])}", flush=True)
    return seconds, found


@dataclass(frozen=True)
class Finished:
    """A process that has ended."""

    seconds: float
    cpu_s: float
    peak_mb: float
    """Its own resident memory at most; that of processes that it started is not in it."""
    answer: dict[str, Any] = field(default_factory=dict)
    """The JSON object in its last line."""
    started: float = 0.0
    """time.monotonic(), which is one clock for all processes."""

    def __str__(self) -> str:
        return f"{self.cpu_s:.1f} CPU s, {self.peak_mb:.0f} MB, {self.answer}"


def process(module: str, *arguments: str) -> Finished:
    """`python -m module arguments` from start to end, imports included."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        started = time.monotonic()
        running = subprocess.Popen(
            [sys.executable, "-m", f"tests.benchmarks.{module}", *arguments], cwd=ROOT, stdout=out, stderr=errors
        )
        _, status, used = os.wait4(running.pid, 0)
        seconds = time.monotonic() - started
        running.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if running.returncode:
            raise SystemExit(f"{module} {' '.join(arguments)} failed:\n{errors.read()[-3000:]}")
        answer = json.loads(out.read().splitlines()[-1])
    return Finished(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, answer, started)


def middle(values: Sequence[float]) -> float:
    """The median, to four digits."""
    return float(f"{statistics.median(values):.4g}")


def paired(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the quotients, pair by pair."""
    return middle([one / other for one, other in zip(above, below, strict=True)])


def near(ours: Sequence[float], theirs: Sequence[float], points: float = 0.5) -> dict[str, Any]:
    """Both accuracies and whether ours, as a mean over the repeats, is within so many points below theirs."""
    difference = 100 * (statistics.mean(ours) - statistics.mean(theirs))
    return {
        "ours": [round(one, 4) for one in ours],
        "peer": [round(one, 4) for one in theirs],
        "points": round(difference, 2),
        "goal_points": -points,
        "met": difference >= -points,
    }


def report(name: str, rows: Sequence[tuple[str, float, float, bool]], **more: Any) -> None:
    """A line for each (what, value, goal, is the goal a lower limit), then the JSON object.

    Its `ratio` and `goal` are those of the first row; `met` says whether all rows and the accuracy hold.
    """
    judged = []
    for what, value, goal, at_least in rows:
        met = value >= goal if at_least else value <= goal
        judged.append({"what": what, "value": value, "goal": goal, "met": met})
        print(f"{'met   ' if met else 'MISSED'} {what}: {value:g} ({'at least' if at_least else 'at most'} {goal:g})")
    accuracy = more.setdefault("accuracy", {})
    if accuracy:
        print(f"{'met   ' if accuracy['met'] else 'MISSED'} accuracy: {accuracy['points']:+} points to the peer's")
    first = judged[0]
    met = all(one["met"] for one in judged) and accuracy.get("met", True)
    whole = {"name": name, "ratio": first["value"], "goal": first["goal"], "met": met, "rows": judged, **more}
    print(json.dumps({**whole, "machine": machine()}))


def machine() -> dict[str, Any]:
    """What a figure depends on: the processor, the cores, how busy they were, the versions."""
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": THREADS,
        "load_5min": round(os.getloadavg()[1], 1),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def report_heads(name: str, sides: dict[str, Callable[[int], dict[str, Any]]], repeats: int, goal: float) -> None:
    """Run both sides of a new last layer in turn, and print how many times faster ours is, and the accuracies."""
    seconds, found = in_turn(sides, repeats)
    ratio = middle([middle(seconds["peer"]) / middle(seconds["ours"])])
    report(
        name,
        [("HF Trainer's time over ours", ratio, goal, True)],
        ours_s=seconds["ours"],
        peer_s=seconds["peer"],
        features_s=[one["features_s"] for one in found["ours"]],
        accuracy=near(*([one["accuracy"] for one in found[side]] for side in ("ours", "peer"))),
    )
