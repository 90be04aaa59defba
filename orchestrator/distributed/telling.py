"""What a job on a cluster tells the laptop: its events, one JSON line each, in the output that the cluster keeps.

So whoever follows sees the job from its first epoch on, whenever that is; other lines of the output are what libraries
print.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from orchestrator.errors import (
    REASONS,
    CheckpointError,
    InterruptedRunError,
    OrchestratorError,
    RefusedError,
    TrainingError,
    WeightsError,
)
from orchestrator.job import Advanced, EpochEnded, Event, Noted, PhaseBegan, TrialsAdvanced

_BEGINS = '{"orchestrator": "'
_TELL_EVERY_S = 1.0
_BEAT_EVERY_S = 2.0


@dataclass(frozen=True)
class Beat:
    """The job is there, and has nothing else to tell."""


@dataclass(frozen=True)
class Ended:
    """The last word of a job: what came of it, or why nothing did."""

    exit_code: int
    place: str = ""
    """The run's."""
    results: Mapping[str, Any] | None = None
    error: Mapping[str, str] = field(default_factory=dict)
    """As `OrchestratorError.as_dict` gives it."""


@dataclass(frozen=True)
class Found:
    """What a look at the nodes of the cluster found, [{what: facts}, ...]."""

    nodes: list[dict[str, Any]]
    refusal: dict[str, str] | None = None
    """Why all of them together have no place for the job, None where they have one."""


@dataclass(frozen=True)
class Piece:
    """A piece of a file of a run, in its order."""

    file: str
    data: str
    """In base64."""


Told = Event | Beat | Ended | Found | Piece
_KINDS: Mapping[str, type] = {
    one.__name__: one for one in (PhaseBegan, Advanced, EpochEnded, Noted, TrialsAdvanced, Beat, Ended, Found, Piece)
}


def as_line(told: Told) -> str:
    """One line, without its end."""
    fields = {one.name: getattr(told, one.name) for one in dataclasses.fields(told)}
    return json.dumps({"orchestrator": type(told).__name__, **fields}, default=dict)


def parse_line(line: str) -> Told | None:
    """What a line of the output tells, None where somebody else wrote it."""
    if not line.startswith(_BEGINS):
        return None
    try:
        fields = json.loads(line)
        kind = _KINDS[fields.pop("orchestrator")]
        told: Told = kind(**fields)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return told


def error_of(ended: Ended) -> OrchestratorError:
    """The error that ended a job, as it was raised there."""
    said = {key: str(ended.error.get(key, "")) for key in ("message", "reason", "expected", "mend")}
    message, reason, expected, mend = said.values()
    if ended.exit_code == RefusedError.exit_code and reason in REASONS:
        return RefusedError(reason, message, expected=expected, mend=mend)
    kinds = (TrainingError, CheckpointError, WeightsError, InterruptedRunError)
    kind = next((one for one in kinds if one.reason == reason), OrchestratorError)
    return kind(message, expected=expected, mend=mend)


class Teller:
    """A `Report` that writes each event as a line; steps forward are summed up for a second."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lock = threading.Lock()
        self._steps = 0
        self._told_at = 0.0

    def __call__(self, told: Told) -> None:
        with self._lock:
            if isinstance(told, Advanced):
                self._steps += told.num
                if time.monotonic() - self._told_at < _TELL_EVERY_S:
                    return
            self._write(None if isinstance(told, Advanced) else told)

    def _write(self, told: Told | None) -> None:
        steps, self._steps = self._steps, 0
        lines = [Advanced(steps)] if steps else []
        for one in (*lines, *([told] if told is not None else [])):
            self._out.write(as_line(one) + "\n")
        self._out.flush()
        self._told_at = time.monotonic()

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """As long as the context lasts, something is told every two seconds."""

        def beat() -> None:
            with self._lock:
                if time.monotonic() - self._told_at >= _BEAT_EVERY_S:
                    self._write(None if self._steps else Beat())

        with repeating(beat, _BEAT_EVERY_S):
            yield


@contextlib.contextmanager
def repeating(call: Callable[[], None], every_s: float) -> Iterator[None]:
    """As long as the context lasts, something is called in a thread, the first time after `every_s`."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(every_s):
            call()

    thread = threading.Thread(target=repeat, daemon=True, name=call.__name__)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
