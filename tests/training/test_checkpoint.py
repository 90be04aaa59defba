"""Checkpoints that are cut off, damaged and pruned; tensors put back into a network."""

from __future__ import annotations

import math
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.errors import CheckpointError, RefusedError
from orchestrator.job import HeldRun
from orchestrator.network import take_step
from orchestrator.training import checkpoint as ckpt
from tests.held import held
from tests.training.checkpoints import cut_at, made, place_of, same, steps_in


@pytest.fixture
def run(tmp_path: Path) -> Iterator[HeldRun]:
    with held(tmp_path / "run") as run:
        yield run


def test_left_overs_of_interruptions_push_out_no_checkpoint(run: HeldRun) -> None:
    """Writes cut off at 105 and 110, going on from 100: what is saved at 102 counts, and so does 100."""
    ckpt.save(run, made(95))
    ckpt.save(run, made(100))
    for step in (105, 110):
        with cut_at(4):
            ckpt.save(run, made(step))
    place_of(run, 110).mkdir()  # of a name that counts, without a manifest
    assert ckpt.newest_step(run) == 100
    ckpt.save(run, made(102))
    assert steps_in(run) == [100, 102]
    assert ckpt.newest_step(run) == 102
    run.collect_orphans(older_s=0)
    assert sorted(child.name for child in run.folder.iterdir()) == [".lease.json", ".lock", "checkpoints"]


def test_a_step_that_is_saved_again_is_the_later_one(run: HeldRun) -> None:
    ckpt.save(run, made(5))
    for number in range(3, 6):  # well before the end
        with cut_at(number):
            ckpt.save(run, ckpt.Checkpoint(5, {}, {}, {}, {"epochs": 1}))
        assert ckpt.load(run, 5).state["loss"] == 1 / 5
    ckpt.save(run, ckpt.Checkpoint(5, {}, {}, {}, {"epochs": 1}))
    assert ckpt.load(run, 5).state == {"epochs": 1, "step": 5}


def test_what_a_run_went_back_behind_is_forgotten(run: HeldRun) -> None:
    """A later checkpoint was damaged: it neither stays nor counts when the steps come again."""
    for step in (100, 105, 110):
        ckpt.save(run, made(step))
    (place_of(run, 110) / "weights.safetensors").write_bytes(b"")
    assert ckpt.newest_step(run) == 105
    ckpt.forget_after(run, 105)
    assert steps_in(run) == [105]
    ckpt.save(run, made(107))
    assert steps_in(run) == [105, 107]
    ckpt.forget_after(run, None)
    assert steps_in(run) == []


@pytest.mark.parametrize("harm", ["{", '{"version": 1}'])
def test_a_damaged_manifest_is_passed_over(run: HeldRun, harm: str) -> None:
    ckpt.save(run, made(5))
    ckpt.save(run, made(6))
    (place_of(run, 6) / ".manifest.json").write_text(harm)
    assert ckpt.newest_step(run) == 5
    (place_of(run, 5) / ".manifest.json").write_text(harm)
    with pytest.raises(CheckpointError, match=r"step-00000006 is damaged: its manifest .*step-00000005"):
        ckpt.newest_step(run)


def test_a_checkpoint_that_was_copied_without_its_manifest_is_damaged_and_stays(run: HeldRun) -> None:
    """As by what leaves hidden files out; a run that was cut off leaves no such folder."""
    for step in (5, 6):
        ckpt.save(run, made(step))
    (place_of(run, 6) / ".manifest.json").unlink()
    told: list[str] = []
    assert ckpt.newest_step(run, told.append) == 5
    assert "step-00000006 has lost what says that it is whole" in told[0]
    (place_of(run, 5) / ".manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint .* is whole: .*step-00000006 has lost"):
        ckpt.newest_step(run)
    assert run.torn("checkpoints") == ["checkpoints/step-00000005", "checkpoints/step-00000006"]


def test_the_first_checkpoint_is_whole_or_not_there(tmp_path: Path) -> None:
    """Cut off at any call: either it is whole, or the run begins anew without a word."""
    number, whole = 0, False
    while not whole:
        with held(tmp_path / str(number)) as run:
            with cut_at(number):
                ckpt.save(run, made(5))
                whole = True
            step = ckpt.newest_step(run)
            assert step is None or same(ckpt.load(run, step).weights, made(5).weights)
        number += 1
    assert number > 10


def test_a_checkpoint_is_on_the_disk_before_an_older_one_goes(run: HeldRun, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []
    fsync, rename, rmtree = os.fsync, os.rename, shutil.rmtree

    def noted_fsync(number: int) -> None:
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    def noted_rename(old: Any, new: Any) -> None:
        rename(old, new)
        calls[:] = [(what, path.replace(str(old), str(new))) for what, path in calls]
        calls.append(("rename", f"{old} {new}"))

    def noted_rmtree(path: Any, **more: Any) -> None:
        calls.append(("rmtree", Path(path).name))
        rmtree(path, **more)

    for step in (1, 2):
        ckpt.save(run, made(step))
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    monkeypatch.setattr(shutil, "rmtree", noted_rmtree)
    ckpt.save(run, made(3))
    new, folder = place_of(run, 3), str(run.folder / "checkpoints")
    removed = next(i for i, (what, path) in enumerate(calls) if what == "rmtree" and "step-00000001" in path)
    before = calls[:removed]
    assert len(os.listdir(new)) == 5
    named = next(i for i, (what, path) in enumerate(before) if what == "rename" and path.endswith(str(new)))
    assert {("fsync", str(new / name)) for name in os.listdir(new)} | {("fsync", str(new))} <= set(before[:named])
    going = next(i for i, (what, path) in enumerate(before) if what == "rename" and "step-00000001 " in path)
    assert ("fsync", folder) in before[named:going]
    assert ("fsync", folder) in before[going:]


def test_every_worker_reads_the_step_that_one_of_them_chose(run: HeldRun) -> None:
    for step in (1, 2):
        ckpt.save(run, made(step))
    found = ckpt.load(run, 1)
    assert (found.step, found.state) == (1, {"loss": 1.0, "step": 1})
    assert same(found.best, made(1).best)
    with pytest.raises(CheckpointError, match=r"step 3 cannot be read: there is no ") as caught:
        ckpt.load(run, 3)
    assert "storage" in caught.value.mend
    state = place_of(run, 2) / "state.json"
    state.write_text(state.read_text().replace("0.5", "0.7"))
    with pytest.raises(CheckpointError, match=r"state\.json was changed"):
        ckpt.load(run, 2)


def test_steps_are_numbers_and_no_names(run: HeldRun) -> None:
    (run.folder / "checkpoints" / "step-of-another").mkdir(parents=True)
    for step in (99_999_999, 100_000_000):
        ckpt.save(run, made(step))
    assert ckpt.newest_step(run) == 100_000_000


def test_another_drivers_run_is_left_as_it_is(run: HeldRun) -> None:
    """A worker that was away comes back after somebody else has taken the run over."""
    ckpt.save(run, made(1))
    (run.folder / ".lock").unlink()
    with held(run.folder) as other:
        ckpt.save(other, made(2))
        for write in (lambda: ckpt.save(run, made(3)), lambda: run.write("results.json", "{}")):
            with pytest.raises(RefusedError, match="has taken over the run") as caught:
                write()
            assert caught.value.reason == "busy"
        assert steps_in(other) == [1, 2]


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


def test_an_optimizers_state_is_restored_in_the_memory_format_of_its_parameter() -> None:
    """A fused one on a GPU refuses another: no run with convolutions went on there."""
    layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    named = dict(layer.named_parameters())
    optimizer, again = (torch.optim.AdamW(layer.parameters(), fused=True) for _ in range(2))
    layer(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    saved = {name: tensor.contiguous() for name, tensor in ckpt.optimizer_tensors(optimizer, named).items()}
    ckpt.restore_optimizer(again, named, saved)
    for entry in ("exp_avg", "exp_avg_sq"):
        restored = again.state[layer.weight][entry]
        assert restored.stride() == layer.weight.stride()
        assert torch.equal(restored, optimizer.state[layer.weight][entry])
        assert not restored.requires_grad
    assert float(again.state[layer.weight]["step"]) == 1.0


def test_a_loss_that_is_not_finite_moves_no_weight_of_a_fused_optimizer() -> None:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    before = ckpt.copy_of(tensors_of(layer))
    for scale, moves in ((math.nan, False), (1.0, True)):
        optimizer.zero_grad()
        loss = layer(torch.ones(4, 3)).sum() * scale
        loss.backward()
        take_step(optimizer, loss)
        assert same(before, tensors_of(layer)) != moves


@pytest.mark.parametrize("file", ["weights.safetensors", "best.safetensors", "optimizer.safetensors", "state.json"])
def test_a_pickle_in_a_checkpoint_runs_nothing(run: HeldRun, tmp_path: Path, file: str) -> None:
    """Whoever puts it there writes the manifest anew, so that all digests are right."""

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "has-run"),)

    ckpt.save(run, made(5))
    with run.opened(ckpt.checkpoint_name(5)) as whole:
        shutil.copytree(whole, tmp_path / "other", ignore=shutil.ignore_patterns(".*"))
    (tmp_path / "other" / file).write_bytes(pickle.dumps(Payload()))
    run.commit(tmp_path / "other", ckpt.checkpoint_name(5))
    assert ckpt.newest_step(run) == 5
    with pytest.raises(CheckpointError, match="step-00000005 is no checkpoint: ") as caught:
        ckpt.load(run, 5)
    assert "remove that folder" in caught.value.mend
    assert not (tmp_path / "has-run").exists()
    pickle.loads(pickle.dumps(Payload()))  # it would have
    assert (tmp_path / "has-run").exists()
