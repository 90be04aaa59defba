"""What the task decides while a network is trained: the loss, what counts as right, the scale of the targets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from orchestrator.job import Plan
from orchestrator.network import Network
from orchestrator.tasks.metrics import MAX_SCORES

_TEMPERATURE = 0.1
"""Of the contrastive loss; docs/methods.md has what others gave."""


@dataclass(frozen=True)
class Objective:
    """The loss of a plan's task, in the form that microbatches and workers add up.

    Outputs may be in any precision, bfloat16 out of autocast too: everything is computed in float32. Losses and
    predictions stay on their device, so that nobody has to wait for a GPU; `prediction_fields` copies to the CPU.
    """

    task: str
    class_weights: Tensor | None
    """float32 [classes]: what a sample of the class counts (multi-label: its positives); None: all the same."""
    label_smoothing: float
    mean: Tensor
    """float32 [classes]: what the network's outputs are shifted by (0 but for regression)."""
    std: Tensor
    """float32 [classes]: and multiplied with (1 but for regression), to be in the targets' own units."""

    def loss(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(sum over the samples, the weight to divide it by once all microbatches are added up), float32 [] each.

        outputs: float [samples, classes]; targets: int64 [samples], or float32 [samples, classes]: 0 and 1 of several
        labels, numbers, or of one class a sample the shares of each class, where samples were mixed.
        """
        class_weights = None if self.class_weights is None else self.class_weights.to(outputs.device)
        each, weights = _LOSSES[self.task](outputs.float(), self._scaled(targets), class_weights, self.label_smoothing)
        return each.sum(), weights.sum()

    def contrastive(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The same of how far samples of one class are from each other, beside those of all others.

        features: float [samples, ...], what the head reads; targets: int64 [samples]. The supervised contrastive loss
        (Khosla et al. 2020, arXiv 2004.11362, equation 2) of directions in feature space, at a temperature of 0.1. A
        sample that is the only one of its class here has others to keep away from it, and no loss of its own.
        """
        directions = functional.normalize(features.float().flatten(1), dim=1)
        itself = torch.eye(len(targets), dtype=torch.bool, device=targets.device)
        likeness = (directions @ directions.T / _TEMPERATURE).masked_fill(itself, -math.inf)
        alike = (targets[:, None] == targets) & ~itself
        log_shares = likeness.log_softmax(dim=1).masked_fill(~alike, 0.0)
        each = -log_shares.sum(dim=1) / alike.sum(dim=1).clamp(min=1)
        weights = torch.ones_like(each) if self.class_weights is None else self.class_weights.to(each.device)[targets]
        return (each * weights).sum(), weights.sum()

    def each_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """float32 [samples]: the loss of every sample, unweighted and without label smoothing."""
        return _LOSSES[self.task](outputs.float(), self._scaled(targets), None, 0.0)[0]

    def _scaled(self, targets: Tensor) -> Tensor:
        if self.task != "regression":
            return targets
        return (targets - self.mean.to(targets.device)) / self.std.to(targets.device)

    def predict(self, outputs: Tensor) -> Tensor:
        """What is predicted: int64 [samples], bool [samples, classes], or float32 [samples, targets] in their units."""
        if self.task == "single-label":
            return outputs.argmax(dim=-1)
        if self.task == "multi-label":
            return outputs > 0
        return outputs.float() * self.std.to(outputs.device) + self.mean.to(outputs.device)

    def scores(self, outputs: Tensor) -> Tensor:
        """float32 [samples, classes]: probabilities, or the predicted values."""
        if self.task == "single-label":
            return outputs.float().softmax(dim=-1)
        return outputs.float().sigmoid() if self.task == "multi-label" else self.predict(outputs)

    def num_right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """How many samples are wholly right, float32 []; 0 for regression, which has no such thing."""
        if self.task == "regression":
            return torch.zeros((), device=outputs.device)
        if targets.is_floating_point():  # the class of which a mixed sample has most
            targets = targets.argmax(dim=-1) if self.task == "single-label" else targets > 0.5
        right = self.predict(outputs) == targets
        return (right if right.ndim == 1 else right.all(dim=-1)).sum().float()

    def prediction_fields(self, rows: Any, outputs: Tensor, targets: Tensor, num_rows: int) -> list[Any]:
        """The fields of `Predictions` for one batch, on the CPU.

        `num_rows`: samples of the whole split; where scores of so many would be too many, there are none.
        """
        outputs, targets = outputs.float().cpu(), targets.cpu()
        scores = self.scores(outputs).numpy()
        if num_rows * scores.shape[1] > MAX_SCORES:
            scores = np.zeros((len(scores), 0), np.float32)
        return [
            rows, targets.numpy(), self.predict(outputs).numpy(), scores, self.each_loss(outputs, targets).numpy(),
        ]  # fmt: skip


def make_objective(plan: Plan, network: Network) -> Objective:
    """The objective of a plan, on the network's device.

    For regression the network learns targets of mean 0 and variance 1, so that learning rates mean the same whatever
    the unit; `fold_target_scale` puts the unit into its last layer, where that of a trained network is already. Where
    that layer has no bias, only the scale is taken out.
    """
    num = len(plan.classes)
    mean, std = torch.zeros(num), torch.ones(num)
    if plan.job.task == "regression" and plan.weights != "trained":
        mean, std = torch.tensor(plan.data.target_mean), torch.tensor(plan.data.target_std)
        if any(
            getattr(network.module.get_submodule(name), "bias", None) is None
            for name in network.outputs or network.head
        ):
            std, mean = (std**2 + mean**2).sqrt(), torch.zeros(num)
    device = next(network.module.parameters()).device
    weights = torch.tensor(plan.class_weights, device=device) if plan.class_weights else None
    smoothing = plan.job.training.label_smoothing
    return Objective(plan.job.task, weights, smoothing, mean.to(device), std.to(device))


def fold_target_scale(objective: Objective, network: Network) -> None:
    """Let the network itself give targets in their own units, so that it can be served without us."""
    if objective.task != "regression":
        return
    with torch.no_grad():
        for name in network.outputs or network.head:
            layer = network.module.get_submodule(name)
            std, mean = (part.to(layer.weight.device) for part in (objective.std, objective.mean))  # type: ignore[arg-type]
            layer.weight.mul_(std.view(-1, *[1] * (layer.weight.ndim - 1)))  # type: ignore[operator]
            if layer.bias is not None:
                layer.bias.mul_(std).add_(mean)  # type: ignore[operator]


def _cross_entropy(
    outputs: Tensor, targets: Tensor, class_weights: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    each = functional.cross_entropy(outputs, targets, weight=class_weights, reduction="none", label_smoothing=smoothing)
    if class_weights is None:
        return each, torch.ones_like(each)
    return each, targets @ class_weights if targets.is_floating_point() else class_weights[targets]


def _binary_cross_entropy(
    outputs: Tensor, targets: Tensor, class_weights: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    smooth = targets * (1 - smoothing) + smoothing / 2
    each = functional.binary_cross_entropy_with_logits(outputs, smooth, pos_weight=class_weights, reduction="none")
    return each.mean(dim=-1), torch.ones_like(each[:, 0])


def _squared_error(
    outputs: Tensor, targets: Tensor, _class_weights: Tensor | None, _smoothing: float
) -> tuple[Tensor, Tensor]:
    each = (outputs - targets).square().mean(dim=-1)
    return each, torch.ones_like(each)


_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]] = {
    "single-label": _cross_entropy,
    "multi-label": _binary_cross_entropy,
    "regression": _squared_error,
}
