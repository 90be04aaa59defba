"""Metrics of predictions, with 95 % intervals, and the confusion matrix."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.floating[Any]]
Counts = npt.NDArray[Any]

MAX_SCORES = 4_000_000
"""Of samples x classes: more are not kept, and AUROC and average precision are left out."""
_MAX_RESAMPLED = 1_000_000  # of samples x classes: more, and the bootstrap of AUROC takes minutes
_NUM_RESAMPLES = 200
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Predictions:
    """What the model says of labelled samples; arrays with one entry a sample."""

    rows: npt.NDArray[np.int64]
    targets: npt.NDArray[Any]
    """int64 [samples], the class; multi-label, regression: float32 [samples, classes]."""
    predicted: npt.NDArray[Any]
    """int64 [samples]; multi-label: bool [samples, classes]; regression: float32 [samples, classes]."""
    scores: npt.NDArray[np.float32]
    """[samples, classes]: probabilities, or predicted values; [samples, 0] where they were too many to keep."""
    loss: npt.NDArray[np.float32]
    """Cross entropy in nats; regression: squared error in units of the training targets' variance."""


def measure(task: str, predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """The figures that suit the task; `x_95` is the 95 % interval of `x`. {"num_samples": 0} without samples."""
    if len(predictions.rows) == 0:
        return {"num_samples": 0}
    with warnings.catch_warnings():
        # A class without a positive sample is no news here: it is left out of the mean, and stands as null.
        warnings.filterwarnings("ignore", module="torchmetrics")
        figures = _MEASURES[task](predictions, classes)
    return {"num_samples": len(predictions.rows), **figures, "loss": float(predictions.loss.mean())}


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927), without continuity correction."""
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    scale = 1 + _Z95**2 / total
    centre = (share + _Z95**2 / (2 * total)) / scale
    half = _Z95 * math.sqrt(share * (1 - share) / total + _Z95**2 / (4 * total**2)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


# --- one class a sample ---


def _single_label(predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """`confusion[i][j]` counts samples of class i that were taken for j."""
    # Deferred: importing torchmetrics takes 2 s, which a run should not wait for before its first step.
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_auroc,
        multiclass_average_precision,
        multiclass_confusion_matrix,
        multiclass_f1_score,
    )

    num = len(classes)
    predicted, labels = torch.from_numpy(predictions.predicted), torch.from_numpy(predictions.targets)
    matrix = multiclass_confusion_matrix(predicted, labels, num)
    counts = matrix.sum(dim=1)
    figures = {
        "accuracy": float(multiclass_accuracy(predicted, labels, num, average="micro")),
        "accuracy_95": list(wilson(int((predicted == labels).sum()), len(labels))),
        "macro_f1": float(multiclass_f1_score(predicted, labels, num, average="macro")),
        "macro_f1_95": _interval_of_f1(matrix.numpy()),
    }
    scores = torch.from_numpy(predictions.scores)
    if scores.shape[1]:
        figures |= {
            "auroc": _macro(multiclass_auroc(scores, labels, num, average="none"), counts, len(labels)),
            "average_precision": _macro(
                multiclass_average_precision(scores, labels, num, average="none"), counts, len(labels)
            ),
            **_intervals_of_ranks(predictions.scores, np.eye(num, dtype=bool)[predictions.targets]),
        }
    return {
        **figures,
        "per_class": {name: (float(matrix[i, i] / counts[i]) if counts[i] else None) for i, name in enumerate(classes)},
        "confusion": matrix.tolist() if num <= 200 else None,
    }


def _interval_of_f1(matrix: npt.NDArray[np.int64]) -> list[float]:
    """Bootstrap: drawing samples anew is drawing cells of the confusion matrix anew."""
    cells = np.argwhere(matrix)
    counts = matrix[cells[:, 0], cells[:, 1]]
    drawn = np.random.default_rng(0).multinomial(counts.sum(), counts / counts.sum(), size=_NUM_RESAMPLES)
    hits = cells[:, 0] == cells[:, 1]
    found = []
    for one in drawn:
        actual = np.bincount(cells[:, 0], one, len(matrix))
        taken = np.bincount(cells[:, 1], one, len(matrix))
        found.append(_macro_f1(np.bincount(cells[hits, 0], one[hits], len(matrix)), actual, taken))
    return _percentiles(found)


def _macro_f1(hits: Counts, actual: Counts, taken: Counts) -> float:
    there = actual + taken > 0
    return float((2 * hits[there] / (actual + taken)[there]).mean())


# --- any number of classes a sample ---


def _multi_label(predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """`confusion[i]` is [[true negatives, false positives], [false negatives, true positives]] of class i."""
    from torchmetrics.functional.classification import (
        multilabel_auroc,
        multilabel_average_precision,
        multilabel_confusion_matrix,
        multilabel_f1_score,
    )

    num = len(classes)
    predicted, labels = torch.from_numpy(predictions.predicted).int(), torch.from_numpy(predictions.targets).int()
    right = int((predicted == labels).all(dim=1).sum())
    counts = labels.sum(dim=0)
    each = multilabel_f1_score(predicted, labels, num, average="none")
    figures: dict[str, Any] = {
        "exact_match": right / len(labels),
        "exact_match_95": list(wilson(right, len(labels))),
        "macro_f1": float(multilabel_f1_score(predicted, labels, num, average="macro")),
        "macro_f1_95": _bootstrap(_weighted_f1(predictions), len(labels)),
    }
    scores = torch.from_numpy(predictions.scores)
    if scores.shape[1]:
        figures |= {
            "auroc": _macro(multilabel_auroc(scores, labels, num, average="none"), counts, len(labels)),
            "average_precision": _macro(
                multilabel_average_precision(scores, labels, num, average="none"), counts, len(labels)
            ),
            **_intervals_of_ranks(predictions.scores, predictions.targets > 0.5),
        }
    return {
        **figures,
        "per_class": {name: float(each[i]) for i, name in enumerate(classes)},
        "confusion": multilabel_confusion_matrix(predicted, labels, num).tolist() if num <= 200 else None,
    }


def _weighted_f1(predictions: Predictions) -> Callable[[Floats], float]:
    taken, actual = predictions.predicted.astype(np.float64), predictions.targets.astype(np.float64)
    hits = taken * actual
    return lambda weights: _macro_f1(weights @ hits, weights @ actual, weights @ taken)


# --- numbers ---


def _regression(predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """Errors in the targets' own units; of several targets the mean, and each in `per_class`."""
    from torchmetrics.functional.regression import mean_absolute_error, mean_squared_error, r2_score

    predicted, targets = torch.from_numpy(predictions.predicted), torch.from_numpy(predictions.targets)
    enough = len(targets) >= 2
    each_mae = mean_absolute_error(predicted, targets, num_outputs=len(classes)).reshape(-1)
    each_r2 = r2_score(predicted, targets, multioutput="raw_values").reshape(-1) if enough else None
    errors = np.abs(predictions.predicted - predictions.targets).astype(np.float64)
    return {
        "mae": float(each_mae.mean()),
        "mae_95": _bootstrap(lambda weights: float((weights @ errors).mean() / weights.sum()), len(errors)),
        "rmse": float(mean_squared_error(predicted, targets, squared=False)),
        "r2": _number(each_r2.mean()) if each_r2 is not None else None,
        "r2_95": _bootstrap(_weighted_r2(predictions), len(errors)) if enough else None,
        "per_class": {
            name: {"mae": float(each_mae[i]), "r2": _number(each_r2[i]) if each_r2 is not None else None}
            for i, name in enumerate(classes)
        },
    }


def _weighted_r2(predictions: Predictions) -> Callable[[Floats], float]:
    targets = predictions.targets.astype(np.float64)
    targets = targets - targets.mean(axis=0)  # sums of squares stay small
    squares = (predictions.predicted - predictions.targets).astype(np.float64) ** 2

    def r2(weights: Floats) -> float:
        spread = weights @ targets**2 - (weights @ targets) ** 2 / weights.sum()
        return float((1 - (weights @ squares) / np.where(spread > 0, spread, np.nan)).mean())

    return r2


# --- intervals ---


def _bootstrap(figure: Callable[[Floats], float], num: int) -> list[float]:
    """The percentile interval (Efron 1979) of a figure over `num` samples, given how often each was drawn."""
    random = np.random.default_rng(0)
    return _percentiles(
        [
            figure(np.bincount(random.integers(num, size=num), minlength=num).astype(np.float64))
            for _ in range(_NUM_RESAMPLES)
        ]
    )


def _percentiles(values: Sequence[float]) -> list[float]:
    known = [value for value in values if not math.isnan(value)]
    return [float(edge) for edge in np.percentile(known, (2.5, 97.5))] if known else [math.nan, math.nan]


def _intervals_of_ranks(scores: npt.NDArray[np.float32], positive: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Intervals of the macro AUROC and average precision. positive: bool [samples, classes]."""
    if scores.size > _MAX_RESAMPLED:
        return {"auroc_95": None, "average_precision_95": None}
    ranks = Ranks(scores, positive)
    random = np.random.default_rng(0)
    num = len(scores)
    found = [
        ranks.measure(np.bincount(random.integers(num, size=num), minlength=num).astype(np.float64))
        for _ in range(_NUM_RESAMPLES)
    ]
    aurocs, precisions = zip(*found, strict=True)
    return {"auroc_95": _finite(_percentiles(aurocs)), "average_precision_95": _finite(_percentiles(precisions))}


class Ranks:
    """Macro AUROC and average precision of weighted samples; sorting is done once for all weightings."""

    def __init__(self, scores: npt.NDArray[np.float32], positive: npt.NDArray[np.bool_]) -> None:
        self._order = np.argsort(-scores, axis=0, kind="stable")
        ordered = np.take_along_axis(scores, self._order, axis=0)
        self._positive = np.take_along_axis(positive, self._order, axis=0)
        place = np.arange(len(scores))[:, None]
        new = np.ones_like(self._positive)
        new[1:] = ordered[1:] != ordered[:-1]
        self._first = np.maximum.accumulate(np.where(new, place, 0), axis=0)
        ends = np.ones_like(new)
        ends[:-1] = new[1:]
        self._last = np.minimum.accumulate(np.where(ends, place, len(scores))[::-1], axis=0)[::-1]

    def measure(self, weights: Floats) -> tuple[float, float]:
        """(AUROC, average precision), each the mean over the classes that have both kinds of samples."""
        drawn = weights[self._order]
        hits, misses = drawn * self._positive, drawn * ~self._positive
        sum_hits, sum_misses = hits.cumsum(axis=0), misses.cumsum(axis=0)
        hits_to_here = np.take_along_axis(sum_hits, self._last, axis=0)
        misses_to_here = np.take_along_axis(sum_misses, self._last, axis=0)
        misses_before = np.take_along_axis(sum_misses - misses, self._first, axis=0)
        num_hits, num_misses = sum_hits[-1], sum_misses[-1]
        with np.errstate(invalid="ignore", divide="ignore"):
            below = num_misses - (misses_to_here + misses_before) / 2  # of equal scores, half count as below
            aurocs = (hits * below).sum(axis=0) / (num_hits * num_misses)
            precision = np.where(hits > 0, hits_to_here / (hits_to_here + misses_to_here), 0.0)
            precisions = (hits * precision).sum(axis=0) / num_hits
        return _mean(aurocs), _mean(precisions)


def _mean(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _macro(each: torch.Tensor, counts: torch.Tensor, num_samples: int) -> float | None:
    """The mean over the classes that have both kinds of samples: torchmetrics gives the others 0, or nan."""
    known = each[(counts > 0) & (counts < num_samples)]
    return float(known.mean()) if len(known) else None


def _number(value: torch.Tensor) -> float | None:
    return float(value) if math.isfinite(value) else None


def _finite(interval: list[float]) -> list[float] | None:
    return None if math.isnan(interval[0]) else interval


_MEASURES: dict[str, Callable[[Predictions, Sequence[str]], dict[str, Any]]] = {
    "single-label": _single_label,
    "multi-label": _multi_label,
    "regression": _regression,
}
