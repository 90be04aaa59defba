"""How parameters are distributed over the workers: what gradients, a checkpoint and an export are made of.

The loop knows none of this. `Replicated` is the only strategy now: every worker holds all of the network. One that
splits it has the same methods.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrator.errors import TrainingError
from orchestrator.network.network import Network
from orchestrator.network.worker import Worker

BUCKET_BYTES = 25 * 2**20
"""Of gradients that are exchanged at once: large enough for a network's bandwidth, small enough to begin early."""


class Strategy(Protocol):
    """What the loop needs of the way in which a network lies on the workers."""

    def reduction(self, parameters: Sequence[nn.Parameter]) -> GradientReduction:
        """The exchange of these parameters' gradients, for all steps; close it after the last."""

    def state(self, names: Iterable[str]) -> dict[str, Tensor]:
        """This worker's tensors of these names, themselves and no copies: what a checkpoint holds, and goes back into.

        Names are those of the module's parameters and buffers.
        """

    def full_state(self) -> Mapping[str, Tensor] | None:
        """The whole network's tensors by name on rank 0, for `Network.save`; None on the others. All call it."""

    def broadcast_new(self) -> None:
        """Give what started from random values the values that it has on rank 0. All call it, before the first step.

        Raises `TrainingError` where another worker has built another network.
        """


class Replicated:
    """Each worker holds all of the network. With one worker nothing is exchanged, and nothing is copied."""

    def __init__(self, network: Network, worker: Worker) -> None:
        self._network = network
        self._worker = worker

    def reduction(self, parameters: Sequence[nn.Parameter]) -> GradientReduction:
        return GradientReduction(parameters, self._worker.num_workers)

    def state(self, names: Iterable[str]) -> dict[str, Tensor]:
        module = self._network.module
        tensors = {**{name: one.data for name, one in module.named_parameters()}, **dict(module.named_buffers())}
        return {name: tensors[name] for name in names}

    def full_state(self) -> Mapping[str, Tensor] | None:
        return self._network.module.state_dict() if self._worker.rank == 0 else None

    def broadcast_new(self) -> None:
        if self._worker.num_workers == 1:
            return
        new = self.state(self._network.new)
        own = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in new.items()]
        first, *others = self._worker.all_gather(own)
        for rank, theirs in enumerate(others, 1):
            if theirs != first:
                odd = next(iter(set(theirs) ^ set(first)), theirs[0])
                raise TrainingError(
                    f"worker {rank} has built another network than worker 0: {odd[0]} {list(odd[1])} {odd[2]}",
                    expected="the same versions of this package, of transformers and of timm on all machines",
                )
        for bucket in _buckets(new.values(), BUCKET_BYTES):
            flat = _flat(bucket)
            dist.broadcast(flat, src=0)
            _put_into(bucket, flat)


class GradientReduction:
    """Gradients summed over the workers, in buckets, each exchanged as soon as it is complete, as DDP does.

        with strategy.reduction(parameters) as reduction:
            ...                                  # a step: backward passes of all microbatches but the last
            with reduction.overlapped():
                loss.backward()                  # of this worker's last microbatch
            reduction.begin()                    # on every worker, also on one that had no microbatch
            ...                                  # other exchanges, never between the two above
            reduction.finish(1.0 / weight)       # gradients are the sums over the workers, times that

    Exchanges begin in one order on all workers, whatever order gradients come in: a bucket waits for those before it.
    A parameter without a gradient brings zeros, so that all bring the same tensors; those for which no worker had one
    in the first step come last from then on, so that nothing waits for them. A gradient is copied into its bucket while
    it is in the processor's cache, and is a part of the bucket afterwards, so that nothing is copied back. With one
    worker there are neither buckets nor hooks.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], num_workers: int, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._parameters = list(parameters)
        self._bucket_bytes = bucket_bytes
        # The backward pass is through with the last layers first.
        ordered = self._parameters[::-1] if num_workers > 1 else []
        self._without: set[nn.Parameter] | None = set()  # None once the first step is over
        self._buckets: list[list[nn.Parameter]] = []
        self._bucket_of: dict[nn.Parameter, int] = {}
        # In their memory formats, which optimizers want of gradients.
        self._strides = {one: torch.empty_like(one, device="meta").stride() for one in ordered}
        self._put_in_order(ordered)
        self._hooks = [
            one.register_post_accumulate_grad_hook(self._is_ready)  # type: ignore[no-untyped-call]
            for one in ordered
        ]
        self._is_last = False
        self._waited_for: list[set[nn.Parameter]] = []
        self._flats: list[Tensor | None] = []  # of each bucket, once one of its gradients is in it
        self._parts: dict[nn.Parameter, Tensor] = {}  # of the buckets, in the parameters' shapes
        self._begun: list[Any] = []
        self._reset()

    def _put_in_order(self, ordered: Sequence[nn.Parameter]) -> None:
        self._buckets = _buckets(ordered, self._bucket_bytes)
        self._bucket_of = {parameter: i for i, bucket in enumerate(self._buckets) for parameter in bucket}

    def _put_unused_last(self) -> None:
        """In the order that all workers find, from what all of them had in the first step."""
        ordered = self._parameters[::-1]
        used = torch.tensor([parameter not in (self._without or ()) for parameter in ordered], dtype=torch.int32)
        used = used.to(ordered[0].device)
        dist.all_reduce(used)
        counts = used.tolist()
        self._put_in_order(
            [one for one, count in zip(ordered, counts, strict=True) if count]
            + [one for one, count in zip(ordered, counts, strict=True) if not count]
        )

    def _reset(self) -> None:
        self._waited_for = [set(bucket) for bucket in self._buckets]
        self._flats, self._parts, self._begun = [None] * len(self._buckets), {}, []

    @contextlib.contextmanager
    def overlapped(self) -> Iterator[None]:
        """A context for the backward pass after which this worker's gradients are whole."""
        self._is_last = True
        try:
            yield
        finally:
            self._is_last = False

    def _is_ready(self, parameter: Tensor) -> None:
        if not self._is_last:
            return
        assert isinstance(parameter, nn.Parameter)
        number = self._bucket_of[parameter]
        self._put_in(number, parameter)
        self._waited_for[number].discard(parameter)
        while len(self._begun) < len(self._buckets) and not self._waited_for[len(self._begun)]:
            self._begin_next()

    def _put_in(self, number: int, parameter: nn.Parameter) -> None:
        """A parameter's gradient into its bucket of that number, which is made for the first one."""
        if self._flats[number] is None:
            bucket = self._buckets[number]
            sizes = [one.numel() for one in bucket]
            flat = self._flats[number] = torch.empty(sum(sizes), dtype=parameter.dtype, device=parameter.device)
            for one, part in zip(bucket, torch.split(flat, sizes), strict=True):
                self._parts[one] = part.as_strided(one.shape, self._strides[one])
        part = self._parts[parameter]
        if parameter.grad is None:
            part.zero_()
        else:
            part.copy_(parameter.grad)

    def _begin_next(self) -> None:
        number = len(self._begun)
        if self._without is not None:
            self._without |= {parameter for parameter in self._buckets[number] if parameter.grad is None}
        for parameter in self._waited_for[number]:  # which the last backward pass did not come by
            self._put_in(number, parameter)
        flat = self._flats[number]
        assert flat is not None  # no bucket is empty
        self._begun.append(dist.all_reduce(flat, async_op=True))

    def begin(self) -> None:
        """Begin the exchanges that have not begun. No other exchange may come between the backward pass and this."""
        while len(self._begun) < len(self._buckets):
            self._begin_next()

    def finish(self, scale: float | Tensor) -> None:
        """Wait for all exchanges; each `parameter.grad` is then the sum over the workers, times `scale`."""
        self.begin()
        for flat, work in zip(self._flats, self._begun, strict=True):
            work.wait()
            assert flat is not None
            flat.mul_(scale)
        for parameter, part in self._parts.items():
            parameter.grad = part
        if not self._buckets:
            torch._foreach_mul_([_gradient(parameter) for parameter in self._parameters], scale)
        elif self._without is not None:
            self._put_unused_last()
        self._without = None
        self._reset()

    def close(self) -> None:
        """Wait for what has begun, and take the hooks off the parameters."""
        for work in self._begun:
            work.wait()
        self._begun = []
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> GradientReduction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:  # the others may never come
            for hook in self._hooks:
                hook.remove()


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _buckets(tensors: Iterable[Any], num_bytes: int) -> list[list[Any]]:
    """The tensors in their order, those together that fit into so many bytes and have one dtype and device."""
    buckets: list[list[Any]] = []
    size = 0
    for tensor in tensors:
        more = tensor.numel() * tensor.element_size()
        last = buckets[-1][0] if buckets else None
        if last is None or size + more > num_bytes or (tensor.dtype, tensor.device) != (last.dtype, last.device):
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += more
    return buckets


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _put_into(tensors: Sequence[Tensor], flat: Tensor) -> None:
    with torch.no_grad():
        for tensor, part in zip(tensors, torch.split(flat, [one.numel() for one in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))
