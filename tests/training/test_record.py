"""What a run writes down, once and whole, whatever interrupts it."""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator.training.record import add_epoch, cut_metrics, write_skipped


def lines_of(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def test_what_was_left_out_is_written_once_however_often_the_last_phase_runs(tmp_path: Path) -> None:
    planned = [{"place": f"data/{name}.png", "problem": "is empty"} for name in "aab"]  # a table may name a file twice
    (tmp_path / "skipped.jsonl").write_text("".join(json.dumps(line) + "\n" for line in planned))
    problems = {"data/c\u2028.png": "is no image", "table row 7": "cannot be read: \x85"}
    for _ in range(3):
        write_skipped(tmp_path, problems)
    met = [{"place": place, "problem": problem} for place, problem in problems.items()]
    assert lines_of(tmp_path / "skipped.jsonl") == planned + met
    whole = (tmp_path / "skipped.jsonl").read_bytes()
    (tmp_path / "skipped.jsonl").write_bytes(whole[:-5])  # as an earlier version, which appended, could leave it
    write_skipped(tmp_path, problems)
    assert (tmp_path / "skipped.jsonl").read_bytes() == whole


def test_nothing_left_out_is_no_file(tmp_path: Path) -> None:
    write_skipped(tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_an_epochs_figures_are_json_also_where_they_are_not_finite(tmp_path: Path) -> None:
    add_epoch(tmp_path, {"epoch": 1, "step": 5, "validation_loss": float("nan"), "train_loss": float("inf")})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: name) == {
        "epoch": 1, "step": 5, "validation_loss": None, "train_loss": None,
    }  # fmt: skip


def test_epochs_that_come_again_are_dropped_and_so_is_a_line_that_was_cut_off(tmp_path: Path) -> None:
    cut_metrics(tmp_path, 2)
    assert not list(tmp_path.iterdir())
    for epoch in (1, 2, 3):
        add_epoch(tmp_path, {"epoch": epoch, "step": 5 * epoch, "train_loss": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "st')
    cut_metrics(tmp_path, 2)
    assert [line["epoch"] for line in lines_of(tmp_path / "metrics.jsonl")] == [1, 2]
    add_epoch(tmp_path, {"epoch": 3, "step": 15, "train_loss": 0.4})
    assert [line["train_loss"] for line in lines_of(tmp_path / "metrics.jsonl")] == [0.5, 0.5, 0.4]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3  # of the third epoch the later one alone
