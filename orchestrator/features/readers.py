"""Processes beside a worker that read, decode and collate its samples, where a GPU would else wait for them.

A fresh interpreter imports what the plugin needs and builds the same source of samples once; from it the readers are
forked, so that they share its memory. Each gets a microbatch by its key and rows and puts the tensors into memory that
it shares with the worker. What is random in them depends on the key alone, so it is the same whoever reads.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Pipe
from typing import Any

import torch
from torch import Tensor

from orchestrator.features.reading import Answer, Layout, Request
from orchestrator.features.sources import Batch, SampleSource, Source, SourceSpec

MOST_BYTES = 2 * 2**30
"""Of batches that are read ahead."""
READ_S, _READ_SHARE = 1.0, 0.05
"""Reading that a GPU waits for, or that the thread which feeds it shares Python with: more is worth processes."""
_READER = "from orchestrator.features.reading import serve; serve()"

Read = tuple[Batch | None, dict[int, str]]
"""(the samples that could be read; row -> why it was left out)"""


class ReadersLostError(Exception):
    """A reader has died, or none could be started."""


@dataclass
class Readers:
    """The readers of one worker, as it sees them. Nothing starts before `start`."""

    spec: SourceSpec
    num: int
    pinned: bool
    """Whether tensors come in pinned memory, from which a GPU copies beside other work."""
    note: Callable[[str], None]
    """Called with what went wrong."""
    read_s: float = 0.0
    """How long the worker's own threads have read, which do so until the readers are ready."""
    since: float = field(default_factory=time.monotonic)
    ready: bool = False
    started: bool = False
    largest: int = 0
    """Bytes of the largest batch so far, 0 where none is known."""
    _closed: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _free: queue.SimpleQueue[_Reader] = field(default_factory=queue.SimpleQueue)
    _threads: ThreadPoolExecutor | None = None
    process: subprocess.Popen[bytes] | None = None
    """From which they are forked."""
    _resources: ExitStack = field(default_factory=ExitStack)

    def was_read(self, seconds: float) -> None:
        """A thread of the worker has read for so long: the readers are started once that is worth it."""
        self.read_s += seconds
        if not self.started and self.read_s > max(READ_S, _READ_SHARE * (time.monotonic() - self.since)):
            self.start()

    def start(self) -> None:
        """Begin to start them; `ready` tells when they are."""
        with self._lock:
            if self.started:
                return
            self.started = True
        try:
            given = pickle.dumps(self.spec)
        except Exception:
            given = b"__main__"
        if b"__main__" in given:
            self.note(
                "the modality stands in a script or a notebook, and another process cannot import it: the worker reads "
                "the samples itself, and a GPU may wait for it; a module of its own is read by several processes"
            )
            return
        try:
            self._start(given)
        except (OSError, TypeError, ValueError) as error:  # no descriptors, no memory, no folder for what is temporary
            self._note_of(str(error))

    def _start(self, given: bytes) -> None:
        readers = [_Reader(self._resources) for _ in range(self.num)]
        fds = [fd for reader in readers for fd in reader.theirs]
        errors = self._resources.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # on the stack
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _READER, *map(str, fds)], pass_fds=fds,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            start_new_session=True,  # Ctrl-C is the driver's: they end when it closes their pipes
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                 "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        for reader in readers:
            reader.close_theirs()
            self._free.put(reader)
        self._threads = ThreadPoolExecutor(self.num, thread_name_prefix="reader")
        threading.Thread(target=self._wait, args=(given, errors), daemon=True).start()

    def _note_of(self, why: str) -> None:
        if not self._closed:  # else the job was through before they were there
            self.note(f"no process that reads samples could be started, so the worker reads them: {why}")

    def _wait(self, given: bytes, errors: Any) -> None:
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError, ValueError):  # it has died, and said why
            process.stdin.write(given)
            process.stdin.close()
        with contextlib.suppress(OSError, ValueError):
            if process.stdout.readline() == b"ready\n":
                self.ready = not self._closed
                return
            process.wait()
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines() or ["it says nothing"]
            self._note_of(said[-1])

    @property
    def num_ahead(self) -> int:
        """Microbatches that are worth to be asked for at once; each reader has memory for one beside."""
        if not self.largest:
            return 2
        return max(2, min(2 * self.num, MOST_BYTES // self.largest - self.num))

    def begin(self, request: Request) -> Future[Read]:
        """Ask for a batch: (it, or None where no sample can be read; row -> why it was left out).

        The future raises what reading raises, and `ReadersLostError`.
        """
        assert self._threads is not None
        return self._threads.submit(self._ask, request)

    def _ask(self, request: Request) -> Read:
        reader = self._free.get()
        try:
            answer = reader.ask(request)
        except (EOFError, OSError) as error:  # whatever says so, its end of the pipe is gone
            self._end()
            raise ReadersLostError from error
        else:
            if isinstance(answer, Exception):
                raise answer
            if answer.layout is None:
                return None, answer.skipped
            tensors = reader.tensors(answer.layout, self.pinned)
        finally:
            self._free.put(reader)
        batch = Batch(tensors, tensors.pop(""), answer.rows, answer.contents)
        self.was_given(batch)
        return batch, answer.skipped

    def was_given(self, batch: Batch | None) -> None:
        """A batch was read, by whom ever."""
        if batch is not None:
            self.largest = max(self.largest, sum(one.nbytes for one in (*batch.inputs.values(), batch.targets)))

    def _end(self) -> None:
        """Of one that has died the others are of no use, and have memory that is lacking perhaps."""
        with self._lock:
            was_ready, self.ready = self.ready, False
        if was_ready and not self._closed:
            self.note("a process that reads samples has died, for lack of memory perhaps: the worker reads them")
        self._kill()

    def _kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)  # a session of their own: the readers too

    def close(self) -> None:
        """End them, at once, whatever they do."""
        self.ready, self._closed = False, True
        self._kill()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._free.empty():
            self._free.get().close()
        if self.process is not None:
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        self._resources.close()


class _Reader:
    """One of them, as the worker sees it: a pipe, and memory that both have."""

    def __init__(self, resources: ExitStack) -> None:
        self._pipe, self._their_pipe = Pipe()
        self._memory = os.memfd_create("orchestrator-reader")
        self._mapped: mmap.mmap | None = None
        resources.callback(self.close)
        self._closed = False

    @property
    def theirs(self) -> list[int]:
        """File descriptors that the other process gets."""
        return [self._their_pipe.fileno(), self._memory]

    def close_theirs(self) -> None:
        self._their_pipe.close()

    def ask(self, request: Request) -> Answer | Exception:
        self._pipe.send(request)
        answer: Answer | Exception = self._pipe.recv()
        return answer

    def tensors(self, layout: Layout, pinned: bool) -> dict[str, Tensor]:
        """Copies of what lies in the shared memory."""
        size = os.fstat(self._memory).st_size
        if self._mapped is None or len(self._mapped) < size:
            self._mapped = mmap.mmap(self._memory, size)
        found = {}
        for name, dtype, shape, start in layout:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), pin_memory=pinned)
            if tensor.numel():
                there = torch.frombuffer(self._mapped, dtype=tensor.dtype, count=tensor.numel(), offset=start)
                tensor.view(-1).copy_(there)
            found[name] = tensor
        return found

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._pipe.close()
        self._their_pipe.close()
        os.close(self._memory)


def ready_readers(source: Source) -> Readers | None:
    """Those that may be asked now."""
    readers = source.readers if isinstance(source, SampleSource) else None
    return readers if readers is not None and readers.ready else None
