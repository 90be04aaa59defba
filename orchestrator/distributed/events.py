"""What the workers of a job on Ray tell the driver, kept until it asks; and whether it wants them to stop or to end.

A module of its own: the process that holds the queue would else import torch and all of Ray Train, beside the workers
that are starting on the same cores.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from typing import Any

import ray

from orchestrator.job import Advanced, Event, Noted

_TELL_EVERY_S = 0.25
"""Each call costs a core about a millisecond, which workers that share few cores would have."""
_ASK_EVERY_S = 1.0
_WATCH_EVERY_S = 1.0
_WATCH_TIMEOUT_S = 5.0
_SILENT_S = 15.0
"""A group of workers none of which has asked anything for so long is gone: each asks once a second."""


class EventQueue:
    """An actor: the workers put events into it, and the driver takes them out."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stopping = False
        self._ending = False
        self._asked_at: dict[str, float] = {}
        self._places: dict[int, str] = {}
        self._num_failures = 0
        self._worked_at = -math.inf
        self._num_begun = 0
        self._controller: str | None = None

    def starting(self, controller: str) -> bool:
        """A controller, an actor of that id, is about to start workers; whether the driver wants none any more."""
        self._controller = controller
        return self._stopping

    def began(self, rank: int, place: str) -> None:
        """The worker of that rank runs there, as a person is told."""
        self._places[rank] = place
        self._worked_at = time.monotonic()
        self._num_begun += 1

    def is_waiting(self) -> bool:
        """Whether no worker runs: none has begun yet, or none since the group was lost."""
        return self.idle_s() > _SILENT_S

    def works(self) -> None:
        """Workers have made a step, of a search some trial's."""
        self._worked_at = time.monotonic()

    def idle_s(self) -> float:
        """Seconds since a worker was last heard of."""
        return time.monotonic() - self._worked_at

    def standing(self) -> tuple[bool, str | None, int]:
        """(Whether no worker runs, the controller that starts them, how many have begun ever)."""
        return self.is_waiting(), self._controller, self._num_begun

    def lost(self) -> None:
        """The group of workers is gone."""
        self._worked_at = -math.inf

    def taken_away(self, ranks: list[int]) -> None:
        """The nodes of these workers are taken away: all have written a checkpoint, and it is no failure."""
        self.lost()
        who = ", ".join(f"worker {rank} ({self._places[rank]})" for rank in ranks if rank in self._places)
        text = f"{who}: its node is taken away; a checkpoint is written, and it goes on without it"
        self._events.append(Noted(text, is_warning=True))

    def failed(self, why: dict[int, str], max_failures: int, from_where: str) -> None:
        """Workers have died or failed, {rank: why}: it is told which, where, and what comes of it."""
        self._num_failures += 1
        self.lost()
        who = "; ".join(
            f"worker {rank}{f' ({self._places[rank]})' if rank in self._places else ''}: {why[rank]}"
            for rank in sorted(why)
        )
        if self._num_failures <= max_failures:  # else it ends the job, whose error says it
            text = f"{who}; restart {self._num_failures} of {max_failures}, {from_where}"
            self._events.append(Noted(text, is_warning=True))

    def put(self, event: Event) -> None:
        """Keep an event until it is taken."""
        self._events.append(event)

    def take(self, stop: bool) -> list[Event]:
        """The events since the last call; `stop`: the workers are to stop, from now on."""
        self._stopping |= stop
        events, self._events = self._events, []
        return events

    def is_stopping(self) -> bool:
        """Whether the driver wants the workers to stop."""
        return self._stopping

    def end(self) -> int:
        """From now on workers end themselves, whatever they are at; how many have not yet."""
        self._stopping = self._ending = True
        recent = time.monotonic() - _WATCH_TIMEOUT_S  # one that has died asks no more
        return sum(asked_at > recent for asked_at in self._asked_at.values())

    def is_ending(self, worker: str, trains: bool) -> bool:
        """Asked by each worker once a second, whether it has to end itself; one that `trains` is one of the group."""
        self._asked_at[worker] = time.monotonic()
        if trains:
            self._worked_at = time.monotonic()
        return self._ending

    def gone(self, worker: str) -> None:
        """A worker is about to end."""
        self._asked_at.pop(worker, None)


def watch_driver(queue: Any, trains: bool) -> None:
    """End this process, whatever it is at, once the driver wants that, or is no more; asked for in a thread.

    A worker that hangs in a sample does not stop when it is asked to, and lives on even when its Ray is shut down: it
    would go on writing into a run that somebody else works on by then.
    """
    worker = f"{ray.util.get_node_ip_address()}:{os.getpid()}"

    def watch() -> None:
        while True:
            try:
                if ray.get(queue.is_ending.remote(worker, trains), timeout=_WATCH_TIMEOUT_S):
                    ray.get(queue.gone.remote(worker), timeout=_WATCH_TIMEOUT_S)
                    os._exit(1)
            except ray.exceptions.ActorDiedError:  # it is started again if it dies alone: the driver has gone
                os._exit(1)
            except ray.exceptions.RayError:
                pass
            time.sleep(_WATCH_EVERY_S)

    threading.Thread(target=watch, daemon=True, name="watch-driver").start()


class DriverChannel:
    """A worker's way to the driver: events go there, and whether to stop comes back.

    The queue's process may die: then nothing is told and nobody is asked to stop, and the work goes on.
    """

    def __init__(self, queue: Any) -> None:
        """`queue`: the handle of an `EventQueue`."""
        self.queue = queue
        self._pending = 0
        self._told = self._asked = 0.0
        self._answer: Any = None
        self._stopping = False
        self._asking = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return DriverChannel, (self.queue,)

    def tell(self, event: Event) -> None:
        """Pass an event on; small steps forward are summed up for a quarter of a second."""
        if isinstance(event, Advanced):
            self._pending += event.num
            if time.monotonic() - self._told >= _TELL_EVERY_S:
                self.flush()
            return
        self.flush()
        self.queue.put.remote(event)

    def tell_for_sure(self, event: Event) -> None:
        """Pass an event on, and return once it is there."""
        self.flush()
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self.queue.put.remote(event))

    def flush(self) -> None:
        """Pass on what was summed up."""
        if self._pending:
            self.queue.put.remote(Advanced(self._pending))
        self._pending = 0
        self._told = time.monotonic()

    def should_stop(self) -> bool:
        """Whether the driver wants all to stop. Asked once a second, without waiting for the answer; by any thread."""
        if self._stopping:
            return True
        with self._asking:
            if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
                with contextlib.suppress(ray.exceptions.RayError):
                    self._stopping = ray.get(self._answer)
                self._answer = None
            if self._answer is None and time.monotonic() - self._asked >= _ASK_EVERY_S:
                self._asked = time.monotonic()
                self._answer = self.queue.is_stopping.remote()
        return self._stopping

    def wait_whether_to_stop(self) -> bool:
        """The same, with the answer waited for."""
        with contextlib.suppress(ray.exceptions.RayError):
            self._stopping = ray.get(self.queue.is_stopping.remote())
        return self._stopping
