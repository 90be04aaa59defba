"""A head of our own on a body for which transformers has none: its output, pooled, and one linear layer.

Exported as the body in Hugging Face form, with the layer beside it in `head.safetensors`; the model card has the
lines that load both with transformers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from orchestrator.errors import TrainingError
from orchestrator.job import Plan
from orchestrator.network.config import make_config
from orchestrator.network.headers import held_tensors
from orchestrator.network.loading import load_body, new_layer, part_of, quiet
from orchestrator.network.network import Inputs, Network, StateDict

_NOTHING: tuple[str, ...] = ()
HEAD_FILE = "head.safetensors"
_POOLINGS = {
    "first": "output.last_hidden_state[:, 0]",
    "mean": "output.last_hidden_state.mean(dim=1)",
    "pooler": "output.pooler_output.flatten(1)",
    "summary": "output.summary",
}
_POOL: Mapping[str, Callable[[Any], Tensor]] = {
    "first": lambda output: output.last_hidden_state[:, 0],
    "mean": lambda output: output.last_hidden_state.mean(dim=1),
    "pooler": lambda output: output.pooler_output.flatten(1),
    "summary": lambda output: output.summary,
}
_USAGE = """\
{imports}
from safetensors.torch import load_file
from transformers import {architecture}

body = {architecture}.from_pretrained(".").eval()
head = load_file("{head_file}")
{prepare}
with torch.no_grad():
    output = body(**inputs)
logits = {pooled} @ head["weight"].T + head["bias"]
print(body.config.id2label[int(logits.argmax())])"""


class Pooled(nn.Module):
    """body -> pooled output -> logits."""

    def __init__(self, body: nn.Module, pool: str, width: int, num_classes: int) -> None:
        super().__init__()
        self.body = body
        self.classifier = new_layer(width, num_classes)
        self._pool = pool

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits, float [batch, classes]."""
        return self.classifier(pool(self.body(**inputs), self._pool))  # type: ignore[no-any-return]


def pool(output: Any, how: str) -> Tensor:
    """One vector a sample, float [batch, width], of a body's output; `how` is a key of `_POOL`."""
    return _POOL[how](output)


def build_pooled(
    plan: Plan, directory: Path, processor: Any, changes: Mapping[str, Any], example: Inputs, imports: str, prepare: str
) -> Network:
    """The body of the plan's row with a head of our own.

    `example` is one sample as the body takes it, for the width of its output. `imports` and `prepare` are
    Python for the model card: what makes `inputs` out of a file. Raises `WeightsError` where the checkpoint lacks
    a parameter of the body, `TrainingError` where the body cannot take the example.
    """
    chosen = getattr(transformers, plan.row.architecture)
    config = make_config(plan, changes)
    torch.manual_seed(plan.job.training.seed)
    if plan.weights == "random":
        body, unused = chosen(config), _NOTHING
    else:
        body, unused = load_body(plan, directory, chosen, config, {})
    body.eval()
    try:
        with torch.no_grad():
            # From headers alone nothing is run: some bodies keep what they computed, for all networks to come.
            width = 1 if held_tensors() is not None else pool(body(**example), plan.row.pool).shape[-1]
    except RuntimeError as error:  # convolutions of which a few pixels leave nothing
        shapes = {name: tuple(tensor.shape) for name, tensor in example.items()}
        raise TrainingError(
            f"{plan.backbone.source} cannot take input of the shape {shapes}: {error}",
            mend="choose a larger size, or leave the settings out and take the backbone's own",
        ) from error
    module = Pooled(body, plan.row.pool, width, len(plan.classes))
    if plan.weights == "trained":
        module.classifier.load_state_dict(load_file(directory / HEAD_FILE))

    def save(folder: Path, state_dict: StateDict) -> None:
        with quiet():
            body.save_pretrained(folder, state_dict=part_of(state_dict, "body"))
            processor.save_pretrained(folder)
        save_file({name: value.contiguous().cpu() for name, value in part_of(state_dict, "classifier").items()},
                  folder / HEAD_FILE, metadata={"format": "pt"})  # fmt: skip

    usage = _USAGE.format(
        imports=imports, architecture=plan.row.architecture, head_file=HEAD_FILE, prepare=prepare,
        pooled=_POOLINGS[plan.row.pool],
    )  # fmt: skip
    new = {"trained": (), "pretrained": ("classifier.weight", "classifier.bias"), "random": tuple(module.state_dict())}
    return Network(module, ("classifier",), new[plan.weights], unused, save, usage=usage)
