"""BatchNorm over logical microbatches: the same running statistics on any number of workers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orchestrator.network.network import batch_norms
from orchestrator.network.worker import Worker


class MicrobatchStatistics:
    """BatchNorm's running statistics over several microbatches: each starts from the same, their mean is kept.

    Without this they would depend on which microbatches a worker happens to have. One microbatch of one worker needs
    nothing; a worker that has none gets the statistics of the others.
    """

    def __init__(self, module: nn.Module, worker: Worker, num_microbatches: int) -> None:
        self._worker = worker
        shared = num_microbatches > 1 or worker.num_workers > 1
        self._layers = [layer for layer in batch_norms(module) if layer.training] if shared else []
        if self._layers:
            self._start = self._read()
            # Copies on the device: to read the numbers would wait for it in each step.
            self._counts = [counter.clone() for counter in self._counters()]
            # A row each; its last number says whether it was run.
            self._of_microbatches = self._start.new_zeros(num_microbatches, len(self._start) + 1)

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

    def of(self, microbatch: int) -> _OfMicrobatch:
        """A context in which one microbatch runs forward."""
        return _OfMicrobatch(self, microbatch)

    def average(self) -> None:
        """Keep the mean over the microbatches, in the order of their numbers."""
        if self._layers:
            # Rows of other workers are 0 here, so that the sum over workers is exact.
            self._worker.all_reduce_sum(self._of_microbatches)
            total = self._of_microbatches.sum(dim=0)
            self._write(total[:-1] / total[-1].clamp(min=1))
            for counter, before in zip(self._counters(), self._counts, strict=True):
                counter.copy_(before + 1)  # of steps, not of this worker's microbatches

    def _counters(self) -> list[Tensor]:
        """Of the steps that each layer has seen."""
        return [layer.num_batches_tracked for layer in self._layers if layer.num_batches_tracked is not None]


@dataclass
class _OfMicrobatch:
    statistics: MicrobatchStatistics
    microbatch: int

    def __enter__(self) -> None:
        if self.statistics._layers:
            self.statistics._write(self.statistics._start)

    def __exit__(self, *_: object) -> None:
        if self.statistics._layers:
            row = self.statistics._of_microbatches[self.microbatch]
            row[:-1], row[-1] = self.statistics._read(), 1
