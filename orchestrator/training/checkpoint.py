"""Save, verify, find the newest whole one, restore, prune. Safetensors and JSON, never pickle.

checkpoints/step-00000120/
    weights.safetensors      what the method trains, and BatchNorm statistics that move
    best.safetensors         the same of the best epoch so far
    optimizer.safetensors    the optimizer's state by parameter name
    state.json               where the run stands
    manifest.json            SHA-256 of each of the above
    COMMITTED                SHA-256 of the manifest, written last

It is written under the name step-00000120.partial. A folder of that name, or without its marker, is a left-over of a
process that died while it wrote or removed it, and counts for nothing. One with a marker is whole, or the storage has
damaged it since: the digests tell.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from orchestrator.errors import CheckpointError
from orchestrator.job import file_sha256, sync, write_file

NUM_KEPT = 2
_PREFIX, _PARTIAL = "step-", ".partial"
_MARKER = "COMMITTED"
_MANIFEST = "manifest.json"
_TENSOR_FILES = ("weights", "best", "optimizer")

Tensors = dict[str, Tensor]


@dataclass
class Checkpoint:
    """All that a run needs to go on as if it had never stopped."""

    step: int
    weights: Tensors
    best: Tensors
    optimizer: Tensors
    state: dict[str, Any]
    """What the loop wants to find again, JSON; `step` is put into it."""


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint below `folder`, and then prune: it is on the disk before an older one is removed."""
    place = folder / f"{_PREFIX}{checkpoint.step:08d}"
    partial = place.with_name(place.name + _PARTIAL)
    if not folder.is_dir():
        folder.mkdir(parents=True)
        sync(folder.parent)
    _remove(partial)
    partial.mkdir()
    for name in _TENSOR_FILES:
        tensors = {key: value.detach().contiguous().cpu() for key, value in getattr(checkpoint, name).items()}
        safetensors.torch.save_file(tensors, partial / f"{name}.safetensors")
    (partial / "state.json").write_text(json.dumps({**checkpoint.state, "step": checkpoint.step}))
    names = [*(f"{name}.safetensors" for name in _TENSOR_FILES), "state.json"]
    (partial / _MANIFEST).write_text(json.dumps({name: file_sha256(partial / name) for name in names}, indent=1))
    for name in (*names, _MANIFEST):
        sync(partial / name)
    write_file(partial / _MARKER, file_sha256(partial / _MANIFEST))
    _remove(place)  # of this step too, but of another state: an epoch's validation was stopped, and made up for
    os.replace(partial, place)
    sync(folder)
    prune(folder)
    return place


def prune(folder: Path) -> None:
    """Leave the newest `NUM_KEPT` committed checkpoints, and nothing that is not committed."""
    places = _places(folder)
    kept = sorted(step for step, place in places.items() if _is_committed(place))[-NUM_KEPT:]
    left_overs = list(folder.glob(f"{_PREFIX}*{_PARTIAL}"))
    _remove_all(folder, [*left_overs, *(place for step, place in places.items() if step not in kept)])


def forget_after(folder: Path, step: int | None) -> None:
    """Remove the checkpoints of later steps, all of them where `step` is None.

    They are left-overs and damaged ones, which the run that goes on from that step has gone back behind.
    """
    _remove_all(folder, [place for number, place in _places(folder).items() if step is None or number > step])


def newest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint that is whole, None if there is none to go on from.

    Raises `CheckpointError` where there are committed ones and none of them is whole: then something other
    than an interruption has damaged the storage, and starting over in silence would hide it.
    """
    damaged = []
    for step, place in sorted(_places(folder).items(), reverse=True):
        if not _is_committed(place):
            continue
        problem = verify(place)
        if not problem:
            return step
        damaged.append(f"{place.name}: {problem}")
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {folder} is whole: {'; '.join(damaged)}",
            expected="files as they were written",
            mend="look at that storage, then start over with --fresh",
        )
    return None


def load(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of that step. Raises `CheckpointError` where it is not there, or not whole."""
    place = _places(folder).get(step)
    problem = verify(place) if place is not None else "it is not there"
    if place is None or problem:
        raise CheckpointError(
            f"the checkpoint of step {step} in {folder} cannot be read: {problem}",
            expected="the files that every worker sees on the storage, as they were written",
            mend="see that all nodes have the same storage, then run the same command again",
        )
    state = json.loads((place / "state.json").read_text())
    tensors = {name: safetensors.torch.load_file(place / f"{name}.safetensors") for name in _TENSOR_FILES}
    return Checkpoint(step, state=state, **tensors)


def newest(folder: Path) -> Checkpoint | None:
    """The checkpoint of `newest_step`, None if there is none. Raises `CheckpointError` as that does."""
    step = newest_step(folder)
    return None if step is None else load(folder, step)


def verify(place: Path) -> str:
    """What is wrong with a checkpoint, '' if nothing is."""
    try:
        if (place / _MARKER).read_text() != file_sha256(place / _MANIFEST):
            return "the manifest was changed"
        digests = json.loads((place / _MANIFEST).read_text())
        for name, expected in digests.items():
            if file_sha256(place / name) != expected:
                return f"{name} was changed"
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _places(folder: Path) -> dict[int, Path]:
    """{step: its folder} of all that have their name, committed or not."""
    places = {place.name.removeprefix(_PREFIX): place for place in folder.glob(f"{_PREFIX}*")}
    return {int(number): place for number, place in places.items() if number.isdecimal()}


def _is_committed(place: Path) -> bool:
    return (place / _MARKER).is_file()


def _remove_all(folder: Path, places: Collection[Path]) -> None:
    for place in places:
        _remove(place)
    if places:
        sync(folder)


def _remove(place: Path) -> None:
    """The marker first: cut short after that, or with a file that another node holds open, it is a left-over."""
    if not place.exists():
        return
    (place / _MARKER).unlink(missing_ok=True)
    sync(place)
    shutil.rmtree(place, ignore_errors=True)


# --- tensors of a network and of its optimizer ---


def trained_tensors(module: nn.Module, moving: tuple[str, ...]) -> Tensors:
    """The module's own tensors that training changes: parameters with gradients, and the buffers below the
    submodules named in `moving` ('' for all)."""
    tensors: Tensors = {name: p.data for name, p in module.named_parameters() if p.requires_grad}
    for prefix in moving:
        for name, buffer in module.get_submodule(prefix).named_buffers():
            tensors[f"{prefix}.{name}" if prefix else name] = buffer
    return tensors


def copy_of(tensors: Tensors) -> Tensors:
    """A copy in main memory."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def load_into(tensors: Tensors, into: Tensors, needed: Collection[str] | None = None) -> None:
    """Copy values into a module's own tensors, on whatever device these are.

    `into` is what may be set, `needed` what must be (by default all of it): a checkpoint of several phases holds what
    earlier ones trained besides. Raises `CheckpointError` where names or shapes differ, before anything is copied.
    """
    lost = sorted((into.keys() if needed is None else set(needed)) - tensors.keys())
    odd = sorted(tensors.keys() - into.keys())
    wrong = [name for name in tensors.keys() & into.keys() if tensors[name].shape != into[name].shape]
    if lost or odd or wrong:
        problem = f"it lacks {lost[0]}" if lost else f"it holds {odd[0]}" if odd else f"{min(wrong)} has another shape"
        raise CheckpointError(f"the checkpoint is of another network: {problem}", mend="start over with --fresh")
    with torch.no_grad():
        for name, tensor in tensors.items():
            into[name].copy_(tensor)


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter]) -> Tensors:
    """The optimizer's state as `{parameter}|{entry}` -> tensor."""
    return {
        f"{name}|{entry}": value
        for name, parameter in named.items()
        for entry, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], tensors: Tensors) -> None:
    """Put back what `optimizer_tensors` gave. Raises `CheckpointError` for a parameter that is not among `named`."""
    for key, value in tensors.items():
        name, _, entry = key.rpartition("|")
        if name not in named:
            raise CheckpointError(
                f"the checkpoint is of another network: its optimizer had {name}", mend="start over with --fresh"
            )
        parameter = named[name]
        on_host = entry == "step" and not optimizer.defaults.get("fused")  # as torch itself keeps it
        device = "cpu" if on_host else parameter.device
        optimizer.state[parameter][entry] = value.clone().to(device)
