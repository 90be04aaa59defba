"""The optimizer of the parameters that a job trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.job import Phase, Training
from orchestrator.network.network import Network, within


def make_optimizer(
    network: Network, training: Training, phase: Phase
) -> tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]:
    """The optimizer of a phase over the parameters that it trains, and these by name.

    Four groups at most: body and head have their own rates, and vectors (biases, norms) no weight decay.
    """
    named = {name: p for name, p in network.module.named_parameters() if p.requires_grad}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        groups.setdefault((within(name, network.head), parameter.ndim > 1), []).append(parameter)
    rates = {False: phase.learning_rate, True: phase.head_learning_rate}
    settings = [
        {
            "params": parameters,
            "lr": rates[in_head],
            "peak_lr": rates[in_head],
            "weight_decay": training.weight_decay if decays else 0.0,
        }
        for (in_head, decays), parameters in groups.items()
    ]
    return _optimizer(training, settings, fused=all(one.device.type == "cuda" for one in named.values())), named


def _optimizer(training: Training, groups: list[dict[str, Any]], fused: bool) -> torch.optim.Optimizer:
    """`fused`: one kernel for all parameters of a group, which CUDA has; on a CPU it is no faster."""
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
