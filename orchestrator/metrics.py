"""Metrics of predictions, with intervals, and the confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Predictions:
    """What the model says of labelled samples; arrays of one entry a sample."""

    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float32]
    """The softmax probability of the predicted class."""
    loss: npt.NDArray[np.float32]
    """Cross entropy, in nats."""


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927), without continuity correction."""
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    scale = 1 + _Z95**2 / total
    centre = (share + _Z95**2 / (2 * total)) / scale
    half = _Z95 * math.sqrt(share * (1 - share) / total + _Z95**2 / (4 * total**2)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def measure(predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """Accuracy with its 95 % interval, macro F1, loss, accuracy a class and the confusion matrix.

    `confusion[i][j]` counts samples of class i that were taken for j.
    """
    # Deferred: importing torchmetrics takes 2 s, which a run should not wait for before its first step.
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_confusion_matrix,
        multiclass_f1_score,
    )

    total = len(predictions.labels)
    if total == 0:
        return {"num_samples": 0}
    num_classes = len(classes)
    predicted, labels = torch.from_numpy(predictions.predicted), torch.from_numpy(predictions.labels)
    correct = int((predicted == labels).sum())
    matrix = multiclass_confusion_matrix(predicted, labels, num_classes)
    counts = matrix.sum(dim=1)
    return {
        "num_samples": total,
        "accuracy": float(multiclass_accuracy(predicted, labels, num_classes, average="micro")),
        "accuracy_95": list(wilson(correct, total)),
        "macro_f1": float(multiclass_f1_score(predicted, labels, num_classes, average="macro")),
        "loss": float(predictions.loss.mean()),
        "per_class": {name: (float(matrix[i, i] / counts[i]) if counts[i] else None) for i, name in enumerate(classes)},
        "confusion": matrix.tolist() if num_classes <= 200 else None,
    }
