"""Checkpoints that are cut off, damaged, resumed from and pruned, in any order; tensors put back into a network."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from orchestrator.errors import CheckpointError
from orchestrator.training import checkpoint as ckpt


def made(step: int) -> ckpt.Checkpoint:
    """A small checkpoint, other values for every step."""
    weights = {"head.weight": torch.arange(6.0).reshape(2, 3) / step, "head.bias": torch.full((2,), float(step))}
    best = {name: value - 1 for name, value in weights.items()}
    return ckpt.Checkpoint(step, weights, best, {"head.bias|exp_avg": torch.ones(2) / step}, {"loss": 1 / step})


def same(one: ckpt.Tensors, other: ckpt.Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def steps_in(folder: Path) -> list[int]:
    return sorted(int(place.name.removeprefix("step-")) for place in folder.glob("step-*"))


class PowerLostError(BaseException):
    """The process ends here. No `Exception`, so that nothing handles it."""


@contextlib.contextmanager
def cut_at(number: int) -> Iterator[list[Path]]:
    """Let the calls that change the storage pass `number` times, and then no more; gives what was committed."""
    committed: list[Path] = []
    left = [number]

    def count() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise PowerLostError

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any, **more: Any) -> Any:
            count()
            return call(*arguments, **more)

        return instead

    def save_file(tensors: ckpt.Tensors, file: Path) -> None:
        content = safetensors.torch.save(tensors)
        file.write_bytes(content[: len(content) // 2])  # as far as it came
        count()
        file.write_bytes(content)

    def write_text(file: Path, text: str, **_: Any) -> None:
        file.write_bytes(text[: len(text) // 2].encode())
        count()
        file.write_bytes(text.encode())

    def replace(old: Path, new: Path) -> None:
        count()
        real["replace"](old, new)
        committed.append(new)

    real = {name: getattr(os, name) for name in ("fsync", "replace", "mkdir", "unlink", "rmdir")}
    with pytest.MonkeyPatch.context() as patch:
        for name, call in real.items():
            patch.setattr(os, name, counted(call))
        patch.setattr(os, "replace", replace)
        patch.setattr(Path, "write_text", write_text)
        patch.setattr(safetensors.torch, "save_file", save_file)
        with contextlib.suppress(PowerLostError):
            yield committed


def test_left_overs_of_interruptions_push_out_no_checkpoint(tmp_path: Path) -> None:
    """Writes cut off at 105 and 110, going on from 100: what is saved at 102 counts, and so does 100."""
    ckpt.save(tmp_path, made(95))
    ckpt.save(tmp_path, made(100))
    for step in (105, 110):
        with cut_at(4):
            ckpt.save(tmp_path, made(step))
    assert steps_in(tmp_path) == [95, 100, 105, 110]
    found = ckpt.newest(tmp_path)
    assert found is not None
    assert found.step == 100
    ckpt.save(tmp_path, made(102))
    assert steps_in(tmp_path) == [100, 102]
    assert ckpt.newest_step(tmp_path) == 102


def test_what_a_run_went_back_behind_is_forgotten(tmp_path: Path) -> None:
    """A later checkpoint was damaged: it neither stays nor counts when the steps come again."""
    for step in (100, 105, 110):
        ckpt.save(tmp_path, made(step))
    (tmp_path / "step-00000110" / "weights.safetensors").write_bytes(b"")
    assert ckpt.newest_step(tmp_path) == 105
    ckpt.forget_after(tmp_path, 105)
    assert steps_in(tmp_path) == [105]
    ckpt.save(tmp_path, made(107))
    assert steps_in(tmp_path) == [105, 107]


def test_a_marker_that_was_not_written_whole_is_no_marker(tmp_path: Path) -> None:
    """The first checkpoint, cut off at any call: either it is whole, or the run begins anew without a word."""
    number, whole = 0, False
    while not whole:
        folder = tmp_path / str(number)
        with cut_at(number):
            ckpt.save(folder, made(5))
            whole = True
        found = ckpt.newest(folder)
        assert found is None or same(found.weights, made(5).weights)
        number += 1
    assert number > 10


def test_a_checkpoint_is_on_the_disk_before_an_older_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    calls: list[tuple[str, str]] = []
    fsync, rmdir = os.fsync, os.rmdir

    def noted_fsync(number: int) -> None:
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    def noted_rmdir(path: str, **more: Any) -> None:
        calls.append(("rmdir", Path(path).name))
        rmdir(path, **more)

    for step in (1, 2):
        ckpt.save(folder, made(step))
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rmdir", noted_rmdir)
    ckpt.save(folder, made(3))
    new, removed = str(folder / "step-00000003"), calls.index(("rmdir", "step-00000001"))
    before, after = calls[:removed], calls[removed + 1 :]
    files = [("fsync", f"{new}/{name}") for name in os.listdir(new) if name != "COMMITTED"]
    assert len(files) == 5
    written = [before.index(call) for call in files]
    marker = before.index(("fsync", f"{new}/COMMITTED.partial"))
    assert max(written) < marker < before.index(("fsync", new)) < before.index(("fsync", str(folder)))
    assert ("fsync", str(folder)) in after


def test_every_worker_reads_the_step_that_one_of_them_chose(tmp_path: Path) -> None:
    for step in (1, 2):
        ckpt.save(tmp_path, made(step))
    found = ckpt.load(tmp_path, 1)
    assert (found.step, found.state) == (1, {"loss": 1.0, "step": 1})
    assert same(found.best, made(1).best)
    with pytest.raises(CheckpointError, match=r"step 3 .* is not there") as caught:
        ckpt.load(tmp_path, 3)
    assert "storage" in caught.value.mend
    (tmp_path / "step-00000002" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"state\.json was changed"):
        ckpt.load(tmp_path, 2)


def test_steps_are_numbers_and_no_names(tmp_path: Path) -> None:
    (tmp_path / "step-of-another").mkdir()
    for step in (99_999_999, 100_000_000):
        ckpt.save(tmp_path, made(step))
    assert ckpt.newest_step(tmp_path) == 100_000_000


class Checkpoints(RuleBasedStateMachine):
    """A run that saves, dies, is damaged and goes on; `written` has the bytes of what was committed."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.position = 0
        self.written: dict[int, dict[str, bytes]] = {}
        self.dead = False

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    def place(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def whole(self) -> list[int]:
        """By the bytes alone, without a digest."""
        return [step for step, files in sorted(self.written.items()) if content_of(self.place(step)) == files]

    def committed(self) -> list[int]:
        return [step for step in steps_in(self.folder) if (self.place(step) / "COMMITTED").is_file()]

    def damaged(self) -> set[int]:
        """What an interruption alone may never leave."""
        return set(self.committed()) - set(self.whole())

    def kept_of(self, after: int) -> set[int]:
        """What must be whole after a checkpoint of the step `after`: what is now, of the newest that are kept."""
        newest = [step for step in self.committed() if step != after][-(ckpt.NUM_KEPT - 1) :]
        return set(newest) & set(self.whole())

    @precondition(lambda self: not self.dead)
    @rule(num_steps=st.integers(1, 3))
    def save(self, num_steps: int) -> None:
        self.position += num_steps
        kept = self.kept_of(self.position)
        ckpt.save(self.folder, made(self.position))
        self.written[self.position] = content_of(self.place(self.position))
        assert kept | {self.position} <= set(self.whole())
        assert steps_in(self.folder) == self.committed()
        assert len(self.committed()) <= ckpt.NUM_KEPT

    @precondition(lambda self: not self.dead)
    @rule(num_steps=st.integers(1, 3), number=st.integers(0, 40), share=st.floats(0, 1), at=st.integers(0, 9))
    def die_while_saving(self, num_steps: int, number: int, share: float, at: int) -> None:
        step = self.position + num_steps
        kept, damaged = self.kept_of(step), self.damaged()
        with cut_at(number) as committed:
            ckpt.save(self.folder, made(step))
        if self.place(step) / "COMMITTED" in committed:
            self.written[step] = content_of(self.place(step))
            kept.add(step)
        elif files := sorted(content_of(self.place(step))):  # what was not synced may be lost
            truncate(self.place(step) / files[at % len(files)], share)
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
        if not whole and self.committed():
            with pytest.raises(CheckpointError, match="is whole"):
                ckpt.newest_step(self.folder)
            shutil.rmtree(self.folder)  # --fresh
            self.folder.mkdir()
            self.position, self.dead, self.written = 0, False, {}
            return
        found = ckpt.newest(self.folder)
        if found is None:
            assert not whole
        else:
            assert found.step == whole[-1]
            theirs = made(found.step)
            assert same(found.weights, theirs.weights)
            assert same(found.best, theirs.best)
            assert same(found.optimizer, theirs.optimizer)
            assert found.state == {**theirs.state, "step": found.step}
        position, damaged = 0 if found is None else found.step, self.damaged()
        if cut is not None:  # and dies again at once
            with cut_at(cut):
                ckpt.forget_after(self.folder, position)
        else:
            ckpt.forget_after(self.folder, position)
            assert all(step <= position for step in steps_in(self.folder))
            self.position, self.dead = position, False
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


# --- tensors of a network ---


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_a_checkpoint_holds_what_earlier_phases_trained() -> None:
    """First the last layer, then the first one alone: both come back, and what the phase needs must be there."""
    module, other = network(), network()
    module.requires_grad_(False)
    module[2].requires_grad_(True)
    trained = ckpt.trained_tensors(module, ())
    module.requires_grad_(False)
    module[0].requires_grad_(True)
    second = ckpt.trained_tensors(module, ())
    trained |= second
    for tensor in trained.values():
        tensor.add_(1)
    kept = ckpt.copy_of(trained)
    ckpt.load_into(kept, ckpt.tensors_of(other), needed=second)
    assert torch.equal(other[2].weight, module[2].weight)
    assert torch.equal(other[0].weight, module[0].weight)
    del kept["0.bias"]
    with pytest.raises(CheckpointError, match=r"another network: it lacks 0\.bias"):
        ckpt.load_into(kept, ckpt.tensors_of(other), needed=second)


def test_a_checkpoint_of_another_network_changes_nothing() -> None:
    module = network()
    before = ckpt.copy_of(ckpt.tensors_of(module))
    more = {**before, "3.weight": torch.zeros(1)}
    wider = {name: value.reshape(-1)[:1] if name == "0.bias" else value + 1 for name, value in before.items()}
    for tensors, problem in ((more, r"it holds 3\.weight"), (wider, r"0\.bias has another shape"), ({}, "it lacks")):
        with pytest.raises(CheckpointError, match=problem) as caught:
            ckpt.load_into(tensors, ckpt.tensors_of(module))
        assert "--fresh" in caught.value.mend
        assert same(before, ckpt.tensors_of(module))


def test_an_optimizer_goes_on_as_if_it_had_not_stopped() -> None:
    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        module(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()

    module, other = network(), network()
    optimizer, again = (torch.optim.AdamW(one.parameters(), lr=0.01) for one in (module, other))
    for _ in range(3):
        step(module, optimizer)
    ckpt.load_into(ckpt.copy_of(ckpt.tensors_of(module)), ckpt.tensors_of(other))
    kept = ckpt.optimizer_tensors(optimizer, dict(module.named_parameters()))
    ckpt.restore_optimizer(again, dict(other.named_parameters()), ckpt.copy_of(kept))
    for one, its in ((module, optimizer), (other, again)):
        step(one, its)
    assert same(ckpt.tensors_of(module), ckpt.tensors_of(other))
    with pytest.raises(CheckpointError, match=r"its optimizer had 0\.weight"):
        ckpt.restore_optimizer(again, {}, kept)
