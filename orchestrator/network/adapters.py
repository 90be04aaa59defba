"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on a frozen body, through peft; and their merging.

Which matrices get one is told by the built network: all linear layers of attention and MLP, since on attention alone
adapters learn less (Schulman et al. 2025, LoRA Without Regret).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from orchestrator.errors import WeightsError
from orchestrator.job import Adapter
from orchestrator.network.network import Network, is_adapter, within

_LAYERS = (nn.Linear, Conv1D)  # GPT-2 has its matrices in the latter


def adapt(network: Network, adapter: Adapter, seed: int) -> None:
    """Put an adapter beside each matrix in the body's layers, in place. What the network gives stays the same.

    The body's parameters keep their values, under names with `base_layer` in them; those of the adapter are new ones of
    the network. Raises `WeightsError` where the body has no such matrix.
    """
    from peft import LoraConfig
    from peft.mapping import inject_adapter_in_model

    names = list(_matrices(network))
    if not names:
        raise WeightsError(
            "the backbone has no linear layer that an adapter could stand beside", mend="train all of it: method full"
        )
    config = LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=0.0, bias="none",
        target_modules="|".join(re.escape(name) for name in names),
    )  # fmt: skip
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a Conv1D lies the other way round, which it then sees to
        inject_adapter_in_model(config, network.module)
    network.new = (*network.new, *(name for name, _ in network.module.named_parameters() if is_adapter(name)))


def adapted_modules(network: Network) -> list[str]:
    """Names of the modules that have an adapter, as the backbone has them."""
    return [name for name, module in network.module.named_modules() if hasattr(module, "lora_A")]


def merge(network: Network) -> None:
    """Add what the adapters add to the body's own matrices, and take them away: the network is as it was built."""
    for name in adapted_modules(network):
        layer = network.module.get_submodule(name)
        layer.merge()  # type: ignore[operator]
        above, _, last = name.rpartition(".")
        setattr(network.module.get_submodule(above), last, layer.get_base_layer())  # type: ignore[operator]
    for module in network.module.modules():
        if hasattr(module, "peft_config"):
            del module.peft_config
    network.new = tuple(name for name in network.new if not is_adapter(name))


def _matrices(network: Network) -> Iterator[str]:
    apart = [name for name, one in network.module.named_modules() if isinstance(one, nn.MultiheadAttention)]
    for name, module in network.module.named_modules():
        in_layers = any(part.isdigit() for part in name.split("."))
        # Torch's own attention takes the weights of its layers without calling them.
        if isinstance(module, _LAYERS) and in_layers and not within(name, (*network.head, *apart)):
            yield name
