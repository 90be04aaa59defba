"""What a run writes down, once and whole, whatever interrupts it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.job import HeldRun
from orchestrator.training import record
from orchestrator.training.record import Record, write_skipped
from tests.held import held


@pytest.fixture
def run(tmp_path: Path) -> Iterator[HeldRun]:
    with held(tmp_path / "run") as run:
        yield run


def lines_of(run: HeldRun, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run.read(name) or "").split("\n") if line]


def test_what_was_left_out_is_written_once_however_often_the_last_stage_runs(run: HeldRun) -> None:
    planned = [{"place": f"data/{name}.png", "problem": "is empty"} for name in "aab"]  # a table may name a file twice
    run.write("skipped.jsonl", "".join(json.dumps(line) + "\n" for line in planned))
    problems = {"data/c\u2028.png": "is no image", "table row 7": "cannot be read: \x85"}
    for _ in range(3):
        write_skipped(run, problems)
    met = [{"place": place, "problem": problem} for place, problem in problems.items()]
    assert lines_of(run, "skipped.jsonl") == planned + met
    whole = run.read("skipped.jsonl") or ""
    run.write("skipped.jsonl", whole[:-5])  # as an earlier version, which appended, could leave it
    write_skipped(run, problems)
    assert run.read("skipped.jsonl") == whole


def test_nothing_left_out_is_no_file(run: HeldRun) -> None:
    write_skipped(run, {})
    assert not run.children("")


def test_an_epochs_figures_are_json_also_where_they_are_not_finite(run: HeldRun) -> None:
    Record(run, 0).add({"epoch": 1, "step": 5, "validation_loss": float("nan"), "train_loss": float("inf")})
    assert json.loads(run.read("metrics.jsonl") or "", parse_constant=lambda name: name) == {
        "epoch": 1, "step": 5, "validation_loss": None, "train_loss": None,
    }  # fmt: skip


def epoch(number: int, loss: float = 0.5) -> dict[str, object]:
    return {"epoch": number, "step": 5 * number, "train_loss": loss}


def test_epochs_that_come_again_are_dropped_and_so_is_a_line_that_was_cut_off(
    run: HeldRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "_PUBLISHED_EVERY_S", 0)
    before = Record(run, 0)
    assert not run.children("")
    for number in (1, 2, 3):
        before.add(epoch(number))
    run.write("metrics.jsonl", f'{run.read("metrics.jsonl")}{{"epoch": 4, "st')
    after = Record(run, 2)
    assert [line["epoch"] for line in lines_of(run, "metrics.jsonl")] == [1, 2]
    assert len(run.children("tensorboard")) == 2
    after.add(epoch(3, 0.4))
    assert [line["train_loss"] for line in lines_of(run, "metrics.jsonl")] == [0.5, 0.5, 0.4]
    assert len(run.children("tensorboard")) == 3  # of the third epoch the later one alone


def test_epochs_that_take_no_time_are_written_together(run: HeldRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_PUBLISHED_EVERY_S", 1000)
    some = Record(run, 0)
    for number in range(1, 200):
        some.add(epoch(number))
    assert len(lines_of(run, "metrics.jsonl")) == 1  # the first one is shown at once
    some.settle()
    assert [line["epoch"] for line in lines_of(run, "metrics.jsonl")] == list(range(1, 200))
    assert len(run.children("tensorboard")) == 2
    some.settle()
    assert len(run.children("tensorboard")) == 2
