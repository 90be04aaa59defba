"""Metrics of predictions, with 95 % intervals, and the confusion matrix: one function a task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.tasks.intervals import Floats, Ranks, Scale, resampled_counts, resamples, wilson, with_interval

Counts = npt.NDArray[Any]

MAX_SCORES = 4_000_000
"""Scores (samples x classes) that are kept at most: of more, AUROC and average precision are left out."""
_MAX_RESAMPLED = 1_000_000  # of samples x classes: more, and the bootstrap of AUROC takes minutes
_MAX_CONFUSED = 200  # classes: a larger matrix is for nobody to read
_SAME = 1e-9  # of their squares: targets that spread less are all equal, but for rounding


@dataclass(frozen=True)
class Predictions:
    """What the model says of labelled samples; arrays with one entry a sample."""

    rows: npt.NDArray[np.int64]
    """Their row numbers in the sample table."""
    targets: npt.NDArray[Any]
    """int64 [samples], the class; multi-label, regression: float32 [samples, classes]."""
    predicted: npt.NDArray[Any]
    """int64 [samples]; multi-label: bool [samples, classes]; regression: float32 [samples, classes]."""
    scores: npt.NDArray[np.float32]
    """[samples, classes]: probabilities, or predicted values; [samples, 0] where they were too many to keep."""
    loss: npt.NDArray[np.float32]
    """[samples]: cross entropy in nats (several labels: its mean over the classes); regression: squared error in units
    of the training targets' variance."""


def compute_metrics(task: str, predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """The figures that suit the task, as plain JSON.

    single-label: accuracy, macro_f1, auroc, average_precision, per_class, confusion. multi-label: exact_match instead
    of accuracy. regression: r2, scaled_mae, mae, rmse, per_class. All: loss. `x_95` is the 95 % interval of `x`, which
    lies in it; not all have one.

    A figure that is not defined on these samples is None, and so is its interval. {"num_samples": 0} without samples.
    """
    if len(predictions.rows) == 0:
        return {"num_samples": 0}
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite stands as null
        figures = _MEASURES[task](predictions, classes)
    figures |= {"loss": float(predictions.loss.mean())}
    return {"num_samples": len(predictions.rows)} | {name: finite(value) for name, value in figures.items()}


def finite(value: Any) -> Any:
    """The same with None for every NaN and infinity, for which JSON has no word."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- one class a sample ---


def _single_label(predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """`confusion[i][j]` counts samples of class i that were taken for j."""
    num, targets = len(classes), predictions.targets
    matrix = np.bincount(targets * num + predictions.predicted, minlength=num * num).reshape(num, num)
    hits, actual = matrix.diagonal(), matrix.sum(axis=1)
    figures = {
        **_share_of_right(int(hits.sum()), len(targets), "accuracy"),
        **with_interval("macro_f1", _macro_f1(hits, actual, matrix.sum(axis=0)), _resampled_f1(matrix)),
        **_of_ranks(predictions.scores, np.eye(num, dtype=bool)[targets]),
    }
    return {
        **figures,
        "per_class": {name: (int(hits[i]) / int(actual[i]) if actual[i] else None) for i, name in enumerate(classes)},
        "confusion": matrix.tolist() if num <= _MAX_CONFUSED else None,
    }


def _resampled_f1(matrix: npt.NDArray[np.int64]) -> list[float]:
    """Drawing samples anew is drawing cells of the confusion matrix anew."""
    cells, num = np.argwhere(matrix), len(matrix)
    actual, predicted = cells.T
    right = actual == predicted
    return [
        _macro_f1(
            np.bincount(actual[right], counts[right], num),
            np.bincount(actual, counts, num),
            np.bincount(predicted, counts, num),
        )
        for counts in resampled_counts(matrix[actual, predicted])
    ]


# --- any number of classes a sample ---


def _multi_label(predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """`confusion[i]` is [[true negatives, false positives], [false negatives, true positives]] of class i."""
    chosen, actual = predictions.predicted, predictions.targets > 0.5
    counted = [array.astype(np.float64) for array in (chosen & actual, actual, chosen)]
    counts = [array.sum(axis=0) for array in counted]
    drawn = [[weights @ array for array in counted] for weights in resamples(len(actual))]
    pairs = ((~chosen & ~actual, chosen & ~actual), (~chosen & actual, chosen & actual))
    matrix = np.array([[array.sum(axis=0) for array in pair] for pair in pairs])
    return {
        **_share_of_right(int((chosen == actual).all(axis=1).sum()), len(actual), "exact_match"),
        **with_interval("macro_f1", _macro_f1(*counts), [_macro_f1(*one) for one in drawn]),
        **_of_ranks(predictions.scores, actual),
        "per_class": dict(zip(classes, _each_f1(*counts).tolist(), strict=True)),
        "confusion": matrix.transpose(2, 0, 1).tolist() if len(classes) <= _MAX_CONFUSED else None,
    }


def _each_f1(hits: Counts, actual: Counts, predicted: Counts) -> Floats:
    """F1 of each class; NaN for one that no sample has and none is given: there is nothing to be right about."""
    with np.errstate(invalid="ignore"):
        return np.asarray(2 * hits / (actual + predicted), np.float64)


def _macro_f1(hits: Counts, actual: Counts, predicted: Counts) -> float:
    """The mean over the classes that some sample has or is given, NaN where there is none; for all tasks alike.

    A class that a split lacks, and that is never predicted there, says nothing of the model: counted as 0, as some
    libraries do, it would make perfect predictions bad ones, and every resample that lacks a rare class as well.
    """
    return _mean_of_known(_each_f1(hits, actual, predicted))


# --- of both kinds of labels ---


def _share_of_right(num_right: int, num: int, name: str) -> dict[str, Any]:
    return {name: num_right / num, f"{name}_95": list(wilson(num_right, num))}


def _of_ranks(scores: npt.NDArray[np.float32], positive: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Macro AUROC and average precision, over the classes that have both kinds of samples, with their intervals.

    scores: [samples, classes], or [samples, 0]: then there are neither; positive: bool [samples, classes].
    """
    if not scores.shape[1]:
        return {}
    ranks = Ranks(scores, positive)
    drawn = resamples(len(scores)) if scores.size <= _MAX_RESAMPLED else ()
    values, resampled = ranks.measure(np.ones(len(scores))), [ranks.measure(weights) for weights in drawn]
    figures: dict[str, Any] = {}
    for i, name in enumerate(("auroc", "average_precision")):
        figures |= with_interval(name, values[i], [one[i] for one in resampled])
    return figures


# --- numbers ---


def _regression(predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """Errors of each target in its own unit, in `per_class`; over all of them only what has no unit.

    `r2` and `scaled_mae`, the error in deviations of the target on these samples, are means over the targets. `mae` and
    `rmse` are those of the one target there is, and None where there are several: kilograms and metres have no mean.
    """
    targets, predicted = (array.astype(np.float64) for array in (predictions.targets, predictions.predicted))
    errors = np.abs(predicted - targets)
    centred = targets - targets.mean(axis=0)  # sums of squares stay small
    values = _of_numbers(np.ones(len(errors)), centred, errors)
    drawn = [_of_numbers(weights, centred, errors) for weights in resamples(len(errors))]
    each = [
        {
            **with_interval("mae", float(values[0, i]), [float(one[0, i]) for one in drawn], "error"),
            "rmse": float(np.sqrt((errors[:, i] ** 2).mean())),
            **with_interval("r2", float(values[1, i]), [float(one[1, i]) for one in drawn], "explained"),
            **with_interval("scaled_mae", float(values[2, i]), [float(one[2, i]) for one in drawn], "error"),
        }
        for i in range(len(classes))
    ]
    means: dict[str, Any] = {}
    scales: tuple[tuple[int, str, Scale], ...] = ((1, "r2", "explained"), (2, "scaled_mae", "error"))
    for number, name, scale in scales:
        resampled = [_mean_of_known(one[number]) for one in drawn]
        means |= with_interval(name, _mean_of_known(values[number]), resampled, scale)
    of_one = ("mae", "mae_95", "rmse")
    return {
        **(dict.fromkeys(of_one) if len(each) > 1 else {name: each[0][name] for name in of_one}),
        **means,
        "per_class": dict(zip(classes, each, strict=True)),
    }


def _of_numbers(weights: Floats, centred: Floats, errors: Floats) -> Floats:
    """[3, targets]: MAE, R2, and MAE over the target's deviation, by how often each sample counts.

    The last two are NaN for a target whose values are all equal: it has no variance, and is left out of their means.
    """
    total = weights.sum()
    squares = weights @ centred**2
    spread = squares - (weights @ centred) ** 2 / total
    spread = np.where(spread > _SAME * squares, spread, np.nan)
    mae = (weights @ errors) / total
    return np.stack([mae, 1 - (weights @ errors**2) / spread, mae / np.sqrt(spread / total)])


def _mean_of_known(each: Floats) -> float:
    known = each[~np.isnan(each)]
    return float(known.mean()) if len(known) else math.nan


_MEASURES: dict[str, Callable[[Predictions, Sequence[str]], dict[str, Any]]] = {
    "single-label": _single_label,
    "multi-label": _multi_label,
    "regression": _regression,
}
