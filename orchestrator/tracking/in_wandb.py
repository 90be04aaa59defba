"""A run in Weights & Biases, as its own variables say (WANDB_PROJECT, WANDB_MODE, WANDB_DIR, WANDB_API_KEY)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from orchestrator.errors import first_line
from orchestrator.job import HeldRun, Plan
from orchestrator.tracking.trackers import Begun, End, Line, settings_of

_PROJECT = "orchestrator"
_TIMEOUT_S, _FINISH_S = 20.0, 60.0
_ASKED_FOR = ("offline", "dryrun", "disabled")


def make(held: HeldRun, plan: Plan) -> WandbTracker:
    """The tracker of a run."""
    return WandbTracker(held, plan)


class WandbTracker:
    """Epochs are steps of the history, the job's settings its config, final figures its summary.

    The library writes all of it to files in the run, `wandb/`, and sends it from there. Where its server cannot be
    reached as the run begins, they are sent by `wandb sync`.
    """

    def __init__(self, held: HeldRun, plan: Plan) -> None:
        self._held, self._plan = held, plan
        self._run: Any = None

    def begin(self, known: str | None) -> Begun:
        """Go on with the run of that id, or begin one; without its server as a run whose files are sent later."""
        why = "there is no key for its server (wandb login)"
        try:
            self._run = self._init(known, None)
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            why = first_line(error)
            self._run = self._init(known, "offline")
        # Without a key and without a terminal to ask at, the library writes to files of itself, in silence.
        if self._run.offline and os.environ.get("WANDB_MODE") not in _ASKED_FOR:
            later = f"wandb sync {Path(self._run.dir).parent}"
            return Begun(str(self._run.id), f"{why}; the run goes on, and what it writes is sent by: {later}")
        return Begun(str(self._run.id))

    def _init(self, known: str | None, mode: Any) -> Any:
        folder = None if os.environ.get("WANDB_DIR") else str(self._held.folder)
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _PROJECT, name=self._plan.name, id=known, dir=folder, mode=mode,
            resume="allow", config=settings_of(self._plan),
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=_TIMEOUT_S, finish_timeout=_FINISH_S,
                finish_timeout_raises=True,
            ),
        )  # fmt: skip

    def add(self, lines: Sequence[Line]) -> None:
        """Epochs that it has not yet."""
        for line in lines:
            self._run.log(
                {key: value for key, value in line.items() if key not in ("epoch", "kept")}, step=int(line["epoch"])
            )

    def end(self, how: End, figures: Mapping[str, float]) -> None:
        """The final figures, and how the run ended."""
        self._run.summary.update(dict(figures))
        try:
            self._run.finish(exit_code=0 if how == "finished" else 1)
        except TimeoutError:
            sent_by = f"wandb sync {Path(self._run.dir).parent}"
            raise TimeoutError(f"not all was sent in {_FINISH_S:.0f} s; the rest is sent by: {sent_by}") from None
