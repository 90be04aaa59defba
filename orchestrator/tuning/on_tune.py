"""Trials as Ray Tune's: each a run of ours in a process of its own, as many side by side as the cluster has room for.

A trial goes on from its run's last checkpoint, ends before its final figures, so that nobody reads the test split, and
is a row of the record once it has ended. What Tune writes itself stays in a folder of this machine, and is never read.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.tune.search import Searcher

from orchestrator.distributed.between_nodes import require_backbone
from orchestrator.distributed.events import DriverChannel
from orchestrator.distributed.failures import failures_of
from orchestrator.distributed.joining import event_queue, joined
from orchestrator.distributed.offer import kind_of, resources_of
from orchestrator.distributed.shared_storage import NotSeenError, refuse_apart, require_seen
from orchestrator.errors import InterruptedRunError, OrchestratorError, TrainingError, first_line
from orchestrator.gate import num_cores
from orchestrator.job import (
    ERROR_FILE,
    EpochEnded,
    Event,
    HeldRun,
    Lease,
    Noted,
    PhaseBegan,
    Plan,
    Run,
    open_storage,
    run_in,
)
from orchestrator.modality import Modality, registry
from orchestrator.train import train_as_planned
from orchestrator.training import FINAL_FIGURES
from orchestrator.tuning.pending import PendingTrial, TrialContext
from orchestrator.tuning.probes import keep_probe
from orchestrator.tuning.room import Room, room_for
from orchestrator.tuning.stopping import LAST_EPOCH
from orchestrator.tuning.trials import KEPT, Key, State, Trial

_STORAGE, _RUN, _LEASE, _NUMBER, _REPEAT = "storage", "run", "lease", "number", "repeat"
_FIRST_WAIT_S = 0.2
"""After which it is looked once more whether a probe is on the storage; each later wait is twice as long."""
_STOP_GRACE_S = 90.0
"""How long trials may take to stop once they are asked to: more than a run gives its workers."""
_DRIVER_BYTES = 2**20
"""What a trial asks for that has workers of its own: a place, and no core."""
_DRIVER_SHARE = 0.001
"""Of Ray's resource `node:ADDRESS`, which ties the driver of a trial to this node."""
_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals are ours
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "20",  # a step may take long; after it the process serves the next trial
    "TUNE_RESULT_BUFFER_LENGTH": "0",  # a scheduler decides before the next epoch
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_LOUD = ("ray.tune.execution.tune_controller", "ray.tune.tune")
"""Loggers that print the whole trace of a trial that fails, whose row says why in a line."""


@dataclass
class TuneTrials:
    """Runs trials with Ray Tune until nothing comes next."""

    context: TrialContext
    began_one: Callable[[], None]
    """Called when a trial begins."""
    next: Callable[[], PendingTrial | None]
    """The next trial, None once there is none."""
    running: set[Key] = field(default_factory=set)
    _tasks: dict[Key, PendingTrial] = field(default_factory=dict)
    _started: dict[Key, float] = field(default_factory=dict)
    _lines: dict[Key, list[dict[str, Any]]] = field(default_factory=dict)
    _stopping: bool = False
    _queue: Any = None
    """Where trials ask whether to stop."""
    _asked_at: float | None = None
    """When they were asked to."""
    _error: Exception | None = None
    """What went wrong here; raised through Tune, it would be the text of a trace."""
    _room: Room = field(default_factory=lambda: Room(1, 1, False))

    def run(self, first: Plan, most: int, max_concurrent: int | None) -> Any:
        """Run all trials that come; Tune's own `ResultGrid`.

        `first`: the plan of one of them, which says what each wants of a cluster; `most`: trials in all.
        `max_concurrent`: side by side, None: as many as there is room for. Raises `RefusedError` where there is room
        for none, and `InterruptedRunError` where `should_stop` says so.
        """
        os.environ.update(_ENVIRONMENT)
        self.context.report(PhaseBegan("starting Ray"))
        with joined(first, self.context.report, num_cpus=num_cores(), dashboard=None):
            refuse_apart(self.context.layout.search)
            self._room = room_for(first, most, max_concurrent)
            if first.job.scaling.device == "auto":
                what = "trials run on GPUs" if self._room.use_gpu else "no GPU for each trial, so all run on CPUs"
                self.context.report(Noted(f"device auto: {what}"))
            modality = first.job.modality
            own = registry.get(modality) if registry.is_registered(modality) else None
            # Beside what Tune writes there itself, so that a search that is killed leaves nothing anywhere else.
            session = ray._private.worker._global_node.get_session_dir_path()
            folder = Path(tempfile.mkdtemp(prefix="orchestrator-tune-", dir=session))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)  # until then its grid can be looked at
            self._queue = event_queue()
            try:
                return self._fit(first, most, own, folder)
            finally:
                if ray.is_initialized():
                    ray.kill(self._queue)

    def _fit(self, first: Plan, most: int, modality: Modality | None, folder: Path) -> Any:
        channel = DriverChannel(self._queue)

        def trial(config: dict[str, Any]) -> None:
            train_trial(config, channel, modality)

        tuner = tune.Tuner(
            tune.with_resources(trial, self._resources(first)),
            tune_config=tune.TuneConfig(
                search_alg=_TrialFeed(self), scheduler=self.context.stopping, num_samples=most,
                max_concurrent_trials=self._room.num_side_by_side, reuse_actors=True,
                trial_dirname_creator=lambda one: str(one.trial_id),
            ),
            run_config=tune.RunConfig(
                name="trials", storage_path=str(folder), verbose=0, callbacks=[_TrialCallback(self)],
                stop=_SearchStopper(self),
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )  # fmt: skip
        with _silent(_LOUD):
            grid = tuner.fit()
        if self._error is not None:
            raise self._as_ours(self._error)
        if self._stopping:
            raise InterruptedRunError("stopped while trials ran", mend="the same command goes on")
        return grid

    def _as_ours(self, error: Exception) -> OrchestratorError:
        if isinstance(error, OrchestratorError):
            return error
        search = self.context.layout.search
        with contextlib.suppress(OrchestratorError):  # the disk may be what is full
            search.write(ERROR_FILE, "".join(traceback.format_exception(error)))
        return TrainingError(
            f"{type(error).__name__}: {first_line(error)}",
            mend=f"the whole trace is in {search.place}/{ERROR_FILE}; the same command goes on",
        )

    def _resources(self, plan: Plan) -> tune.PlacementGroupFactory:
        if plan.num_workers > 1 or plan.num_extractors:
            # On this node: another one that is lost takes workers with it, which are replaced, and no trial.
            here = f"node:{ray.util.get_node_ip_address()}"
            return tune.PlacementGroupFactory([{"memory": _DRIVER_BYTES, here: _DRIVER_SHARE}])
        kind = kind_of(plan) if self._room.use_gpu else {}
        return tune.PlacementGroupFactory([{**resources_of(plan, self._room.threads, self._room.use_gpu), **kind}])

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its parts into a folder that nobody reads."""
        return {}

    def __deepcopy__(self, _memo: Any) -> TuneTrials:
        return self

    # --- what Tune's parts call ---

    def propose(self) -> dict[str, Any] | None:
        """What a trial's process gets; None once there is nothing more."""
        placed = None
        with self._kept():
            task = None if self._stopping else self.next()
            placed = None if task is None else self._laid_out(task)
        return placed

    def _laid_out(self, task: PendingTrial) -> dict[str, Any]:
        plan = task.plan.model_copy(update={
            "threads_per_worker": self._room.threads,
            "ray": task.plan.num_workers > 1 or task.plan.num_extractors > 0,
        })  # fmt: skip
        run, search = self.context.layout.lay_out(task.key, task.config, plan), self.context.layout.search
        self._tasks[task.key] = task
        where = {_STORAGE: search.storage.place, _RUN: run.name, _LEASE: vars(search.lease)}
        return {**where, _NUMBER: task.key[0], _REPEAT: task.key[1], **task.config}

    def began(self, key: Key) -> None:
        """A trial has begun."""
        self.running.add(key)
        self._started.setdefault(key, time.monotonic())
        with self._kept():
            self.began_one()

    def epoch(self, key: Key, result: Mapping[str, Any]) -> None:
        """A trial tells of an epoch."""
        with self._kept():
            self._hear(key, {name: result[name] for name in ("epoch", *_FIGURES, KEPT) if name in result})

    def _hear(self, key: Key, line: dict[str, Any]) -> None:
        # Those of earlier processes the run itself has; it writes down those of this one when it finds the time.
        known = self._lines.get(key) or [
            one for one in lines_of(self.context.layout.run_of(key)) if one["epoch"] < line["epoch"]
        ]
        self._lines[key] = [*known, line]
        self.context.heard(key, line)

    def over(self, key: Key, error: str = "", cause: Exception | None = None) -> None:
        """A trial has ended; where all are stopped, or its storage failed, it goes on another time."""
        self.running.discard(key)
        if not self._stopping:
            with self._kept():
                storage = self.context.layout.search.storage
                if cause is not None and (isinstance(cause, NotSeenError) or storage.has_failed(cause)):
                    raise cause  # no fault of this trial
                self._record(key, error)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """What goes wrong within it ends all trials, as they are."""
        try:
            yield
        except Exception as error:
            self._error, self._stopping = self._error or error, True

    def _record(self, key: Key, error: str) -> None:
        task, lines = self._tasks[key], self._lines.get(key) or lines_of(self.context.layout.run_of(key))
        epochs = task.plan.recipe.num_epochs
        finished = bool(lines) and lines[-1]["epoch"] == epochs
        state: State = "failed" if error else "finished" if finished else "stopped"
        score = None if error else self.context.metric.value(lines)
        seconds = round(time.monotonic() - self._started.get(key, time.monotonic()), 3)
        self.context.ended([Trial(key[0], task.config, state, score, epochs, lines, seconds, error, key[1])])

    def stops(self) -> bool:
        """Whether Tune is to end all trials: they are asked to stop first, which leaves a checkpoint of each."""
        self._stopping = self._stopping or self.context.should_stop()
        if self._stopping and self._asked_at is None:
            self._asked_at = time.monotonic()
            self._queue.take.remote(True)
            if self.running:
                self.context.report(Noted("stopping: each trial writes a checkpoint"))
        return self._asked_at is not None and (not self.running or time.monotonic() - self._asked_at > _STOP_GRACE_S)


@contextlib.contextmanager
def _silent(names: tuple[str, ...]) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


_FIGURES = ("train_loss", "validation_loss", "validation_accuracy")


def line_of(figures: Mapping[str, Any]) -> dict[str, Any]:
    """An epoch as the record has it, of its line in metrics.jsonl; the figures are those of what the run would keep."""
    line = {name: figures[name] for name in ("epoch", *_FIGURES) if name in figures}
    if KEPT not in figures:
        return line
    if figures[KEPT] == "average":
        line |= {name: figures[f"average_{name}"] for name in line if f"average_{name}" in figures}
    return {**line, KEPT: True}


def lines_of(run: Run) -> list[dict[str, Any]]:
    """The epochs of a trial's run."""
    return [line_of(figures) for figures in run.metrics]


# --- in the trial's process ---


def train_trial(config: Mapping[str, Any], channel: DriverChannel, modality: Modality | None = None) -> None:
    """Train the run of a trial up to its final figures, or until the driver wants no more; Tune hears of each epoch."""
    if modality is not None and not registry.is_registered(modality.name):
        registry.register(modality)
    storage = open_storage(config[_STORAGE])
    run, search = run_in(storage, config[_RUN]), HeldRun(storage, Lease(**config[_LEASE]))
    require_seen(search, ray.util.get_node_ip_address())
    plan = run.plan
    trained = probed = False
    asked_at, wait_s = -math.inf, _FIRST_WAIT_S

    def report(event: Event) -> None:
        nonlocal trained, probed, asked_at, wait_s
        if isinstance(event, PhaseBegan):
            trained = event.text == FINAL_FIGURES
        if probed and time.monotonic() - asked_at > wait_s:
            probed, asked_at, wait_s = not keep_probe(run, plan, search), time.monotonic(), 2 * wait_s
        if isinstance(event, EpochEnded):
            epoch = event.figures["epoch"]
            probed = probed or epoch == plan.recipe.phases[0].epochs
            line = line_of(event.figures)
            tune.report({**line, "training_iteration": epoch, LAST_EPOCH: event.num_epochs})

    if not plan.ray:  # else its workers see to it
        require_backbone(plan)
    with contextlib.suppress(InterruptedRunError):
        train_as_planned(run, report, lambda: trained or channel.should_stop())
    if probed:  # by now all that the run has is on the storage
        keep_probe(run, plan, search)


# --- Tune's parts ---


class _TrialFeed(Searcher):  # type: ignore[misc]  # Ray has no types
    """Gives Tune one trial after the other."""

    def __init__(self, trials: TuneTrials) -> None:
        super().__init__()
        self._trials = trials

    def suggest(self, trial_id: str) -> Any:  # noqa: ARG002  # trials have names of their own
        """The next one's configuration."""
        return self._trials.propose() or Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Its row is written elsewhere."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: our own record is what a search goes on with."""

    restore = save


class _TrialCallback(tune.Callback):  # type: ignore[misc]
    """Passes on what Tune's trials do."""

    def __init__(self, trials: TuneTrials) -> None:
        self._trials = trials

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_info: Any) -> None:  # noqa: ARG002
        """A trial begins."""
        self._trials.began(_key_of(trial))

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **_info: Any) -> None:  # noqa: ARG002
        """It tells of an epoch."""
        self._trials.epoch(_key_of(trial), result)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_info: Any) -> None:  # noqa: ARG002
        """It has ended, by itself or because a scheduler has stopped it."""
        self._trials.over(_key_of(trial))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_info: Any) -> None:  # noqa: ARG002
        """It has failed, or its process has died."""
        cause = _cause_of(trial)
        self._trials.over(_key_of(trial), _why_failed(trial, cause), cause)


def _cause_of(trial: Any) -> Exception | None:
    """Tune has written the error into this process's own folder, and not yet where it keeps trials."""
    pickled = trial.pickled_error_file
    if pickled is None or not Path(pickled).exists():
        return None
    error = cloudpickle.loads(Path(pickled).read_bytes())
    found: Exception = getattr(error, "cause", None) or error
    return found


def _why_failed(trial: Any, cause: Exception | None) -> str:
    """In a few words."""
    if cause is not None:
        return failures_of({0: cause})[0]
    text = trial.error_file
    lines = Path(text).read_text().split("\n") if text is not None and Path(text).exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it failed")


def _key_of(trial: Any) -> Key:
    return trial.config[_NUMBER], trial.config[_REPEAT]


class _SearchStopper(tune.Stopper):  # type: ignore[misc]
    """Ends all trials when the search is to end, and they have stopped."""

    def __init__(self, trials: TuneTrials) -> None:
        self._trials = trials

    def __call__(self, trial_id: str, result: Any) -> bool:  # noqa: ARG002
        """No single one."""
        return False

    def stop_all(self) -> bool:
        """Whether all of them end."""
        return self._trials.stops()
