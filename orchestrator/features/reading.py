"""The process that reads samples for a worker: what it is asked for, what it answers, and how it does it.

The worker's side, and why there are such processes: readers.py. `serve` is what a fresh interpreter runs.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from orchestrator.data import Asker, Ids, Ints
from orchestrator.features.mixing import make_mix
from orchestrator.features.sources import Batch, SampleSource, Source, SourceSpec
from orchestrator.network import seed_for

STEP = 2
"""What the random numbers of a microbatch are for."""
_ALIGNED = 64  # bytes
_PATIENCE_S = 5.0
"""A store that does not answer is asked again for so long here, then by the worker, which can say so."""

Key = tuple[int, ...]
"""(seed, step, microbatch)"""
Layout = list[tuple[str, str, tuple[int, ...], int]]
"""(name, dtype, shape, where it begins in the shared memory) of each tensor."""


@dataclass(frozen=True)
class Request:
    """What a reader is asked for: a batch of samples."""

    rows: Ints
    key: Key | None = None
    """None: samples as they are, nothing random."""
    mixed: bool = False
    """Whether the samples are mixed with each other, as the job says."""
    with_contents: bool = False
    """Whether the ids of their contents are asked for too."""


@dataclass(frozen=True)
class Answer:
    """What it gives."""

    layout: Layout | None
    """None where no sample can be read."""
    rows: Ints
    skipped: dict[int, str]
    """Row -> why it was left out."""
    contents: Ids | None = None


def serve() -> None:
    """Build the source that standard input describes, and fork a reader for each (pipe, memory) of the arguments."""
    fds = [int(fd) for fd in sys.argv[1:]]
    sign = os.dup(1)
    os.dup2(2, 1)  # what a plugin prints is no sign
    torch.set_num_threads(1)
    spec: SourceSpec = pickle.load(sys.stdin.buffer)
    mix = make_mix(spec.plan, spec.find_modality())
    source = spec.opened(ThreadPoolExecutor(1), _ask)  # whose thread begins with its first sample
    pairs = list(zip(fds[::2], fds[1::2], strict=True))
    for number, (pipe, memory) in enumerate(pairs):
        if os.fork():
            continue
        for other, (theirs, its) in enumerate(pairs):
            if other != number:
                os.close(theirs)
                os.close(its)
        os.close(sign)
        try:
            _read_for(Connection(pipe), memory, source, mix)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    for fd in fds:
        os.close(fd)
    os.write(sign, b"ready\n")
    os.close(sign)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def _ask(store: str, place: str, call: Callable[[], Any]) -> Any:
    return Asker(store, _PATIENCE_S)(place, call)


def _read_for(pipe: Connection, memory: int, source: SampleSource, mix: Callable[[Batch], Batch] | None) -> None:
    """Answer until the worker has gone."""
    shared: list[mmap.mmap] = []
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            request: Request = pipe.recv()
            source.skipped.clear()
            try:
                batch = read(source, request, mix)
                layout = None if batch is None else _put({"": batch.targets, **batch.inputs}, memory, shared)
                rows, contents = (request.rows[:0], None) if batch is None else (batch.rows, batch.contents)
                pipe.send(Answer(layout, rows, dict(source.skipped), contents))
            except Exception as error:
                pipe.send(_as_sent(error))


def read(source: Source, request: Request, mix: Callable[[Batch], Batch] | None) -> Batch | None:
    """The samples of a request that can be read; torch's generator of the CPU is that of its key."""
    began = time.monotonic()
    if request.with_contents:
        assert isinstance(source, SampleSource)
        batch = source.batch(request.rows, train=False, with_contents=True)
    elif request.key is None:
        batch = source.batch(request.rows, train=False)
    else:
        seed_for(STEP, *request.key, where="cpu")
        batch = source.batch(request.rows, train=True)
        batch = batch if batch is None or mix is None or not request.mixed else mix(batch)
    if isinstance(source, SampleSource) and source.readers is not None:
        source.readers.was_given(batch)
        source.readers.was_read(time.monotonic() - began)
    return batch


def _put(tensors: dict[str, Tensor], memory: int, shared: list[mmap.mmap]) -> Layout:
    """Write the tensors there one behind the other; `shared` is the mapping, if there is one yet."""
    layout: Layout = []
    end = 0
    for name, tensor in tensors.items():
        layout.append((name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), end))
        end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    if not shared or len(shared[0]) < end:
        os.ftruncate(memory, max(end, mmap.PAGESIZE))
        shared[:] = [mmap.mmap(memory, 0)]
    for (_, _, _, start), tensor in zip(layout, tensors.values(), strict=True):
        if tensor.numel():
            there = torch.frombuffer(shared[0], dtype=tensor.dtype, count=tensor.numel(), offset=start)
            there.copy_(tensor.detach().reshape(-1))
    return layout


def _as_sent(error: Exception) -> Exception:
    """The error, or its words where it cannot cross to the worker, with the trace, which cannot."""
    said = f"in the process that reads:\n{traceback.format_exc()}"
    error.add_note(said)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        words = RuntimeError(f"{type(error).__name__}: {error}")
        words.add_note(said)
        return words
    return error
