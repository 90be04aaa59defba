"""Save, find the newest whole one, restore, prune. Safetensors and JSON, never pickle.

checkpoints/step-00000120/       a commit of the run's storage
    weights.safetensors          what the method trains, and BatchNorm statistics that move
    best.safetensors             the same of the best epoch so far
    optimizer.safetensors        the optimizer's state by parameter name
    average.safetensors          the moving average of the weights, where there is one
    state.json                   where the run stands

A commit is there whole or not at all, unless the storage has damaged it since: its digests tell.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from orchestrator.errors import CheckpointError, RefusedError, first_line
from orchestrator.job import CHECKPOINTS, HeldRun

NUM_KEPT = 2
STATE_FILE = "state.json"
_PREFIX = "step-"
_TENSOR_FILES = ("weights", "best", "optimizer")
_AVERAGE = "average"

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
    average: Tensors = field(default_factory=dict)


def save(run: HeldRun, checkpoint: Checkpoint) -> None:
    """Commit a checkpoint to the run, and then prune: it is on the storage before an older one is removed."""
    with run.committing(checkpoint_name(checkpoint.step)) as folder:
        for name in (*_TENSOR_FILES, *([_AVERAGE] if checkpoint.average else [])):
            tensors = {key: value.detach().contiguous().cpu() for key, value in getattr(checkpoint, name).items()}
            safetensors.torch.save_file(tensors, folder / f"{name}.safetensors")
        (folder / STATE_FILE).write_text(json.dumps({**checkpoint.state, "step": checkpoint.step}, allow_nan=False))
    prune(run)


def copied(checkpoint: Checkpoint) -> Checkpoint:
    """The same, apart from what training changes meanwhile; `best` is never changed, only replaced."""
    return replace(
        checkpoint, weights=copy_of(checkpoint.weights), optimizer=copy_of(checkpoint.optimizer),
        average=copy_of(checkpoint.average),
    )  # fmt: skip


def prune(run: HeldRun) -> None:
    """Leave the newest `NUM_KEPT` committed checkpoints, and nothing that is not committed."""
    kept = _committed_steps(run)[-NUM_KEPT:]
    _delete(run, lambda step: step not in kept)


def forget_after(run: HeldRun, step: int | None) -> None:
    """Remove the checkpoints of later steps, all of them where `step` is None.

    They are left-overs and damaged ones, which the run that goes on from that step has gone back behind.
    """
    _delete(run, lambda number: step is None or number > step)


def newest_step(run: HeldRun, note: Callable[[str], None] | None = None) -> int | None:
    """The step of the newest checkpoint that is whole, None if there is none to go on from.

    `note` is told of those that are passed over. Raises `CheckpointError` where there are committed ones and none of
    them is whole: then something other than an interruption has damaged the storage, and starting over in silence would
    hide it.
    """
    problems: list[str] = []
    for name in run.children(CHECKPOINTS):
        if "COMMITTED" in run.children(f"{CHECKPOINTS}/{name}"):
            raise CheckpointError(
                f"the checkpoints of the run {run.name} are of an earlier version", expected="those of this version",
                mend="start over with --fresh, or go on with that version",
            )  # fmt: skip
    torn = {step for name in run.torn(CHECKPOINTS) if (step := _step_of(name.split("/")[-1])) is not None}
    for step in sorted({*_committed_steps(run), *torn}, reverse=True):
        if step in torn:
            problems.append(f"{run.place}/{checkpoint_name(step)} has lost what says that it is whole")
            continue
        try:
            with run.opened(checkpoint_name(step)):
                if note is not None:
                    for problem in problems:
                        note(f"a checkpoint is passed over: {problem}")
                return step
        except RefusedError as error:
            if error.reason not in ("damaged", "not_found"):
                raise
            problems.append(error.message)
    if problems:
        raise CheckpointError(
            f"no checkpoint of the run {run.name} is whole: {'; '.join(problems)}",
            expected="files as they were written",
            mend="look at that storage, then start over with --fresh",
        )
    return None


def load(run: HeldRun, step: int) -> Checkpoint:
    """The checkpoint of that step. Raises `CheckpointError` where it is not there, or not whole."""
    try:
        with run.opened(checkpoint_name(step)) as folder:
            state = json.loads((folder / STATE_FILE).read_text())
            names = (*_TENSOR_FILES, *([_AVERAGE] if (folder / f"{_AVERAGE}.safetensors").is_file() else []))
            tensors = {name: safetensors.torch.load_file(folder / f"{name}.safetensors") for name in names}
    except RefusedError as error:
        raise CheckpointError(
            f"the checkpoint of step {step} cannot be read: {error.message}",
            expected="the files that every worker sees on the storage, as they were written",
            mend="see that all nodes have the same storage, then run the same command again",
        ) from None
    except (ValueError, SafetensorError) as error:  # it is as its manifest says, and no run wrote that
        raise CheckpointError(
            f"{run.place}/{checkpoint_name(step)} is no checkpoint: {first_line(error)}",
            expected="safetensors and JSON, as a run writes them",
            mend="remove that folder, and the same command goes on from the one before; or start over with --fresh",
        ) from None
    return Checkpoint(step, state=state, **tensors)


def checkpoint_name(step: int) -> str:
    """Of the commit, in a run."""
    return f"{CHECKPOINTS}/{_PREFIX}{step:08d}"


def _committed_steps(run: HeldRun) -> list[int]:
    """Those of the committed checkpoints, whole or damaged since, in order."""
    return sorted(step for name in run.commits(CHECKPOINTS) if (step := _step_of(name.split("/")[-1])) is not None)


def _delete(run: HeldRun, is_gone: Callable[[int], bool]) -> None:
    for name in run.children(CHECKPOINTS):
        step = _step_of(name)
        if step is not None and is_gone(step):
            run.delete(f"{CHECKPOINTS}/{name}")


def _step_of(name: str) -> int | None:
    number = name.removeprefix(_PREFIX)
    return int(number) if number != name and number.isdecimal() else None


# --- tensors of a network and of its optimizer ---


def trained_tensors(module: nn.Module, moving: tuple[str, ...]) -> Tensors:
    """The module's own tensors that training changes: parameters with gradients, and the buffers below the
    submodules named in `moving` ('' for all).
    """
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
        if value.shape == parameter.shape and entry != "step":
            # In the parameter's memory format too, without which a fused optimizer refuses it.
            kept = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
        else:
            on_host = entry == "step" and not optimizer.defaults.get("fused")  # as torch itself keeps it
            kept = value.clone().to("cpu" if on_host else parameter.device)
        optimizer.state[parameter][entry] = kept
