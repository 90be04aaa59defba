from __future__ import annotations

import numpy as np
import pytest

from orchestrator.data.splits import balanced_subset, grouped, stratified

NAMES = ["a", "b", "c"]


def labels(*counts: int) -> np.ndarray:
    return np.concatenate([np.full(n, i) for i, n in enumerate(counts)]).astype(np.int64)


def test_every_class_in_the_same_proportion() -> None:
    y = labels(100, 50, 10)
    split = stratified(y, NAMES, (0.1, 0.2), seed=0)
    for label, n in enumerate((100, 50, 10)):
        mine = split[y == label]
        assert ((mine == 1).sum(), (mine == 2).sum()) == (n // 10, n // 5)


def test_a_seed_gives_one_split_and_another_seed_another() -> None:
    y = labels(50, 50)
    assert (stratified(y, NAMES, (0.2, 0.2), 3) == stratified(y, NAMES, (0.2, 0.2), 3)).all()
    assert (stratified(y, NAMES, (0.2, 0.2), 3) != stratified(y, NAMES, (0.2, 0.2), 4)).any()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_class_keeps_a_training_sample(n: int) -> None:
    split = stratified(labels(n, 30), NAMES, (0.4, 0.5), 0)
    assert (split[:n] == 0).any()


def test_another_class_does_not_move_the_samples_of_the_first() -> None:
    few, more = labels(20, 20), labels(20, 20, 20)
    assert (stratified(few, NAMES, (0.2, 0.2), 0) == stratified(more, NAMES, (0.2, 0.2), 0)[:40]).all()


@pytest.mark.parametrize("seed", range(5))
def test_no_group_on_two_sides(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 25, 400)
    y = rng.integers(0, 3, 400)
    _, groups = np.unique(groups, return_inverse=True)
    split = grouped(y, groups, 3, (0.15, 0.15), seed)
    for group in range(groups.max() + 1):
        assert len(set(split[groups == group].tolist())) == 1
    for side, share in ((0, 0.7), (1, 0.15), (2, 0.15)):
        assert abs((split == side).mean() - share) < 0.06


def test_a_split_without_a_share_gets_no_group() -> None:
    split = grouped(labels(30, 30), np.arange(60) // 6, 2, (0.2, 0.0), 0)
    assert (split != 2).all()
    assert (split == 1).any()


def test_a_subset_is_balanced_and_the_larger_holds_the_smaller() -> None:
    y = labels(50, 5, 50)
    rows = np.arange(len(y))
    small = balanced_subset(y, NAMES, rows, 12, 0)
    large = balanced_subset(y, NAMES, rows, 30, 0)
    assert np.bincount(y[small]).tolist() == [4, 4, 4]
    assert set(small) <= set(large)
    assert len(large) == 30
    assert np.bincount(y[large])[1] == 5
    assert len(balanced_subset(y, NAMES, rows, 1000, 0)) == len(y)
