"""Writes beside the loop: in order, whole, and never in silence where they fail."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.errors import OrchestratorError, RefusedError
from orchestrator.job import Advanced, DirectoryStorage, Event, HeldRun, Noted
from orchestrator.training import checkpoint
from orchestrator.training.outbox import MOST_OF_TIME, Outbox
from orchestrator.training.record import Record
from tests.held import held

_HELD_UP_S = 0.01


@pytest.fixture
def run(tmp_path: Path) -> Iterator[HeldRun]:
    with held(tmp_path / "run") as run:
        yield run


def test_what_is_given_is_written_in_order_while_the_loop_goes_on(run: HeldRun) -> None:
    box, written, go_on = Outbox(run, print), list[int](), threading.Event()
    box.put(lambda: go_on.wait(60) and written.append(1))
    box.put(lambda: written.append(2))
    assert (box.busy, written) == (True, [])  # the loop is here already
    go_on.set()
    box.wait()
    assert (box.busy, written) == (False, [1, 2])


def test_what_fails_ends_the_loop_and_nothing_is_written_behind_it(run: HeldRun) -> None:
    def fail() -> None:
        raise RefusedError("offline", "s3://bucket/runs does not answer", mend="check the connection")

    box, written = Outbox(run, print), list[int]()
    box.put(fail)
    with pytest.raises(OrchestratorError, match="the storage failed: s3://bucket/runs does not answer") as caught:
        box.wait()
    assert (caught.value.exit_code, type(caught.value)) == (1, OrchestratorError)
    assert caught.value.mend == "check the connection; then the same command goes on from the last checkpoint"
    for ask in (box.check, box.wait, lambda: box.put(lambda: written.append(1))):
        with pytest.raises(OrchestratorError):
            ask()
    assert written == []


def test_who_does_not_wait_writes_nothing_more(run: HeldRun) -> None:
    box, written, began, go_on = Outbox(run, print), list[int](), threading.Event(), threading.Event()
    box.put(lambda: (began.set(), go_on.wait(60), written.append(1)))
    box.put(lambda: written.append(2))
    began.wait(60)
    box.drop()
    go_on.set()
    with pytest.raises(OrchestratorError, match="stopped"):
        box.check()
    with box._changed:
        box._changed.wait_for(lambda: not box.busy, timeout=60)
    assert written == [1]


def test_what_a_store_says_is_told_by_the_loop(run: HeldRun) -> None:
    events: list[tuple[int, Event]] = []
    box = Outbox(run, lambda event: events.append((threading.get_ident(), event)))
    box.put(lambda: box._note("it does not answer"))
    box.wait()
    assert events == [(threading.get_ident(), Noted("it does not answer", is_warning=True))]


def test_a_checkpoint_costs_a_fiftieth_of_the_time_at_most(run: HeldRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.training import outbox as module

    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    box = Outbox(run, print)
    with box.stalling():
        now[0] += 3.0
    assert (box.stalled_s, box.rest_s) == (3.0, 3.0 / MOST_OF_TIME)
    with box.stalling():
        now[0] += 1.0
    assert (box.stalled_s, box.rest_s) == (4.0, 1.0 / MOST_OF_TIME)


def test_epochs_that_cannot_go_yet_go_before_the_next_checkpoint(run: HeldRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.training import record as module

    monkeypatch.setattr(module, "_PUBLISHED_EVERY_S", 0.0)
    box, go_on, seen = Outbox(run, print), threading.Event(), list[int]()
    box.put(lambda: go_on.wait(60))  # a checkpoint on its way
    record = Record(run, 0, box)
    for epoch in (1, 2):
        record.add({"epoch": epoch, "step": epoch, "train_loss": 0.5})
    assert run.read("metrics.jsonl") is None
    record.publish()
    box.put(lambda: seen.append((run.read("metrics.jsonl") or "").count("\n")))
    go_on.set()
    box.wait()
    assert seen == [2]
    record.settle()
    assert (run.read("metrics.jsonl") or "").count("\n") == 2


def test_training_goes_on_while_a_checkpoint_is_on_its_way(
    tiny_resnet: Path, flat_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one of step 4 arrives once step 7 is done; the one of step 8 is begun after that."""
    steps, later, arrived = [0], threading.Event(), list[tuple[str, bool, int]]()
    commit = DirectoryStorage.commit

    def slow(self: DirectoryStorage, folder: Path, name: str, lease: Any) -> Any:
        went_on = later.wait(60) if name.endswith("step-00000004") else True
        arrived.append((name.rpartition("/")[2], went_on, steps[0]))
        return commit(self, folder, name, lease)

    def report(event: Event) -> None:
        if isinstance(event, Advanced):
            steps[0] += 1
            if steps[0] == 7:
                later.set()

    monkeypatch.setattr(DirectoryStorage, "commit", slow)
    training = {"epochs": 1, "batch_size": 16, "checkpoint_every_steps": 4}
    run = orchestrator.finetune(
        backbone=str(tiny_resnet), data=str(flat_digits), method="full", training=training, report=report
    )
    assert run.finished
    assert [name for name, _, _ in arrived] == ["step-00000004", "step-00000008", "step-00000012", "step-00000015",
                                                "model"]  # fmt: skip
    assert arrived[0][1:] >= (True, 7)


def test_a_checkpoint_that_costs_much_is_followed_by_a_long_rest(
    tiny_resnet: Path, flat_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is due all the time; each holds the loop up for 10 ms, so that the next one waits for half a second."""
    copied, at = checkpoint.copied, list[float]()

    def slow(of: checkpoint.Checkpoint) -> checkpoint.Checkpoint:
        time.sleep(_HELD_UP_S)
        at.append(time.monotonic())
        return copied(of)

    monkeypatch.setattr(checkpoint, "copied", slow)
    orchestrator.finetune(
        backbone=str(tiny_resnet), data=str(flat_digits), method="full", name="rests", report=lambda _: None,
        training={"epochs": 12, "batch_size": 16, "checkpoint_every_s": 0.001}, scaling={"threads_per_worker": 1},
    )  # fmt: skip
    between = [later - before for before, later in itertools.pairwise(at[:-1])]  # the last one is of the end
    assert between, "it was over before a second one was due"
    assert min(between) >= _HELD_UP_S / MOST_OF_TIME
