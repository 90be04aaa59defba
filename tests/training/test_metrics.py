"""Figures against other libraries' and against what is known of them; losses of the three tasks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torch.nn import functional

from orchestrator.training.metrics import Predictions, Ranks, measure, wilson
from orchestrator.training.objective import Objective

CLASSES = ("a", "b", "c")


def made(targets: object, predicted: object, scores: object) -> Predictions:
    num = len(targets)  # type: ignore[arg-type]
    return Predictions(np.arange(num), targets, predicted, scores, np.full(num, 0.5, np.float32))  # type: ignore[arg-type]


def single(num: int, seed: int = 0) -> Predictions:
    random = np.random.default_rng(seed)
    targets = random.integers(3, size=num)
    logits = random.normal(size=(num, 3)).round(1) + 1.2 * np.eye(3)[targets]  # rounded: with ties
    scores = torch.from_numpy(logits).softmax(-1).float().numpy()
    return made(targets, scores.argmax(1), scores)


def test_one_class_a_sample_agrees_with_scikit_learn() -> None:
    given = single(400)
    found = measure("single-label", given, CLASSES)
    onehot = np.eye(3)[given.targets]
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(given.targets, given.predicted))
    assert found["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(given.targets, given.predicted, average="macro"))
    assert found["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(onehot, given.scores), abs=1e-6)
    assert found["average_precision"] == pytest.approx(
        sklearn_metrics.average_precision_score(onehot, given.scores), abs=1e-6
    )
    for name in ("accuracy", "macro_f1", "auroc", "average_precision"):
        low, high = found[f"{name}_95"]
        assert low < found[name] < high
        assert 0.01 < high - low < 0.2


def test_the_bootstraps_weighted_ranks_are_the_libraries_own() -> None:
    given = single(200, seed=3)
    weights = np.random.default_rng(1).integers(3, size=200).astype(float)
    drawn = np.repeat(np.arange(200), weights.astype(int))
    onehot = np.eye(3)[given.targets]
    auroc, precision = Ranks(given.scores, onehot.astype(bool)).measure(weights)
    assert auroc == pytest.approx(sklearn_metrics.roc_auc_score(onehot[drawn], given.scores[drawn]))
    assert precision == pytest.approx(sklearn_metrics.average_precision_score(onehot[drawn], given.scores[drawn]))


def test_the_interval_of_f1_is_as_wide_as_f1_varies() -> None:
    """Against fresh samples of the same kind, not against the bootstrap's own formula."""
    truth = [measure("single-label", single(300, seed=s), CLASSES)["macro_f1"] for s in range(60)]
    low, high = measure("single-label", single(300, seed=99), CLASSES)["macro_f1_95"]
    assert high - low == pytest.approx(np.subtract(*np.percentile(truth, (97.5, 2.5))), rel=0.4)


def test_a_class_without_samples_is_left_out_of_the_means() -> None:
    given = single(60)
    targets = np.where(given.targets == 2, 0, given.targets)
    found = measure("single-label", made(targets, given.predicted, given.scores), CLASSES)
    assert found["per_class"]["c"] is None
    assert found["auroc"] == pytest.approx(
        np.mean([sklearn_metrics.roc_auc_score(targets == i, given.scores[:, i]) for i in (0, 1)])
    )


def test_several_labels_agree_with_scikit_learn() -> None:
    random = np.random.default_rng(0)
    targets = (random.random((300, 3)) < (0.2, 0.5, 0.7)).astype(np.float32)
    scores = torch.from_numpy(random.normal(size=(300, 3)) + targets).sigmoid().float().numpy()
    found = measure("multi-label", made(targets, scores > 0.5, scores), CLASSES)
    assert found["exact_match"] == pytest.approx(np.mean(((scores > 0.5) == targets).all(axis=1)))
    assert found["macro_f1"] == pytest.approx(
        sklearn_metrics.f1_score(targets, scores > 0.5, average="macro"), abs=1e-6
    )
    assert found["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(targets, scores), abs=1e-6)
    assert found["average_precision"] == pytest.approx(
        sklearn_metrics.average_precision_score(targets, scores), abs=1e-6
    )
    for name in ("exact_match", "macro_f1", "auroc", "average_precision"):
        low, high = found[f"{name}_95"]
        assert low < found[name] < high
    assert np.array(found["confusion"]).sum() == 900


def test_numbers_agree_with_scikit_learn() -> None:
    random = np.random.default_rng(0)
    targets = (1000 + 50 * random.normal(size=(200, 2))).astype(np.float32)
    values = targets + (10 * random.normal(size=(200, 2))).astype(np.float32)
    found = measure("regression", made(targets, values, values), ("x", "y"))
    assert found["mae"] == pytest.approx(sklearn_metrics.mean_absolute_error(targets, values), rel=1e-4)
    assert found["r2"] == pytest.approx(sklearn_metrics.r2_score(targets, values), abs=1e-3)
    assert found["per_class"]["x"]["mae"] == pytest.approx(np.abs(targets - values)[:, 0].mean(), rel=1e-4)
    assert found["mae_95"][0] < found["mae"] < found["mae_95"][1]
    assert found["r2_95"][0] < found["r2"] < found["r2_95"][1]


def test_wilsons_interval_by_its_own_table() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Newcombe 1998, method 3
    assert wilson(0, 0) == (0.0, 1.0)


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
