"""A frozen body as machine code of its own, where the pass over the samples is long enough to pay for making it.

Compiling EfficientNet-Lite0 took 12 s and made it 1.24 times as fast on two cores: that pays back after a minute. What
is compiled is what ran, operation by operation, for inputs of one shape; so it is for inputs that are numbers alone
(images, spectrograms), not for tokens and masks, whose values may decide what runs. It is held against the body.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.errors import first_line
from orchestrator.network.network import Inputs

WORTH_S = 180.0
"""How long the body must be expected to run. A sixth less of it is more than twice what compiling takes."""
LEAST_GAIN = 1.05
TOLERANCE = 1e-4
"""Between the features, relative to the largest; of bfloat16 it is that number's own."""
_TOLERANCE_BF16 = 0.05

Function = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Compiled:
    """A body for inputs of one shape; others, as those of a last batch, take the way that was compiled from."""

    function: Callable[..., Tensor]
    shapes: dict[str, torch.Size]
    gain: float
    """How many times faster it is."""

    def fits(self, inputs: Inputs) -> bool:
        """Whether these are of the shape."""
        return {name: value.shape for name, value in inputs.items()} == self.shapes

    def __call__(self, inputs: Inputs) -> Tensor:
        """float [batch, ...]"""
        found: Tensor = self.function(*(inputs[name] for name in self.shapes))
        return found


def can_be_compiled(inputs: Inputs) -> bool:
    """Whether what runs depends on the shapes alone."""
    return all(value.is_floating_point() for value in inputs.values())


def compiled(body: Function, inputs: Inputs) -> Compiled | str:
    """The body for inputs like these; why not where that fails, gives something else, or is no faster.

    Called as the body will be: in its number format, without gradients, with its threads.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # noqa: PLC0415  # half a second of imports

    # It warns that CUDA is not there, on machines that have none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    names = list(inputs)
    values = [inputs[name] for name in names]
    try:
        graph = make_fx(lambda *some: body(dict(zip(names, some, strict=True))))(*values)
        freezing = {"freezing": True} if values[0].device.type == "cpu" else {}  # weights as constants, scales in them
        with torch._inductor.config.patch(freezing):
            function = torch.compile(graph, dynamic=False)
            found = function(*values)
    except Exception as error:  # a compiler that is not there, or a network that it cannot take: no loss
        return f"{type(error).__name__}: {first_line(error)}"
    expected = body(inputs)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"it gave {found.dtype} {list(found.shape)} for {expected.dtype} {list(expected.shape)}"
    tolerance = TOLERANCE if expected.dtype == torch.float32 else _TOLERANCE_BF16
    wrong = (found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-6)
    if not wrong <= tolerance:
        return f"it gave something else (by {float(wrong):.1g} of the largest feature)"
    gain = seconds_of(body, inputs) / seconds_of(lambda _: function(*values), inputs)
    shapes = {name: inputs[name].shape for name in names}
    if gain < LEAST_GAIN:
        return f"it was {gain:.2f} times as fast"
    return Compiled(function, shapes, gain)


def seconds_of(body: Function, inputs: Inputs, repeats: int = 3) -> float:
    """What one pass takes at best."""
    device = next(iter(inputs.values())).device
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        body(inputs)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        took.append(time.perf_counter() - began)
    return min(took)
