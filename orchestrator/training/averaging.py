"""A moving average of the weights, which often does better than the last ones: it is evaluated beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from orchestrator.training.checkpoint import Tensors

_SHORT = 10


class Average:
    """The exponential moving average of tensors (Polyak & Juditsky 1992), on their own device.

    It forgets sooner in the beginning, at (1 + steps) / (10 + steps), so that it holds nothing of how they began.
    """

    def __init__(self, tensors: Tensors, decay: float, kept: Tensors) -> None:
        """`tensors`: the module's own; `kept`: the average that a checkpoint has of them, {} to begin with them."""
        self._own = tensors
        self._decay = decay
        self.tensors: Tensors = {
            name: kept[name].to(tensor, copy=True) if name in kept else tensor.detach().clone()
            for name, tensor in tensors.items()
        }

    def update(self, num_steps: int) -> None:
        """Take in what the tensors have become after so many steps. Whole numbers (of batches seen) are copied."""
        weight = 1 - min(self._decay, (1 + num_steps) / (_SHORT + num_steps))
        moving = [name for name, tensor in self._own.items() if tensor.is_floating_point()]
        with torch.no_grad():
            torch._foreach_lerp_([self.tensors[name] for name in moving], [self._own[name] for name in moving], weight)
            for name in self._own.keys() - set(moving):
                self.tensors[name].copy_(self._own[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the module has the average for its tensors."""
        kept = {name: tensor.detach().clone() for name, tensor in self._own.items()}
        try:
            self._put(self.tensors)
            yield
        finally:
            self._put(kept)

    def _put(self, values: Tensors) -> None:
        with torch.no_grad():
            for name, tensor in self._own.items():
                tensor.copy_(values[name])
