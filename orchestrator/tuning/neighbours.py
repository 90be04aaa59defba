"""Nearest neighbours on features: what they are worth with nothing trained on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from orchestrator.data import Ints
from orchestrator.probing import SCORES
from orchestrator.tasks import Predictions, compute_metrics

NUM_NEIGHBOURS = 10
_SIMILARITIES_AT_ONCE = 2**24


def score_of_neighbours(
    features: Tensor, targets: npt.NDArray[Any], fold: Ints, task: str, num_classes: int
) -> float | None:
    """The task's score where each sample gets what its 10 nearest have, by cosine, in the other folds.

    features: float32 [samples, width]; targets: int64 [samples], or float32 [samples, classes]. The class that most
    have, the nearest counting most; labels that half of them have; the mean of numbers.
    """
    x = functional.normalize(features - features.mean(dim=0), dim=1)
    folds = torch.from_numpy(fold)
    wanted = functional.one_hot(torch.from_numpy(targets), num_classes) if targets.ndim == 1 else torch.tensor(targets)
    step = max(1, _SIMILARITIES_AT_ONCE // len(x))
    parts = []
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        similar = (x[rows] @ x.T).masked_fill_(folds[rows, None] == folds, -torch.inf)
        nearness, at = similar.topk(min(NUM_NEIGHBOURS, len(x)), dim=1)
        weights = torch.where(nearness.isfinite(), 1 + nearness, 0)[..., None]
        parts.append((wanted[at] * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1e-12))
    found = torch.cat(parts).float().numpy()
    predicted = found.argmax(axis=1) if task == "single-label" else found > 0.5 if task == "multi-label" else found
    nothing = np.zeros((len(found), 0), np.float32)
    figures = compute_metrics(
        task, Predictions(np.arange(len(found)), targets, predicted, nothing, np.zeros(len(found), np.float32)),
        [str(number) for number in range(num_classes)],
    )  # fmt: skip
    score: float | None = figures[SCORES[task]]
    return score
