"""How many epochs fit into what a job may take, by the first steps in which everything is trained."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

from orchestrator.job import Noted
from orchestrator.training.state import Session

_STEPS_OF_A_FORWARD = 1 / 3
"""Validation runs forward alone: a third of a step."""
_NUM_MEASURED = 4


def is_to_be_fitted(session: Session) -> bool:
    """Whether the phase's epochs are still to be made to fit into a budget. What was decided stays."""
    decided = session.state.decided.get(str(session.state.phase), {})
    return session.plan.recipe.budget_s is not None and "epochs" not in decided


def seconds_of(take: Callable[[int], object]) -> list[float]:
    """Of steps 1 to 3, by `take(number)`; step 0, which gets everything ready, is not among them."""
    seconds = []
    for number in range(_NUM_MEASURED):
        started = time.monotonic()
        take(number)
        seconds.append(time.monotonic() - started)
    return seconds[1:]


def epochs_that_fit(
    left_s: float, step_s: Sequence[float], steps_per_epoch: int, num_train: int, num_evaluated: int
) -> tuple[int, float]:
    """(how many epochs fit into `left_s`, seconds of one with its validation)."""
    step = statistics.median(step_s)
    evaluation = _STEPS_OF_A_FORWARD * step * steps_per_epoch * num_evaluated / max(1, num_train)
    epoch = max(1e-9, steps_per_epoch * step + evaluation)
    return max(0, int(left_s / epoch)), epoch


def fit_epochs(session: Session, step_s: Sequence[float]) -> None:
    """Settle how many epochs the phase has, as rank 0 measured; one that `must_win` may have none.

    Half of what is left is kept for a phase that refits. All workers call this.
    """
    phase, budget_s = session.phase, session.plan.recipe.budget_s
    assert budget_s is not None
    num_train, num_evaluated = (len(session.samples.rows(name)) for name in ("train", "validation"))
    if phase.loss == "contrastive":  # the head is fitted to what the body gives for all of them
        num_evaluated += num_train
    used = session.seconds()
    left = (budget_s - used) / (2 if any(one.refits for one in session.plan.recipe.phases) else 1)
    fit = epochs_that_fit(left, step_s, phase.steps_per_epoch, num_train, num_evaluated)
    fitting, epoch_s, used = session.worker.all_gather((*fit, used))[0]
    epochs = min(phase.epochs, max(fitting, 0 if phase.must_win else 1))
    if epochs < phase.epochs:
        need = math.ceil((used + epoch_s * phase.epochs) / 60)
        text = (
            f"an epoch takes {epoch_s:.0f} s: of {phase.epochs} the budget of {budget_s / 60:g} minutes has time for "
            f"{epochs}; for all of them: --budget {need}"
        )
        session.report(Noted(text, is_warning=epochs == 0))
    session.decide(session.state.phase, epochs=epochs, num_steps=epochs * phase.steps_per_epoch)
