"""Figures against other libraries' and against what is known of them; every interval holds its figure."""

from __future__ import annotations

import json
import math

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from orchestrator.tasks.intervals import Ranks, wilson
from orchestrator.tasks.metrics import Predictions, compute_metrics

CLASSES = ("a", "b", "c")


def made(targets: object, predicted: object, scores: object) -> Predictions:
    num = len(targets)  # type: ignore[arg-type]
    return Predictions(np.arange(num), targets, predicted, scores, np.full(num, 0.5, np.float32))  # type: ignore[arg-type]


def single(num: int, seed: int = 0, apart: float = 1.2) -> Predictions:
    random = np.random.default_rng(seed)
    targets = random.integers(3, size=num)
    logits = random.normal(size=(num, 3)).round(1) + apart * np.eye(3)[targets]  # rounded: with ties
    scores = torch.from_numpy(logits).softmax(-1).float().numpy()
    return made(targets, scores.argmax(1), scores)


def test_one_class_a_sample_agrees_with_scikit_learn() -> None:
    given = single(400)
    found = compute_metrics("single-label", given, CLASSES)
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


@pytest.mark.parametrize(("name", "at_least"), [("average_precision", 0.85), ("auroc", 0.9), ("macro_f1", 0.9)])
def test_intervals_of_few_samples_hold_the_figure_of_many(name: str, at_least: float) -> None:
    """They should in 95 % of cases; percentiles of the resamples did in 82 % for average precision."""
    truth = compute_metrics("single-label", single(20_000, 1, apart=0.3), CLASSES)[name]
    intervals = [compute_metrics("single-label", single(30, s, apart=0.3), CLASSES)[f"{name}_95"] for s in range(2, 82)]
    assert sum(low <= truth <= high for low, high in intervals) >= at_least * len(intervals)


def test_the_interval_of_f1_is_as_wide_as_f1_varies() -> None:
    """Against fresh samples of the same kind, not against the bootstrap's own formula."""
    truth = [compute_metrics("single-label", single(300, seed=s), CLASSES)["macro_f1"] for s in range(60)]
    low, high = compute_metrics("single-label", single(300, seed=99), CLASSES)["macro_f1_95"]
    assert high - low == pytest.approx(np.subtract(*np.percentile(truth, (97.5, 2.5))), rel=0.4)


def test_a_class_without_samples_is_left_out_of_the_means() -> None:
    given = single(60)
    targets = np.where(given.targets == 2, 0, given.targets)
    found = compute_metrics("single-label", made(targets, given.predicted, given.scores), CLASSES)
    assert found["per_class"]["c"] is None
    assert found["auroc"] == pytest.approx(
        np.mean([sklearn_metrics.roc_auc_score(targets == i, given.scores[:, i]) for i in (0, 1)])
    )


def test_several_labels_agree_with_scikit_learn() -> None:
    random = np.random.default_rng(0)
    targets = (random.random((300, 3)) < (0.2, 0.5, 0.7)).astype(np.float32)
    scores = torch.from_numpy(random.normal(size=(300, 3)) + targets).sigmoid().float().numpy()
    found = compute_metrics("multi-label", made(targets, scores > 0.5, scores), CLASSES)
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
    targets = (1000 + 50 * random.normal(size=(200, 1))).astype(np.float32)
    values = targets + (10 * random.normal(size=(200, 1))).astype(np.float32)
    found = compute_metrics("regression", made(targets, values, values), ("x",))
    assert found["mae"] == pytest.approx(sklearn_metrics.mean_absolute_error(targets, values), rel=1e-4)
    assert found["rmse"] == pytest.approx(sklearn_metrics.root_mean_squared_error(targets.ravel(), values.ravel()))
    assert found["r2"] == pytest.approx(sklearn_metrics.r2_score(targets, values), abs=1e-6)
    assert found["scaled_mae"] == pytest.approx(found["mae"] / targets.astype(float).std())
    for name in ("mae", "r2", "scaled_mae"):
        assert found[f"{name}_95"][0] < found[name] < found[f"{name}_95"][1]


def test_targets_of_different_units_have_no_mae_in_common() -> None:
    """Grams beside kilometres: what is said over both does not change with the unit of one."""
    random = np.random.default_rng(0)
    targets = random.normal(size=(300, 2)).astype(np.float32)
    values = targets + random.normal(size=(300, 2)).astype(np.float32) * np.float32([0.1, 0.5])
    units = np.float32([1000, 0.001])
    small, large = (
        compute_metrics("regression", made(targets * by, values * by, values * by), ("weight", "way"))
        for by in (1, units)
    )
    for found in (small, large):
        assert (found["mae"], found["mae_95"], found["rmse"]) == (None, None, None)
    for name in ("r2", "scaled_mae"):
        assert small[name] == pytest.approx(large[name], rel=1e-4)
        assert small[f"{name}_95"] == pytest.approx(large[f"{name}_95"], rel=1e-3)
        assert small[name] == pytest.approx(np.mean([one[name] for one in small["per_class"].values()]))
    for i, name in enumerate(("weight", "way")):
        one, mean = large["per_class"][name], np.abs(targets - values)[:, i].mean() * units[i]
        assert one["mae"] == pytest.approx(mean, rel=1e-4)
        assert one["mae_95"][0] < one["mae"] < one["mae_95"][1]
        assert one["rmse"] > one["mae"]
    assert large["r2"] == pytest.approx(sklearn_metrics.r2_score(targets, values), abs=1e-4)


@pytest.mark.parametrize(("mean", "std"), [(1e6, 1.0), (0.0, 1e-5)])
def test_what_is_explained_of_numbers_far_from_zero_and_of_small_ones(mean: float, std: float) -> None:
    """Sums of squares in float32 lose the former, and a fixed tolerance takes the latter for constants."""
    random = np.random.default_rng(0)
    targets = (mean + std * random.normal(size=(100, 1))).astype(np.float32)
    values = (targets + std * random.normal(size=(100, 1))).astype(np.float32)
    found = compute_metrics("regression", made(targets, values, values), ("x",))
    assert found["r2"] == pytest.approx(sklearn_metrics.r2_score(targets.astype(float), values.astype(float)))
    assert found["r2_95"][0] < found["r2"] < found["r2_95"][1]


def test_a_target_without_variance_has_no_share_of_it() -> None:
    """In the whole split, and in resamples: `null`, where NaN would be no JSON."""
    targets = np.array([[0.3, 1], [0.3, 2], [0.3, 3]], np.float32)
    found = compute_metrics("regression", made(targets, targets, targets), ("same", "x"))
    assert found["per_class"]["same"] == {
        "mae": 0.0, "mae_95": [0.0, 0.0], "rmse": 0.0, "r2": None, "r2_95": None, "scaled_mae": None,
        "scaled_mae_95": None,
    }  # fmt: skip
    assert (found["r2"], found["r2_95"]) == (1.0, [1.0, 1.0])
    alone = compute_metrics("regression", made(targets[:, :1], targets[:, :1] + 1, targets[:, :1]), ("same",))
    assert (alone["r2"], alone["r2_95"]) == (None, None)
    two = compute_metrics("regression", made(targets[:2, 1:], targets[1:, 1:], targets[:2, 1:]), ("x",))
    assert two["r2"] == -3.0
    assert two["r2_95"][0] == pytest.approx(-3.0)


def test_a_label_that_a_split_lacks_is_left_out_of_f1_and_of_its_interval() -> None:
    """The third is never there and never predicted; two thirds of the rest would be outside of the interval."""
    targets = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]] * 25, np.float32)
    perfect = compute_metrics("multi-label", made(targets, targets > 0.5, targets), CLASSES)
    assert (perfect["macro_f1"], perfect["macro_f1_95"]) == (1.0, [1.0, 1.0])
    assert perfect["per_class"] == {"a": 1.0, "b": 1.0, "c": None}
    never = np.zeros_like(targets)
    missed = compute_metrics("multi-label", made(targets, never > 0, never), CLASSES)
    assert (missed["macro_f1"], missed["per_class"]["a"]) == (0.0, 0.0)
    nothing = compute_metrics("multi-label", made(never, never > 0, never), CLASSES)
    assert (nothing["macro_f1"], nothing["macro_f1_95"]) == (None, None)


@st.composite
def predictions(draw: st.DrawFn) -> tuple[str, Predictions, list[str]]:
    """Few samples of skewed classes, with ties, absent classes, constants, and now and then a number that is none."""
    task = draw(st.sampled_from(("single-label", "multi-label", "regression")))
    num, num_classes = draw(st.integers(1, 25)), draw(st.integers(2 if task == "single-label" else 1, 4))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread, shift = draw(st.sampled_from((0.0, 1e-6, 1.0))), draw(st.sampled_from((0.0, 1.0, 1e6)))
    scores = random.random((num, num_classes)).round(draw(st.integers(0, 8))).astype(np.float32)
    loss = random.random(num).astype(np.float32)
    names = [f"class {i}" for i in range(num_classes)]
    if task == "single-label":
        shares = random.dirichlet(np.full(num_classes, draw(st.sampled_from((0.05, 1.0)))))
        targets, predicted = random.choice(num_classes, size=num, p=shares), scores.argmax(axis=1)
    elif task == "multi-label":
        shares = random.random(num_classes) ** draw(st.sampled_from((1, 8)))
        targets, predicted = (random.random((num, num_classes)) < shares).astype(np.float32), scores > 0.5
    else:
        targets = (shift + spread * random.normal(size=(num, num_classes))).astype(np.float32)
        predicted = scores = (targets + spread * random.normal(size=targets.shape)).astype(np.float32)
        broken = draw(st.sampled_from((None, math.nan, math.inf, 3e38)))
        if broken is not None:
            predicted[0, 0] = loss[0] = broken
    return task, Predictions(np.arange(num), targets, predicted, scores, loss), names


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
@hypothesis.given(predictions())
def test_every_figure_lies_in_its_interval_and_is_json(drawn: tuple[str, Predictions, list[str]]) -> None:
    found = json.loads(json.dumps(compute_metrics(*drawn), allow_nan=False))
    for name in [name for name in found if f"{name}_95" in found]:
        value, interval = found[name], found[f"{name}_95"]
        assert interval is None or interval[0] <= value <= interval[1], name


def test_wilsons_interval_by_its_own_table() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Newcombe 1998, method 3
    assert wilson(0, 0) == (0.0, 1.0)
