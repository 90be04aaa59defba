"""Whether a job is to stop: the caller says so, or a signal."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Container, Iterator
from types import FrameType

Stop = Callable[[], bool]
"""Whether a job is to stop: asked often, after steps and batches, from the thread that called.

Where the store of the samples does not answer, who reads them asks, which may be another thread.
"""


@contextlib.contextmanager
def stop_on_signal(stop: Stop | None, at_once: Container[int] = (signal.SIGINT,)) -> Iterator[Stop]:
    """Whether to stop: `stop()` says so, or a first Ctrl-C or SIGTERM; a second one of `at_once` stops at once.

    Who gives a `stop` owns the signals, and so does who calls from another thread than the main one.
    """
    if stop is not None or threading.current_thread() is not threading.main_thread():
        yield stop or (lambda: False)
        return
    asked = threading.Event()

    def handle(number: int, _frame: FrameType | None) -> None:
        if asked.is_set() and number in at_once:
            raise KeyboardInterrupt
        asked.set()

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in old.items():
            if handler is not None:  # one that was not installed from Python cannot be put back
                signal.signal(number, handler)
