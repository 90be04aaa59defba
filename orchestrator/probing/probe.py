"""A linear probe: the best linear layer on features that do not change, its strength chosen by cross-validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from orchestrator.errors import TrainingError, counted
from orchestrator.probing.folds import assign_folds
from orchestrator.probing.linear_fits import LinearFits, RidgeFits, SigmoidFits, SoftmaxFits
from orchestrator.tasks import Objective, Predictions, compute_metrics

STRENGTHS = (100.0, 10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
"""Of the L2 term, strongest first: a decade apart, from what 50 samples of 1,000 features need to next to none."""
SCORES = {"single-label": "accuracy", "multi-label": "macro_f1", "regression": "r2"}
"""Task -> the key of what `tasks.compute_metrics` gives that is the score."""

_HALF = math.sqrt(10)
"""A step from a strength to those beside the best: of five vowels with their speakers apart a decade is two to three
points too far."""
_MOST_UNSURE = 0.9
"""No temperature takes the loss above this share of what it is where all logits are 0: some direction is left."""
_CONSTANT = 1e-6
"""A feature whose standard deviation is less than this share of its mean is constant, but for rounding."""


@dataclass(frozen=True)
class Probe:
    """A linear layer: `features @ weight.T + bias` are logits, or targets in their own units."""

    weight: Tensor
    """float32 [classes, features]"""
    bias: Tensor
    """float32 [classes]"""
    strength: float
    """Of the L2 term: the minimised mean loss has strength / 2 times the squares of the standardised weights added."""
    figure: str
    """What the score is: accuracy, macro_f1 or r2."""
    score: float | None
    """Of all samples, each predicted by the layer that was fitted without its fold. None where it is not defined."""
    interval: tuple[float, float] | None
    """Its 95 % interval."""
    loss: float
    """Of the same predictions: cross entropy in nats, or squared error in units of the targets' variance."""
    fold_scores: tuple[float, ...]
    """The score of each fold; NaN where it is not defined."""
    held_out: Predictions
    """The same predictions, without scores."""
    temperature: float
    """What the layer has to be divided by to be no surer of the samples that it was fitted to than of held-out ones: so
    that the mean loss of both is the same. 1 where it is no surer, and of a regression."""

    def __call__(self, features: Tensor) -> Tensor:
        """float32 [samples, classes] of features float32 [samples, features]."""
        return features @ self.weight.T + self.bias


def fit_probe(
    features: Tensor,
    targets: Tensor | npt.NDArray[Any],
    task: str,
    *,
    num_classes: int,
    groups: Sequence[Any] | npt.NDArray[Any] | None = None,
    class_weights: Sequence[float] | Tensor | None = None,
    folds: int = 5,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
) -> Probe:
    """The linear layer with the least loss on float32 [samples, features], and how well it does on held-out samples.

    Multinomial logistic regression (single-label), one logistic regression a class (multi-label), or ridge regression
    of targets brought to one scale. targets: int64 [samples], or float32 [samples, classes] of 0 and 1, or of numbers.
    Features are standardised (over all samples, which needs no targets), and that is folded back into the layer.

    `class_weights`, float32 [classes]: what the loss of a sample of a class counts (multi-label: of its positives
    alone; regression: nothing). `groups`: one a sample; those of a group are in one fold. `seed`: of the folds.

    The strength is the one of `strengths` with the best cross-validation, tried from the strongest on until two in a
    row are better in nothing, and then, of several, half a decade beside the best: the most accurate for single-label,
    of equals the one with the least loss; the least loss elsewhere, as a run chooses its epoch. The folds hold classes
    in equal proportions and never tear a group. A class that no training fold has cannot be right; the layer is fitted
    anyway.

    The same for the same arguments and number of threads. Raises `TrainingError` where features or targets are not
    finite, and where there is one sample or one group alone.
    """
    with torch.no_grad():
        targets = torch.as_tensor(targets)
        targets = targets.long() if task == "single-label" else targets.float()
        _refuse_not_finite(features, "features")
        _refuse_not_finite(targets, "targets")
        fold = assign_folds(targets.numpy(), task, groups, folds, seed)
        x, restored = _standardised(features.float())
        objective = _objective(targets, task, num_classes)
        fits = _fits(objective, x, targets, torch.from_numpy(fold), class_weights)
        start = torch.zeros(int(fold.max()) + 2, num_classes, x.shape[1])
        strength, layers, outputs = _best_of_path(fits, objective, targets, start, strengths)
        layer = restored(fits.refine(layers[-1], strength)) * objective.std[:, None]
        layer[:, -1] += objective.mean
    predictions = _predictions(objective, outputs, targets)
    held_out_loss = float(predictions.loss.mean())
    with torch.no_grad():
        ours = functional.linear(features.float(), layer[:, :-1], layer[:, -1])
        temperature = 1.0 if task == "regression" else _temperature(objective, ours, targets, held_out_loss)
    figure, whole = SCORES[task], _measured(task, predictions, num_classes)
    parts = [_measured(task, _some(predictions, fold == number), num_classes) for number in range(int(fold.max()) + 1)]
    interval = whole[f"{figure}_95"]
    return Probe(
        layer[:, :-1], layer[:, -1], strength, figure, whole[figure],
        None if interval is None else (interval[0], interval[1]), held_out_loss,
        tuple(math.nan if part[figure] is None else part[figure] for part in parts), predictions, temperature,
    )  # fmt: skip


def fit_layer(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    strength: float,
    class_weights: Sequence[float] | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(weight, bias) of the multinomial logistic regression of one strength: what `fit_probe` ends with, unjudged.

    features: float32 [samples, features]; labels: int64 [samples]; class_weights as there. Raises `TrainingError`
    where features are not finite.
    """
    with torch.no_grad():
        _refuse_not_finite(features, "features")
        x, restored = _standardised(features.float())
        nobody = torch.full((len(x),), -1)
        fits = _fits(_objective(labels, "single-label", num_classes), x, labels, nobody, class_weights)
        layer = restored(fits.refine(torch.zeros(num_classes, x.shape[1]), strength))
    return layer[:, :-1], layer[:, -1]


def _temperature(objective: Objective, logits: Tensor, targets: Tensor, loss: float) -> float:
    """What float32 [samples, classes] are divided by for a mean loss as high as that; 1 where it is as high already."""

    def loss_at(share: float) -> float:
        return float(objective.each_loss(logits * share, targets).double().mean())

    loss = min(loss, _MOST_UNSURE * loss_at(0.0))
    if loss_at(1.0) >= loss:
        return 1.0
    low, high = 0.0, 1.0  # between them the loss falls: it is convex along the way, and least at 1 or beyond
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if loss_at(middle) > loss else (low, middle)
    return 1 / high


def _best_of_path(
    fits: LinearFits, objective: Objective, targets: Tensor, layers: Tensor, strengths: Sequence[float]
) -> tuple[float, Tensor, Tensor]:
    """(the best strength, the layers there, what held-out samples get from them: float32 [samples, classes]).

    From the strongest on, each from where the one before ended. Ends after two in a row that are better in nothing;
    then the two beside the best are tried from there.
    """
    best: _Tried | None = None
    tried: _Tried | None = None
    most_right, least_loss, num_worse = -1.0, math.inf, 0
    for strength in sorted(set(strengths), reverse=True):
        tried = _Tried.of(fits, objective, targets, tried.layers if tried else layers, strength)
        num_worse = 0 if tried.num_right > most_right or tried.loss < least_loss else num_worse + 1
        least_loss = min(tried.loss, least_loss)
        if best is None or tried.rank > best.rank:
            best, most_right = tried, tried.num_right
        if num_worse == 2:
            break
    assert best is not None, "no strengths"
    if len(set(strengths)) > 1:
        beside = (_Tried.of(fits, objective, targets, best.layers, best.strength * step) for step in (_HALF, 1 / _HALF))
        best = max(best, *beside, key=lambda one: one.rank)
    return best.strength, best.layers, best.outputs


@dataclass(frozen=True)
class _Tried:
    """A strength, and what came of it."""

    strength: float
    layers: Tensor
    outputs: Tensor
    """float32 [samples, classes]: of held-out samples."""
    loss: float
    num_right: float
    """Of the held-out samples; 0 where the task goes by the loss alone."""

    @property
    def rank(self) -> tuple[float, float]:
        """The larger the better."""
        return self.num_right, -self.loss

    @classmethod
    def of(cls, fits: LinearFits, objective: Objective, targets: Tensor, start: Tensor, strength: float) -> _Tried:
        """All folds' layers at that strength, by the way of those that are given."""
        layers = fits.fit_folds(start, strength)
        outputs = fits.held_out(layers)
        loss = float(objective.each_loss(outputs, targets).double().mean())
        num_right = float(objective.num_right(outputs, targets)) if objective.task == "single-label" else 0.0
        return cls(strength, layers, outputs, loss, num_right)


def _fits(
    objective: Objective, x: Tensor, targets: Tensor, fold: Tensor, class_weights: Sequence[float] | Tensor | None
) -> LinearFits:
    equal = torch.ones(len(x))
    if objective.task == "regression":
        return RidgeFits(x, (targets - objective.mean) / objective.std, fold, equal)
    given = class_weights is not None and len(class_weights) > 0
    of_class = torch.as_tensor(class_weights, dtype=torch.float32) if given else torch.ones(len(objective.mean))
    if objective.task == "multi-label":
        return SigmoidFits(x, targets, fold, equal, of_class)
    return SoftmaxFits(x, targets, fold, of_class[targets])


def _standardised(features: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(float32 [samples, size + 1], the last column 1; a layer on that -> the same layer on features).

    Features of mean 0 and variance 1. Where samples are fewer than features, these are rotated (QR) into the space that
    the samples span, and the rest, which is 0, is left out: the L2 term does not change by a rotation, so that the
    best layer is the same.
    """
    rounded = features.mean(dim=0, dtype=torch.float64).float()
    x = features - rounded
    rest = x.mean(dim=0, dtype=torch.float64)  # of a large mean float32 has lost what is small beside it
    mean = rounded.double() + rest
    x -= rest.float()
    std = x.square().mean(dim=0, dtype=torch.float64).sqrt()
    scale = torch.where(std > _CONSTANT * mean.abs(), 1 / std, 0.0)
    x *= scale.float()
    basis = None
    if len(x) < x.shape[1]:
        basis, corner = torch.linalg.qr(x.T)
        x = corner.T

    def restored(layer: Tensor) -> Tensor:
        weight = layer[:, :-1] if basis is None else layer[:, :-1] @ basis.T
        weight = weight.double() * scale
        bias = layer[:, -1].double() - weight @ mean
        return torch.cat([weight, bias[:, None]], dim=1).float()

    return functional.pad(x, (0, 1), value=1.0), restored


def _objective(targets: Tensor, task: str, num_classes: int) -> Objective:
    """Of unweighted losses; targets of a regression are brought to mean 0 and variance 1."""
    mean, std = torch.zeros(num_classes), torch.ones(num_classes)
    if task == "regression":
        mean, std = targets.double().mean(dim=0), targets.double().std(dim=0, correction=0)
        std = torch.where(std > _CONSTANT * mean.abs(), std, 1.0).float()
        mean = mean.float()
    return Objective(task, None, 0.0, mean, std)


def _predictions(objective: Objective, outputs: Tensor, targets: Tensor) -> Predictions:
    return Predictions(
        np.arange(len(targets)), targets.numpy(), objective.predict(outputs).numpy(),
        np.zeros((len(targets), 0), np.float32), objective.each_loss(outputs, targets).numpy(),
    )  # fmt: skip


def _some(predictions: Predictions, chosen: npt.NDArray[np.bool_]) -> Predictions:
    return Predictions(*(getattr(predictions, field.name)[chosen] for field in fields(Predictions)))


def _measured(task: str, predictions: Predictions, num_classes: int) -> dict[str, Any]:
    return compute_metrics(task, predictions, [str(number) for number in range(num_classes)])


def _refuse_not_finite(values: Tensor, what: str) -> None:
    bad = (~values.isfinite()).reshape(len(values), -1).any(dim=1).nonzero().flatten()
    if len(bad):
        raise TrainingError(
            f"{what} of {counted(len(bad), 'sample')} are not finite, the first of sample {int(bad[0])}",
            expected="finite numbers",
            mend="the network overflows on these samples: training.precision fp32, or leave them out",
        )
