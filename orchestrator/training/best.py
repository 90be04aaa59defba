"""Which epoch's weights a run keeps: the best by validation; of a phase that has to win, what beats those before.

Where the validation split is too small to tell epochs apart, the last one that may be as good as the best.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from orchestrator.job import Phase
from orchestrator.tasks import Comparison, Predictions, compare, may_be_as_good, rank_of
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
        task, highest = session.plan.job.task, (state.best_accuracy, -state.best_loss)
        rank = rank_of(task, line)
        is_noted = rank > rank_of(task, state.candidates.get(str(state.phase), {}))
        compared = self._compared(line, predictions)
        if compared is not None and (is_noted or compared.is_won):
            state.comparison = asdict(compared)
        if compared is not None:
            is_kept = compared.is_won
        else:
            is_kept = rank > highest
            if not self._phase.must_win:  # else its comparison says whether validation can tell
                is_kept |= may_be_as_good(task, rank, highest, len(predictions.rows))
        if is_noted or is_kept:
            session.note_of(state.phase, **line)
        if is_kept and (rank > highest or self._before is not None):
            state.best_accuracy, state.best_loss, state.highest_epoch = rank[0], -rank[1], line["epoch"]
        if is_kept:
            self._before = None  # from here on epochs compete with one another, where validation can tell them apart
        return is_kept

    def _compared(self, line: Mapping[str, Any], predictions: Predictions) -> Comparison | None:
        """An epoch against what the phase has to beat; None where it competes with the phase's other epochs.

        Where validation cannot tell, the best of many epochs is the luckiest one: each that would be kept instead of
        what was there before the phase replaces the one before it, so that the last one is kept, whose rate was the
        lowest.
        """
        state, task = self._session.state, self._session.plan.job.task
        if self._before is not None:
            return replace(
                compare(task, self._before, predictions), groups_apart=self._session.samples.groups is not None
            )
        if not self._phase.must_win or state.comparison is None:
            return None
        won = Comparison(**state.comparison)
        return None if won.tells else won.of_later(task, state.candidates[str(state.phase - 1)], line)
