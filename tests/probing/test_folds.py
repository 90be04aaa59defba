"""Which fold a sample is held out in: classes in proportion, groups whole, the same in every call."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from orchestrator.errors import TrainingError
from orchestrator.probing import assign_folds


@given(
    targets=st.lists(st.integers(0, 4), min_size=2, max_size=60), folds=st.integers(2, 6), seed=st.integers(0, 9)
)  # fmt: skip
@settings(deadline=None)
def test_a_class_is_spread_evenly(targets: list[int], folds: int, seed: int) -> None:
    labels = np.array(targets)
    fold = assign_folds(labels, "single-label", None, folds, seed)
    num = min(folds, len(targets))
    sizes = np.bincount(fold, minlength=num)
    assert len(sizes) == num
    assert sizes.max() - sizes.min() <= 1
    for one in set(targets):
        of_class = np.bincount(fold[labels == one], minlength=num)
        assert of_class.max() - of_class.min() <= 1
    assert (fold == assign_folds(labels, "single-label", None, folds, seed)).all()


@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 15)), min_size=2, max_size=80), seed=st.integers(0, 9)
)  # fmt: skip
@settings(deadline=None)
def test_no_group_is_torn_and_no_fold_empty(rows: list[tuple[int, int]], seed: int) -> None:
    labels, groups = np.array(rows).T
    num = min(5, len(set(groups.tolist())))
    if num < 2:
        with pytest.raises(TrainingError, match="one group alone"):
            assign_folds(labels, "single-label", groups, 5, seed)
        return
    fold = assign_folds(labels, "single-label", groups, 5, seed)
    assert set(fold.tolist()) == set(range(num))
    for one in set(groups.tolist()):
        assert len(set(fold[groups == one].tolist())) == 1


def test_groups_leave_the_classes_in_proportion() -> None:
    random = np.random.default_rng(0)
    groups = random.integers(60, size=1200)
    labels = (groups % 3 + (random.random(1200) < 0.1)) % 3
    fold = assign_folds(labels, "single-label", [f"person {one}" for one in groups], 5, 0)
    for one in range(3):
        share = np.bincount(fold[labels == one]) / (labels == one).sum()
        assert share.min() > 0.1
        assert share.max() < 0.3


def test_a_rare_label_is_in_every_fold() -> None:
    targets = np.zeros((100, 3))
    targets[:, 0] = 1
    targets[::10, 2] = 1
    targets[::25, 1] = 1
    fold = assign_folds(targets, "multi-label", None, 4, 0)
    assert (np.bincount(fold[targets[:, 1] == 1], minlength=4) == 1).all()
    assert np.bincount(fold[targets[:, 2] == 1], minlength=4).min() >= 2


def test_one_sample_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"one sample alone.*2 samples or more.*more labelled data"):
        assign_folds(np.zeros(1), "single-label", None, 5, 0)
