"""Which of two networks is kept, by the validation samples that both have seen."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from orchestrator.tasks.choice import LOWEST, Comparison, compare, may_be_as_good, rank_of
from orchestrator.tasks.metrics import Predictions


def said(right: list[bool], loss: float = 1.0) -> Predictions:
    num = len(right)
    return Predictions(
        np.arange(num), np.zeros(num, np.int64), np.where(right, 0, 1), np.zeros((num, 0), np.float32),
        np.full(num, loss, np.float32),
    )  # fmt: skip


def pair(num: int, only_first: int, only_second: int) -> Comparison:
    both = num - only_first - only_second
    first = [True] * (both + only_first) + [False] * only_second
    second = [True] * both + [False] * only_first + [True] * only_second
    return compare("single-label", said(first), said(second))


def test_the_difference_and_its_noise_are_of_pairs() -> None:
    found = pair(1000, 10, 40)
    assert found.difference == pytest.approx(0.03)
    paired = np.array([-1] * 10 + [1] * 40 + [0] * 950)
    assert found.noise == pytest.approx(stats.sem(paired), rel=0.02)


@pytest.mark.parametrize(
    ("num", "worse", "better", "won"),
    [
        (1000, 10, 40, True),  # beyond noise
        (1000, 20, 23, False),  # many samples, no difference: the body as it was
        (1000, 40, 10, False),
        (50, 2, 8, True),
        (50, 3, 3, True),  # so few cannot tell; what the later phase usually gives does
        (50, 4, 3, True),
        (50, 9, 2, False),  # worse beyond noise
        (10, 0, 0, True),
    ],
)
def test_many_samples_decide_and_few_keep_away_what_is_worse(num: int, worse: int, better: int, won: bool) -> None:
    assert pair(num, worse, better).is_won is won


@pytest.mark.parametrize(("worse", "better", "won"), [(2, 8, True), (3, 3, False), (4, 3, False), (9, 2, False)])
def test_where_groups_are_kept_apart_few_samples_have_to_say_it_is_better(worse: int, better: int, won: bool) -> None:
    assert replace(pair(50, worse, better), groups_apart=True).is_won is won


@pytest.mark.parametrize(
    ("accuracy", "highest", "num", "may_be"),
    [
        (0.5, 0.6, 10, True),  # one sample of ten
        (0.4, 0.6, 10, False),
        (0.87, 0.9, 60, True),
        (0.85, 0.9, 60, False),
        (1.0, 1.0, 10, True),
        (0.9, 1.0, 10, False),  # nor is an accuracy of 1 without noise: 11 of 12
        (0.59, 0.6, 10_000, False),  # so many can tell
        (0.6, 0.6, 10_000, False),
    ],
)
def test_few_samples_cannot_tell_an_accuracy_from_the_highest(
    accuracy: float, highest: float, num: int, may_be: bool
) -> None:
    assert may_be_as_good("single-label", (accuracy, -0.5), (highest, -0.5), num) is may_be
    assert not may_be_as_good("regression", (0.0, -0.5), (0.0, -0.4), num)


def test_what_is_no_number_is_never_as_good() -> None:
    nothing = rank_of("single-label", {"validation_loss": math.nan, "validation_accuracy": 0.5})
    assert nothing == rank_of("single-label", {}) == LOWEST
    for highest in (LOWEST, (0.1, -2.0)):
        assert not may_be_as_good("single-label", nothing, highest, 10)


def test_no_difference_seen_in_few_samples_is_not_one_without_noise() -> None:
    assert pair(10, 0, 0).noise > 0.05


@pytest.mark.parametrize("task", ["multi-label", "regression"])
def test_where_there_is_no_accuracy_the_loss_is_compared_in_parts_of_it(task: str) -> None:
    def of(losses: list[float]) -> Predictions:
        num = len(losses)
        numbers = np.zeros((num, 2), np.float32)
        return Predictions(np.arange(num), numbers, numbers, numbers[:, :0], np.array(losses, np.float32))

    found = compare(task, of([2.0] * 400), of([1.0, 1.2] * 200))
    assert found.difference == pytest.approx(0.45, abs=1e-6)
    assert found.noise == pytest.approx(0.05 / 20, rel=0.01)
    assert found.is_won
    assert not compare(task, of([1.0, 1.2] * 200), of([2.0] * 400)).is_won
    assert compare(task, of([1.0]), of([0.5])).num_samples == 1


@pytest.mark.parametrize(
    ("task", "accuracy", "loss", "difference"),
    [("single-label", 0.5, 9.0, -0.25), ("regression", None, 1.5, 0.25), ("multi-label", 0.9, 3.0, -0.5)],
)
def test_a_later_epoch_is_compared_by_its_figures(
    task: str, accuracy: float | None, loss: float, difference: float
) -> None:
    kept = {"validation_accuracy": 0.75, "validation_loss": 2.0}
    found = pair(50, 2, 8).of_later(task, kept, {"validation_accuracy": accuracy, "validation_loss": loss})
    assert found.difference == pytest.approx(difference)
    assert (found.noise, found.num_samples) == (pair(50, 2, 8).noise, 50)
