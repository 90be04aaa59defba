"""Losses, predictions and scores of the three tasks, in whatever precision the network computes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional

from orchestrator.tasks.objective import Objective


def objective(task: str, weights: tuple[float, ...] = (), smoothing: float = 0.0) -> Objective:
    return Objective(task, torch.tensor(weights) if weights else None, smoothing, torch.zeros(3), torch.ones(3))


def targets_of(task: str) -> torch.Tensor:
    torch.manual_seed(1)
    if task == "single-label":
        return torch.randint(3, (12,))
    return (torch.rand(12, 3) > 0.5).float() if task == "multi-label" else 100 + 30 * torch.randn(12, 3)


@pytest.mark.parametrize("weights", [(), (0.5, 1.0, 4.0)])
@pytest.mark.parametrize("task", ["single-label", "multi-label", "regression"])
def test_outputs_in_bf16_are_what_they_are_in_float32(task: str, weights: tuple[float, ...]) -> None:
    """As autocast gives them: only the outputs are rounded, nothing that is computed of them."""
    torch.manual_seed(0)
    rounded = torch.randn(12, 3).bfloat16().requires_grad_()
    exact = rounded.detach().float().requires_grad_()
    targets = targets_of(task)
    ours = dataclasses.replace(
        objective(task, weights, smoothing=0.1), mean=torch.full((3,), 100.0), std=torch.full((3,), 30.0)
    )
    for outputs in (rounded, exact):
        loss, weight = ours.loss(outputs, targets)
        (loss / weight).backward()
        assert (loss.dtype, weight.dtype) == (torch.float32, torch.float32)
    assert torch.equal(ours.loss(rounded, targets)[0], ours.loss(exact, targets)[0])
    assert rounded.grad is not None
    assert exact.grad is not None
    assert torch.equal(rounded.grad, exact.grad.bfloat16())
    for function in (ours.predict, ours.scores):
        assert torch.equal(function(rounded), function(exact))
        assert function(rounded).dtype == function(exact).dtype
    for function in (ours.num_right, ours.each_loss):
        assert torch.equal(function(rounded, targets), function(exact, targets))
    columns = zip(
        *(ours.prediction_fields(range(12), one.detach(), targets, 12) for one in (rounded, exact)), strict=True
    )
    for one, other in columns:
        assert np.array_equal(one, other)


@pytest.mark.parametrize("task", ["single-label", "multi-label", "regression"])
def test_nothing_that_a_step_adds_up_leaves_the_device(task: str) -> None:
    """Tensors without values stand for those of a GPU: reading a number off one raises."""
    targets = targets_of(task).to("meta")
    weights = torch.ones(3, device="meta")
    shift = torch.zeros(3, device="meta")
    ours = Objective(task, weights, 0.1, shift, shift + 1)
    outputs = torch.zeros(12, 3, device="meta", dtype=torch.bfloat16)
    for one in (*ours.loss(outputs, targets), ours.num_right(outputs, targets)):
        assert (one.device.type, one.shape, one.dtype) == ("meta", (), torch.float32)


def test_weighted_cross_entropy_over_microbatches_is_torchs_over_the_batch() -> None:
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


@pytest.mark.parametrize("weights", [(), (0.5, 1.0, 4.0)])
def test_the_contrastive_loss_is_that_of_khosla_et_al(weights: tuple[float, ...]) -> None:
    """Equation 2, sample by sample; one of the samples is the only one of its class."""
    torch.manual_seed(0)
    features, targets = torch.randn(9, 5, dtype=torch.float64), torch.tensor([0, 1, 0, 2, 1, 1, 0, 0, 1])
    z = features / features.norm(dim=1, keepdim=True)
    expected, total = 0.0, 0.0
    for i in range(9):
        weight = weights[int(targets[i])] if weights else 1.0
        others = [a for a in range(9) if a != i]
        alike = [p for p in others if targets[p] == targets[i]]
        below = sum(float((z[i] @ z[a] / 0.1).exp()) for a in others)
        expected -= weight * sum(np.log(float((z[i] @ z[p] / 0.1).exp()) / below) for p in alike) / max(1, len(alike))
        total += weight
    loss, weight = objective("single-label", weights).contrastive(features.view(9, 1, 5), targets)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(weight) == pytest.approx(total)


@pytest.mark.parametrize("targets", [[1], [0, 1, 2]])
def test_without_two_of_a_class_nothing_moves_and_nothing_breaks(targets: list[int]) -> None:
    features = torch.randn(len(targets), 4, requires_grad=True)
    loss, weight = objective("single-label").contrastive(features, torch.tensor(targets))
    loss.backward()
    assert (loss.item(), weight.item()) == (0.0, len(targets))
    assert features.grad is not None
    assert not features.grad.any()
