"""What a step's loss is of: the task, by what the network says; or which samples are alike, by what the head reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from orchestrator.features import Batch
from orchestrator.network import Body, autocast, channels_last
from orchestrator.training.fitted import cut_of
from orchestrator.training.state import Session

StepLoss = Callable[[Batch], tuple[Tensor, Tensor, Tensor]]
"""A microbatch -> float32 [] each: (sum of the loss, with its gradient; the weight to divide it by once all are added
up; how many samples are right, 0 where that is not known)."""


def step_loss_of(session: Session) -> StepLoss:
    """That of the session's phase."""
    objective = session.objective

    def of_task(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        with autocast(session.plan, session.worker):
            logits = session.forward(channels_last(batch.inputs))
        return *objective.loss(logits, batch.targets), objective.num_right(logits.detach(), batch.targets)

    if session.phase.loss == "task":
        return of_task
    body = Body(session.network, cut_of(session))

    def contrastive(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        with autocast(session.plan, session.worker):
            features = body(channels_last(batch.inputs))
        return *objective.contrastive(features, batch.targets), torch.zeros((), device=features.device)

    return contrastive
