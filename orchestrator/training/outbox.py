"""What goes to a run's storage beside the loop: one thread, in the order in which it was given.

The loop copies what is to be kept and goes on. At most one checkpoint is behind: while one is on its way no other is
begun, and who has to have one waits. A store that is away is asked again for minutes, and `report` is told; what fails
for good is raised in the loop, which ends with it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from orchestrator.errors import OrchestratorError, RefusedError, storage_failed
from orchestrator.job import HeldRun, Noted, Report, patient

MOST_OF_TIME = 0.02
"""So much of its time at most the loop spends on checkpoints that are due by time."""
STOP_PATIENCE_S = 60.0
"""A store that is away is waited for so long by who was asked to stop; then the checkpoint before is the last."""
_POLL_S = 0.5

Write = Callable[[], None]


class Outbox:
    """Writes of one run; rank 0 has it."""

    def __init__(self, run: HeldRun, report: Report, should_stop: Callable[[], bool] = lambda: False) -> None:
        """`report` and `should_stop` are called by the loop's thread alone."""
        self.run = patient(run, self._note, self._gives_up)
        """The same run, for the writes: it asks a store for longer."""
        self.stalled_s = 0.0
        """How long the loop has stood still for checkpoints."""
        self._report = report
        self._should_stop = should_stop
        self._is_asked = False
        """Whether somebody has asked to stop."""
        self._notes: deque[str] = deque()
        self._queue: queue.SimpleQueue[Write] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._num_waiting = 0
        self._error: BaseException | None = None
        self._last_stall_s = 0.0
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether anything is on its way."""
        return self._num_waiting > 0

    @property
    def rest_s(self) -> float:
        """So long after a checkpoint the next one begins at the earliest, so that they cost `MOST_OF_TIME`."""
        return self._last_stall_s / MOST_OF_TIME

    def put(self, write: Write) -> None:
        """Have this written, behind all that was given before. Raises what one of those failed with."""
        self.check()
        with self._changed:
            self._num_waiting += 1
        self._queue.put(write)
        if self._thread is None:  # it does not keep the process from ending: what is cut off was never committed
            self._thread = threading.Thread(target=self._work, daemon=True, name=f"storage of {self.run.name}")
            self._thread.start()

    def check(self) -> None:
        """Report what is to be said. Raises what a write failed with."""
        while self._notes:
            self._report(Noted(self._notes.popleft(), is_warning=True))
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Return once all is written. Raises what a write failed with, and `InterruptedRunError` where somebody asks to
        stop and the store is away for a minute.
        """
        while self.busy:
            self._is_asked = self._is_asked or self._should_stop()
            with self._changed:
                self._changed.wait_for(lambda: not self.busy, timeout=_POLL_S)
            self.check()
        self.check()

    def drop(self) -> None:
        """Write nothing more of what waits."""
        self._error = self._error or OrchestratorError("stopped")

    @contextlib.contextmanager
    def stalling(self) -> Iterator[None]:
        """Around what the loop does for a checkpoint: its time is counted."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._last_stall_s = time.monotonic() - began
            self.stalled_s += self._last_stall_s

    def _gives_up(self, away_s: float) -> bool:
        return self._is_asked and away_s > STOP_PATIENCE_S

    def _note(self, text: str) -> None:
        self._notes.append(text)

    def _work(self) -> None:
        while True:
            write = self._queue.get()
            if self._error is None:  # behind what has failed nothing is written: it would count on that
                try:
                    write()
                except BaseException as error:
                    self._error = storage_failed(error) if isinstance(error, RefusedError) else error
            with self._changed:
                self._num_waiting -= 1
                self._changed.notify_all()
