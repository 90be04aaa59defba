"""A run that saves, dies, is damaged and goes on, in any order: a state machine against what the bytes say."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator.errors import CheckpointError
from orchestrator.training import checkpoint as ckpt
from tests.held import held
from tests.training.checkpoints import cut_at, made, place_of, same, steps_in


class Checkpoints(RuleBasedStateMachine):
    """A run that saves, dies, is damaged and goes on; `written` has the bytes of what was committed."""

    @initialize()
    def begin(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(os, "fsync", lambda _: None)  # a busy disk takes 10 ms; what is synced is another test's
        self.root = Path(tempfile.mkdtemp())
        self.held = held(self.root / "run")
        self.run_ = self.held.__enter__()
        self.folder = self.run_.folder / "checkpoints"
        self.folder.mkdir()
        self.position = 1
        self.saved: dict[int, ckpt.Checkpoint] = {}
        self.written: dict[int, dict[str, bytes]] = {}
        self.number = 0
        self.dead = False

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.held.__exit__(None, None, None)
            self.patch.undo()
            shutil.rmtree(self.root)

    def place(self, step: int) -> Path:
        return place_of(self.run_, step)

    def whole(self) -> list[int]:
        """By the bytes alone, without a digest."""
        return [step for step, files in sorted(self.written.items()) if content_of(self.place(step)) == files]

    def committed(self) -> list[int]:
        return [step for step in steps_in(self.run_) if (self.place(step) / ".manifest.json").is_file()]

    def note(self, step: int) -> ckpt.Checkpoint:
        self.number += 1
        self.saved[step] = made(step, self.number)
        return self.saved[step]

    def damaged(self) -> set[int]:
        """What an interruption alone may never leave."""
        return set(self.committed()) - set(self.whole())

    def kept_of(self, after: int) -> set[int]:
        """What must be whole after a checkpoint of the step `after`: what is now, of the newest that are kept."""
        newest = [step for step in self.committed() if step != after][-(ckpt.NUM_KEPT - 1) :]
        return set(newest) & set(self.whole())

    @precondition(lambda self: not self.dead)
    @rule(num_steps=st.integers(0, 3))
    def save(self, num_steps: int) -> None:
        self.position += num_steps
        kept = self.kept_of(self.position)
        ckpt.save(self.run_, self.note(self.position))
        self.written[self.position] = content_of(self.place(self.position))
        assert kept | {self.position} <= set(self.whole())
        self.run_.collect_orphans(0)  # one that was put aside for its replacement, where that was cut off
        assert [self.place(step) for step in self.committed()] == sorted(self.folder.iterdir())
        assert len(self.committed()) <= ckpt.NUM_KEPT

    @precondition(lambda self: not self.dead)
    @rule(num_steps=st.integers(0, 3), number=st.integers(0, 40), share=st.floats(0, 1), at=st.integers(0, 9))
    def die_while_saving(self, num_steps: int, number: int, share: float, at: int) -> None:
        step = self.position + num_steps
        kept, damaged = self.kept_of(step), self.damaged()
        before = self.saved.get(step)
        with cut_at(number) as committed:
            ckpt.save(self.run_, self.note(step))
        if self.place(step) in committed:
            self.written[step] = content_of(self.place(step))
            kept.add(step)
        elif before is not None:
            self.saved[step] = before
        files = [file for file in self.run_.folder.glob(".*.partial/*") if file.is_file()]
        if files:  # what was not synced may be lost
            truncate(sorted(files)[at % len(files)], share)
        assert kept <= set(self.whole())
        assert self.damaged() <= damaged
        self.dead = True

    @rule()
    def die(self) -> None:
        self.dead = True

    @precondition(lambda self: self.written)
    @rule(which=st.integers(0, 9), at=st.integers(0, 9), how=st.sampled_from(("truncate", "flip", "remove")),
          share=st.floats(0, 1, exclude_max=True))  # fmt: skip
    def damage(self, which: int, at: int, how: str, share: float) -> None:
        steps = self.committed()
        if not steps:
            return
        place = self.place(steps[-1 - which % len(steps)])
        file = place / sorted(content_of(place))[at % len(content_of(place))]
        if how == "remove":
            file.unlink()
        elif how == "truncate":
            truncate(file, share)
        elif content := bytearray(file.read_bytes()):
            content[int(share * len(content))] ^= 1 << at % 8
            file.write_bytes(content)

    @precondition(lambda self: self.dead)
    @rule(cut=st.none() | st.integers(0, 20))
    def go_on(self, cut: int | None) -> None:
        whole = self.whole()
        if not whole and steps_in(self.run_):  # one that lacks its manifest was damaged too: none is seen before it
            with pytest.raises(CheckpointError, match="is whole"):
                ckpt.newest_step(self.run_)
            shutil.rmtree(self.folder)  # --fresh
            self.folder.mkdir()
            self.position, self.dead, self.written = 1, False, {}
            return
        newest = ckpt.newest_step(self.run_)
        found = None if newest is None else ckpt.load(self.run_, newest)
        if found is None:
            assert not whole
        else:
            assert found.step == whole[-1]
            theirs = self.saved[found.step]
            assert same(found.weights, theirs.weights)
            assert same(found.best, theirs.best)
            assert same(found.optimizer, theirs.optimizer)
            assert found.state == {**theirs.state, "step": found.step}
        step, damaged = None if found is None else found.step, self.damaged()
        if cut is not None:  # and dies again at once
            with cut_at(cut):
                ckpt.forget_after(self.run_, step)
        else:
            ckpt.forget_after(self.run_, step)
            self.position, self.dead = step or 1, False
            assert all(number <= self.position for number in steps_in(self.run_))
        assert self.whole() == whole
        assert self.damaged() <= damaged

    @invariant()
    def nothing_whole_lies_beyond(self) -> None:
        if hasattr(self, "folder") and not self.dead:
            assert all(step <= self.position for step in self.whole())


def content_of(place: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in place.iterdir()} if place.is_dir() else {}


def truncate(file: Path, share: float) -> None:
    os.truncate(file, int(share * file.stat().st_size))


TestCheckpoints = Checkpoints.TestCase
TestCheckpoints.settings = settings(
    max_examples=120, stateful_step_count=20, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
