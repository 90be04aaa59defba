"""The trials of a search from first to last: which are heads in a stack, which runs of Tune's, and what is told."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.tune.search import Searcher

from orchestrator.errors import InterruptedRunError, RefusedError, TrainingError, counted
from orchestrator.job import Noted, Report, Stop, TrialsAdvanced
from orchestrator.tuning.layout import Layout
from orchestrator.tuning.pending import PendingTrial, TrialContext, grouped, is_stackable
from orchestrator.tuning.proposals import NUM_AT_ONCE, Proposals
from orchestrator.tuning.result import ranked, shown_config
from orchestrator.tuning.settings import SearchSettings
from orchestrator.tuning.space import Config, Space
from orchestrator.tuning.stacks import Stacks
from orchestrator.tuning.stopping import make_stopping
from orchestrator.tuning.trials import Book, Key, Metric, Trial

_NUM_SHOWN = 3
_NUM_REPEATED = 3
_SEED = "training.seed"


@dataclass
class Work:
    """What is done for a search in this process."""

    space: Space
    settings: SearchSettings
    metric: Metric
    layout: Layout
    book: Book
    algorithm: Searcher | None
    report: Report
    should_stop: Stop
    num_trials: int
    num_epochs: int
    """Of the longest trial that is known of."""
    _started: float = field(default_factory=time.monotonic)
    _only_failed: TrainingError | None = None
    _num_before: int = 0
    _running: set[Key] = field(default_factory=set)
    _context: TrialContext = field(init=False)
    _proposals: Proposals = field(init=False)

    def __post_init__(self) -> None:
        """Raises `JobError` for a scheduler or an algorithm that cannot be used."""
        stopping = make_stopping(self.settings.scheduler, self.metric, self.num_epochs)
        self._context = TrialContext(
            self.layout, self.metric, stopping, self.report, self._is_over, self._heard, self._ended
        )
        self._proposals = Proposals(
            self.space, self.algorithm, self.num_trials, self.settings.seed, self.metric, self.book
        )

    def run(self) -> Any:
        """Do all trials, and repetitions of the best; Tune's `ResultGrid` of those that it ran, None without any.

        Raises `TrainingError` where they only fail, and `InterruptedRunError` where it is asked to stop. At the end of
        its time it returns.
        """
        self._num_before = len(self.book.trials)
        for trial in self.book.trials.values():
            self._context.stopping.hear_again(trial)
        if self._num_before:
            self.report(Noted(f"{counted(self._num_before, 'trial')} ended before, and are not done again"))
        grid = None
        try:
            grid = self._all_trials(self._proposals)
            grid = self._repetitions() or grid
        except InterruptedRunError:
            if self._only_failed is not None:
                raise self._only_failed from None
            if not self._time_is_over():
                raise
            self.report(Noted("the time budget is used up; the same command with another one goes on"))
        return grid

    def ranked(self) -> list[Trial]:
        """Trials with a score, the best first."""
        return ranked(list(self.book.trials.values()), self.metric)

    def best(self) -> Trial | None:
        """The best one so far."""
        return next(iter(self.ranked()), None)

    # --- what is done with which trials ---

    def _all_trials(self, proposals: Proposals) -> Any:
        at_once = self.num_trials if self.algorithm is None else NUM_AT_ONCE
        numbers = proposals.again()
        while True:
            numbers = numbers or proposals.next(at_once)
            if not numbers:
                return None
            tasks = [task for number in numbers if (task := self._task((number, 0), self.book.proposed[number]))]
            numbers = []
            others = [task for task in tasks if not is_stackable(task.plan)]
            # An algorithm that has to wait for runs proposes one at a time; of heads it proposes many.
            if self.algorithm is None or not others:
                others += self._stacked([task for task in tasks if is_stackable(task.plan)])
                tasks = []
            waiting = deque(others + [task for task in tasks if task not in others])
            if waiting:
                return self._on_tune(waiting, proposals if self.algorithm is not None else None)

    def _repetitions(self) -> Any:
        tasks = []
        for trial in self.ranked()[:_NUM_REPEATED] if self.settings.num_seeds > 1 else ():
            seed = self.layout.job_of(trial.key, trial.config).training.seed
            for repeat in range(1, self.settings.num_seeds):
                if (trial.number, repeat) not in self.book.trials:
                    tasks.append(self._task((trial.number, repeat), {**trial.config, _SEED: seed + repeat}))
        there = [task for task in tasks if task is not None]
        others = [task for task in there if not is_stackable(task.plan)]
        others += self._stacked([task for task in there if is_stackable(task.plan)])
        return self._on_tune(deque(others), None) if others else None

    def _task(self, key: Key, config: Config) -> PendingTrial | None:
        """The trial as it is to be done; None where its settings do not go together, which is its row then."""
        try:
            return PendingTrial(key, config, self.layout.plan_of(key, config))
        except RefusedError as error:
            if self.layout.search.storage.has_failed(error):
                raise
            self._ended([Trial(key[0], config, "refused", None, 0, error=str(error), repeat=key[1])])
            return None

    def _stacked(self, tasks: Sequence[PendingTrial]) -> list[PendingTrial]:
        """Train heads side by side; those whose network does not allow it."""
        stacks = Stacks(self._context)
        left: list[PendingTrial] = []
        for group in grouped(tasks):
            if self._is_over():
                raise InterruptedRunError("stopped between groups of trials", mend="the same command goes on")
            left += stacks.train(group)
        return left

    def _on_tune(self, waiting: deque[PendingTrial], proposals: Proposals | None) -> Any:
        from orchestrator.tuning.on_tune import TuneTrials  # noqa: PLC0415  # heads alone need no cluster

        def following() -> PendingTrial | None:
            while not waiting:
                numbers = proposals.next(1) if proposals is not None else []
                if not numbers:
                    return None
                task = self._task((numbers[0], 0), self.book.proposed[numbers[0]])
                if task is not None:
                    waiting.append(task)
            return waiting.popleft()

        most = len(waiting) + (self.num_trials - len(self.book.proposed) if proposals is not None else 0)
        tune = TuneTrials(self._context, self._tell, following, self._running)
        return tune.run(waiting[0].plan, most, self.settings.max_concurrent)

    # --- what is heard of them ---

    def _heard(self, key: Key, line: Mapping[str, Any]) -> None:
        if not key[1]:
            self._proposals.heard(key[0], dict(line))

    def _ended(self, trials: Sequence[Trial]) -> None:
        self.book.add(*trials)
        for trial in trials:
            self._proposals.tell(trial)
            if trial.error:
                self.report(Noted(f"trial {trial.number} {trial.state}: {trial.error}", is_warning=True))
        there = self.book.trials.values()
        failed = [one for one in there if one.score is None]
        if len(failed) >= self.settings.max_failed and len(failed) == len(there):
            self._only_failed = TrainingError(
                f"all {len(failed)} trials have failed, the last one with: {failed[-1].error}",
                expected="trials that end well", mend="mend what fails; --fresh starts over, --max-failed allows more",
            )  # fmt: skip
        self._tell()

    def _tell(self) -> None:
        there = list(self.book.trials.values())
        best = tuple(
            (one.number, one.score, shown_config(one.config, list(self.space.domains)))
            for one in self.ranked()[:_NUM_SHOWN] if one.score is not None
        )  # fmt: skip
        num_done, num = sum(not one.repeat for one in there), self.num_trials
        done_here = len(there) - self._num_before
        passed = time.monotonic() - self._started
        left = passed / done_here * max(0, num - num_done) if done_here else None
        self.report(TrialsAdvanced(
            num_done, num, len(self._running), sum(one.score is None for one in there), self.metric.key, best, left
        ))  # fmt: skip

    def _time_is_over(self) -> bool:
        budget = self.settings.time_budget
        return budget is not None and time.monotonic() - self._started > budget

    def _is_over(self) -> bool:
        return self._only_failed is not None or self._time_is_over() or self.should_stop()
