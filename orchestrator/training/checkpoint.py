"""Save, verify, find the newest valid one, restore. Safetensors and JSON, never pickle.

checkpoints/step-00000120/
    weights.safetensors      what the method trains, and BatchNorm statistics that move
    best.safetensors         the same of the best epoch so far
    optimizer.safetensors    the optimizer's state by parameter name
    state.json               where the run stands
    manifest.json            SHA-256 of each of the above
    COMMITTED                SHA-256 of the manifest, written last
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from orchestrator.errors import CheckpointError
from orchestrator.job import sync

NUM_KEPT = 2
_MARKER = "COMMITTED"
_MANIFEST = "manifest.json"

Tensors = dict[str, Tensor]


@dataclass
class Checkpoint:
    """All that a run needs to go on as if it had never stopped."""

    step: int
    weights: Tensors
    best: Tensors
    optimizer: Tensors
    state: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint below `folder`; it counts once its marker is there. Older ones are pruned."""
    place = folder / f"step-{checkpoint.step:08d}"
    if place.exists():  # of a process that died, or that this run went back behind
        shutil.rmtree(place)
    place.mkdir(parents=True)
    for name in ("weights", "best", "optimizer"):
        tensors = {key: value.detach().contiguous().cpu() for key, value in getattr(checkpoint, name).items()}
        safetensors.torch.save_file(tensors, place / f"{name}.safetensors")
    (place / "state.json").write_text(json.dumps({**checkpoint.state, "step": checkpoint.step}))
    sums = {file.name: _digest(file) for file in sorted(place.iterdir())}
    (place / _MANIFEST).write_text(json.dumps(sums, indent=1))
    for file in place.iterdir():
        sync(file)
    (place / _MARKER).write_text(_digest(place / _MANIFEST))
    sync(place / _MARKER)
    sync(place)
    for old in sorted(folder.glob("step-*"))[:-NUM_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, None if there is none to go on from.

    Raises `CheckpointError` where there are finished ones and none of them is whole: then something other
    than an interruption has damaged the storage, and starting over in silence would hide it.
    """
    damaged = []
    for place in sorted(folder.glob("step-*"), reverse=True):
        if not (place / _MARKER).is_file():
            continue
        problem = verify(place)
        if problem:
            damaged.append(f"{place.name}: {problem}")
            continue
        return _load(place)
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {folder} is whole: {'; '.join(damaged)}",
            expected="files as they were written",
            mend="look at that storage, then start over with --fresh",
        )
    return None


def verify(place: Path) -> str:
    """What is wrong with a committed checkpoint, '' if nothing is."""
    try:
        if (place / _MARKER).read_text() != _digest(place / _MANIFEST):
            return "the manifest was changed"
        sums = json.loads((place / _MANIFEST).read_text())
        for name, expected in sums.items():
            if _digest(place / name) != expected:
                return f"{name} was changed"
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _load(place: Path) -> Checkpoint:
    state = json.loads((place / "state.json").read_text())
    weights, best, optimizer = (
        safetensors.torch.load_file(place / f"{name}.safetensors") for name in ("weights", "best", "optimizer")
    )
    return Checkpoint(state["step"], weights, best, optimizer, state)


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def trained_tensors(module: nn.Module, moving: tuple[str, ...]) -> Tensors:
    """The module's own tensors that training changes: parameters with gradients, and the buffers below the
    submodules named in `moving` ('' for all)."""
    found: Tensors = {name: p.data for name, p in module.named_parameters() if p.requires_grad}
    for prefix in moving:
        for name, buffer in module.get_submodule(prefix).named_buffers():
            found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def copy_of(tensors: Tensors) -> Tensors:
    """A copy in main memory."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def load_into(tensors: Tensors, into: Tensors) -> None:
    """Copy values into a module's own tensors. Raises `CheckpointError` where names or shapes differ."""
    if tensors.keys() != into.keys():
        odd = sorted(tensors.keys() ^ into.keys())[0]
        raise CheckpointError(f"the checkpoint is of another network: {odd}", mend="start over with --fresh")
    with torch.no_grad():
        for name, tensor in tensors.items():
            into[name].copy_(tensor)


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter]) -> Tensors:
    """The optimizer's state as `{parameter}|{entry}` -> tensor."""
    found: Tensors = {}
    for name, parameter in named.items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{name}|{entry}"] = value
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], tensors: Tensors) -> None:
    """Put back what `optimizer_tensors` gave."""
    for key, value in tensors.items():
        name, _, entry = key.rpartition("|")
        parameter = named[name]
        on_host = entry == "step" and not optimizer.defaults.get("fused")  # as torch itself keeps it
        device = "cpu" if on_host else parameter.device
        optimizer.state[parameter][entry] = value.clone().to(device)
