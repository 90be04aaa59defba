"""What a person sees of a job while it runs: a bar on a terminal, a line now and then in a pipe or a file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from orchestrator.job import Advanced, EpochEnded, Event, Noted, PhaseBegan, Report, TrialsAdvanced, figure

# A class named ":fish:" is shown as it is written, and so is a file named "[bold].png": `escape` sees to that.
err = Console(stderr=True, highlight=False, emoji=False)

_PLAIN_EVERY_S = 10.0


class _Percent(ProgressColumn):
    """How much is done; nothing where the end is not known."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.percentage:>3.0f}%" if task.total else "    ")


class _Rate(ProgressColumn):
    """Samples or bytes a second, and the time left."""

    def render(self, task: Task) -> Text:
        per_unit = task.fields.get("samples_per_unit", 1.0)
        speed = (task.speed or 0.0) * per_unit
        rate = f"{speed / 1e6:,.1f} MB/s" if task.fields.get("unit") == "bytes" else f"{speed:,.0f}/s"
        rate = rate if speed else ""
        left = task.time_remaining
        return Text(f"{rate:>9} {_clock(left) if left is not None else '':>6}", style="cyan")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextlib.contextmanager
def progress() -> Iterator[Report]:
    """A function that shows events: a bar on a terminal, a line now and then elsewhere."""
    if not err.is_terminal:
        yield _Plain()
        return
    bar = Progress(
        TextColumn("{task.description}", style="bold"),
        BarColumn(bar_width=None),
        _Percent(table_column=Column(no_wrap=True)),
        _Rate(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[status]}", style="green", table_column=Column(no_wrap=True)),
        console=err,
        transient=True,
        expand=True,
        speed_estimate_period=10,
    )
    with bar:
        yield _Bar(bar)


class _Bar:
    """One bar a phase."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task: Any = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, PhaseBegan):
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(
                event.text, total=event.total, completed=event.done, samples_per_unit=event.samples_per_unit,
                unit=event.unit, status="",
            )  # fmt: skip
        elif isinstance(event, Noted):
            what, style = ("warning", "bold yellow") if event.is_warning else ("note", "yellow")
            self._bar.console.print(Text(f"  {what} ", style=style).append(event.text, style="default"))
        elif isinstance(event, Advanced) and self._task is not None:
            self._bar.advance(self._task, event.num)
        elif isinstance(event, EpochEnded | TrialsAdvanced) and self._task is not None:
            self._bar.update(
                self._task, status=epoch_line(event) if isinstance(event, EpochEnded) else trials_line(event)
            )


def epoch_line(event: EpochEnded) -> str:
    """`epoch 3/20 val acc 0.912`: what the best epoch is chosen by; of one that nobody judged, its training loss."""
    line = event.figures
    what, short = ("accuracy", "acc") if event.task == "single-label" else ("loss", "loss")
    split, shown = ("validation", "val") if f"validation_{what}" in line else ("train", "train")
    if f"{split}_{what}" not in line:  # no validation, and a head that is fitted at the end alone
        what = short = "loss"
    return f"epoch {line['epoch']}/{event.num_epochs} {shown} {short} {line[f'{split}_{what}']:.3f}"


def trials_line(event: TrialsAdvanced) -> str:
    """`trial 12/16 best 0.931`"""
    best = f" best {figure(event.best[0][1])}" if event.best else ""
    return f"trial {event.num_done}/{event.num_trials}{best}"


class _Plain:
    """Lines, for a log."""

    def __init__(self) -> None:
        self._last = 0.0
        self._phase = PhaseBegan("")
        self._done = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, PhaseBegan | Noted):
            warning = "warning: " if isinstance(event, Noted) and event.is_warning else ""
            err.print(escape(f"{warning}{event.text}"), soft_wrap=True)
        if isinstance(event, PhaseBegan):
            self._phase, self._done = event, event.done
            self._last = time.monotonic() if event.unit in ("samples", "bytes") else 0.0
        elif isinstance(event, Advanced):
            self._done += event.num
            if self._phase.unit == "samples" and self._phase.total:
                self._show(f"{self._done:,} of {self._phase.total:,} samples")
            elif self._phase.unit == "bytes" and self._phase.total:
                self._show(f"{self._done / 1e6:,.1f} of {self._phase.total / 1e6:,.1f} MB")
        elif isinstance(event, EpochEnded):
            self._show(epoch_line(event), at_once=event.figures["epoch"] == event.num_epochs)
        elif isinstance(event, TrialsAdvanced):
            self._show(trials_line(event), at_once=event.num_done == event.num_trials)

    def _show(self, line: str, at_once: bool = False) -> None:
        if at_once or time.monotonic() - self._last > _PLAIN_EVERY_S:
            self._last = time.monotonic()
            err.print(escape(line))
