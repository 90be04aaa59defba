"""The optimizer's groups: whose rate is which, and which blocks lie above a parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.job import Job, Phase
from orchestrator.network import Network, make_optimizer
from orchestrator.network.optimizer import blocks_above

PHASE: dict[str, Any] = {
    "trains": "everything", "source": "samples", "epochs": 1, "num_steps": 1, "learning_rate": 1e-3,
    "head_learning_rate": 1e-2, "batch_norm": "none",
}  # fmt: skip


def network(module: nn.Module, head: str = "head") -> Network:
    return Network(module, (head,), (), (), lambda _folder, _state: None)


class Body(nn.Module):
    """An embedding, three blocks, a norm, a head; the blocks hold lists of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(2, 2)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)) for _ in range(3))
        self.norm = nn.LayerNorm(2)
        self.head = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def test_blocks_are_the_entries_of_the_outermost_list() -> None:
    above = blocks_above(network(Body()))
    assert not any(name.startswith("head") for name in above)
    assert above["embedding.weight"] == 3
    assert [above[f"layers.{i}.{j}.weight"] for i in range(3) for j in (0, 2)] == [2, 2, 1, 1, 0, 0]
    assert above["norm.weight"] == 0


def test_a_list_of_body_and_head_is_none_of_blocks() -> None:
    module = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    assert blocks_above(network(module, head="1")) == {
        "0.0.weight": 1, "0.0.bias": 1, "0.1.weight": 0, "0.1.bias": 0,
    }  # fmt: skip


def test_a_network_without_blocks_has_one_rate() -> None:
    module = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    assert set(blocks_above(network(module)).values()) == {0}


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_each_parameter_has_the_rate_of_its_place(decay: float) -> None:
    module = Body()
    training = Job(backbone="x", data={"path": "y"}, training={"weight_decay": 0.1}).training
    optimizer, named = make_optimizer(network(module), training, Phase(**PHASE, layer_decay=decay))
    rates, decays = {}, {}
    for group in optimizer.param_groups:
        for one in group["params"]:
            (name,) = [name for name, parameter in named.items() if parameter is one]
            rates[name], decays[name] = group["peak_lr"], group["weight_decay"]
    assert set(rates) == {name for name, _ in module.named_parameters()}
    assert rates["head.0.weight"] == 1e-2
    assert rates["norm.weight"] == rates["layers.2.0.weight"] == 1e-3
    assert rates["embedding.weight"] == pytest.approx(1e-3 * decay**3)
    assert rates["layers.0.2.bias"] == pytest.approx(1e-3 * decay**2)
    assert (decays["layers.0.0.weight"], decays["layers.0.0.bias"], decays["norm.weight"]) == (0.1, 0, 0)


def test_of_a_transformer_they_are_its_layers() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    with torch.device("meta"):
        module = BertForSequenceClassification(BertConfig(num_hidden_layers=3))
    above = blocks_above(network(module, head="classifier"))
    assert above["bert.embeddings.word_embeddings.weight"] == 3
    assert [above[f"bert.encoder.layer.{i}.output.dense.weight"] for i in range(3)] == [2, 1, 0]
    assert above["bert.pooler.dense.weight"] == 0
