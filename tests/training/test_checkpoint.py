"""Checkpoints that are cut off, damaged and pruned; tensors put back into a network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.errors import CheckpointError
from orchestrator.training import checkpoint as ckpt
from tests.training.checkpoints import cut_at, made, same, steps_in


@pytest.mark.parametrize("old", [False, True])
def test_left_overs_of_interruptions_push_out_no_checkpoint(old: bool, tmp_path: Path) -> None:
    """Writes cut off at 105 and 110, going on from 100: what is saved at 102 counts, and so does 100."""
    ckpt.save(tmp_path, made(95))
    ckpt.save(tmp_path, made(100))
    for step in (105, 110):
        with cut_at(4):
            ckpt.save(tmp_path, made(step))
        if old:  # an earlier version wrote under the name itself
            (tmp_path / f"step-{step:08d}.partial").rename(tmp_path / f"step-{step:08d}")
    assert len(list(tmp_path.iterdir())) == 4
    found = ckpt.newest(tmp_path)
    assert found is not None
    assert found.step == 100
    ckpt.save(tmp_path, made(102))
    assert [place.name for place in sorted(tmp_path.iterdir())] == ["step-00000100", "step-00000102"]
    assert ckpt.newest_step(tmp_path) == 102


def test_a_step_that_is_saved_again_is_the_later_one(tmp_path: Path) -> None:
    ckpt.save(tmp_path, made(5))
    for number in range(3, 6):  # well before the end
        with cut_at(number):
            ckpt.save(tmp_path, ckpt.Checkpoint(5, {}, {}, {}, {"epochs": 1}))
        assert ckpt.load(tmp_path, 5).state["loss"] == 1 / 5
    ckpt.save(tmp_path, ckpt.Checkpoint(5, {}, {}, {}, {"epochs": 1}))
    assert ckpt.load(tmp_path, 5).state == {"epochs": 1, "step": 5}


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
    ckpt.forget_after(tmp_path, None)
    assert not list(tmp_path.iterdir())


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
    files = [("fsync", f"{new}.partial/{name}") for name in os.listdir(new) if name != "COMMITTED"]
    assert len(files) == 5
    written = [before.index(call) for call in files]
    marker = before.index(("fsync", f"{new}.partial/COMMITTED.partial"))
    assert max(written) < marker < before.index(("fsync", f"{new}.partial")) < before.index(("fsync", str(folder)))
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


# --- tensors of a network ---


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def tensors_of(module: nn.Module) -> ckpt.Tensors:
    """Every parameter and buffer, themselves and no copies."""
    return {**{name: one.data for name, one in module.named_parameters()}, **dict(module.named_buffers())}


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
    ckpt.load_into(kept, tensors_of(other), needed=second)
    assert torch.equal(other[2].weight, module[2].weight)
    assert torch.equal(other[0].weight, module[0].weight)
    del kept["0.bias"]
    with pytest.raises(CheckpointError, match=r"another network: it lacks 0\.bias"):
        ckpt.load_into(kept, tensors_of(other), needed=second)


def test_a_checkpoint_of_another_network_changes_nothing() -> None:
    module = network()
    before = ckpt.copy_of(tensors_of(module))
    more = {**before, "3.weight": torch.zeros(1)}
    wider = {name: value.reshape(-1)[:1] if name == "0.bias" else value + 1 for name, value in before.items()}
    for tensors, problem in ((more, r"it holds 3\.weight"), (wider, r"0\.bias has another shape"), ({}, "it lacks")):
        with pytest.raises(CheckpointError, match=problem) as caught:
            ckpt.load_into(tensors, tensors_of(module))
        assert "--fresh" in caught.value.mend
        assert same(before, tensors_of(module))


def test_an_optimizer_goes_on_as_if_it_had_not_stopped() -> None:
    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        module(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()

    module, other = network(), network()
    optimizer, again = (torch.optim.AdamW(one.parameters(), lr=0.01) for one in (module, other))
    for _ in range(3):
        step(module, optimizer)
    ckpt.load_into(ckpt.copy_of(tensors_of(module)), tensors_of(other))
    kept = ckpt.optimizer_tensors(optimizer, dict(module.named_parameters()))
    ckpt.restore_optimizer(again, dict(other.named_parameters()), ckpt.copy_of(kept))
    for one, its in ((module, optimizer), (other, again)):
        step(one, its)
    assert same(tensors_of(module), tensors_of(other))
    with pytest.raises(CheckpointError, match=r"its optimizer had 0\.weight"):
        ckpt.restore_optimizer(again, {}, kept)
