"""A network built from the headers of its weights: no file is read, no memory taken, and what does not fit shows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

_DTYPES = {
    "BF16": torch.bfloat16, "BOOL": torch.bool, "F16": torch.float16, "F64": torch.float64, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
_IN_ONE_THREAD = "HF_DEACTIVATE_ASYNC_LOAD"  # of transformers' loading: the mode holds for one thread

_held: ContextVar[Mapping[str, Tensor] | None] = ContextVar("held", default=None)


@contextlib.contextmanager
def from_headers(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Iterator[None]:
    """Within it `build_transformers` and `load_body` take these shapes for the checkpoint; their tensors hold nothing.

    `tensors`: name -> (dtype, shape), as `read_tensors` gives them. Torch's random numbers are afterwards as they were.
    """
    before = os.environ.get(_IN_ONE_THREAD)
    os.environ[_IN_ONE_THREAD] = "1"
    try:
        with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True):
            held = {
                name: torch.empty(shape, dtype=_DTYPES.get(dtype, torch.float32))
                for name, (dtype, shape) in tensors.items()
            }
            token = _held.set(held)
            try:
                yield
            finally:
                _held.reset(token)
    finally:
        if before is None:
            del os.environ[_IN_ONE_THREAD]
        else:
            os.environ[_IN_ONE_THREAD] = before


def held_tensors() -> dict[str, Tensor] | None:
    """The checkpoint that stands for the files, by the names of its tensors; None outside of `from_headers`."""
    held = _held.get()
    return None if held is None else dict(held)
