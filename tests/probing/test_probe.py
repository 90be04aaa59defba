"""The linear probe: held against scikit-learn and numpy, and what it makes of little, odd and bad data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional

from orchestrator.errors import TrainingError
from orchestrator.probing import STRENGTHS, Probe, fit_layer, fit_probe


def digits(num: int) -> tuple[Tensor, Tensor]:
    """Pixels of the first digits, 0 to 16: float32 [num, 64], three of them constant; and their classes."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels[:num]).float(), torch.from_numpy(labels[:num])


def standardised(features: Tensor) -> np.ndarray:
    return np.asarray(StandardScaler().fit_transform(features.double().numpy()))


def chances(probe: Probe, features: Tensor) -> Tensor:
    return probe(features).softmax(-1)


@pytest.mark.parametrize("strength", [1.0, 0.01, 1e-4])
@pytest.mark.parametrize("num", [400, 40])
def test_it_is_logistic_regression(num: int, strength: float) -> None:
    """With more samples than features, and with fewer."""
    features, labels = digits(num)
    probe = fit_probe(features, labels, "single-label", num_classes=10, strengths=[strength])
    theirs = LogisticRegression(C=1 / (strength * num), tol=1e-8, max_iter=5000)
    theirs.fit(standardised(features), labels.numpy())
    expected = torch.from_numpy(theirs.predict_proba(standardised(features))).float()
    assert (chances(probe, features) - expected).abs().max() < 5e-3


def test_class_weights_count_in_the_mean() -> None:
    features, labels = digits(400)
    keep = (labels < 3) & ((labels > 0) | (torch.arange(400) < 60))
    features, labels = features[keep], labels[keep]
    weights = [4.0, 1.0, 0.5]
    probe = fit_probe(
        features, labels, "single-label", num_classes=3, class_weights=weights, strengths=[0.1]
    )  # fmt: skip
    total = float(torch.tensor(weights)[labels].sum())
    theirs = LogisticRegression(C=1 / (0.1 * total), class_weight=dict(enumerate(weights)), tol=1e-8, max_iter=5000)
    theirs.fit(standardised(features), labels.numpy())
    expected = torch.from_numpy(theirs.predict_proba(standardised(features))).float()
    assert (chances(probe, features) - expected).abs().max() < 5e-3


def test_several_labels_are_a_regression_each() -> None:
    features, labels = digits(400)
    targets = torch.stack([labels % 2, labels > 4, labels % 3 == 0], dim=1).float()
    weights = torch.tensor([1.0, 3.0, 0.5])
    probe = fit_probe(features, targets, "multi-label", num_classes=3, class_weights=weights, strengths=[0.01])
    for number in range(3):
        counted = torch.where(targets[:, number] > 0, weights[number], 1.0).numpy()
        theirs = LogisticRegression(C=1 / (0.01 * 400), tol=1e-8, max_iter=5000)
        theirs.fit(standardised(features), targets[:, number].numpy(), counted)
        expected = torch.from_numpy(theirs.predict_proba(standardised(features))[:, 1]).float()
        assert (probe(features)[:, number].sigmoid() - expected).abs().max() < 5e-3
    assert probe.figure == "macro_f1"


@pytest.mark.parametrize("num", [300, 40])
def test_numbers_are_a_ridge_regression_in_their_own_units(num: int) -> None:
    features, labels = digits(num)
    targets = torch.stack([labels.float(), 70_000 + 1_000 * (features[:, 20] - labels)], dim=1)
    probe = fit_probe(features, targets, "regression", num_classes=2, strengths=[0.1])
    x, y = standardised(features), targets.double().numpy()
    weight = np.linalg.solve(x.T @ x / num + 0.1 * np.eye(64), x.T @ (y - y.mean(0)) / num)
    assert np.allclose(probe(features).numpy(), x @ weight + y.mean(0), rtol=1e-4, atol=1e-4 * y.std(0).max())
    assert probe.score == pytest.approx(np.mean(1 - _squares(y, _of_held_out(probe)) / y.var(0)), abs=1e-6)


def _squares(y: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    return np.asarray(((y - predicted) ** 2).mean(0))


def _of_held_out(probe: Probe) -> np.ndarray:
    return np.asarray(probe.held_out.predicted, np.float64)


def test_it_is_no_worse_than_scikit_learn_chooses() -> None:
    """On samples that neither has seen; theirs with the same folds and a finer path."""
    features, labels = digits(1797)
    scaler = StandardScaler().fit(features[:1000])
    theirs = LogisticRegressionCV(
        Cs=10, cv=5, max_iter=2000, scoring="accuracy", l1_ratios=(0,), use_legacy_attributes=False
    )
    theirs.fit(scaler.transform(features[:1000]), labels[:1000].numpy())
    probe = fit_probe(features[:1000], labels[:1000], "single-label", num_classes=10)
    accuracy = float((probe(features[1000:]).argmax(1) == labels[1000:]).float().mean())
    assert accuracy >= theirs.score(scaler.transform(features[1000:]), labels[1000:].numpy())
    assert probe.score is not None
    assert probe.interval is not None
    assert probe.interval[0] < probe.score < probe.interval[1]
    assert probe.score == pytest.approx(np.mean(probe.fold_scores), abs=1e-6)


def test_a_layer_of_one_strength_is_the_probe_s_at_that_strength() -> None:
    features, labels = digits(200)
    weights = [1.0 + number % 3 for number in range(10)]
    probe = fit_probe(features, labels, "single-label", num_classes=10, class_weights=weights, strengths=[0.01])
    weight, bias = fit_layer(features, labels, num_classes=10, strength=0.01, class_weights=weights)
    assert torch.allclose(features @ weight.T + bias, probe(features), atol=2e-2)


@pytest.mark.parametrize("task", ["single-label", "regression"])
def test_no_strength_near_the_chosen_one_is_better(task: str) -> None:
    torch.manual_seed(0)
    features, labels = digits(150)
    targets = labels if task == "single-label" else torch.randn(150, 1) + features[:, 20:21]

    def tried(*strengths: float) -> Probe:
        num = 10 if task == "single-label" else 1
        return fit_probe(features, targets, task, num_classes=num, strengths=strengths or STRENGTHS)

    probe = tried()
    for step in (10, math.sqrt(10), 1 / math.sqrt(10), 0.1):
        other = tried(probe.strength * step)
        assert (probe.score or 0, -probe.loss) >= (other.score or 0, -other.loss - 1e-5)


def test_random_labels_score_as_chance_does() -> None:
    """Nothing of a sample's own label reaches its prediction, though every layer fits its own samples wholly."""
    torch.manual_seed(0)
    probe = fit_probe(torch.randn(300, 400), torch.arange(300) % 10, "single-label", num_classes=10)
    assert probe.interval is not None
    assert probe.interval[0] < 0.1 < probe.interval[1]


def test_the_same_call_gives_the_same_bits() -> None:
    features, labels = digits(200)
    one, other = (fit_probe(features, labels, "single-label", num_classes=10) for _ in range(2))
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)
    assert one.fold_scores == other.fold_scores


def test_scales_and_shifts_of_features_do_not_matter() -> None:
    features, labels = digits(200)
    torch.manual_seed(0)
    other = features * torch.logspace(-4, 4, 64) + torch.linspace(-10, 10, 64)
    one = fit_probe(features, labels, "single-label", num_classes=10)
    moved = fit_probe(other, labels, "single-label", num_classes=10)
    assert one.strength == moved.strength
    assert (chances(one, features) - chances(moved, other)).abs().max() < 0.02


def test_constant_features_weigh_nothing() -> None:
    """Also those that differ by rounding alone."""
    features, labels = digits(200)
    nearly = 1e6 + 1e-2 * torch.rand(200)
    probe = fit_probe(
        torch.cat([features, nearly[:, None], torch.zeros(200, 1)], 1), labels, "single-label", num_classes=10
    )
    constant = torch.cat([features.std(0) == 0, torch.tensor([True, True])])
    assert constant.sum() > 2
    assert (probe.weight[:, constant] == 0).all()
    assert probe.weight.isfinite().all()
    assert probe.score is not None
    assert probe.score > 0.8


def test_at_its_temperature_it_is_no_surer_of_what_it_was_fitted_to_than_of_others() -> None:
    features, labels = digits(60)
    probe = fit_probe(features, labels, "single-label", num_classes=10)
    logits = probe(features)
    assert probe.temperature > 1.5
    assert float(functional.cross_entropy(logits, labels)) < 0.6 * probe.loss
    assert float(functional.cross_entropy(logits / probe.temperature, labels)) == pytest.approx(probe.loss, rel=1e-4)


def test_with_labels_that_mean_nothing_some_direction_is_left() -> None:
    features, _ = digits(60)
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 10, 60))
    probe = fit_probe(features, labels, "single-label", num_classes=10, strengths=[1e-4])
    assert probe.loss > math.log(10)
    logits = probe(features) / probe.temperature
    assert float(functional.cross_entropy(logits, labels)) == pytest.approx(0.9 * math.log(10), rel=1e-4)


def test_numbers_have_no_temperature() -> None:
    features, labels = digits(60)
    probe = fit_probe(features, labels.float()[:, None], "regression", num_classes=1)
    assert probe.temperature == 1


def test_two_samples() -> None:
    """Each fold has one class: what is held out cannot be right, and the layer tells the two apart."""
    features = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    probe = fit_probe(features, torch.tensor([0, 1]), "single-label", num_classes=2)
    assert probe.score == 0
    assert probe.fold_scores == (0, 0)
    assert probe(features).argmax(1).tolist() == [0, 1]


def test_a_class_of_one_sample_and_one_of_none() -> None:
    features, labels = digits(100)
    labels = labels.clamp(max=7)
    labels[3] = 8
    probe = fit_probe(features, labels, "single-label", num_classes=10)
    assert probe.weight.shape == (10, 64)
    assert probe.held_out.predicted[3] != 8
    assert not (probe.held_out.predicted == 9).any()
    assert math.isfinite(probe.loss)
    assert int(probe(features[3:4]).argmax()) == 8


def test_one_class_alone() -> None:
    probe = fit_probe(torch.randn(9, 3), torch.ones(9).long(), "single-label", num_classes=3)
    assert probe.score == 1


def test_labels_that_no_sample_has() -> None:
    features, labels = digits(60)
    targets = torch.stack([labels > 4, labels < 0], dim=1).float()
    probe = fit_probe(features, targets, "multi-label", num_classes=2)
    assert (probe(features)[:, 1] < -2).all()
    none = fit_probe(features, torch.zeros(60, 2), "multi-label", num_classes=2)
    assert none.score is None
    assert none.interval is None
    assert all(math.isnan(one) for one in none.fold_scores)


def test_a_target_that_is_constant() -> None:
    features, labels = digits(60)
    probe = fit_probe(features, torch.stack([labels.float(), torch.full((60,), 7.0)], 1), "regression", num_classes=2)
    assert torch.allclose(probe(features)[:, 1], torch.tensor(7.0))
    assert probe.score is not None  # of the other one


def test_groups_are_held_out_whole() -> None:
    """Ten near copies of each of 30 digits, labelled by chance: copies in other folds would give the label away."""
    features, _ = digits(30)
    torch.manual_seed(0)
    copies = features.repeat_interleave(10, 0) + 0.01 * torch.randn(300, 64)
    labels = torch.randint(3, (30,)).repeat_interleave(10)
    torn = fit_probe(copies, labels, "single-label", num_classes=3)
    whole = fit_probe(copies, labels, "single-label", num_classes=3, groups=np.arange(30).repeat(10))
    assert torn.score == 1
    assert whole.score is not None
    assert whole.score < 0.7


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_named(bad: float) -> None:
    features, labels = digits(50)
    features[7, 3] = features[9, 1] = bad
    with pytest.raises(TrainingError, match="features of 2 samples are not finite, the first of sample 7"):
        fit_probe(features, labels, "single-label", num_classes=10)
    features, labels = digits(50)
    targets = labels.float()[:, None].clone()
    targets[4] = bad
    with pytest.raises(TrainingError, match="targets of 1 sample are not finite, the first of sample 4"):
        fit_probe(features, targets, "regression", num_classes=1)
