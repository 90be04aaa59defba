"""Defaults alone against the best of other libraries' and of our own methods: make bench NAME=accuracy

Digits with EfficientNet-Lite0 (64 px, 1,000 test digits), WordNet's glosses with MiniLM (25 classes, 1,916 test
glosses), vowels with a voice encoder (the speech example's splits). Each row is a task, a number of labels, a way and a
seed; the seed chooses which labels, the same ones for every way, and what is random in training. All labels are given
to every way, which may hold some of them back. A row is written as a line of JSON once it is measured, and not measured
again: so it can be stopped, and run in pieces.

    make bench NAME=accuracy RUN="--task digits --size 10 --size 50 --way auto --way hf --seeds 2"
    make bench NAME=accuracy RUN=--report
    make bench NAME=accuracy RUN="--report --out tests/benchmarks/accuracy.jsonl"  # the rows of docs/methods.md

Goal: `auto` at every size at least the best of the others but for one standard error of the difference, over the
seeds, and above all of them by more than that at two sizes or more.

fastai and SetFit are no part of the extra [bench], as they ask for other versions of torch and transformers than ours;
`pip install --no-deps --target PEERS fastai fastcore fastdownload fasttransform fastprogress==1.0.3 plum-dispatch
beartype setfit evaluate`, and PEERS in PYTHONPATH. Without them their rows are left out, which is said.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks import accuracy_ways as ways
from tests.benchmarks.harness import ROOT, THREADS, machine
from tests.benchmarks.peers import DIGITS, GLOSSES, files_of, make_digits, make_glosses

PLACE = ROOT / "build" / "accuracy"
NUM_TEST_GLOSSES = 1916
SPEECH = ways.SPEECH


@dataclass(frozen=True)
class Task:
    """Labelled data, and the network that is fine-tuned on it."""

    modality: str
    sizes: tuple[int, ...]
    ways: tuple[str, ...]
    rows: Callable[[], tuple[Sequence[ways.Row], Sequence[ways.Row]]]
    """(all that may be trained on, test)"""
    job: Mapping[str, Any]
    group: Callable[[str], str] | None = None
    """A sample -> what must not be on both sides of a split."""


def digits() -> tuple[Sequence[ways.Row], Sequence[ways.Row]]:
    make_digits()
    train, test = ([(str(file), str(label)) for file, label in files_of(DIGITS / "data" / name)]
                   for name in ("train", "test"))  # fmt: skip
    return train, test


def glosses() -> tuple[Sequence[ways.Row], Sequence[ways.Row]]:
    """All glosses of the small classes, 700 of the large ones."""
    import runpy

    make_glosses()
    table = PLACE / "glosses" / "glosses.csv"
    if not table.is_file():
        example = runpy.run_path(str(GLOSSES / "make_data.py"))
        example["make_data"].__globals__["PER_CLASS"] = 700
        example["make_data"](out=table.parent)
    with table.open(newline="", encoding="utf-8") as file:
        rows = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    random.Random(0).shuffle(rows)
    return rows[NUM_TEST_GLOSSES:], rows[:NUM_TEST_GLOSSES]


def vowels() -> tuple[Sequence[ways.Row], Sequence[ways.Row]]:
    """665 syllables of eight languages, and 339 of the five that the example tests on."""
    import runpy

    if not (SPEECH / "data" / "vowels.csv").is_file():
        runpy.run_path(str(SPEECH / "make_data.py"))["make_data"](out=SPEECH / "data")
    if not (ways.VOICE / "model.safetensors").is_file():
        subprocess.run([sys.executable, SPEECH / "make_backbone.py"], check=True)
    with (SPEECH / "data" / "vowels.csv").open(newline="", encoding="utf-8") as file:
        rows = [(str(SPEECH / "data" / row["path"]), row["label"]) for row in csv.DictReader(file)]
    test = {"cs", "es", "it", "pt_BR", "tn"}
    return [row for row in rows if language(row[0]) not in test], [row for row in rows if language(row[0]) in test]


def language(file: str) -> str:
    """Of a syllable; Russian and Ukrainian may have been read by one person."""
    found = Path(file).relative_to(SPEECH / "data").parts[0]
    return "ru+uk" if found in ("ru", "uk") else found


OURS = ("auto", "head", "full", "scratch")
TASKS = {
    "digits": Task(
        "image", (10, 50, 100, 500, 2000), (*OURS, "lp-ft", "logistic", "hf", "fastai"), digits,
        {"backbone": str(DIGITS / "backbone"), "settings": {"size": ways.SIZE}, "data.root": str(DIGITS / "data")},
    ),
    "glosses": Task(
        "text", (100, 1000, 10_000), (*OURS, "lp-ft", "logistic", "hf", "setfit"), glosses,
        {"backbone": str(GLOSSES / "backbone")},
    ),
    "vowels": Task(
        "speech", (100, 665), (*OURS, "lp-ft", "logistic", "hf"), vowels,
        {"backbone": str(ways.VOICE), "data.root": str(SPEECH / "data")}, group=language,
    ),
}  # fmt: skip


def chosen(rows: Sequence[ways.Row], num: int, seed: int) -> list[ways.Row]:
    """So many rows, as many of each class as there can be, chosen by the seed."""
    of_class = defaultdict(list)
    for row in rows:
        of_class[row[1]].append(row)
    for label, some in sorted(of_class.items()):
        random.Random(f"{seed} {label}").shuffle(some)
    taken: list[ways.Row] = []
    while len(taken) < min(num, len(rows)):
        for label in sorted(of_class):
            if of_class[label] and len(taken) < num:
                taken.append(of_class[label].pop())
    return taken


def measure(name: str, size: int, way: str, seed: int, threads: int) -> dict[str, Any]:
    """One row of the results."""
    task = TASKS[name]
    train, test = task.rows()
    data = ways.Data(chosen(train, size, seed), list(test), task.group)
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        if way in ways.PEERS:
            found = ways.PEERS[way](task.modality, data, seed, Path(folder))
        else:
            found = ways.ours(task.modality, dict(task.job), data, way, seed, Path(folder), threads)
        seconds = time.monotonic() - started
    return {
        "task": name, "size": size, "way": way, "seed": seed, **found, "seconds": round(seconds, 2), "threads": threads,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=sorted(TASKS))
    parser.add_argument("--size", action="append", type=int, help="so many labels")
    parser.add_argument(
        "--way", action="append", help="auto, head, ... (auto,training.epochs=9 too), or " + ", ".join(ways.PEERS)
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, default=PLACE / "rows.jsonl")
    parser.add_argument("--report", action="store_true", help="say what is there, and measure nothing")
    given = parser.parse_args()
    there = read(given.out)
    if not given.report:
        ways.use_threads(given.threads)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        for name in given.task or TASKS:
            for size in given.size or TASKS[name].sizes:
                for seed in range(given.seeds):
                    for way in given.way or TASKS[name].ways:
                        if (name, size, way, seed) in there or ways.is_missing(way):
                            continue
                        row = measure(name, size, way, seed, given.threads)
                        there[name, size, way, seed] = row
                        with given.out.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(row) + "\n")
                        print(json.dumps(row), flush=True)
    report(there)


def read(file: Path) -> dict[tuple[str, int, str, int], dict[str, Any]]:
    """The rows that were measured before."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rows = [json.loads(line) for line in lines]
    return {(row["task"], row["size"], row["way"], row["seed"]): row for row in rows}


def report(rows: Mapping[tuple[str, int, str, int], Mapping[str, Any]]) -> None:
    """A table of means and standard errors, each size's verdict, and the whole as a JSON object."""
    judged = []
    for name, size in sorted({key[:2] for key in rows}):
        accuracy: dict[str, dict[int, float]] = defaultdict(dict)
        seconds: dict[str, list[float]] = defaultdict(list)
        for (task, num, way, seed), row in rows.items():
            if (task, num) == (name, size):
                accuracy[way][seed] = row["accuracy"]
                if row["seconds"] is not None:  # as of rows that were measured side by side on one GPU
                    seconds[way].append(row["seconds"])
        print(f"\n{name}, {size} labels")
        for way, one in sorted(accuracy.items(), key=lambda one: -statistics.mean(one[1].values())):
            values = list(one.values())
            error = f" ± {standard_error(values):.3f}" if len(values) > 1 else ""
            took = f", {statistics.median(seconds[way]):.0f} s" if seconds[way] else ""
            print(f"  {way:9} {statistics.mean(values):.3f}{error}  {len(values)} seeds{took}")
        if "auto" in accuracy and any(_is_plain(way) for way in accuracy):
            found = {"task": name, "size": size, **verdict(accuracy)}
            judged.append(found)
            print(f"  {'met   ' if found['met'] else 'MISSED'} {found['difference']:+.3f} to {found['best']}")
    num_above = sum(one["is_above"] for one in judged)
    met = bool(judged) and all(one["met"] for one in judged) and num_above >= 2
    print(json.dumps({"name": "accuracy", "met": met, "num_above": num_above, "rows": judged, "machine": machine()}))


def standard_error(values: Sequence[float]) -> float:
    """Of their mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _is_plain(way: str) -> bool:
    return way != "auto" and "," not in way


def verdict(accuracy: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """`auto` against the best of the others, on the seeds that both have; what says more than a method is none."""
    auto = accuracy["auto"]
    others = {way: found for way, found in accuracy.items() if _is_plain(way) and set(found) & set(auto)}
    best = max(others, key=lambda way: statistics.mean(others[way].values()))
    pairs = [auto[seed] - others[best][seed] for seed in sorted(set(auto) & set(others[best]))]
    difference, error = statistics.mean(pairs), standard_error(pairs)
    return {
        "best": best, "difference": round(difference, 4), "error": round(error, 4), "num_seeds": len(pairs),
        "met": difference >= -error, "is_above": difference > error,
    }  # fmt: skip


if __name__ == "__main__":
    main()
