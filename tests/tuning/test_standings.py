"""Whether two candidates differ by more than the noise, who leaves, and on how many samples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from orchestrator.tuning.standings import Standing, compare, leaving, sample_sizes


def standing(*folds: float) -> Standing:
    return Standing(100, float(np.mean(folds)), None, 1 - float(np.mean(folds)), folds, None)


def test_what_lies_below_in_every_fold_is_behind() -> None:
    difference, is_beyond = compare((0.90, 0.92, 0.91, 0.93, 0.89), (0.70, 0.73, 0.70, 0.74, 0.68))
    assert difference == pytest.approx(0.2)
    assert is_beyond


def test_folds_that_disagree_are_noise() -> None:
    difference, is_beyond = compare((0.90, 0.80, 0.90, 0.80, 0.90), (0.80, 0.90, 0.80, 0.90, 0.80))
    assert difference == pytest.approx(0.02)
    assert not is_beyond


def test_chance_is_rarely_taken_for_a_difference() -> None:
    """Two that are equally good, on folds of 100 samples: 5 % two-sided, and only what lies behind counts."""
    random = np.random.default_rng(0)
    draws = random.binomial(100, 0.8, size=(2000, 2, 5)) / 100
    share = np.mean([compare(one, other)[1] for one, other in draws.tolist()])
    assert share < 0.025


def test_the_same_scores_are_no_difference() -> None:
    assert compare((0.5, 0.5), (0.5, 0.5)) == (0.0, False)
    assert compare((0.6, 0.6), (0.5, 0.5))[1]  # the same in each fold


@pytest.mark.parametrize("folds", [(math.nan, 0.5), (0.5,)])
def test_what_is_not_defined_is_no_difference(folds: tuple[float, ...]) -> None:
    difference, is_beyond = compare(tuple(0.9 for _ in folds), folds)
    assert math.isnan(difference)
    assert not is_beyond


def test_of_the_worse_half_those_leave_that_are_clearly_behind() -> None:
    racing = {
        "best": standing(0.90, 0.91, 0.90, 0.92, 0.90),
        "near": standing(0.88, 0.92, 0.89, 0.91, 0.90),
        "noisy": standing(0.95, 0.70, 0.95, 0.75, 0.92),
        "far": standing(0.30, 0.31, 0.33, 0.30, 0.32),
    }
    assert leaving(racing) == ["far"]
    del racing["near"], racing["noisy"]
    assert leaving(racing) == ["far"]
    del racing["far"]
    assert leaving(racing) == []


def test_what_has_no_score_leaves() -> None:
    racing = {"one": standing(0.5, 0.5), "none": Standing(100, None, None, 2.0, (math.nan, math.nan), None)}
    assert leaving(racing) == ["none"]


def test_samples_are_nested_and_end_with_all() -> None:
    assert sample_sizes(200, 10, 10_000) == [200]
    assert sample_sizes(4_000, 10, 10_000) == [512, 1_536, 4_000]
    assert sample_sizes(50_000, 10, 10_000) == [512, 1_536, 4_608, 10_000]
    assert sample_sizes(50_000, 1_000, 10_000) == [10_000]
