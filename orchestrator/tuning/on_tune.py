"""Trials as Ray Tune's: each a run of ours in a process of its own, as many side by side as the cluster has room for.

A trial goes on from its run's last checkpoint, ends before its final figures, so that nobody reads the test split, and
is a row of the record once it has ended. What Tune writes itself stays in a folder of this machine, and is never read.
"""

from __future__ import annotations

import atexit
import contextlib
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

from orchestrator.distributed.events import DriverChannel
from orchestrator.distributed.failures import failures_of
from orchestrator.distributed.joining import event_queue, joined
from orchestrator.distributed.offer import kind_of, resources_of
from orchestrator.distributed.places import give_back_places, places_of
from orchestrator.distributed.shared_storage import NotSeenError, refuse_apart
from orchestrator.distributed.waiting import NoPlaceError, Wait
from orchestrator.errors import InterruptedRunError, OrchestratorError, TrainingError, first_line
from orchestrator.gate import num_cores
from orchestrator.job import (
    ERROR_FILE,
    Noted,
    PhaseBegan,
    Plan,
)
from orchestrator.modality import Modality, registry
from orchestrator.tuning.in_trial import FIGURES, LEASE, NUMBER, REPEAT, RUN, STORAGE, lines_of, run_trial
from orchestrator.tuning.pending import PendingTrial, TrialContext
from orchestrator.tuning.room import Room, room_for
from orchestrator.tuning.trials import KEPT, Key, State, Trial
from orchestrator.tuning.tune_parts import NothingShown, SearchStopper, TrialCallback, TrialFeed, silent

_STOP_GRACE_S = 90.0
"""How long trials may take to stop once they are asked to: more than a run gives its workers."""
_LOOK_EVERY_S = 2.0
_ANSWER_S = 30.0
_DRIVER_BYTES = 2**20
"""What a trial asks for that has workers of its own: a place, and no core."""
_DRIVER_SHARE = 0.001
"""Of Ray's resource `node:ADDRESS`, which ties the driver of a trial to this node."""
_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals are ours
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "20",  # a step may take long; after it the process serves the next trial
    "TUNE_RESULT_BUFFER_LENGTH": "0",  # a scheduler decides before the next epoch
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


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
    _looked_at: float = 0.0
    _pending: set[Key] = field(default_factory=set)
    """Laid out, and not begun."""
    _failed: dict[Key, Exception] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)
    """What trials have told, each thing once."""
    _have_workers: bool = False
    _wait: Wait | None = None
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
            os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(self._room.num_pending)
            self._have_workers = first.num_workers > 1 or first.num_extractors > 0
            self._wait = Wait(first, self._room.threads, self._room.use_gpu, self.context.report)
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
            run_trial(config, channel, modality)

        tuner = tune.Tuner(
            tune.with_resources(trial, self._resources(first)),
            tune_config=tune.TuneConfig(
                search_alg=TrialFeed(self), scheduler=self.context.stopping, num_samples=most,
                max_concurrent_trials=self._room.num_side_by_side, reuse_actors=True,
                trial_dirname_creator=lambda one: str(one.trial_id),
            ),
            run_config=tune.RunConfig(
                name="trials", storage_path=str(folder), verbose=0, callbacks=[TrialCallback(self), NothingShown()],
                stop=SearchStopper(self),
                failure_config=tune.FailureConfig(max_failures=first.job.scaling.max_failures),
            ),
        )  # fmt: skip
        with silent():
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
        if self._have_workers:
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
        self._pending.add(task.key)
        where = {STORAGE: search.storage.place, RUN: run.name, LEASE: vars(search.lease)}
        return {**where, NUMBER: task.key[0], REPEAT: task.key[1], **task.config}

    def began(self, key: Key) -> None:
        """A trial has begun."""
        self.running.add(key)
        self._pending.discard(key)
        self._started.setdefault(key, time.monotonic())
        with self._kept():
            self.began_one()

    def epoch(self, key: Key, result: Mapping[str, Any]) -> None:
        """A trial tells of an epoch."""
        with self._kept():
            self._hear(key, {name: result[name] for name in ("epoch", *FIGURES, KEPT) if name in result})

    def _hear(self, key: Key, line: dict[str, Any]) -> None:
        # Those of earlier processes the run itself has; it writes down those of this one when it finds the time.
        known = self._lines.get(key) or lines_of(self.context.layout.run_of(key))
        is_new = all(one["epoch"] < line["epoch"] for one in self._lines.get(key, ()))  # else begun once more
        self._lines[key] = [*(one for one in known if one["epoch"] < line["epoch"]), line]
        if is_new:
            self.context.heard(key, line)

    def over(self, key: Key, error: str = "", cause: Exception | None = None) -> None:
        """A trial has ended; where all are stopped, or its storage failed, it goes on another time."""
        self.running.discard(key)
        self._pending.discard(key)
        with self._kept():
            self._hear_trials()
            if (told := self._failed.pop(key, None)) is not None:
                cause, error = told, failures_of({0: told})[0]
            if self._stopping:
                return
            storage = self.context.layout.search.storage
            if isinstance(cause, NotSeenError | NoPlaceError) or (cause is not None and storage.has_failed(cause)):
                raise cause  # no fault of this trial
            self._record(key, error)

    def begins_again(self, key: Key, why: str, num: int, most: int) -> None:
        """The process of a trial has died: it goes on from its last checkpoint in another one."""
        self.running.discard(key)
        self._pending.add(key)
        # Of a node that was taken away with notice Tune counts none.
        how = f"{why}; restart {num} of {most}" if num else "its node was taken away; it goes on elsewhere"
        self.context.report(Noted(f"trial {key[0]}: {how}", is_warning=True))

    def _hear_trials(self) -> None:
        """What trials themselves have told: why they failed, and what their workers wait for."""
        heard: list[tuple[Key, bytes | Noted]] = []
        with contextlib.suppress(ray.exceptions.RayError):  # the queue's process has died, and is started again
            heard = ray.get(self._queue.take.remote(self._stopping), timeout=_ANSWER_S)
        for key, what in heard:
            if isinstance(what, bytes):
                self._failed[key] = cloudpickle.loads(what)
            elif what.text not in self._told:
                self._told.add(what.text)
                self.context.report(Noted(f"trial {key[0]}: {what.text}", what.is_warning))

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
            self._asked_at, self._looked_at = time.monotonic(), 0.0
            if self.running:
                self.context.report(Noted("stopping: each trial writes a checkpoint"))
        if time.monotonic() - self._looked_at > _LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            with self._kept():
                self._look()
        return self._asked_at is not None and (not self.running or time.monotonic() - self._asked_at > _STOP_GRACE_S)

    def _look(self) -> None:
        self._hear_trials()
        if self._have_workers:  # a trial whose process died had workers elsewhere
            give_back_places()
        elif self._wait is not None:
            waiting = bool(self._pending) and not self.running and not self._stopping
            self._wait.look(waiting, places_of(None) if waiting else [])
