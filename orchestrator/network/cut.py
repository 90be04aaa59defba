"""Where a network is cut into body and head, and the proof on real samples that the cut holds.

The features are what the head reads. Where its first module takes a whole sequence and reads one token of it, or the
mean over time, the features are that alone: so they have one size, whatever the length. Which form a network has
is not looked up but tried: each of a few forms is held against the whole network.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.errors import WeightsError
from orchestrator.network.network import Inputs, Network

TOLERANCE = 1e-4
"""Between head(body(x)) and the whole network in float32, relative to the largest logit."""

Form = Literal["chain", "mean"]
Pooling = Literal["", "first", "last", "end", "mean"]
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x, "relu": functional.relu, "tanh": torch.tanh, "gelu": functional.gelu,
    "mean": lambda x: x.flatten(2).mean(dim=-1),
}  # fmt: skip
"""What stands between two modules of a chain, and is no module of the head: distilbert's ReLU, albert's tanh,
poolformer's mean over the pixels."""


@dataclass(frozen=True)
class Cut:
    """One way to cut a network."""

    modules: tuple[str, ...]
    """Names of the modules behind the cut, in forward order."""
    form: Form
    """chain: one after the other; mean: side by side, each on an input of its own, and their mean is the output."""
    pooling: Pooling = ""
    """What of a sequence [batch, tokens, width] the head reads: the first token, the last one that is no padding, the
    one that stands last, or the mean over the tokens."""
    activation: str = ""
    """chain: a key of `_ACTIVATIONS`, between each two modules."""
    widths: tuple[int, ...] = ()
    """mean: the width of each module's input."""

    @property
    def point(self) -> str:
        """Where the features are taken, whatever comes after it."""
        where = self.modules[0] if self.form == "chain" else ", ".join(self.modules)
        return f"{self.pooling} into {where}".strip()


@dataclass(frozen=True)
class Body:
    """inputs -> features, float [batch, ...], every sample of one shape."""

    network: Network
    cut: Cut

    def __call__(self, inputs: Inputs) -> Tensor:
        return self.network.by_parts(self._of_part, inputs)

    def _of_part(self, inputs: Inputs) -> Tensor:
        cut = self.cut
        names = cut.modules[:1] if cut.form == "chain" else cut.modules
        read = _inputs_of(self.network, names, inputs)
        if cut.form == "mean":
            return torch.cat([read[name].flatten(1) for name in names], dim=1)
        return _POOLINGS[cut.pooling](read[names[0]], inputs, self.network.module)


@dataclass(frozen=True)
class Head:
    """features -> logits, float [batch, classes], with the network's own modules."""

    network: Network
    cut: Cut

    def __call__(self, inputs: Inputs) -> Tensor:
        """`inputs`: {"features": float32 [batch, ...]}"""
        features, cut = inputs["features"], self.cut
        modules = [self.network.module.get_submodule(name) for name in cut.modules]
        if cut.form == "mean":
            parts = torch.split(features, list(cut.widths), dim=1)
            return torch.stack([m(part) for m, part in zip(modules, parts, strict=True)]).mean(dim=0)
        for module in modules[:-1]:
            features = _ACTIVATIONS[cut.activation](module(features))
        logits: Tensor = modules[-1](features)
        return logits[:, 0] if logits.ndim == 3 and cut.pooling else logits


def find_cut(network: Network, inputs: Inputs) -> tuple[Cut | None, float]:
    """(the cut that holds on these inputs, its error); (None, the least error) where none does.

    The network is in eval mode, the inputs are float32. The head's weights are drawn large meanwhile: small ones, as
    it starts with, would make a wrong cut look right.
    """
    least_error = math.inf
    with torch.no_grad(), _drawn_large(*(network.module.get_submodule(name) for name in network.head)):
        whole = network.logits(inputs)
        scale = whole.abs().max().clamp(min=1e-6)
        for cut in _candidates(network, inputs):
            for variant in _with_activations(cut):
                error = _error(network, variant, inputs, whole, scale)
                if error <= TOLERANCE:
                    return variant, error
                least_error = min(least_error, error)
    return None, least_error


def _error(network: Network, cut: Cut, inputs: Inputs, whole: Tensor, scale: Tensor) -> float:
    """The largest difference from the whole network's logits, in parts of `scale`; infinite where none come out."""
    try:
        logits = Head(network, cut)({"features": Body(network, cut)(inputs)})
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError, ValueError, AttributeError, IndexError, AssertionError):
        return math.inf  # this module takes something else
    if not isinstance(logits, Tensor) or logits.shape != whole.shape:
        return math.inf
    error = float((whole - logits).abs().max() / scale)
    return error if math.isfinite(error) else math.inf


def _candidates(network: Network, inputs: Inputs) -> Iterator[Cut]:
    """The cuts that the shapes allow, the likeliest first."""
    reached = _reached(network, _a_part(network, inputs))
    names = tuple(name for name in network.head if name in reached)
    yield from _cuts(network, inputs, names, reached)
    read = tuple(name for name in names if _is_read(network, inputs, name)) if len(names) > 1 else names
    if read != names:
        yield from _cuts(network, inputs, read, reached)


def _cuts(network: Network, inputs: Inputs, names: tuple[str, ...], reached: Mapping[str, Tensor]) -> Iterator[Cut]:
    if not names:
        return
    first = reached[names[0]]
    if first.ndim == 3:
        for pooling in _POOLINGS_TRIED:
            yield Cut(names, "chain", pooling)
    if not (first.ndim == 3 and _differ_in_length(network, inputs)):
        yield Cut(names, "chain")
    if len(names) > 1:
        yield Cut(names, "mean", widths=tuple(reached[name].flatten(1).shape[1] for name in names))


def _is_read(network: Network, inputs: Inputs, name: str) -> bool:
    """Whether the logits depend on a module at all (those of big_bird do not on its pooler, which is called)."""
    before = network.logits(inputs)
    with _drawn_large(network.module.get_submodule(name), seed=1):
        return not torch.equal(before, network.logits(inputs))


def _with_activations(cut: Cut) -> Iterator[Cut]:
    for activation in _ACTIVATIONS if cut.form == "chain" and len(cut.modules) > 1 else ("",):
        yield Cut(cut.modules, cut.form, cut.pooling, activation, cut.widths)


def _differ_in_length(network: Network, inputs: Inputs) -> bool:
    return network.parts is not None or "attention_mask" in inputs


def _a_part(network: Network, inputs: Inputs) -> Inputs:
    return inputs if network.parts is None else network.parts(inputs)[0][1]


# --- what the head reads ---


class _ReachedError(Exception):
    """All that is wanted was seen: the rest of the network need not run."""


def _inputs_of(network: Network, names: tuple[str, ...], inputs: Inputs) -> dict[str, Tensor]:
    """The first argument of each of these modules while the network runs, up to the last of them."""
    first_arguments = _reached(network, inputs, names)
    for name in names:
        if name not in first_arguments:
            raise WeightsError(f"the model never called its head {name!r}")
    return first_arguments


def _reached(network: Network, inputs: Inputs, names: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The first argument of these modules, or of all of the head, that are called while the network runs."""
    names = names or network.head
    first_arguments: dict[str, Tensor] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], more: dict[str, Any]) -> None:
            first_arguments.setdefault(name, args[0] if args else next(iter(more.values())))
            if len(first_arguments) == len(names):
                raise _ReachedError

        return hook

    handles = [
        network.module.get_submodule(name).register_forward_pre_hook(look(name), with_kwargs=True) for name in names
    ]
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        with contextlib.suppress(_ReachedError):
            network.module(**inputs)
    return first_arguments


def _first(tokens: Tensor, _inputs: Inputs, _module: nn.Module) -> Tensor:
    return tokens[:, :1]


def _last(tokens: Tensor, inputs: Inputs, module: nn.Module) -> Tensor:
    """The last token that is no padding, as transformers' language models find it."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    padding = getattr(getattr(module, "config", None), "pad_token_id", None)
    if ids is not None and padding is not None and ids.shape[:2] == tokens.shape[:2]:
        kept = ids != padding
    elif mask is not None and mask.shape[:2] == tokens.shape[:2]:
        kept = mask != 0
    else:
        return tokens[:, -1:]
    at = (torch.arange(tokens.shape[1], device=tokens.device) * kept).argmax(dim=-1)
    return tokens[torch.arange(len(tokens), device=tokens.device), at].unsqueeze(1)


def _mean(tokens: Tensor, inputs: Inputs, module: nn.Module) -> Tensor:
    """Over the tokens that are no padding. A linear layer of the mean is the mean of the linear layer."""
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape[1] != tokens.shape[1]:
        shorter = getattr(module, "_get_feature_vector_attention_mask", None)
        mask = shorter(tokens.shape[1], mask) if shorter is not None else None
    if mask is None:
        return tokens.mean(dim=1, keepdim=True)
    weights = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True).clamp(min=1e-9)


_POOLINGS: Mapping[str, Callable[[Tensor, Inputs, nn.Module], Tensor]] = {
    "": lambda tokens, _inputs, _module: tokens, "first": _first, "last": _last,
    "end": lambda tokens, _inputs, _module: tokens[:, -1:], "mean": _mean,
}  # fmt: skip
_POOLINGS_TRIED: tuple[Pooling, ...] = ("first", "last", "end", "mean")


@contextlib.contextmanager
def _drawn_large(*modules: nn.Module, seed: int = 0) -> Iterator[None]:
    """With parameters as after long training; put back afterwards."""
    parameters = dict.fromkeys(parameter for module in modules for parameter in module.parameters())
    kept = [(parameter, parameter.detach().clone()) for parameter in parameters]
    source = torch.Generator().manual_seed(seed)
    try:
        for parameter, value in kept:
            noise = torch.randn(value.shape, generator=source).to(value)
            if value.ndim > 1:
                parameter.copy_(noise / math.sqrt(max(1, value[0].numel())))
            else:  # biases, and the scales of norms
                parameter.copy_(value + 0.3 * noise)
        yield
    finally:
        for parameter, value in kept:
            parameter.copy_(value)
