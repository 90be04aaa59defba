"""Which samples a step takes: each once an epoch, whatever the number of parts and workers; read ahead or not."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from hypothesis import given, settings, strategies as st

from orchestrator.data import Ints, Samples
from orchestrator.features import Batch, Source, split_evenly
from orchestrator.training.batches import BatchLoader, batches_of_pairs, epoch_batches, split_in_pairs


@dataclass
class Lengths:
    """Stands for a sample table, of which only the lengths are asked for."""

    num_bytes: Ints
    targets: Ints

    def order_by_length(self, rows: Ints) -> Ints:
        return rows[np.argsort(self.num_bytes[rows], kind="stable")]


@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(1, 300), num_steps=st.integers(1, 40), parts=st.integers(1, 7), workers=st.integers(1, 5),
    seed=st.integers(0, 3), epoch=st.integers(0, 3), bucketing=st.booleans(),
)  # fmt: skip
def test_each_sample_is_taken_once_an_epoch_whatever_computes_it(
    num: int, num_steps: int, parts: int, workers: int, seed: int, epoch: int, bucketing: bool
) -> None:
    num_steps = min(num, num_steps)
    rows = np.arange(1000, 1000 + num)
    lengths = cast(Samples, Lengths(np.random.default_rng(seed).integers(1, 99, 1000 + num), rows))
    batches = epoch_batches(lengths, rows, seed, epoch, num_steps, bucketing)
    again = epoch_batches(lengths, rows, seed, epoch, num_steps, bucketing)
    assert len(batches) == num_steps
    assert all(np.array_equal(one, other) for one, other in zip(batches, again, strict=True))
    sizes = {len(batch) for batch in batches}
    assert max(sizes) - min(sizes) <= 1
    taken: list[int] = []
    for batch in batches:
        microbatches = [split_evenly(batch, number, parts) for number in range(parts)]
        assert np.array_equal(np.concatenate(microbatches), batch)
        for rank in range(workers):  # as the loop shares them
            taken += [row for number in range(rank, parts, workers) for row in microbatches[number].tolist()]
    assert sorted(taken) == rows.tolist()


@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(1, 200), size=st.integers(2, 40), num_classes=st.integers(1, 60), seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)  # fmt: skip
def test_two_of_a_class_are_side_by_side_as_far_as_there_are_two(
    num: int, size: int, num_classes: int, seed: int, epoch: int
) -> None:
    rows, num_steps = np.arange(1000, 1000 + num), -(-num // size)
    targets = np.random.default_rng(seed + 9).integers(0, num_classes, 1000 + num)
    samples = cast(Samples, Lengths(np.zeros(0, np.int64), targets))
    batches = batches_of_pairs(samples, rows, seed, epoch, num_steps)
    again = batches_of_pairs(samples, rows, seed, epoch, num_steps)
    assert all(np.array_equal(one, other) for one, other in zip(batches, again, strict=True))
    assert len(batches) == num_steps
    assert all(0 < len(batch) <= size + size % 2 for batch in batches)
    assert sorted(np.concatenate(batches).tolist()) == rows.tolist()
    for batch in batches:
        for parts in (1, 2, 5):
            pieces = [split_in_pairs(batch, number, parts) for number in range(parts)]
            assert np.array_equal(np.concatenate(pieces), batch)
            assert all(len(piece) % 2 == 0 for piece in pieces[:-1])
    in_batches = sum(count // 2 for batch in batches for count in Counter(targets[batch].tolist()).values())
    assert in_batches == sum(count // 2 for count in Counter(targets[rows].tolist()).values())


def test_each_epoch_has_its_own_pairs() -> None:
    rows, targets = np.arange(40), np.arange(40) % 4
    samples = cast(Samples, Lengths(np.zeros(0, np.int64), targets))
    pairs = [
        {frozenset(pair) for batch in batches_of_pairs(samples, rows, 0, epoch, 5) for pair in batch.reshape(-1, 2)}
        for epoch in range(2)
    ]
    assert len(pairs[0] & pairs[1]) < 10  # of 20


class Noisy:
    """A source whose samples are changed at random, as augmentation does, by torch's generator of the CPU."""

    def batch(self, rows: Ints, train: bool) -> Batch | None:
        assert train
        if not len(rows):
            return None
        return Batch({"x": torch.rand(len(rows), 2)}, torch.from_numpy(rows), rows)


def test_what_is_read_ahead_is_what_would_have_been_read() -> None:
    source = cast(Source, Noisy())
    steps = [(0, step, microbatch) for step in range(4) for microbatch in range(2)]
    rows = {key: np.arange(3 * number, 3 * number + number % 3) for number, key in enumerate(steps)}
    loaded: dict[bool, list[Any]] = {}
    for ahead in (False, True):
        with ExitStack() as resources:
            loader = BatchLoader(torch.device("cpu"), resources, ahead)
            loaded[ahead] = []
            for key, following in zip(steps, [*steps[1:], None], strict=True):
                batch = loader.load(source, key, rows[key])
                loaded[ahead].append(None if batch is None else batch.inputs["x"])
                if following is not None:
                    loader.prepare(source, following, rows[following])
    assert [one is None for one in loaded[True]] == [one is None for one in loaded[False]]
    assert any(one is None for one in loaded[True])
    for one, other in zip(loaded[True], loaded[False], strict=True):
        assert one is None or torch.equal(one, other)
