"""Which of a recipe's phases the run keeps: two networks on the same validation samples, and by how much one is better.

The comparison is paired: what both get right, or both wrong, tells nothing of the difference and is no noise of it
(McNemar 1947). A large validation split decides alone: beyond one standard error, else the phase before is kept, whose
body is nearer to what it was and so holds better on other data (Kumar et al. 2022, arXiv 2202.10054). A small one
cannot see what the later phase usually gives (docs/methods.md), so it decides only against: the later phase is kept
unless it is worse by more than one standard error. Where groups are kept apart (speakers, patients), those that count
are none of the split, and the phase before is kept unless the later one is better beyond the noise: a body that moves
learns the few groups by heart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from orchestrator.errors import counted
from orchestrator.job import Plan, figure
from orchestrator.tasks.metrics import Predictions

_TELLS = 0.02
"""Up to this standard error validation decides alone: of the accuracy, or of the relative difference of the losses."""


@dataclass(frozen=True)
class Comparison:
    """A network against the one that is kept so far."""

    difference: float
    """Of the accuracies, above 0 where it is better; without an accuracy of the losses: (kept - other) / kept."""
    noise: float
    """The difference's standard error."""
    num_samples: int
    groups_apart: bool = False
    """Whether no group of samples is in both the training and the validation split."""

    @property
    def tells(self) -> bool:
        """Whether there are samples enough to decide alone."""
        return self.noise <= _TELLS

    @property
    def is_won(self) -> bool:
        """Whether it replaces the other."""
        return self.difference > (self.noise if self.tells or self.groups_apart else -self.noise)

    def of_later(self, task: str, kept: Mapping[str, Any], other: Mapping[str, Any]) -> Comparison:
        """The same of a later epoch of the other, by the validation figures of both; the noise stays what it was."""
        if task == "single-label":
            difference = other["validation_accuracy"] - kept["validation_accuracy"]
        else:
            difference = (kept["validation_loss"] - other["validation_loss"]) / max(kept["validation_loss"], 1e-12)
        return replace(self, difference=difference)


Rank = tuple[float, float]
"""(accuracy, 0 where the task has none; the loss below 0): the larger the better."""
LOWEST: Rank = (-1.0, -math.inf)
"""Of what has no figures, or a loss that is no number."""


def rank_of(task: str, figures: Mapping[str, Any]) -> Rank:
    """How good an epoch is, by its validation figures: the most right; of equals the surest.

    Small validation sets have many equals, and with several labels a sample hardly any is wholly right at first:
    there the loss decides.
    """
    loss = figures.get("validation_loss")
    if loss is None or math.isnan(loss):
        return LOWEST
    return (figures["validation_accuracy"] if task == "single-label" else 0.0), -loss


def may_be_as_good(task: str, rank: Rank, highest: Rank, num_samples: int) -> bool:
    """Whether a validation split is so small that it cannot tell an epoch's accuracy from the highest so far.

    Of many epochs the one that a small split likes best is the luckiest; the last one of those that may be as good has
    the lowest learning rate. The noise is the standard error of the highest accuracy, by Laplace's rule of succession.
    """
    if task != "single-label" or LOWEST in (rank, highest):
        return False
    share = (highest[0] * num_samples + 1) / (num_samples + 2)
    noise = math.sqrt(share * (1 - share) / max(1, num_samples))
    return noise > _TELLS and rank[0] >= highest[0] - noise


def compare(task: str, kept: Predictions, other: Predictions) -> Comparison:
    """The other's predictions against those that are kept, of the same samples in the same order."""
    num = len(kept.rows)
    if task == "single-label":
        better = (other.predicted == other.targets).astype(np.float64) - (kept.predicted == kept.targets)
        difference = float(better.mean())
        # One pair that differs is added: no difference seen must not give a standard error of 0.
        noise = math.sqrt(max(0.0, (np.abs(better).sum() + 1) / num - difference**2) / num)
        return Comparison(difference, noise, num)
    scale = max(float(kept.loss.mean()), 1e-12)
    less = (kept.loss.astype(np.float64) - other.loss) / scale
    return Comparison(float(less.mean()), float(less.std(ddof=min(1, num - 1))) / math.sqrt(num), num)


def what_was_chosen(
    plan: Plan, best_epoch: int, candidates: Sequence[Mapping[str, Any]], comparison: Mapping[str, Any] | None
) -> tuple[str, str] | None:
    """Two sentences: what the run's weights are of, and why. None where the recipe left nothing to choose.

    `best_epoch` of all phases, from 1; `candidates`: the figures of each phase's best epoch; `comparison`: the fields
    of the last phase's `Comparison`.
    """
    phases = [phase for phase in plan.recipe.phases if not phase.refits]
    if not phases[-1].must_win:
        return None
    name = "the probe" if phases[0].solver == "probe" else "the new last layer"
    is_later = best_epoch > phases[0].epochs
    if is_later:
        num_epochs = sum(phase.epochs for phase in phases)  # counted as everywhere, those of the first phase too
        how = f"from {name}" if phases[-1].loss == "task" else "by what is alike, a probe behind it"
        chosen = f"everything, trained {how}: epoch {best_epoch} of {num_epochs}."
    else:
        chosen = f"{name}, on the body as it was."
    if not phases[-1].epochs:
        return chosen, "the budget does not suffice for one epoch in which everything is trained (--budget)."
    if comparison is None:
        return chosen, _without_validation(plan, name, candidates)
    return chosen, _by_validation(plan, name, is_later, candidates, Comparison(**comparison))


def _without_validation(plan: Plan, name: str, candidates: Sequence[Mapping[str, Any]]) -> str:
    score = candidates[0].get("cross_validation")
    if min(plan.data.per_class.get("train", (2,)), default=2) < 2:  # which no fold can hold out and be taught
        score = None
    known = f" ({name} alone: {figure(score)} in cross-validation)" if score is not None else ""
    return (
        f"{counted(plan.data.num_samples['train'], 'sample')} and none held back to choose by{known}; in the runs of "
        "docs/methods.md on so few, training everything gave more."
    )


def _by_validation(
    plan: Plan, name: str, is_later: bool, candidates: Sequence[Mapping[str, Any]], compared: Comparison
) -> str:
    what = "accuracy" if plan.job.task == "single-label" else "loss"
    before, after = (figure(one.get(f"validation_{what}")) for one in (candidates[0], candidates[-1]))
    noise = compared.noise
    if is_later:
        why = "more than its noise" if compared.difference > noise else "and so few cannot tell that it is worse"
    elif compared.tells or (compared.groups_apart and compared.difference >= -noise):
        why = "no more than its noise, and the body as it was is the safer one"
    else:
        why = "worse than its noise"
    unit = "" if what == "accuracy" else " of the loss"
    return (
        f"on {counted(compared.num_samples, 'validation sample')} {what} {before} of {name} became {after}; the "
        f"difference has a standard error of {noise:.3f}{unit}: {why}."
    )
