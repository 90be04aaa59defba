"""What a tracking service has to do, and which ones there are."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, Protocol

from orchestrator.errors import MissingExtraError
from orchestrator.job import HeldRun, Plan

Line = Mapping[str, Any]
"""Of an epoch, as metrics.jsonl has it."""
End = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class Begun:
    """A run as the service has it."""

    name: str
    """By which it is known there."""
    warning: str = ""
    """What a person should know of it."""


class Tracker(Protocol):
    """One run in a service. Each call may raise whatever its library raises."""

    def begin(self, known: str | None) -> Begun:
        """Go on with the service's run of that name, or begin one."""

    def add(self, lines: Sequence[Line]) -> None:
        """Epochs that it has not yet, in order."""

    def end(self, how: End, figures: Mapping[str, float]) -> None:
        """The final figures, where there are any; nothing comes after them until `begin` is called again."""


def make_tracker(name: str, held: HeldRun, plan: Plan) -> Tracker:
    """The tracker of that name, which imports its library."""
    module = importlib.import_module(_MODULES[name])
    make: Callable[[HeldRun, Plan], Tracker] = module.make
    return make(held, plan)


def require_trackers(names: Iterable[str]) -> None:
    """Raise `MissingExtraError` where a library is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise MissingExtraError(name, name)


def settings_of(plan: Plan) -> dict[str, str | int | float | bool]:
    """The job's settings by their dotted names, and what its recipe resolved: `training.epochs`, `recipe.batch_size`.

    Settings without a value are left out.
    """
    recipe = plan.recipe
    resolved = {
        "batch_size": recipe.batch_size, "epochs": recipe.num_epochs, "steps": recipe.num_steps,
        "learning_rate": recipe.phases[-1].learning_rate, "head_learning_rate": recipe.phases[-1].head_learning_rate,
        "loss": recipe.phases[-1].loss,
    }  # fmt: skip
    tree = {**plan.job.model_dump(mode="json"), "recipe": resolved, "num_classes": len(plan.classes)}
    return dict(_flat(tree, ""))


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{key}", ", ".join(map(str, value))
        elif value is not None:
            yield f"{prefix}{key}", value


_MODULES = {"mlflow": "orchestrator.tracking.in_mlflow", "wandb": "orchestrator.tracking.in_wandb"}
