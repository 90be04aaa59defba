"""Body and head: a network with its new last layer, and what of it is frozen.

The head is the modules whose shape depends on the number of classes, and every module with a parameter that
the checkpoint does not hold: no randomly initialised parameter is ever frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from orchestrator.job import Phase

Inputs = Mapping[str, Tensor]
"""What a model is called with: name -> tensor, first dimension the batch."""
StateDict = Mapping[str, Tensor]
"""A module's parameters and buffers by name, as `module.state_dict()` gives them."""


@dataclass
class Network:
    """A model with a head for the plan's classes. Its parameters are all those of `module`."""

    module: nn.Module
    """Called with the collate function's output as keywords; gives logits [batch, classes], float, alone or
    as the `.logits` of an output object."""
    head: tuple[str, ...]
    """Names of the submodules that `method: head` trains, in forward order."""
    new: tuple[str, ...]
    """Parameters and buffers that started from random values."""
    unused: tuple[str, ...]
    """Tensors of the checkpoint that this model has no place for (the head of its old task)."""
    save: Callable[[Path, StateDict], None]
    """Write the model as a Hugging Face directory: the configuration of `module`, and the tensors that are given by the
    names of `module.state_dict()`. They may lie elsewhere than in `module`, of which a worker may hold a part alone."""
    outputs: tuple[str, ...] = ()
    """The layers that give the logits, where they are not all of `head`."""
    parts: Callable[[Inputs], Sequence[tuple[Tensor, Inputs]]] | None = None
    """Where samples of a batch must not be computed together (lengths that padding would falsify): the batch as
    [(int64 indices, inputs), ...]. None: the batch as it is."""
    usage: str = ""
    """Python that loads and calls the saved model without this package, for the model card; '' where
    `transformers.pipeline` serves it by itself."""
    library: str = "transformers"
    """Which library that is, by the Hub's name."""

    def logits(self, inputs: Inputs) -> Tensor:
        """float [batch, classes]."""
        return self.by_parts(self._logits, inputs)

    def _logits(self, inputs: Inputs) -> Tensor:
        output = self.module(**inputs)
        return output if isinstance(output, Tensor) else output.logits

    def by_parts(self, function: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
        """float [batch, ...]: what `function` gives for the samples, those together that may be."""
        if self.parts is None:
            return function(inputs)
        indices, outputs = zip(*((index, function(part)) for index, part in self.parts(inputs)), strict=True)
        return torch.cat(outputs)[torch.cat(indices).argsort()]


def within(name: str, modules: Sequence[str]) -> bool:
    """Whether a parameter or module of that name is one of the modules, or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is of an adapter, and no backbone's own."""
    return ".lora_A." in name or ".lora_B." in name


def freeze(network: Network, phase: Phase) -> None:
    """Ask for gradients where the phase trains, nowhere else."""
    for name, parameter in network.module.named_parameters():
        moves = within(name, network.head) or (phase.trains == "adapter" and is_adapter(name))
        parameter.requires_grad_(phase.trains == "everything" or moves)


def set_mode(network: Network, phase: Phase, training: bool) -> None:
    """Train or eval mode. What is frozen stays in eval mode: dropout off, BatchNorm on its own statistics.

    A frozen body with an adapter has its dropout, as it has where all of it moves.

    In train mode too BatchNorm goes by its own statistics where a channel has one value alone, as in a batch of one
    sample: of one value there is no variance.
    """
    if phase.trains == "head":
        network.module.eval()
        for name in network.head:
            network.module.get_submodule(name).train(training)
    else:
        network.module.train(training)
        if phase.batch_norm == "frozen":
            for layer in batch_norms(network.module):
                layer.eval()
    for layer in batch_norms(network.module) if training else ():
        if layer.training and not hasattr(layer, _GOES_BY):
            setattr(layer, _GOES_BY, "the batch")
            layer.register_forward_pre_hook(_before)
            layer.register_forward_hook(_after, always_call=True)


_GOES_BY = "_orchestrator_goes_by"


def _before(layer: nn.Module, args: tuple[Any, ...]) -> None:
    if layer.training and args and args[0].numel() == args[0].shape[1]:
        layer.eval()
        setattr(layer, _GOES_BY, "its own statistics")


def _after(layer: nn.Module, _args: tuple[Any, ...], _output: object) -> None:
    if getattr(layer, _GOES_BY) == "its own statistics":
        layer.train()
        setattr(layer, _GOES_BY, "the batch")


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers that keep running statistics."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]
