"""Method `lora` before the start: whether the backbone can have an adapter, and how many parameters that is."""

from __future__ import annotations

from orchestrator.backbone import Tensors
from orchestrator.errors import RefusedError
from orchestrator.job import Adapter, Training


def adapter_of(training: Training) -> Adapter:
    """The adapter that a job asks for; with alpha = 2 x rank what it adds counts twice, as is usual."""
    return Adapter(rank=training.lora_rank, alpha=training.lora_alpha or 2.0 * training.lora_rank)


def require_transformer(kind: str) -> None:
    """Raise `RefusedError` for a network that is none: `kind` is what its weights tell."""
    if kind != "transformer":
        raise RefusedError(
            "unsupported", "method lora adds to the matrices of a transformer, and this backbone's weights are of none",
            expected="attention: four and more square matrices of one shape, and hardly a kernel of a convolution",
            mend="train all of it (method full, lp-ft), or the last layer alone: method head",
        )  # fmt: skip


def num_adapted(adapter: Adapter, body: Tensors) -> int:
    """Parameters of the adapter, as far as the headers of the body's weights tell: of the matrices in its layers."""
    return sum(
        adapter.rank * sum(shape) for name, (_, shape) in body.items() if len(shape) == 2 and in_layers(name)
    )  # fmt: skip


def in_layers(name: str) -> bool:
    """Whether a module or tensor of that name stands in a list of layers: `encoder.layer.3.output.dense`."""
    return any(part.isdigit() for part in name.split("."))
