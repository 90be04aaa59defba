"""What the workers of a job on Ray tell the driver, kept until it asks.

A module of its own: the process that holds it would else import torch and all of Ray Train, beside the workers that
are starting on the same cores.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

_EVENT_EVERY_S = 0.1
_STOP_EVERY_S = 0.5


class EventSink:
    """Where the workers put events, and the driver takes them from."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []

    def put(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def take(self) -> list[dict[str, Any]]:
        events, self._events = self._events, []
        return events


class Line:
    """A worker's line to the driver: what happens goes there, and whether to stop comes back."""

    def __init__(self, sink: Any, stop_file: Path) -> None:
        """`sink`: the handle of an `EventSink`; `stop_file`: is there once the driver wants all to stop."""
        self.sink = sink
        self.stop_file = stop_file
        self._pending = 0
        self._told = self._asked = 0.0
        self._stopping = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Line, (self.sink, self.stop_file)

    def tell(self, event: dict[str, Any]) -> None:
        """Pass an event on; small steps forward are added up for a tenth of a second."""
        if event["kind"] == "advance" and "epoch" not in event:
            self._pending += event["num"]
            if time.monotonic() - self._told < _EVENT_EVERY_S:
                return
            event = {**event, "num": self._pending}
        elif self._pending:
            self.sink.put.remote({"kind": "advance", "num": self._pending})
        self._pending = 0
        self._told = time.monotonic()
        self.sink.put.remote(event)

    def flush(self) -> None:
        """Pass on what was added up."""
        if self._pending:
            self.sink.put.remote({"kind": "advance", "num": self._pending})
            self._pending = 0

    def should_stop(self) -> bool:
        """Whether the driver wants all to stop; the file is looked for twice a second, until it is there."""
        if not self._stopping and time.monotonic() - self._asked >= _STOP_EVERY_S:
            self._asked = time.monotonic()
            self._stopping = self.stop_file.exists()
        return self._stopping
