from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from orchestrator.data.contents import fingerprint
from orchestrator.data.splits import balanced_subset, grouped, stratified

NAMES = ["a", "b", "c"]
PROPERTY = settings(max_examples=200, deadline=None, database=None, derandomize=True)
SEEDS = st.integers(0, 2**32)
CLASSES = st.lists(st.integers(0, 3), min_size=1, max_size=80).map(lambda one: np.array(one, dtype=np.int64))
"""A class for each sample, in any order; some classes may have none."""
CLASS_NAMES = ["a", "b", "猫", ""]


@st.composite
def fractions(draw: st.DrawFn) -> tuple[float, float]:
    """Of validation and test, as `Data` lets them through."""
    validation = draw(st.floats(0, 1, exclude_max=True))
    test = draw(st.floats(0, 1, exclude_max=True).filter(lambda test: validation + test < 1))
    return validation, test


@st.composite
def groups(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """(class, group) of each sample; groups are numbers from 0 without a gap."""
    y = draw(CLASSES)
    g = draw(st.lists(st.integers(0, 11), min_size=len(y), max_size=len(y)))
    return y, np.unique(g, return_inverse=True)[1].astype(np.int64)


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


# --- whatever the samples, the fractions and the seed ---


@PROPERTY
@given(y=CLASSES, fractions=fractions(), seed=SEEDS)
def test_each_class_is_split_by_the_fractions_to_within_a_sample(
    y: np.ndarray, fractions: tuple[float, float], seed: int
) -> None:
    split = stratified(y, CLASS_NAMES, fractions, seed)
    assert split.shape == y.shape
    assert set(split.tolist()) <= {0, 1, 2}
    for label in set(y.tolist()):
        num_train, *nums = np.bincount(split[y == label], minlength=3).tolist()
        assert num_train >= 1
        wanted = [fraction * (y == label).sum() for fraction in fractions]
        for num, ideal in zip(nums, wanted, strict=True):
            assert num <= ideal + 0.5 + 1e-6
            if num_train > 1:  # else the class is too small for its share: training comes first
                assert num >= ideal - 0.5 - 1e-6
    assert (stratified(y, CLASS_NAMES, fractions, seed) == split).all()


@PROPERTY
@given(y=CLASSES, fractions=fractions(), seed=SEEDS, order=st.randoms(use_true_random=False))
def test_a_class_is_split_alike_whatever_the_others_are(
    y: np.ndarray, fractions: tuple[float, float], seed: int, order: object
) -> None:
    """However their samples lie between its own, which number it has, and without them."""
    split = stratified(y, CLASS_NAMES, fractions, seed)
    numbers = list(range(4))
    order.shuffle(numbers)  # type: ignore[attr-defined]
    renumbered = np.argsort(numbers)[y]
    assert (stratified(renumbered, [CLASS_NAMES[i] for i in numbers], fractions, seed) == split).all()
    by_class = np.argsort(y, kind="stable")
    assert (stratified(y[by_class], CLASS_NAMES, fractions, seed) == split[by_class]).all()
    for label in set(y.tolist()):
        alone = stratified(y[y == label], CLASS_NAMES, fractions, seed)
        assert (alone == split[y == label]).all()


@PROPERTY
@given(samples=groups(), fractions=fractions(), seed=SEEDS, order=st.randoms(use_true_random=False))
def test_groups_are_never_torn_whatever_the_order(
    samples: tuple[np.ndarray, np.ndarray], fractions: tuple[float, float], seed: int, order: object
) -> None:
    y, group = samples
    split = grouped(y, group, 4, fractions, seed)
    assert split.shape == y.shape
    assert set(split.tolist()) <= {0} | {side for side, fraction in zip((1, 2), fractions, strict=True) if fraction}
    for one in set(group.tolist()):
        assert len(set(split[group == one].tolist())) == 1
    assert (grouped(y, group, 4, fractions, seed) == split).all()
    shuffled = list(range(len(y)))
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert (grouped(y[shuffled], group[shuffled], 4, fractions, seed) == split[shuffled]).all()


@PROPERTY
@given(y=CLASSES, data=st.data(), seed=SEEDS)
def test_a_subset_is_as_even_as_the_classes_allow(y: np.ndarray, data: st.DataObject, seed: int) -> None:
    rows = np.flatnonzero(np.array(data.draw(st.lists(st.booleans(), min_size=len(y), max_size=len(y)))))
    num = data.draw(st.integers(0, len(rows)))
    subset = balanced_subset(y, CLASS_NAMES, rows, num, seed)
    assert len(subset) == num
    assert (np.diff(subset) > 0).all()
    assert set(subset) <= set(rows)
    there, chosen = (np.bincount(y[some], minlength=4) for some in (rows, subset))
    for label in range(4):  # a class with samples left over has as many as any other, to within one
        if chosen[label] < there[label]:
            assert chosen[label] >= chosen.max() - 1
    assert set(subset) <= set(balanced_subset(y, CLASS_NAMES, rows, num + 1, seed))


@PROPERTY
@given(y=CLASSES, seed=SEEDS, order=st.randoms(use_true_random=False))
def test_a_fingerprint_is_of_samples_and_not_of_their_order(y: np.ndarray, seed: int, order: object) -> None:
    random = np.random.default_rng(seed)
    contents, split = random.integers(0, 2**63, len(y)), random.integers(0, 3, len(y))
    rows = np.arange(len(y))
    first = fingerprint((contents, y), rows, split)
    shuffled = list(range(len(y)))
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert fingerprint((contents, y), rows[shuffled], split[shuffled]) == first
    changed = int(random.integers(len(y)))
    for columns, split_now in (
        ((np.where(rows == changed, contents + 1, contents), y), split),
        ((contents, np.where(rows == changed, y + 1, y)), split),
        ((contents, y), np.where(rows == changed, split + 1, split)),
    ):
        assert fingerprint(columns, rows, split_now) != first
