"""Which epoch's weights a run keeps: the best by validation; of a phase that has to win, what beats those before.

Where the validation split is too small to tell epochs apart, the last one that may be as good as the best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from orchestrator.job import Phase
from orchestrator.tasks import Comparison, Predictions, compare, may_be_as_good
from orchestrator.training import checkpoint as ckpt
from orchestrator.training.evaluate import predict_split
from orchestrator.training.state import Session

_OF_THE_CLOCK = ("seconds", "samples_per_s")


class BestEpoch:
    """Of one phase. What it finds is in the session's state, but for what the phases before say of each sample."""

    def __init__(self, session: Session, phase: Phase) -> None:
        self._session, self._phase = session, phase
        self._before: Predictions | None = None

    def look_back(self, best: ckpt.Tensors, tensors: ckpt.Tensors) -> bool:
        """See what `best` says on validation, which the phase has to beat; `tensors`, the network's, are as before.

        Whether that is done: False where somebody asked to stop. Nothing is to be seen where there is no validation, or
        an epoch of the phase has won already.
        """
        session, state = self._session, self._session.state
        first = state.num_epochs_ended(session.plan.recipe) - state.epochs_ended
        if not self._phase.must_win or state.best_epoch > first or not len(session.samples.rows("validation")):
            return True
        now = ckpt.copy_of(tensors)
        ckpt.load_into(best, tensors)
        self._before = predict_split(session, "validation")
        ckpt.load_into(now, tensors)
        return self._before is not None

    def is_found(self, line: Mapping[str, Any], predictions: Predictions) -> bool:
        """Whether an epoch's weights are to be kept from now on; without a validation split the last one's are.

        `line`: its figures, as in metrics.jsonl; `predictions` for the validation split.
        """
        session, state = self._session, self._session.state
        line = {name: value for name, value in line.items() if name not in _OF_THE_CLOCK}
        if "validation_loss" not in line:
            session.note_of(state.phase, **line)
            return True
        rank = self._rank(line)
        is_noted = rank > self._rank(state.candidates.get(str(state.phase), {}))
        compared = self._compared(line, predictions)
        if compared is not None and (is_noted or compared.is_won):
            state.comparison, is_noted = asdict(compared), True
        if is_noted:
            session.note_of(state.phase, **line)
        if compared is not None and not compared.is_won:
            return False
        is_highest = rank > (state.best_accuracy, -state.best_loss) or self._before is not None
        self._before = None  # from here on epochs compete with one another, where validation can tell them apart
        if is_highest:
            state.best_accuracy, state.best_loss, state.highest_epoch = rank[0], -rank[1], line["epoch"]
        return is_highest or compared is not None or self._may_be_as_good(line, rank[0], len(predictions.rows))

    def _may_be_as_good(self, line: Mapping[str, Any], accuracy: float, num: int) -> bool:
        """Whether this later epoch replaces the one that is kept, although another one had higher figures.

        `accuracy`: below 0 where its loss is no number.
        """
        session = self._session
        if self._phase.must_win or session.plan.job.task != "single-label":
            return False
        if is_kept := may_be_as_good(accuracy, session.state.best_accuracy, num):
            session.note_of(session.state.phase, **line)
        return is_kept

    def _compared(self, line: Mapping[str, Any], predictions: Predictions) -> Comparison | None:
        """An epoch against what the phase has to beat; None where it competes with the phase's other epochs.

        Where validation cannot tell, the best of many epochs is the luckiest one: each that is not worse than what was
        there before the phase replaces the one before it, so that the last one is kept, whose rate was the lowest.
        """
        state, task = self._session.state, self._session.plan.job.task
        if self._before is not None:
            return compare(task, self._before, predictions)
        if not self._phase.must_win or state.comparison is None:
            return None
        won = Comparison(**state.comparison)
        return None if won.tells else won.of_later(task, state.candidates[str(state.phase - 1)], line)

    def _rank(self, line: Mapping[str, Any]) -> tuple[float, float]:
        """The most right; of equals the surest.

        Small validation sets have many equals, and with several labels a sample hardly any is wholly right at first:
        there the loss decides.
        """
        loss = line.get("validation_loss")
        if loss is None or math.isnan(loss):
            return -1.0, -math.inf
        return (line["validation_accuracy"] if self._session.plan.job.task == "single-label" else 0.0), -loss
