"""Which samples a step takes, and how they get onto the device.

A step's batch is a fixed list of microbatches, whatever the number of workers; what is random in one depends on (seed,
step, microbatch) alone, and the order of the samples on (seed, epoch).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import torch

from orchestrator.data import Ints, Samples
from orchestrator.features import Batch, Source, split_evenly
from orchestrator.network import seed_for

_BUCKET_STEPS = 32
_ORDER, _STEP = 1, 2  # what a random number is for

Key = tuple[int, ...]
"""(seed, step, microbatch)"""


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


class BatchLoader:
    """Microbatches on the worker's device.

    On a GPU the next ones are read, collated and pinned in a thread while a step runs. On a CPU the network has all
    cores already: there a batch is read when it is asked for.
    """

    def __init__(self, device: torch.device, resources: ExitStack, ahead: bool | None = None) -> None:
        """`ahead`: read ahead or not, whatever the device."""
        self._device = device
        self.mix: Callable[[Batch], Batch] | None = None
        """What is done to each batch of samples, on the CPU, with randomness of its own key."""
        self._ahead: dict[Key, Future[Batch | None]] = {}
        self._reader: ThreadPoolExecutor | None = None
        if device.type != "cpu" if ahead is None else ahead:
            self._reader = resources.enter_context(ThreadPoolExecutor(1))

    def prepare(self, source: Source, key: Key, rows: Ints) -> None:
        """Begin to read a microbatch that will be asked for."""
        if self._reader is not None:
            self._ahead[key] = self._reader.submit(self._read, source, key, rows)

    def load(self, source: Source, key: Key, rows: Ints) -> Batch | None:
        """The samples that can be read, None if there is none. Torch's random numbers are seeded by `key` after it.

        Raises `TrainingError` for a sample that cannot be read, unless such are left out.
        """
        if self._reader is None:
            seed_for(_STEP, *key)
            batch = self._mixed(source.batch(rows, train=True))
            return batch if batch is None else batch.to(self._device)
        if key not in self._ahead:
            self.prepare(source, key, rows)
        batch = self._ahead.pop(key).result()
        if self._device.type == "cpu":
            seed_for(_STEP, *key)
            return batch
        seed_for(_STEP, *key, where="device")
        return batch if batch is None else batch.to(self._device)

    def _read(self, source: Source, key: Key, rows: Ints) -> Batch | None:
        # Samples are changed at random by torch's generator of the CPU, which nothing else uses while the network is on
        # another device.
        seed_for(_STEP, *key, where="cpu")
        batch = self._mixed(source.batch(rows, train=True))
        if batch is None or self._device.type != "cuda":
            return batch
        inputs = {name: tensor.pin_memory() for name, tensor in batch.inputs.items()}
        return Batch(inputs, batch.targets.pin_memory(), batch.rows)

    def _mixed(self, batch: Batch | None) -> Batch | None:
        return batch if batch is None or self.mix is None else self.mix(batch)
