"""Whether a run that has ended learnt anything; where it did not, the likely cause, and what to try.

Two things tell: the training loss, which falls, and the figures of samples that were held back, which are better than
those of a prediction that knows no input. A run is spoken of only where its figures leave no doubt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.job import Plan, figure

_FALLS_BY = 0.02
"""Of the first epoch's loss: a loss that never gets lower than that has not fallen."""
_LEARNT_ACCURACY, _LEARNT_LOSS = 0.9, 0.1
"""In training: then there is nothing left to fall (the loss of regression is in parts of the targets' variance)."""
_FEWEST = 20
"""Samples that were held back: of fewer nothing can be told from chance."""
_ROSE_BY = 1.2
_REACHES = 0.02
"""How far a rate has to be able to move a weight: the deviation that new layers begin with."""
_GOOD_REACH = 0.2
_FEW_STEPS = 20
_CONSTANT = "a prediction that is always the same"


@dataclass(frozen=True)
class Finding:
    """What is wrong with a run, why most likely, and what to try."""

    problem: str
    cause: str
    mend: str

    def __str__(self) -> str:
        return f"{self.problem}; likely cause: {self.cause}; try: {self.mend}"


@dataclass(frozen=True)
class Curve:
    """How the training went, epoch after epoch."""

    losses: tuple[float, ...]
    accuracy: float | None
    """Of the last epoch in training."""

    @classmethod
    def of(cls, lines: Sequence[Mapping[str, Any]]) -> Curve:
        """Epochs without a loss are left out."""
        losses = tuple(float(line["train_loss"]) for line in lines if line.get("train_loss") is not None)
        return cls(losses, lines[-1].get("train_accuracy") if lines else None)

    @property
    def is_learnt(self) -> bool:
        """Whether the training samples are known."""
        if self.accuracy is not None:
            return self.accuracy >= _LEARNT_ACCURACY
        return bool(self.losses) and self.losses[-1] <= _LEARNT_LOSS

    @property
    def fell(self) -> bool:
        """Whether the loss of some later epoch is lower than the first one's; of a single epoch that is not known."""
        first, *later = self.losses or (0.0,)
        return not later or min(later) <= first * (1 - _FALLS_BY)

    @property
    def rose(self) -> bool:
        """Whether it ended well above where it once was."""
        return len(self.losses) > 1 and self.losses[-1] > _ROSE_BY * min(self.losses)


def find_problems(
    plan: Plan,
    lines: Sequence[Mapping[str, Any]],
    figures: Mapping[str, Mapping[str, Any]],
    are_alike: Callable[[], bool],
) -> tuple[Finding, ...]:
    """What is wrong with a run that has ended; () where nothing is.

    `lines`: of its epochs; `figures`: split -> its final ones. `are_alike`: whether training samples that differ are
    all the same to the network; asked only where there is a problem.
    """
    curve = Curve.of(lines)
    chance = _at_chance(plan, figures)
    if not curve.fell and not curve.is_learnt:
        first, lowest = curve.losses[0], min(curve.losses[1:])
        problem = f"the training loss did not fall: {figure(first)} in the first epoch, {figure(lowest)} at its lowest"
        if chance:
            problem += f", and {chance}"
        return (Finding(problem, *_why_it_did_not_fall(plan, curve, are_alike())),)
    if chance:
        return (Finding(chance, *_why_at_chance(plan, curve, are_alike())),)
    return ()


# --- what is seen ---


def _at_chance(plan: Plan, figures: Mapping[str, Mapping[str, Any]]) -> str:
    """That the samples which were held back are predicted no better than by a constant, in words; '' if they are.

    By the interval of every figure that tells: the accuracy of rare classes is high for a constant too, and the order
    of the scores may be right where their threshold is not.
    """
    split = next((one for one in ("validation", "test") if figures.get(one, {}).get("num_samples", 0) >= _FEWEST), None)
    if split is None:
        return ""
    told = figures[split]
    if plan.job.task == "regression":
        low = _lower_edge(told, "r2")
        if low is None or low > 0:
            return ""
        return f"the {split} R2 is {figure(told['r2'])}, no better than {_CONSTANT}: the mean"
    low = _lower_edge(told, "auroc")
    if low is not None and low > 0.5:
        return ""
    if plan.job.task == "multi-label":
        return "" if low is None else f"the {split} AUROC is {figure(told['auroc'])}, no better than {_CONSTANT}"
    counts = plan.data.per_class.get(split, ())
    share = max(counts, default=0) / max(1, sum(counts))
    edge = _lower_edge(told, "accuracy")
    if edge is None or edge > share:
        return ""
    return (
        f"the {split} accuracy is {figure(told['accuracy'])}, no better than {_CONSTANT}: the most frequent class has "
        f"{figure(share)}"
    )


def _lower_edge(figures: Mapping[str, Any], key: str) -> float | None:
    """Of the figure's interval; the figure itself where it has none, None where there is no such figure."""
    edges = figures.get(f"{key}_95")
    return float(edges[0]) if edges is not None else figures.get(key)


# --- why ---


def _why_it_did_not_fall(plan: Plan, curve: Curve, alike: bool) -> tuple[str, str]:
    """(the likely cause, what to try)"""
    phase, training = plan.recipe.phases[-1], plan.job.training
    rate = phase.highest_rate
    if alike:
        return _alike(plan)
    if curve.rose or curve.losses[-1] > _ROSE_BY * curve.losses[0]:
        return _too_high(rate)
    # AdamW moves a weight by its rate in a step at most, and along the cosine by half of it in the mean.
    reach = rate * phase.num_steps * (0.5 if training.schedule == "cosine" else 1.0)
    if training.optimizer == "sgd":
        reach /= (1 - training.momentum) * 10
    if reach < _REACHES:
        if phase.num_steps < _FEW_STEPS:
            return f"{phase.num_steps} steps are too few", f"training.epochs = {_more_epochs(plan)}"
        better = _one_digit(rate * _GOOD_REACH / reach)
        return (
            f"the learning rate {rate:g} is too low: in {phase.num_steps} steps weights move by {reach:.1g} at most",
            f"training.learning_rate = {better}",
        )
    if training.learning_rate is not None or training.head_learning_rate is not None:
        return f"the learning rate {rate:g} that was set does not suit this network", "leave training.learning_rate out"
    return _labels(plan)


def _why_at_chance(plan: Plan, curve: Curve, alike: bool) -> tuple[str, str]:
    if alike:
        return _alike(plan)
    phase = plan.recipe.phases[-1]
    is_spoilt = phase.loss == "contrastive" and curve.rose  # a head that is fitted has its samples right all the same
    if curve.is_learnt and not is_spoilt:
        return _overfits(plan)
    if curve.rose:
        return _too_high(phase.highest_rate)
    if phase.num_steps < 10 * _FEW_STEPS and len(curve.losses) < 5:
        return f"{phase.num_steps} steps may be too few", f"training.epochs = {_more_epochs(plan)}"
    return _labels(plan)


def _too_high(rate: float) -> tuple[str, str]:
    return f"the learning rate {rate:g} is too high: the loss rose", f"training.learning_rate = {_one_digit(rate / 10)}"


def _alike(plan: Plan) -> tuple[str, str]:
    adapted = f" ({'; '.join(str(one) for one in plan.adaptations)})" if plan.adaptations else ""
    return (
        f"the preprocessing: samples that differ are all the same to the network{adapted}",
        f"look at what becomes of the input, and set settings of the modality: orchestrator settings "
        f"{plan.job.modality}",
    )


def _overfits(plan: Plan) -> tuple[str, str]:
    cause = "the network overfits: it has learnt the training samples by heart, which tells nothing of others: "
    if plan.job.method == "scratch":
        return cause + "random weights want far more samples", "method = full"
    if plan.job.method != "head" and plan.data.num_samples["train"] < 1000:
        return cause + "they are few to train a whole network, or labels and inputs do not go together", (
            "method = head"
        )
    return cause + "labels and inputs do not go together, or the splits differ in kind", _look_at_labels(plan)


def _labels(plan: Plan) -> tuple[str, str]:
    return "the labels: nothing that this backbone sees of the inputs tells them", _look_at_labels(plan)


def _look_at_labels(plan: Plan) -> str:
    column = plan.job.data.label_column
    what = f"the column {column!r}" if isinstance(column, str) else "the columns of labels"
    more = "" if plan.job.method in ("full", "scratch") else "; else method = full"
    return f"compare some inputs with their labels, folders or {what} of {plan.job.data.path}{more}"


def _more_epochs(plan: Plan) -> int:
    """So many that there are some hundred steps."""
    return max(2 * plan.recipe.phases[-1].epochs, math.ceil(10 * _FEW_STEPS / plan.recipe.steps_per_epoch))


def _one_digit(rate: float) -> str:
    return f"{float(f'{rate:.0e}'):g}"
