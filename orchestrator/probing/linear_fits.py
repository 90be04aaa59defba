"""Linear layers with an L2 term on the same samples: one for each fold, fitted to the others, and one to all of them.

Side by side, so that one pass over the samples serves all layers, and the last one is there when the choice is made.
Parameters of all: float32 [folds + 1, classes, features + 1], the bias last.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from orchestrator.probing.minimise import minimise

_TOLERANCE, _MOST_STEPS = 1e-4, 100
_LAST_TOLERANCE, _MOST_LAST_STEPS = 1e-6, 500
_LEAST_ON_BIAS = 1e-6
"""A class that a fold lacks has no best bias: this gives it one."""
_DAMPING = 1e-4
"""Of the mean second moment: what float32 gives of them is not quite definite."""
_OUTPUTS_AT_ONCE = 2**21


class LinearFits:
    """What all kinds have in common. A kind gives `fit_folds` and `refine`."""

    def __init__(self, x: Tensor, targets: Tensor, fold: Tensor, weights: Tensor) -> None:
        """x: float32 [samples, features + 1], the last column 1; fold: int64 [samples].

        weights: float32 [samples], what each counts in the loss (`RidgeFits`: all the same). targets: as in
        `fit_probe`.
        """
        self.x, self.targets, self.fold = x, targets, fold
        num = int(fold.max()) + 1
        used = (fold[:, None] != torch.arange(num + 1)).float() * weights[:, None]  # the last column: all samples
        self.weights = used / used.sum(dim=0)
        """float32 [samples, folds + 1], of sum 1"""

    def fit_folds(self, layers: Tensor, strength: float) -> Tensor:
        """The layers with the least loss, to what cross-validation needs; looked for from `layers` on."""
        raise NotImplementedError

    def refine(self, layer: Tensor, strength: float) -> Tensor:
        """The one of all samples, to the last digits that float32 tells: [classes, features + 1]."""
        raise NotImplementedError

    def held_out(self, layers: Tensor) -> Tensor:
        """float32 [samples, classes]: what each sample gets from the layer that was fitted without its fold."""
        outputs = torch.empty(len(self.x), layers.shape[1])
        for number in range(len(layers) - 1):
            here = self.fold == number
            outputs[here] = self.x[here] @ layers[number].T
        return outputs

    def penalty(self, strength: float) -> Tensor:
        """float32 [features + 1]"""
        penalty = torch.full((self.x.shape[1],), float(strength))
        penalty[-1] = min(strength, _LEAST_ON_BIAS)
        return penalty


class RidgeFits(LinearFits):
    """Least squares (Hoerl and Kennard 1970), in closed form and in float64. Targets: float32 [samples, targets]."""

    def __init__(self, x: Tensor, targets: Tensor, fold: Tensor, weights: Tensor) -> None:
        super().__init__(x, targets, fold, weights)
        parts = [_moments(x[fold == number], targets[fold == number]) for number in range(int(fold.max()) + 1)]
        whole = tuple(sum(some, torch.zeros(())) for some in zip(*parts, strict=True))
        num = [len(x) - int((fold == number).sum()) for number in range(len(parts))] + [len(x)]
        rest = [tuple(all - part for all, part in zip(whole, some, strict=True)) for some in parts] + [whole]
        self._moments = [(second / count, cross / count) for (second, cross), count in zip(rest, num, strict=True)]

    def fit_folds(self, layers: Tensor, strength: float) -> Tensor:  # noqa: ARG002  # needs no start
        penalty = self.penalty(strength).double()
        found = []
        for second, cross in self._moments:
            factor = torch.linalg.cholesky(second + penalty.diag())
            found.append(torch.cholesky_solve(cross, factor).T.float())
        return torch.stack(found)

    def refine(self, layer: Tensor, strength: float) -> Tensor:  # noqa: ARG002  # it is exact
        return layer


class LogisticFits(LinearFits):
    """Logistic regression, by what the kinds below know of their loss."""

    probabilities: Callable[[Tensor], Tensor]
    """Logits [..., classes] -> probabilities."""
    one_problem_per_class: bool
    """Whether each class is a problem of its own."""

    def loss(self, layers: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(the loss of each problem, float32 [problems]; gradients, as `layers`)."""
        raise NotImplementedError

    def fit_folds(self, layers: Tensor, strength: float) -> Tensor:
        return self._minimised(layers, self.weights, strength, _TOLERANCE, _MOST_STEPS)

    def refine(self, layer: Tensor, strength: float) -> Tensor:
        return self._minimised(layer[None], self.weights[:, -1:], strength, _LAST_TOLERANCE, _MOST_LAST_STEPS)[0]

    def _minimised(
        self, layers: Tensor, weights: Tensor, strength: float, tolerance: float, max_steps: int
    ) -> Tensor:  # fmt: skip
        penalty, size = self.penalty(strength), self.x.shape[1]
        inverse = self._preconditioner(layers[-1], penalty)

        def function(flat: Tensor) -> tuple[Tensor, Tensor]:
            here = flat.view(layers.shape)
            values, gradients = self.loss(here, weights)
            squares = (penalty * here.square()).sum(-1).view(len(values), -1).sum(-1)
            return values + squares / 2, (gradients + penalty * here).view(flat.shape)

        def precondition(flat: Tensor) -> Tensor:
            return (flat.reshape(-1, size) @ inverse).view(flat.shape)

        num_problems = layers.shape[0] * (layers.shape[1] if self.one_problem_per_class else 1)
        start = layers.reshape(num_problems, -1)
        return minimise(function, start, precondition, tolerance, max_steps).view(layers.shape)

    def _preconditioner(self, layer: Tensor, penalty: Tensor) -> Tensor:
        """float32 [features + 1, features + 1]: of the second moments times the mean variance of the probabilities."""
        probabilities = self.probabilities(self.x @ layer.T)
        near = float((probabilities * (1 - probabilities)).mean().clamp_min(1e-4)) * self._second_moments
        near.diagonal().add_(penalty + _DAMPING * near.diagonal().mean())
        return torch.cholesky_inverse(torch.linalg.cholesky(near)).float()

    @property
    def _second_moments(self) -> Tensor:
        """float64, of all samples: folds do not differ by much."""
        if not hasattr(self, "_second"):
            self._second = ((self.x * self.weights[:, -1:]).T @ self.x).double()
        return self._second

    def _blocks(self, num_outputs: int) -> list[slice]:
        step = max(64, _OUTPUTS_AT_ONCE // num_outputs)
        return [slice(start, start + step) for start in range(0, len(self.x), step)]


class SoftmaxFits(LogisticFits):
    """Of one class a sample. targets: int64 [samples]."""

    one_problem_per_class = False

    @staticmethod
    def probabilities(outputs: Tensor) -> Tensor:
        return outputs.softmax(-1)

    def loss(self, layers: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        num, flat = len(layers), layers.reshape(-1, layers.shape[-1])
        values, gradients = torch.zeros(num), torch.zeros_like(flat)
        for rows in self._blocks(len(flat)):
            x, weight = self.x[rows], weights[rows]
            probabilities = (x @ flat.T).view(len(x), num, -1).log_softmax(-1)
            target = self.targets[rows][:, None, None].expand(-1, num, 1)
            values -= (probabilities.gather(-1, target)[..., 0] * weight).sum(0)
            probabilities.exp_().scatter_add_(-1, target, probabilities.new_full((1, 1, 1), -1.0).expand(target.shape))
            gradients.addmm_((probabilities * weight[..., None]).view(len(x), -1).T, x)
        return values, gradients.view(layers.shape)


class SigmoidFits(LogisticFits):
    """Of any number of classes a sample. targets: float32 [samples, classes], 0 or 1."""

    one_problem_per_class = True

    def __init__(self, x: Tensor, targets: Tensor, fold: Tensor, weights: Tensor, of_positive: Tensor) -> None:
        """of_positive: float32 [classes], what a class's positive samples count."""
        super().__init__(x, targets, fold, weights)
        self._of_positive = of_positive

    @staticmethod
    def probabilities(outputs: Tensor) -> Tensor:
        return outputs.sigmoid()

    def loss(self, layers: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        num, flat = len(layers), layers.reshape(-1, layers.shape[-1])
        values, gradients = torch.zeros(layers.shape[:2]), torch.zeros_like(flat)
        for rows in self._blocks(len(flat)):
            x, weight = self.x[rows], weights[rows][..., None]
            outputs = (x @ flat.T).view(len(x), num, -1)
            positive = (self.targets[rows] * self._of_positive)[:, None]
            negative = 1 - self.targets[rows][:, None]
            each = positive * functional.softplus(-outputs) + negative * functional.softplus(outputs)
            values += (each * weight).sum(0)
            slopes = outputs.sigmoid() * (positive + negative) - positive
            gradients.addmm_((slopes * weight).view(len(x), -1).T, x)
        return values.view(-1), gradients.view(layers.shape)


def _moments(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    x = x.double()
    return x.T @ x, x.T @ targets.double()
