"""What a run writes down, once and whole, whatever interrupts it."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from orchestrator.job import HeldRun
from orchestrator.training import record
from orchestrator.training.record import Record, write_skipped
from tests.conftest import REPOSITORY
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


def events_of(content: bytes) -> list[tuple[str, int, float]]:
    """(tag, step, value) of the scalars of an event file, each record held against its checksums."""
    found, at = [], 0
    while at < len(content):
        (size,) = struct.unpack("Q", content[at : at + 8])
        body = content[at + 12 : at + 12 + size]
        assert content[at + 8 : at + 12] == struct.pack("I", masked_crc32c(content[at : at + 8]))
        assert content[at + 12 + size : at + 16 + size] == struct.pack("I", masked_crc32c(body))
        event = Event.FromString(body)
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        at += 16 + size
    return found


def test_event_files_are_what_tensorboard_reads(run: HeldRun, tmp_path: Path) -> None:
    """As tensorboardX writes them itself, and what it writes TensorBoard reads."""
    Record(run, 0).add(epoch(1) | {"validation loss": 0.25})
    (name,) = run.children("tensorboard")
    assert name.startswith("events.out.tfevents.")
    with SummaryWriter(str(tmp_path / "theirs")) as writer:
        writer.add_scalar("train_loss", 0.5, 5)
        writer.add_scalar("validation loss", 0.25, 5)
    (theirs,) = (tmp_path / "theirs").iterdir()
    ours = run.folder / "tensorboard" / name
    assert events_of(ours.read_bytes()) == events_of(theirs.read_bytes())
    assert [one[:2] for one in events_of(ours.read_bytes())] == [("train_loss", 5), ("validation_loss", 5)]


def test_a_disk_that_is_full_is_one_error_and_no_trace_of_a_thread(tmp_path: Path) -> None:
    script = f"""
        import resource, signal
        from pathlib import Path
        from orchestrator.errors import OrchestratorError
        from orchestrator.training.record import Record
        from tests.held import held
        with held(Path({str(tmp_path / "run")!r})) as run:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))  # a line fits, no event file
            try:
                Record(run, 0).add({{"epoch": 1, "step": 5, **{{f"figure_{{k}}": 0.5 for k in range(6)}}}})
            except OrchestratorError as error:
                print(error.message)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "cannot be written: File too large" in done.stdout
