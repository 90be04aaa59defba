"""A frozen body as fast as the device runs it: copies for several threads, and torch.compile.

On a CPU each core has a body of its own, with the weights in common, and takes small batches: one batch split over two
cores leaves each waiting for the other after every layer. On two cores, EfficientNet-Lite0 at 96 px: 399 images a
second this way, 326 with one batch of 64 over both; a six-layer BERT: 354 glosses a second, and 265.

Compiling EfficientNet-Lite0 took 12 s and made it 1.24 times as fast on two cores: that pays back after a minute. What
is compiled is what ran, operation by operation, for inputs of one shape; so it is for inputs that are numbers alone
(images, spectrograms), not for tokens and masks, whose values may decide what runs. It is held against the body.

In bfloat16 the copies hold the weights of their large layers in it. Autocast would round them to the same numbers anew
for every batch: of a six-layer BERT 11 million for 16 texts.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from orchestrator.data import MAX_AT_ONCE
from orchestrator.errors import first_line
from orchestrator.network import Body, Inputs, with_threads
from orchestrator.store import Format

_MOST_BODIES = 8
"""More would wait for Python's lock; each has several cores then."""
_BATCH_OF_CORE: dict[Format, int] = {"float32": 32, "bfloat16": 64}
"""The faster one computes, the more samples it takes to outweigh what each layer costs besides: 5,000 digits and 3,000
glosses took 12.7 and 5.9 s in float32 (16: 12.8 and 6.1; 64: 11.2 and 6.0), on AVX2 14.2 and 8.4 (16: 14.8 and 8.7; 64:
13.8 and 9.4), 11.0 and 2.9 in bfloat16 (16: 12.2 and 3.7)."""
_IN_BFLOAT16 = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BODIES_OF_GPU = 2
"""While one waits for its features to arrive, the other's batch is there to compute."""

WORTH_S = 180.0
"""How long the body must be expected to run, to be compiled: that takes some 12 s, and saves about a sixth of it."""
LEAST_GAIN = 1.05
"""A compiled body that is not so many times as fast is not used."""
_TOLERANCE = 1e-4
_TOLERANCE_BF16 = 0.05
"""How far compiled features may be from the body's own, relative to the largest feature."""

T = TypeVar("T")
U = TypeVar("U")
V = TypeVar("V")
Function = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Bodies:
    """Copies of a body for threads: the same weights, modules of their own."""

    copies: Sequence[Body]
    cores: int
    """Of each, for what runs on the CPU."""
    batch_size: int
    """Of samples, at most."""


def bodies_for(
    body: Body, device: torch.device, threads: int | None = None, most: int | None = None, format: Format = "float32"
) -> Bodies:  # fmt: skip
    """As many copies as serve this device, for computing in that number format.

    `threads`: the cores of this worker, by default what torch is set to; `most`: so many copies, whatever would serve.
    """
    threads = threads or torch.get_num_threads()
    if device.type != "cpu":
        num = min(most or _BODIES_OF_GPU, _BODIES_OF_GPU if device.type == "cuda" else 1)
        return Bodies(_copies(body, num, format), threads, MAX_AT_ONCE)
    nums = range(1, min(threads, most or _MOST_BODIES) + 1)
    copies = _copies(
        body, max(nums, key=lambda num: (num * (threads // num), num)), format
    )  # the least cores left over
    cores = max(1, threads // len(copies))
    return Bodies(copies, cores, min(MAX_AT_ONCE, _BATCH_OF_CORE[format] * cores))


def _copies(body: Body, num: int, format: Format) -> list[Body]:
    """Copies of the body's modules around the same tensors, or around their bfloat16; in float32 the body is the first.

    A module that is called from two threads at once would mix up what its hooks see, and what it keeps on itself.
    """
    module = body.network.module
    rounded = _rounded(module) if format == "bfloat16" else {}
    copies = [] if rounded else [body]
    while len(copies) < num:
        tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())} | rounded
        try:
            copies.append(replace(body, network=replace(body.network, module=copy.deepcopy(module, tensors))))
        except (TypeError, RuntimeError, AttributeError, copy.Error):  # a module that holds what cannot be copied
            break
    return copies or [body]


def _rounded(module: nn.Module) -> dict[int, nn.Parameter]:
    """The id of each weight that only layers read which autocast runs in bfloat16 -> the same in bfloat16."""
    if any(isinstance(one, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) for one in module.modules()):
        return {}  # their fast path wants all weights in one number format
    others, weights = set(), {}
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if name == "weight" and isinstance(layer, _IN_BFLOAT16):
                weights[id(parameter)] = parameter
            else:
                others.add(id(parameter))
    return {
        number: nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)
        for number, weight in weights.items() if weight.dtype == torch.float32 and number not in others
    }  # fmt: skip


def passed(
    items: Iterable[T], load: Callable[[T], U], run: Callable[[Body, U], V], bodies: Bodies,
    num_loads: int = 1, loads_ahead: Callable[[], int] = lambda: 0,
) -> Iterator[tuple[T, U, V]]:  # fmt: skip
    """Each item in its turn, with what `load` gives for it, and what `run` gives for that.

    `load` is called ahead, in `num_loads` threads; `run` in as many as there are bodies. An error of either is raised
    here, at its item's turn. `loads_ahead`: so many more items are loaded before their turn.
    """
    free: queue.SimpleQueue[Body] = queue.SimpleQueue()
    for body in bodies.copies:
        free.put(body)

    def work(future: Future[U]) -> V:
        loaded = future.result()  # before a body is taken: they are for those whose samples are there
        body = free.get()
        try:
            return run(body, loaded)
        finally:
            free.put(body)

    num = len(bodies.copies)
    pending: deque[tuple[T, Future[U], Future[V]]] = deque()
    with (
        with_threads(),  # MKL has one number for all threads
        ThreadPoolExecutor(num_loads) as loader,
        ThreadPoolExecutor(num, initializer=torch.set_num_threads, initargs=(bodies.cores,)) as workers,
    ):
        try:
            for item in items:
                loading = loader.submit(load, item)
                pending.append((item, loading, workers.submit(work, loading)))
                while len(pending) > 2 * num + loads_ahead():
                    yield _first(pending)
            while pending:
                yield _first(pending)
        finally:
            for _, loading, working in pending:
                loading.cancel()
                working.cancel()
            # What waits for a sample whose loading was cancelled ends by itself.
            for _, _, working in pending:
                with contextlib.suppress(BaseException):
                    working.result()


def _first(pending: deque[tuple[T, Future[U], Future[V]]]) -> tuple[T, U, V]:
    item, loading, working = pending.popleft()
    result = working.result()
    return item, loading.result(), result


# --- torch.compile ---


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
        features: Tensor = self.function(*(inputs[name] for name in self.shapes))
        return features


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
            actual = function(*values)
    except Exception as error:  # a compiler that is not there, or a network that it cannot take: no loss
        return f"{type(error).__name__}: {first_line(error)}"
    expected = body(inputs)
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"it gave {actual.dtype} {list(actual.shape)} for {expected.dtype} {list(expected.shape)}"
    tolerance = _TOLERANCE if expected.dtype == torch.float32 else _TOLERANCE_BF16
    wrong = (actual.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-6)
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
