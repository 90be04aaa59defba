"""The events of a job -> its trackers. What was sent is noted in the run: nothing is sent twice, or forgotten."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestrator.errors import InterruptedRunError, OrchestratorError, first_line
from orchestrator.job import TRACKING_FILE, EpochEnded, Event, HeldRun, Noted, Plan, Report, Run
from orchestrator.tracking.trackers import End, Line, Tracker, make_tracker

_EVERY_S = 1.0
"""Small networks have hundreds of epochs a second."""


@contextlib.contextmanager
def tracked(names: Sequence[str], held: HeldRun, plan: Plan, run: Run, report: Report) -> Iterator[Report]:
    """A function that reports to `report` and to the trackers of these names, as long as the context lasts.

    At its end they get what is missing of the run, and how it ended. Nothing that a tracker raises comes through: it is
    reported as a warning, once for each.
    """
    senders = [_Sender(name, held, plan, run, report) for name in names]

    def tell(event: Event) -> None:
        report(event)
        if isinstance(event, EpochEnded):
            for sender in senders:
                sender.add(event.figures)

    how: End = "failed"
    try:
        for sender in senders:
            sender.begin()
        yield tell
        how = "finished" if run.finished else "stopped"
    except (InterruptedRunError, KeyboardInterrupt):
        how = "stopped"
        raise
    finally:
        for sender in senders:
            sender.end(how)


class _Sender:
    """What one tracker has of a run, and what it has not."""

    def __init__(self, name: str, held: HeldRun, plan: Plan, run: Run, report: Report) -> None:
        self._name, self._held, self._plan, self._run, self._report = name, held, plan, run, report
        noted = _read(held).get(name, {})
        self._known: str | None = noted.get("run")
        self._last_epoch: int = noted.get("epoch", 0)
        self._ended: str = noted.get("ended", "")
        self._tracker: Tracker | None = None
        self._pending: list[Line] = []
        self._sent_at = time.monotonic()
        self._is_away = False

    @property
    def _has_all(self) -> bool:
        return self._run.finished and self._ended == "finished"

    def begin(self) -> None:
        """Go on with the service's run, or begin one."""
        if not self._has_all:
            self._trying(self._begin, "the run goes on, and what is missed is sent at its end")

    def add(self, line: Line) -> None:
        """One more epoch; those that come again after an interruption are there already."""
        if line["epoch"] <= self._last_epoch:
            return
        self._pending.append(line)
        if not self._is_away and time.monotonic() - self._sent_at >= _EVERY_S:
            self._trying(self._send, "the run goes on, and what is missed is sent at its end")

    def end(self, how: End) -> None:
        """Send what is missing, also of epochs of earlier processes."""
        if self._has_all:
            return
        self._pending = [line for line in self._run.metrics if line["epoch"] > self._last_epoch]
        self._is_away = False
        self._trying(lambda: self._end(how), f"the same command again sends what is missing of {self._run.name}")

    def _begin(self) -> None:
        tracker = make_tracker(self._name, self._held, self._plan)
        begun = tracker.begin(self._known)
        self._tracker, self._known = tracker, begun.name
        self._note()
        if begun.warning:
            self._report(Noted(f"{self._name}: {begun.warning}", is_warning=True))

    def _send(self) -> None:
        if self._tracker is None:
            self._begin()
        assert self._tracker is not None
        if self._pending:
            self._tracker.add(self._pending)
            self._last_epoch = self._pending[-1]["epoch"]
            self._pending = []
            self._note()
        self._sent_at = time.monotonic()

    def _end(self, how: End) -> None:
        self._send()
        assert self._tracker is not None
        self._tracker.end(how, _figures(self._run.results) if how == "finished" else {})
        self._ended = how
        self._note()

    def _note(self) -> None:
        told = _read(self._held)
        told[self._name] = {"run": self._known, "epoch": self._last_epoch, "ended": self._ended}
        self._held.write(TRACKING_FILE, json.dumps(told, indent=1))

    def _trying(self, what: Any, then: str) -> None:
        """Do it; what it raises is reported. The libraries raise whatever theirs do: no list of it would be whole."""
        try:
            what()
        except OrchestratorError:  # of the run's own storage
            raise
        except Exception as error:
            self._is_away = True
            text = f"{self._name}: {type(error).__name__}: {first_line(error)}; {then}"
            self._report(Noted(text, is_warning=True))


def _read(held: HeldRun) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        told = json.loads(held.read(TRACKING_FILE) or "{}")
        if isinstance(told, dict):
            return told
    return {}


def _figures(results: Mapping[str, Any]) -> dict[str, float]:
    """`test_accuracy`, `validation_loss`: the final figures that are one number each, and the best epoch's."""
    figures = {
        f"{split}_{key}": float(value)
        for split in ("validation", "test")
        for key, value in results.get(split, {}).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }  # fmt: skip
    return {**figures, "best_epoch": float(results["best_epoch"])}
