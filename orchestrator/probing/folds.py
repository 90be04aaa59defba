"""Which fold of a cross-validation each sample is held out in: a function of targets, groups and a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.data import Ints
from orchestrator.errors import TrainingError


def assign_folds(
    targets: npt.NDArray[Any], task: str, groups: Sequence[Any] | npt.NDArray[Any] | None, folds: int, seed: int
) -> Ints:
    """The fold of each sample, int64 [samples], 0 to `folds` - 1; fewer folds where samples or groups are fewer.

    targets: int64 [samples], the class, or [samples, classes]. The folds hold classes in equal proportions, as far as
    that goes; a sample of several labels counts as one of its rarest. Samples of a group share a fold. The same for the
    same arguments, so that two sets of features are compared on the same folds. Raises `TrainingError` for one sample,
    or one group.
    """
    strata = _strata(targets, task)
    random = np.random.default_rng(seed)
    if groups is None:
        num = min(folds, len(strata))
        _require_two(num, "sample")
        # Dealt out like cards, class after class, so that no fold is larger than another by more than one.
        order = random.permutation(len(strata))
        order = order[np.argsort(strata[order], kind="stable")]
        fold = np.empty(len(strata), np.int64)
        fold[order] = np.arange(len(strata)) % num
        return fold
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    num = min(folds, int(group.max()) + 1)
    _require_two(num, "group")
    return _deal_groups(strata, group, num, random)[group]


def _deal_groups(strata: Ints, group: Ints, num: int, random: np.random.Generator) -> Ints:
    """The fold of each group: the largest first, each into the fold that has the least of what it holds."""
    counts = np.zeros((int(group.max()) + 1, int(strata.max()) + 1))
    np.add.at(counts, (group, strata), 1)
    share = counts / counts.sum(axis=0).clip(1)  # of each class
    fold_of = np.empty(len(counts), np.int64)
    held, num_groups = np.zeros((num, counts.shape[1])), np.zeros(num)
    order = random.permutation(len(counts))
    for one in order[np.argsort(-counts[order].sum(axis=1), kind="stable")]:
        after = ((held + share[one]) ** 2 - held**2).sum(axis=1)
        chosen = int(np.lexsort((num_groups, after))[0])
        fold_of[one] = chosen
        held[chosen] += share[one]
        num_groups[chosen] += 1
    return fold_of


def _strata(targets: npt.NDArray[Any], task: str) -> Ints:
    if task == "single-label":
        return np.asarray(targets, np.int64)
    if task == "regression":
        return np.zeros(len(targets), np.int64)
    positive = targets > 0.5
    rarity = np.where(positive, positive.sum(axis=0), len(targets) + 1)
    return np.asarray(np.where(positive.any(axis=1), rarity.argmin(axis=1), targets.shape[1]), np.int64)


def _require_two(num: int, what: str) -> None:
    if num < 2:
        raise TrainingError(
            f"cross-validation has one {what} alone",
            expected=f"2 {what}s or more, so that one can be held out",
            mend="give more labelled data" if what == "sample" else "give more groups, or none",
        )
