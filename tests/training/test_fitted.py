"""Which features a fitted head goes by."""

from __future__ import annotations

import torch

from orchestrator.training.fitted import varying


def test_what_hardly_varies_counts_for_nothing() -> None:
    torch.manual_seed(0)
    features = torch.randn(50, 6) * torch.tensor([1.0, 0.2, 1e-2, 1e-9, 0.0, 1.0])
    features[:, 3] -= 8.7e-8
    assert varying(features).tolist() == [True, True, True, False, False, True]


def test_one_that_is_much_louder_silences_nobody() -> None:
    torch.manual_seed(0)
    features = torch.randn(50, 8)
    features[:, 0] *= 5000
    assert varying(features).all()


def test_of_features_that_never_vary_none_counts() -> None:
    assert not varying(torch.ones(5, 3)).any()
    assert not varying(torch.randn(1, 3)).any()
