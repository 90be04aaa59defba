"""What the workers of a job on Ray tell the driver, kept until it asks.

A module of its own: the process that holds it would else import torch and all of Ray Train, beside the workers that
are starting on the same cores.
"""

from __future__ import annotations

from typing import Any


class EventSink:
    """Where the workers put events, and the driver takes them from."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []

    def put(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def take(self) -> list[dict[str, Any]]:
        events, self._events = self._events, []
        return events
