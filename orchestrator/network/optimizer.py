"""The optimizer of the parameters that a job trains."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.job import Phase, Training
from orchestrator.network.network import Network, within


def make_optimizer(
    network: Network, training: Training, phase: Phase
) -> tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]:
    """The optimizer of a phase over the parameters that it trains, and these by name; a head that is fitted behind the
    steps is not among them.

    A group has one rate and one weight decay, which vectors (biases, norms) are spared. The head has a rate of its
    own; the body's is multiplied by `phase.layer_decay` for each block between a parameter and the head (layer-wise
    decay: Clark et al. 2020, arXiv 2003.10555).
    """
    named = {name: p for name, p in network.module.named_parameters() if p.requires_grad}
    if phase.loss == "contrastive":
        named = {name: p for name, p in named.items() if not within(name, network.head)}
    above = blocks_above(network) if phase.layer_decay < 1 else {}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        in_body = phase.learning_rate * phase.layer_decay ** above.get(name, 0)
        rate = phase.head_learning_rate if within(name, network.head) else in_body
        groups.setdefault((rate, parameter.ndim > 1), []).append(parameter)
    settings = [
        {"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": training.weight_decay if decays else 0.0}
        for (rate, decays), parameters in groups.items()
    ]
    fused = {one.device.type for one in named.values()} <= {"cpu", "cuda"}
    return _optimizer(training, settings, fused), named


def blocks_above(network: Network) -> dict[str, int]:
    """Each of the body's parameters by name, and how many blocks come behind the place where it lies.

    A block is an entry of a `ModuleList` or `Sequential` several entries of which have parameters, the outermost one on
    the way to the parameter: a transformer's layers, the stages of a convolutional network or their entries. Before and
    behind are as the modules are registered. What is before them all (embeddings, stem) has all of them above it; the
    last one, and what is behind it (norm, pooler), none.
    """
    body = [name for name, _ in network.module.named_parameters() if not within(name, network.head)]
    lists = {name for name, one in network.module.named_modules() if isinstance(one, nn.ModuleList | nn.Sequential)}
    entries: dict[str, dict[str, None]] = {}
    for name in body:
        for place, entry in _entries(name, lists):
            entries.setdefault(place, {}).setdefault(entry)
    met: dict[str, None] = {}
    num_met = {}
    for name in body:
        for place, entry in _entries(name, lists):
            if len(entries[place]) > 1:
                met.setdefault(entry)
                break
        num_met[name] = len(met)
    return {name: len(met) - num for name, num in num_met.items()}


def _entries(name: str, lists: Collection[str]) -> Iterator[tuple[str, str]]:
    """The lists of modules in which a parameter of that name lies, outermost first: (list, its entry), by name."""
    parts = name.split(".")
    for i in range(len(parts) - 1):
        place = ".".join(parts[:i])
        if place in lists:
            yield place, ".".join(parts[: i + 1])


def _optimizer(training: Training, groups: list[dict[str, Any]], fused: bool) -> torch.optim.Optimizer:
    """`fused`: one kernel for all parameters of a group, or on a CPU one pass over the memory of each."""
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=0.0, momentum=training.momentum, nesterov=training.momentum > 0, fused=fused or None
        )
    return torch.optim.AdamW(groups, lr=0.0, fused=fused or None)


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Move the parameters; a fused optimizer leaves them where the loss of their gradients is not finite.

    It looks on the GPU itself (`found_inf`, as GradScaler uses it), so that nobody waits for it to be told whose fault
    that is. With any other, who calls this has looked.
    """
    if optimizer.defaults.get("fused"):
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = (~loss.detach().isfinite()).float()  # type: ignore[attr-defined]
    optimizer.step()
