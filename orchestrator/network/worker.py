"""One worker among many: its rank, its device, and what it exchanges with the others."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.errors import RefusedError
from orchestrator.job import Plan

_M_MMAP_MAX, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -4, -3, -1  # of glibc's malloc.h
_MMAP_THRESHOLD = 32 * 2**20
"""Up to which glibc raises the size from which on it gives memory back at once, as tensors of that size are freed."""


@dataclass(frozen=True)
class Worker:
    """This process among the workers: rank, device, and what they exchange. One worker alone exchanges nothing."""

    rank: int
    local_rank: int
    num_workers: int
    device: torch.device
    threads: int
    """Cores that this process may use."""

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over the workers, in place."""
        if self.num_workers > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_sums(self, *tensors: Tensor) -> list[Tensor]:
        """The sum over the workers of each of some flat tensors; those of one dtype and device go at once."""
        if self.num_workers == 1:
            return list(tensors)
        if any((one.dtype, one.device) != (tensors[0].dtype, tensors[0].device) for one in tensors):
            return [self.all_reduce_sum(one) for one in tensors]
        return list(torch.split(self.all_reduce_sum(torch.cat(tensors)), [len(one) for one in tensors]))

    def all_gather(self, value: Any) -> list[Any]:
        """Each worker's value, by rank, on all of them; all have to call it (all_gather_object)."""
        if self.num_workers == 1:
            return [value]
        values: list[Any] = [None] * self.num_workers
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Give all workers what the one of rank `source` has in the tensor."""
        if self.num_workers > 1:
            dist.broadcast(tensor, source)

    def barrier(self) -> None:
        """Until all workers are here."""
        if self.num_workers > 1:
            dist.barrier()


@contextlib.contextmanager
def start_worker(
    threads: int, device: torch.device, local_rank: int = 0, deterministic: bool = False
) -> Iterator[Worker]:
    """This process as a worker, until the context ends; then its settings are what they were before.

    Set are torch's threads, exact fp32 (no TF32), the memory allocator, the limit of open files; with `deterministic`,
    algorithms that give the same to the bit, where torch has them.
    """
    grouped = dist.is_available() and dist.is_initialized()
    with contextlib.ExitStack() as settings:
        settings.enter_context(with_threads(threads))
        settings.enter_context(_exact(deterministic))
        settings.enter_context(_many_files())
        settings.enter_context(_kept_memory())
        if device.type == "cuda":
            torch.cuda.set_device(device)
        yield Worker(
            rank=dist.get_rank() if grouped else 0,
            local_rank=local_rank,
            num_workers=dist.get_world_size() if grouped else 1,
            device=device,
            threads=threads,
        )


@contextlib.contextmanager
def with_threads(num: int | None = None) -> Iterator[None]:
    """Torch set to so many threads, and back to what it was, whatever was set meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(num or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def find_device(wanted: Literal["auto", "cpu", "gpu"]) -> torch.device:
    """The device of a process that Ray has given none. Raises `RefusedError` where a GPU is wanted and
    there is none.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if wanted == "gpu" and accelerator is None:
        raise RefusedError(
            "resources", "scaling.device = 'gpu', and torch finds none here", mend="use device auto or cpu"
        )
    if wanted == "cpu" or accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, 0) if accelerator.type == "cuda" else torch.device(accelerator.type)


@contextlib.contextmanager
def _exact(deterministic: bool) -> Iterator[None]:
    """fp32 is fp32, in stored features too, whatever the caller allows; who wants speed has bf16.

    What gives the same to the bit is slower on a GPU, and is taken on request alone.
    """
    backends = torch.backends
    parts = [
        backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn,  # type: ignore[attr-defined]
        backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn,  # type: ignore[attr-defined]
    ]  # fmt: skip
    precisions = [part.fp32_precision for part in parts]
    chosen, mode = (backends.cudnn.deterministic, backends.cudnn.benchmark), torch.get_deterministic_debug_mode()
    for part in parts:
        part.fp32_precision = "ieee"
    backends.cudnn.deterministic, backends.cudnn.benchmark = deterministic, False
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        for part, precision in zip(parts, precisions, strict=True):
            part.fp32_precision = precision
        backends.cudnn.deterministic, backends.cudnn.benchmark = chosen
        torch.set_deterministic_debug_mode(mode)


@contextlib.contextmanager
def _kept_memory() -> Iterator[None]:
    """Tell glibc to keep freed memory, and after it to do as it does in a process that has freed large tensors.

    By default it hands every large tensor back to the kernel and faults it in again: 2.0 to 3.7 times the
    time of a forward pass on a 2-core machine. Other C libraries have no such switch and need none.
    """
    mallopt = None
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            libc = ctypes.CDLL(None)
            mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        # What they were cannot be asked for, and glibc adjusts no threshold any more once one was set: its own limits
        # are where it would be by now, unless the environment says otherwise.
        mallopt(_M_MMAP_MAX, int(os.environ.get("MALLOC_MMAP_MAX_", 65536)))
        mallopt(_M_MMAP_THRESHOLD, int(os.environ.get("MALLOC_MMAP_THRESHOLD_", _MMAP_THRESHOLD)))
        mallopt(_M_TRIM_THRESHOLD, int(os.environ.get("MALLOC_TRIM_THRESHOLD_", 2 * _MMAP_THRESHOLD)))
        malloc_trim(0)


@contextlib.contextmanager
def _many_files() -> Iterator[None]:
    """Raise the limit of open files to what may be: each shard of stored features is one."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


def seed_for(*what: int, where: Literal["all", "cpu", "device"] = "all") -> None:
    """Seed torch's generators by what the numbers are for, for example (seed, step, microbatch).

    `where`: the CPU's generator, those of other devices, or all.
    """
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") % 2**63
    # torch.manual_seed notes a stack trace for each kind of device that is not in use: 1.3 ms, longer than the step of
    # a head takes.
    if where != "device":
        torch.default_generator.manual_seed(seed)
    if where == "cpu":
        return
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def on_device(inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same tensors there."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def channels_last(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of 4 dimensions in the memory format that convolutions are fastest with; others as they are."""
    return {
        name: tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
        for name, tensor in inputs.items()
    }


def autocast(plan: Plan, worker: Worker) -> contextlib.AbstractContextManager[Any]:
    """bf16 where the plan wants it and the device has it."""
    wanted = plan.precision
    cuda = worker.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "bf16" or (wanted == "auto" and cuda):
        return torch.autocast(worker.device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
