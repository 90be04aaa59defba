"""Which samples a step takes, and how they get onto the device.

A step's batch is a fixed list of microbatches, whatever the number of workers; what is random in one depends on (seed,
step, microbatch) alone, and the order of the samples on (seed, epoch).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import torch

from orchestrator.data import Ints, Samples
from orchestrator.errors import RefusedError, TrainingError
from orchestrator.features import (
    STEP,
    Batch,
    Key,
    Read,
    ReadersLostError,
    Request,
    SampleSource,
    Source,
    read,
    ready_readers,
    split_evenly,
)
from orchestrator.network import seed_for

_BUCKET_STEPS = 32
_ORDER = 1  # what a random number is for


def epoch_batches(samples: Samples, rows: Ints, seed: int, epoch: int, num: int, length_bucketing: bool) -> list[Ints]:
    """The rows of each of `num` steps of an epoch: a permutation, and, where wanted, like lengths together.

    Those are sorted among a quarter of the epoch at most: length often tells the class, and batches of one class
    each learn badly.
    """
    random = np.random.default_rng((_ORDER, seed, epoch))
    order = rows[random.permutation(len(rows))]
    batches = [split_evenly(order, number, num) for number in range(num)]
    together = min(_BUCKET_STEPS, num // 4)
    if not length_bucketing or together < 2:
        return batches
    for start in range(0, num, together):
        window = batches[start : start + together]
        ordered = samples.order_by_length(np.concatenate(window))
        batches[start : start + together] = np.split(ordered, np.cumsum([len(one) for one in window])[:-1])
    return [batches[i] for i in random.permutation(num)]


def batches_of_pairs(samples: Samples, rows: Ints, seed: int, epoch: int, num: int) -> list[Ints]:
    """The same, in another permutation: two samples of one class side by side, as far as there are two.

    Of batches drawn at random a class would mostly have one sample, which nothing could be brought closer to.
    """
    random = np.random.default_rng((_ORDER, seed, epoch))
    order = rows[random.permutation(len(rows))]
    order = order[np.argsort(samples.targets[order], kind="stable")]
    _, first, sizes = np.unique(samples.targets[order], return_index=True, return_counts=True)
    within_class = np.arange(len(order)) - np.repeat(first, sizes)
    is_odd_one = (np.repeat(sizes, sizes) % 2 == 1) & (within_class == np.repeat(sizes, sizes) - 1)
    paired = np.concatenate([order[~is_odd_one], random.permutation(order[is_odd_one])])
    pairs = [paired[i : i + 2] for i in range(0, len(paired), 2)]
    shuffled = random.permutation(len(pairs))
    batches = [[pairs[i] for i in split_evenly(shuffled, number, num)] for number in range(num)]
    return [np.concatenate(sorted(some, key=len, reverse=True)) for some in batches]  # one that is alone comes last


def split_in_pairs(rows: Ints, number: int, num_parts: int) -> Ints:
    """`split_evenly` that tears no pair of those side by side."""
    num_pairs = -(-len(rows) // 2)
    return rows[number * num_pairs // num_parts * 2 : (number + 1) * num_pairs // num_parts * 2]


class BatchLoader:
    """Microbatches on the worker's device.

    On a GPU the next ones are read, collated and pinned in a thread while a step runs; where that is heavy, by the
    source's processes (`readers`). On a CPU the network has all cores already: there a batch
    is read when it is asked for.
    """

    def __init__(self, device: torch.device, resources: ExitStack, ahead: bool | None = None) -> None:
        """`ahead`: read ahead or not, whatever the device."""
        self._device = device
        self.mix: Callable[[Batch], Batch] | None = None
        """What is done to each batch of samples, on the CPU, with randomness of its own key."""
        self._ahead: dict[Key, Future[Read]] = {}
        self._reader: ThreadPoolExecutor | None = None
        if device.type != "cpu" if ahead is None else ahead:
            # One thread of torch's, as readers have: sums over many numbers depend on how many add them up.
            self._reader = resources.enter_context(
                ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
            )

    def num_ahead(self, source: Source, own: int = 1) -> int:
        """The steps, of so many microbatches each, that are worth to be prepared; 0 where nothing is read ahead."""
        if self._reader is None:
            return 0
        readers = ready_readers(source)
        return 1 if readers is None else -(-readers.num_ahead // max(1, own))

    def prepare(self, source: Source, key: Key, rows: Ints) -> None:
        """Begin to read a microbatch that will be asked for."""
        if self._reader is not None and key not in self._ahead:
            self._ahead[key] = self._begin(source, Request(rows, key, self.mix is not None))

    def load(self, source: Source, key: Key, rows: Ints) -> Batch | None:
        """The samples that can be read, None if there is none. Torch's random numbers are seeded by `key` after it.

        Raises `TrainingError` for a sample that cannot be read, unless such are left out.
        """
        request = Request(rows, key, self.mix is not None)
        if self._reader is None:
            seed_for(STEP, *key)
            batch = read(source, request, self.mix)
            return batch if batch is None else batch.to(self._device)
        self.prepare(source, key, rows)
        batch = self._got(source, self._ahead.pop(key), request)
        if self._device.type == "cpu":
            seed_for(STEP, *key)
            return batch
        seed_for(STEP, *key, where="device")
        return batch if batch is None else batch.to(self._device)

    def each(self, source: Source, pieces: Iterable[Ints]) -> Iterator[Batch | None]:
        """What can be read of each piece, one after the other, as it is: for evaluation."""
        if self._reader is None:
            for rows in pieces:
                batch = source.batch(rows, train=False)
                yield batch if batch is None else batch.to(self._device)
            return
        coming: deque[tuple[Request, Future[Read]]] = deque()
        remaining = iter(pieces)
        while True:
            for rows in itertools.islice(remaining, max(0, self.num_ahead(source) + 1 - len(coming))):
                request = Request(rows)
                coming.append((request, self._begin(source, request)))
            if not coming:
                return
            request, future = coming.popleft()
            batch = self._got(source, future, request)
            yield batch if batch is None else batch.to(self._device)

    def _begin(self, source: Source, request: Request) -> Future[Read]:
        readers = ready_readers(source)
        if readers is not None:
            return readers.begin(request)
        assert self._reader is not None
        return self._reader.submit(self._read, source, request)

    def _got(self, source: Source, future: Future[Read], request: Request) -> Batch | None:
        """What was read, once it is there; in the worker itself where its reader has died meanwhile."""
        try:
            batch, skipped = future.result()
            if skipped:
                raise ReadersLostError
        except (ReadersLostError, TrainingError, RefusedError):
            # The worker has the last word on a sample: what a script has set for its decoder is known here alone. It
            # waits for a store, too.
            assert self._reader is not None
            batch, skipped = self._reader.submit(self._read, source, request).result()
        if isinstance(source, SampleSource):
            source.skipped.update(skipped)
        return batch

    def _read(self, source: Source, request: Request) -> Read:
        # Samples are changed at random by torch's generator of the CPU, which nothing else uses while the network is on
        # another device.
        batch = read(source, request, self.mix)
        if batch is None or self._device.type != "cuda":
            return batch, {}
        inputs = {name: tensor.pin_memory() for name, tensor in batch.inputs.items()}
        return Batch(inputs, batch.targets.pin_memory(), batch.rows), {}
