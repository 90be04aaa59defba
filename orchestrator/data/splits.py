"""Which sample is for training, which for choosing the epoch, which for the final figures. Opens nothing.

`split_samples` does as the job says; `stratified`, `grouped` and `balanced_subset` are the ways, functions of a seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from orchestrator.data.contents import Ints
from orchestrator.data.ingested import IngestedTable, numbers
from orchestrator.errors import DataError
from orchestrator.job import SPLITS, VALIDATION_FRACTION, Data, shown

TRAIN, VALIDATION, TEST = 0, 1, 2
UNUSED = -1
"""The split of a sample that is left out."""


def split_samples(
    table: IngestedTable, rows: Ints, strata: Ints, names: Sequence[str], num_classes: int, ready_made: bool,
    spec: Data, fewest_validation: int = 0,
) -> Ints:  # fmt: skip
    """A split for each sample, int64 [samples]: TRAIN, VALIDATION, TEST, or UNUSED beyond `data.num_train`.

    rows: int64 [samples], those of the table that are samples; strata: int64 [samples], what the splits hold in equal
    proportions, each with its name. Ready-made splits stay; a validation split that they lack is taken of the training
    samples. `fewest_validation`: none smaller is taken where `spec` leaves its size open. Raises `DataError`
    where groups or samples are too few.
    """
    groups = numbers(table.ingested.group)[rows] if spec.group_column else None
    if ready_made:
        split = numbers(table.ingested.split)[rows].clip(TRAIN)
        if groups is not None:
            _refuse_torn_groups(table, rows, groups, split)
        has_validation = bool((split == VALIDATION).any())
        fractions = (0.0 if has_validation else _validation_fraction(spec, split, fewest_validation), 0.0)
    else:
        split = np.full(len(rows), TRAIN, dtype=np.int64)
        fractions = (_validation_fraction(spec, split, fewest_validation), spec.test_fraction)
    ours = np.flatnonzero(split == TRAIN)
    if any(fractions) and len(ours):
        if groups is not None:
            split[ours] = _split_groups(groups[ours], strata[ours], len(names), fractions, spec)
        else:
            split[ours] = stratified(strata[ours], names, fractions, spec.seed)
    if spec.num_train is not None:
        train = np.flatnonzero(split == TRAIN)
        if spec.num_train > len(train):
            raise DataError(
                f"data.num_train = {spec.num_train}, and there are {len(train)} training samples",
                mend=f"lower it to {len(train)} at most, or leave it out",
            )
        if spec.num_train < num_classes:
            raise DataError(
                f"data.num_train = {spec.num_train} leaves classes without a sample",
                expected=f"{num_classes} or more",
                mend=f"raise it to {num_classes} or more, or leave it out",
            )
        split[np.setdiff1d(train, balanced_subset(strata, names, train, spec.num_train, spec.seed))] = UNUSED
    return split


def _validation_fraction(spec: Data, split: Ints, fewest: int) -> float:
    if spec.validation_fraction is not None:
        return spec.validation_fraction
    return VALIDATION_FRACTION if VALIDATION_FRACTION * (split == TRAIN).sum() >= fewest else 0.0


def split_for_evaluation(table: IngestedTable, rows: Ints) -> Ints:
    """int64 [samples]: all are TEST; of data that came with a test split those alone, the others UNUSED."""
    split = numbers(table.ingested.split)[rows]
    split[split < 0] = TEST
    if (split == TEST).any():
        return np.where(split == TEST, TEST, UNUSED)
    return np.full(len(rows), TEST, dtype=np.int64)


def _refuse_torn_groups(table: IngestedTable, rows: Ints, groups: Ints, split: Ints) -> None:
    split_of = np.full(len(table.ingested.groups), UNUSED, dtype=np.int64)
    backwards = np.arange(len(groups))[::-1]
    split_of[groups[backwards]] = split[backwards]  # of each group's first row
    torn = np.flatnonzero(split_of[groups] != split)
    if len(torn):
        at = int(torn[0])
        row = int(rows[at])
        raise DataError(
            f"the group {table.group(row)!r} stands in {SPLITS[split_of[groups[at]]]} and in {SPLITS[split[at]]} "
            f"({table.place(row)})",
            expected="every group in one split",
            mend="move its samples to one split, or leave the splitting to us",
        )


def _split_groups(groups: Ints, strata: Ints, num_strata: int, fractions: tuple[float, float], spec: Data) -> Ints:
    """`grouped`, for groups of any numbers. Raises `DataError` where a split that was asked for gets none."""
    _, groups = np.unique(groups, return_inverse=True)
    num_groups = int(groups.max()) + 1
    num_splits = 1 + sum(fraction > 0 for fraction in fractions)
    if num_groups < num_splits:
        raise DataError(
            f"{shown(spec.path)} holds {num_groups} groups in {spec.group_column!r}, too few for {num_splits} splits",
            expected=f"{num_splits} groups or more",
            mend="add groups, or set data.validation_fraction and data.test_fraction to 0, both",
        )
    split = grouped(strata, groups, num_strata, fractions, spec.seed)
    for side, fraction in zip((VALIDATION, TEST), fractions, strict=True):
        if fraction and not (split == side).any():
            raise DataError(
                f"the groups in {spec.group_column!r} are too few or too large: none is left for {SPLITS[side]}",
                mend=f"raise data.{SPLITS[side]}_fraction, set it to 0, or split the data yourself",
            )
    return split


def stratified(labels: Ints, names: Sequence[str], fractions: tuple[float, float], seed: int) -> Ints:
    """A split for each sample, every class in the same proportion; `fractions` of validation and of test.

    labels: int64 [samples], numbers of `names`; the result is int64 [samples]. Every class keeps one training sample
    at least. Which samples of a class are chosen depends on its name and on their order alone: adding a class, or
    another order of the classes, does not move the samples of the others.
    """
    split = np.full(len(labels), TRAIN, dtype=np.int64)
    for label, name in enumerate(names):
        rows = np.flatnonzero(labels == label)
        order = _generator(seed, "split", name).permutation(rows)
        num_validation, num_test = (int(fraction * len(rows) + 0.5) for fraction in fractions)
        while num_validation + num_test >= len(rows) and num_validation + num_test > 0:
            num_validation, num_test = (
                (num_validation - 1, num_test) if num_validation >= num_test else (num_validation, num_test - 1)
            )
        split[order[:num_test]] = TEST
        split[order[num_test : num_test + num_validation]] = VALIDATION
    return split


def grouped(labels: Ints, groups: Ints, num_classes: int, fractions: tuple[float, float], seed: int) -> Ints:
    """A split for each sample, no group on two sides, the classes' proportions as near as that allows.

    labels: int64 [samples]; groups: int64 [samples], numbers from 0 without a gap; the result is int64 [samples], the
    same in any order of the samples. Greedy: the largest group first, each to the split that still misses most of
    what it holds (the idea of scikit-learn's StratifiedGroupKFold).
    """
    share = np.array([1 - sum(fractions), *fractions])
    target = np.outer(share, np.bincount(labels, minlength=num_classes)).astype(float)
    missing = target.copy()
    num_groups = int(groups.max()) + 1
    counts = np.zeros((num_groups, num_classes))
    np.add.at(counts, (groups, labels), 1)
    shuffled = _generator(seed, "groups").permutation(num_groups)
    order = shuffled[np.argsort(-counts[shuffled].sum(axis=1), kind="stable")]
    split_of = np.empty(num_groups, dtype=np.int64)
    for group in order:
        need = (counts[group] * missing / np.maximum(target, 1)).sum(axis=1)
        need[share == 0] = -np.inf
        split_of[group] = int(np.argmax(need))
        missing[split_of[group]] -= counts[group]
    return split_of[groups]


def balanced_subset(labels: Ints, names: Sequence[str], rows: Ints, num: int, seed: int) -> Ints:
    """`num` of `rows`, as many of each class as there can be. int64 [num], in ascending order.

    labels: int64 [samples], numbers of `names`; rows: int64, some of the samples. A larger `num` of the same seed
    holds the smaller one.
    """
    queues = []
    for label, name in enumerate(names):
        of_class = rows[labels[rows] == label]
        queues.append(list(_generator(seed, "subset", name).permutation(of_class)))
    chosen: list[int] = []
    while len(chosen) < min(num, len(rows)):
        for queue in queues:
            if queue and len(chosen) < num:
                chosen.append(int(queue.pop(0)))
    return np.array(sorted(chosen), dtype=np.int64)


def _generator(seed: int, *what: object) -> np.random.Generator:
    """Random numbers that depend on what they are for, not on the order of the calls."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))
