"""BatchNorm over logical shards: the same running statistics on any number of workers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orchestrator.network.model import batch_norms
from orchestrator.network.worker import Worker


class ShardStatistics:
    """BatchNorm's running statistics over several shards: each starts from the same, their mean is kept.

    Without this they would depend on which shards a worker happens to have. One shard needs nothing.
    """

    def __init__(self, module: nn.Module, worker: Worker, num_shards: int) -> None:
        self._worker = worker
        self._layers = [layer for layer in batch_norms(module) if layer.training] if num_shards > 1 else []
        if self._layers:
            self._start = self._read()
            self._counts = [int(layer.num_batches_tracked or 0) for layer in self._layers]
            self._of_shards = self._start.new_zeros(num_shards, len(self._start))
            self._mine = self._start.new_zeros(num_shards)

    def _read(self) -> Tensor:
        return torch.cat(
            [t.reshape(-1) for layer in self._layers for t in (layer.running_mean, layer.running_var) if t is not None]
        )

    def _write(self, flat: Tensor) -> None:
        at = 0
        for layer in self._layers:
            for tensor in (layer.running_mean, layer.running_var):
                if tensor is not None:
                    tensor.copy_(flat[at : at + tensor.numel()].view_as(tensor))
                    at += tensor.numel()

    def of(self, shard: int) -> _OfShard:
        """A context in which one shard runs forward."""
        return _OfShard(self, shard)

    def average(self) -> None:
        """Keep the mean over the shards, in the order of their numbers."""
        if self._layers:
            # Rows of other workers are 0 here, so that the sum over workers is exact.
            self._worker.add_up(self._of_shards)
            self._worker.add_up(self._mine)
            self._write(self._of_shards.sum(dim=0) / self._mine.sum().clamp(min=1))
            for layer, count in zip(self._layers, self._counts, strict=True):
                if layer.num_batches_tracked is not None:
                    layer.num_batches_tracked.fill_(count + 1)  # of steps, not of this worker's shards


@dataclass
class _OfShard:
    statistics: ShardStatistics
    shard: int

    def __enter__(self) -> None:
        if self.statistics._layers:
            self.statistics._write(self.statistics._start)

    def __exit__(self, *_: object) -> None:
        if self.statistics._layers:
            self.statistics._of_shards[self.shard] = self.statistics._read()
            self.statistics._mine[self.shard] = 1
