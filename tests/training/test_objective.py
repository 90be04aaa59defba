"""Losses, predictions and scores of the three tasks, in whatever precision the network computes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from orchestrator.training.objective import Objective


def objective(task: str, weights: tuple[float, ...] = (), smoothing: float = 0.0) -> Objective:
    return Objective(task, torch.tensor(weights) if weights else None, smoothing, torch.zeros(3), torch.ones(3))


def test_weighted_cross_entropy_over_shards_is_torchs_over_the_batch() -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(12, 3), torch.randint(3, (12,))
    ours = objective("single-label", (0.5, 1.0, 4.0), smoothing=0.1)
    parts = [ours.loss(outputs[part], targets[part]) for part in (slice(5), slice(5, 12))]
    found = sum(float(loss) for loss, _ in parts) / sum(weight for _, weight in parts)
    weights = torch.tensor([0.5, 1.0, 4.0])
    assert found == pytest.approx(
        float(functional.cross_entropy(outputs, targets, weight=weights, label_smoothing=0.1)), rel=1e-5
    )


def test_regression_is_learnt_in_units_of_its_deviation() -> None:
    ours = Objective("regression", None, 0.0, torch.tensor([100.0]), torch.tensor([10.0]))
    outputs, targets = torch.tensor([[0.0], [1.0]]), torch.tensor([[100.0], [130.0]])
    assert ours.predict(outputs).flatten().tolist() == [100.0, 110.0]
    loss, weight = ours.loss(outputs, targets)
    assert (float(loss), weight) == (4.0, 2.0)
