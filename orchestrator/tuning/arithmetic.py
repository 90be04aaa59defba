"""The arithmetic of `training.objective` and of torch's optimizers, for many heads at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from orchestrator.job import Plan
from orchestrator.tasks import Objective

_BETAS, _EPS = (0.9, 0.999), 1e-8  # torch's AdamW


@dataclass(frozen=True)
class OfHeads:
    """Settings that each head of a stack has of its own, float32 [heads] each.

    class_weights: [heads, classes], None where no head has any.
    """

    peak_rates: Tensor
    weight_decay: Tensor
    momentum: Tensor
    clip_norm: Tensor
    smoothing: Tensor
    class_weights: Tensor | None

    def of(self, chosen: Tensor) -> OfHeads:
        """Of some of the heads. chosen: int64"""
        some = {name: value[chosen] for name, value in vars(self).items() if value is not None}
        return replace(self, **some)


def settings_of_heads(plans: Sequence[Plan], device: torch.device) -> OfHeads:
    """Those of these plans, a head a plan."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    trainings = [plan.job.training for plan in plans]
    weights = None
    if any(plan.class_weights for plan in plans):
        ones = (1.0,) * len(plans[0].classes)
        weights = torch.tensor([plan.class_weights or ones for plan in plans], device=device)
    return OfHeads(
        peak_rates=column([plan.recipe.phases[0].head_learning_rate for plan in plans]),
        weight_decay=column([one.weight_decay for one in trainings]),
        momentum=column([one.momentum for one in trainings]),
        clip_norm=column([math.inf if one.clip_norm is None else one.clip_norm for one in trainings]),
        smoothing=column([one.label_smoothing for one in trainings]),
        class_weights=weights,
    )


def losses_of_heads(objective: Objective, outputs: Tensor, targets: Tensor, of: OfHeads) -> tuple[Tensor, Tensor]:
    """(loss of each sample, what it counts), float32 [heads, batch] each; as `Objective.loss` has them.

    outputs: float32 [heads, batch, classes]; targets: those of one batch, or of one a head.
    """
    smoothing = of.smoothing.view(-1, 1)
    num_heads, num_samples, num_classes = outputs.shape
    ones = torch.ones(num_heads, num_samples, device=outputs.device)
    if objective.task == "single-label":
        chances = functional.log_softmax(outputs, dim=-1)
        target = targets.expand(num_heads, num_samples)
        right = -chances.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        if of.class_weights is None:
            return (1 - smoothing) * right + smoothing * -chances.mean(dim=-1), ones
        weight = of.class_weights.gather(1, target)
        spread = -(chances * of.class_weights.unsqueeze(1)).sum(dim=-1) / num_classes
        return (1 - smoothing) * weight * right + smoothing * spread, weight
    if objective.task == "multi-label":
        wanted = targets * (1 - smoothing.unsqueeze(-1)) + smoothing.unsqueeze(-1) / 2
        positive = None if of.class_weights is None else of.class_weights.unsqueeze(1)
        each = functional.binary_cross_entropy_with_logits(
            outputs, wanted.expand_as(outputs), pos_weight=positive, reduction="none"
        )
        return each.mean(dim=-1), ones
    scaled = (targets - objective.mean) / objective.std
    return (outputs - scaled).square().mean(dim=-1), ones


def adamw(
    weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, rate: Tensor, decay: Tensor, step: int
) -> None:
    """Loshchilov & Hutter 2019 (arXiv 1711.05101), as torch computes it; `rate` and `decay` are each head's own."""
    weight.mul_(1 - rate * decay)
    mean.lerp_(gradient, 1 - _BETAS[0])
    square.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
    root = square.sqrt().div_(math.sqrt(1 - _BETAS[1] ** (step + 1))).add_(_EPS)
    weight.sub_(mean / root * (rate / (1 - _BETAS[0] ** (step + 1))))


def sgd(
    weight: Tensor, gradient: Tensor, moving: Tensor, rate: Tensor, decay: Tensor, momentum: Tensor, step: int
) -> None:
    """With Nesterov's momentum, as torch computes it; a head whose momentum is 0 goes by the gradient alone."""
    gradient = gradient + decay * weight
    if step == 0:
        moving.copy_(gradient)
    else:
        moving.mul_(momentum).add_(gradient)
    weight.sub_(rate * (gradient + momentum * moving))
