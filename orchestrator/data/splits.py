"""Which sample is for training, which for choosing the epoch, which for the final figures. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

TRAIN, VALIDATION, TEST = 0, 1, 2
Ints = npt.NDArray[np.int64]


def _generator(seed: int, *what: object) -> np.random.Generator:
    """Random numbers that depend on what they are for, not on the order of the calls."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def stratified(labels: Ints, names: Sequence[str], fractions: tuple[float, float], seed: int) -> Ints:
    """A split for each sample, every class in the same proportion; `fractions` of validation and of test.

    int64 [samples]. Every class keeps one training sample at least. Adding a class does not move the
    samples of the others.
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

    int64 [samples]. Greedy: the largest group first, each to the split that still misses most of what it
    holds (the idea of scikit-learn's StratifiedGroupKFold).
    """
    share = np.array([1 - sum(fractions), *fractions])
    target = np.outer(share, np.bincount(labels, minlength=num_classes)).astype(float)
    missing = target.copy()
    num_groups = int(groups.max()) + 1
    held = np.zeros((num_groups, num_classes))
    np.add.at(held, (groups, labels), 1)
    shuffled = _generator(seed, "groups").permutation(num_groups)
    order = shuffled[np.argsort(-held[shuffled].sum(axis=1), kind="stable")]
    side = np.empty(num_groups, dtype=np.int64)
    for group in order:
        need = (held[group] * missing / np.maximum(target, 1)).sum(axis=1)
        need[share == 0] = -np.inf
        side[group] = int(np.argmax(need))
        missing[side[group]] -= held[group]
    return side[groups]


def balanced_subset(labels: Ints, names: Sequence[str], rows: Ints, num: int, seed: int) -> Ints:
    """`num` of `rows`, as many of each class as there can be. int64 [num], in ascending order.

    A larger `num` of the same seed holds the smaller one.
    """
    queues = []
    for label, name in enumerate(names):
        mine = rows[labels[rows] == label]
        queues.append(list(_generator(seed, "subset", name).permutation(mine)))
    ingested: list[int] = []
    while len(ingested) < min(num, len(rows)):
        for queue in queues:
            if queue and len(ingested) < num:
                ingested.append(int(queue.pop(0)))
    return np.array(sorted(ingested), dtype=np.int64)
