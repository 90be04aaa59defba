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
_TIMEOUT_S = 20.0


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
        warning = ""
        try:
            self._run = self._init(known, None)
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            self._run = self._init(known, "offline")
            later = f"wandb sync {Path(self._run.dir).parent}"
            warning = f"{first_line(error)}; the run goes on, and what it writes is sent by: {later}"
        return Begun(str(self._run.id), warning)

    def _init(self, known: str | None, mode: Any) -> Any:
        folder = None if os.environ.get("WANDB_DIR") else str(self._held.folder)
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _PROJECT, name=self._plan.name, id=known, dir=folder, mode=mode,
            resume="allow", config=settings_of(self._plan),
            settings=wandb.Settings(silent=True, console="off", init_timeout=_TIMEOUT_S),
        )  # fmt: skip

    def add(self, lines: Sequence[Line]) -> None:
        """Epochs that it has not yet."""
        for line in lines:
            self._run.log({key: value for key, value in line.items() if key != "epoch"}, step=int(line["epoch"]))

    def end(self, how: End, figures: Mapping[str, float]) -> None:
        """The final figures, and how the run ended."""
        self._run.summary.update(dict(figures))
        self._run.finish(exit_code=0 if how == "finished" else 1)
