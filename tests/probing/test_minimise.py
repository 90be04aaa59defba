"""Several convex problems at once: each reaches its own minimum, whatever the others do."""

from __future__ import annotations

import torch
from torch import Tensor

from orchestrator.probing.minimise import minimise


def test_each_problem_reaches_its_own_minimum() -> None:
    """Quadratics of condition 1 to 100,000, one of them begun at its minimum, with no preconditioner to help."""
    torch.manual_seed(0)
    turns = torch.linalg.qr(torch.randn(3, 20, 20))[0]
    scales = torch.stack([torch.logspace(0, power, 20) for power in (0, 2, 5)])
    matrices = turns @ scales.diag_embed() @ turns.mT
    minima = torch.randn(3, 20)

    def function(points: Tensor) -> tuple[Tensor, Tensor]:
        away = points - minima
        gradients = torch.einsum("pij,pj->pi", matrices, away)
        return 1 + (away * gradients).sum(1) / 2, gradients

    start = torch.zeros(3, 20)
    start[0] = minima[0]
    found = minimise(function, start, lambda one: one, 1e-9, 1000)
    assert torch.equal(found[0], minima[0])
    assert (function(found)[0] < 1 + 1e-5).all()


def test_a_step_that_leads_out_of_the_numbers_is_shortened() -> None:
    """exp(x) - x from 30 on: its first step goes to minus 1e13, where nothing is finite."""

    def function(points: Tensor) -> tuple[Tensor, Tensor]:
        values = (points.exp() - points).sum(1)
        return torch.where(points[:, 0] < -1e3, torch.nan, values), points.exp() - 1

    found = minimise(function, torch.tensor([[30.0], [0.5]]), lambda one: one, 1e-7, 500)
    assert found.abs().max() < 1e-2
