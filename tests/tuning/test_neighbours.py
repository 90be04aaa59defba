"""Nearest neighbours: held against scikit-learn's, fold by fold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

from orchestrator.probing import assign_folds
from orchestrator.tuning import neighbours
from orchestrator.tuning.neighbours import score_of_neighbours


@pytest.mark.parametrize("at_once", [2**24, 1000])
def test_they_are_those_of_scikit_learn(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_SIMILARITIES_AT_ONCE", at_once)
    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = pixels[:300], labels[:300].astype(np.int64)
    fold = assign_folds(labels, "single-label", None, 5, 0)
    features = torch.from_numpy(pixels).float()
    centred = pixels - pixels.mean(0)
    right, errors = [], []
    for number in range(5):
        train, test = fold != number, fold == number
        for model, kept in ((KNeighborsClassifier, right), (KNeighborsRegressor, errors)):
            near = model(10, metric="cosine", weights=lambda distance: 2 - distance)
            near.fit(centred[train], labels[train])
            predicted = near.predict(centred[test])
            kept += (predicted == labels[test]).tolist() if kept is right else (predicted - labels[test]).tolist()
    assert score_of_neighbours(features, labels, fold, "single-label", 10) == pytest.approx(np.mean(right), abs=0.01)
    numbers = labels.astype(np.float32)[:, None]
    r2 = 1 - np.mean(np.square(errors)) / labels.var()
    assert score_of_neighbours(features, numbers, fold, "regression", 1) == pytest.approx(r2, abs=0.01)


def test_labels_that_most_have() -> None:
    """Two clouds, each with a label of its own and one that all have."""
    torch.manual_seed(0)
    side = torch.arange(60) % 2
    features = torch.randn(60, 4) + 8 * side[:, None]
    targets = torch.stack([side, 1 - side, torch.ones(60)], 1).float().numpy()
    fold = assign_folds(targets, "multi-label", None, 5, 0)
    assert score_of_neighbours(features, targets, fold, "multi-label", 3) == 1


def test_fewer_samples_than_neighbours() -> None:
    features, labels = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]), np.array([0, 0, 1, 1])
    assert score_of_neighbours(features, labels, np.array([0, 1, 0, 1]), "single-label", 2) == 1
