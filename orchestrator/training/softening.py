"""A fitted head, made less sure before the body is trained behind it.

It has few samples all right with a loss of next to nothing, from which the body would learn nothing; and what it was
fitted to knew neither dropout nor augmentation. Divided by a number it predicts the same, less sure: as unsure of the
training samples as of others, and no surer of them than it is right while they are trained on (temperature scaling: Guo
et al. 2017, arXiv 1706.04599). docs/methods.md has what that gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from orchestrator.data import Ints
from orchestrator.features import Key
from orchestrator.network import StateDict, autocast, channels_last, set_mode, within
from orchestrator.training import checkpoint as ckpt
from orchestrator.training.nonfinite import Own
from orchestrator.training.state import Session

_NUM_BATCHES = 8
"""Of training samples that are looked at."""
_LEAST_SHARE = 1e-3


def soften_head(
    session: Session,
    tensors: StateDict,
    batches_of: Callable[[Ints, int], Sequence[Ints]],
    own_of: Callable[[Ints], Own],
) -> None:
    """Divide the head that the phase before has fitted, if one has; `tensors`: those of the network, by name.

    `batches_of`: (rows, epoch) -> the rows of each step; `own_of`: this worker's microbatches of a step. All workers
    call it. What was chosen is noted as the temperature of the phase before. The network is as it was but for the head.
    """
    before = session.state.phase - 1
    known = session.state.candidates.get(str(before), {}).get("temperature")
    behind = session.phase.trains == "everything" and session.phase.loss == "task"
    if known is None or not behind or session.plan.job.task == "regression":
        return
    seed, first = session.plan.job.training.seed, session.state.steps_done(session.plan.recipe)
    batches = batches_of(session.samples.rows("train"), 0)[:_NUM_BATCHES]
    own = [
        ((seed, first + i, microbatch), some) for i in range(len(batches)) for microbatch, some in own_of(batches[i])
    ]
    found = max(known, 1 / _best_share(session, _while_training(session, tensors, own)))
    temperature = session.worker.all_gather(found)[0]  # the same on all, whatever their arithmetic
    session.note_of(before, temperature=temperature)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if within(name, session.network.head) and tensor.is_floating_point():
                tensor.div_(temperature)


def _while_training(
    session: Session, tensors: StateDict, microbatches: Sequence[tuple[Key, Ints]]
) -> list[tuple[Tensor, Tensor]]:
    """[(logits, targets)] of all workers' microbatches as training sees them, with dropout and augmentation."""
    kept, found = ckpt.copy_of(dict(tensors)), []
    set_mode(session.network, session.phase, training=True)
    with torch.no_grad():
        for key, rows in microbatches:
            batch = session.loader.load(session.source("train"), key, rows)
            if batch is None:
                continue
            with autocast(session.plan, session.worker):
                logits = session.forward(channels_last(batch.inputs))
            found.append((key[1:], logits.float().cpu(), batch.targets.cpu()))
    ckpt.load_into(kept, dict(tensors))  # BatchNorm has moved its statistics
    everybodys = sorted((one for part in session.worker.all_gather(found) for one in part), key=lambda one: one[0])
    return [(logits, targets) for _, logits, targets in everybodys]


def _best_share(session: Session, said: Sequence[tuple[Tensor, Tensor]]) -> float:
    """What logits are multiplied by for the least loss; 1 at most, and where nothing could be read."""

    def loss_at(log_share: float) -> float:
        losses = [session.objective.each_loss(logits * math.exp(log_share), targets) for logits, targets in said]
        return float(torch.cat(losses).double().sum())

    if not said:
        return 1.0
    return math.exp(_lowest(loss_at, math.log(_LEAST_SHARE), 0.0))


def _lowest(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one valley is lowest, by thirds."""
    for _ in range(40):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if function(left) < function(right):
            high = right
        else:
            low = left
    return high
