"""The configurations of trials: drawn or counted off by their seed, or proposed by one of Ray Tune's algorithms.

What was proposed is written down before anything is done with it. So a search that was cut off goes on with the same
trials, and an algorithm is told all that came of them before it proposes more.
"""

from __future__ import annotations

import contextlib
from typing import Any

from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, Searcher

from orchestrator.errors import JobError, MissingExtraError, TrainingError, first_line
from orchestrator.tuning.space import Config, Space, plain
from orchestrator.tuning.trials import Book, Metric, Trial

_NAMES = ("random", "grid", "optuna")
NUM_AT_ONCE = 16
"""So many configurations an algorithm is asked for before it is told what came of them."""


def make_algorithm(asked: Any, space: Space, seed: int) -> Searcher | None:
    """The algorithm that was asked for, None where the seed alone decides. Raises `JobError`."""
    if asked in ("random", None):
        return None
    if asked == "grid":
        if space.is_grid:
            return None
        drawn = [key for key, domain in space.domains.items() if not isinstance(domain, dict)]
        raise JobError(
            f"search_alg = 'grid', and {drawn[0]} is drawn", expected="a grid of all keys",
            mend=f"give its values: {drawn[0]}: {{grid_search: [...]}}, or search_alg random",
        )  # fmt: skip
    if asked == "optuna":
        return _optuna(seed)
    if isinstance(asked, BasicVariantGenerator) and not asked._points_to_evaluate:
        return None
    if not isinstance(asked, Searcher):
        raise JobError(
            f"search_alg = {asked!r}", expected=f"one of {', '.join(_NAMES)}, or an algorithm of ray.tune.search",
            mend="leave it out: values are drawn at random, grids counted off",
        )  # fmt: skip
    if any(isinstance(domain, dict) for domain in space.domains.values()):
        raise JobError(
            f"search_alg {type(asked).__name__} proposes values itself, and the space has a grid",
            mend="use choice instead of grid_search, or leave search_alg out",
        )
    return asked


def _optuna(seed: int) -> Searcher:
    try:
        import optuna  # noqa: PLC0415
        from ray.tune.search.optuna import OptunaSearch  # noqa: PLC0415
    except ModuleNotFoundError:
        raise MissingExtraError("optuna", "search") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return OptunaSearch(sampler=optuna.samplers.TPESampler(seed=seed))


class Proposals:
    """What comes next, up to a number of trials; all of it goes into the book first."""

    def __init__(
        self, space: Space, algorithm: Searcher | None, num_trials: int, seed: int, metric: Metric, book: Book
    ) -> None:
        self._algorithm, self._metric, self._book, self._num_trials = algorithm, metric, book, num_trials
        self._draws = space.draws(seed)
        self._asked: set[int] = set()
        """Trials that the algorithm has proposed in this process, and has not been told of."""
        if algorithm is None:
            for _ in book.proposed:
                next(self._draws)
        else:
            self._set_up(algorithm, space)
            for trial in book.trials.values():
                self.tell(trial)

    def again(self) -> list[int]:
        """The numbers of trials that were proposed before, and have not ended."""
        return [number for number in self._book.open_numbers(self._num_trials) if number in self._book.proposed]

    def next(self, num: int) -> list[int]:
        """The numbers of new trials, `num` at most; none once there are enough, or while the algorithm waits."""
        first = len(self._book.proposed) + 1
        new: dict[int, Config] = {}
        for number in range(first, min(first + num, self._num_trials + 1)):
            config = self._proposed(number)
            if config is None:
                break
            new[number] = config
        self._book.propose(new)
        return list(new)

    def heard(self, number: int, line: dict[str, Any]) -> None:
        """Tell the algorithm of an epoch."""
        if self._algorithm is not None and number in self._asked:
            self._algorithm.on_trial_result(_id(number), {**line, "training_iteration": line["epoch"]})

    def tell(self, trial: Trial) -> None:
        """Tell the algorithm what came of a trial."""
        algorithm = self._algorithm
        if algorithm is None or trial.repeat:
            return
        failed = trial.score is None
        if trial.number in self._asked:
            self._asked.discard(trial.number)
            result = None if failed else {self._metric.key: trial.score, "training_iteration": len(trial.lines)}
            algorithm.on_trial_complete(_id(trial.number), result=result, error=failed)
            return
        inner = algorithm.searcher if isinstance(algorithm, ConcurrencyLimiter) else algorithm
        if not failed:  # of one that failed in an earlier process there is nothing to learn
            with contextlib.suppress(NotImplementedError):  # it begins anew, and the trials are kept
                inner.add_evaluated_point(trial.config, trial.score)

    def _set_up(self, algorithm: Searcher, space: Space) -> None:
        if algorithm.metric not in (None, self._metric.key) or algorithm.mode not in (None, self._metric.mode):
            raise JobError(
                f"search_alg has metric {algorithm.metric!r} and mode {algorithm.mode!r}",
                expected=f"{self._metric.key}, {self._metric.mode}", mend="leave both out of the algorithm",
            )  # fmt: skip
        try:
            took = algorithm.set_search_properties(self._metric.key, self._metric.mode, dict(space.domains))
        except Exception as error:
            raise JobError(
                f"{type(algorithm).__name__} cannot use the space: {first_line(error)}",
                expected="domains that it knows", mend="use others, or leave search_alg out",
            ) from error  # fmt: skip
        if not took:
            raise JobError(
                f"{type(algorithm).__name__} has a space of its own", expected="an algorithm without one",
                mend="give the space to the search alone",
            )  # fmt: skip

    def _proposed(self, number: int) -> Config | None:
        if self._algorithm is None:
            return next(self._draws)
        try:
            config = self._algorithm.suggest(_id(number))
        except Exception as error:
            raise TrainingError(
                f"{type(self._algorithm).__name__} proposes nothing: {type(error).__name__}: {first_line(error)}",
                mend="the same command goes on; with search_alg random it needs no algorithm",
            ) from error
        if config is None or config == Searcher.FINISHED:
            return None
        self._asked.add(number)
        return {key: plain(value) for key, value in config.items()}


def _id(number: int) -> str:
    return f"{number:05}"
