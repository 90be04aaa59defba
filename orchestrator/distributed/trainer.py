"""Ray Train's trainer for a plan, run to its end: deaths are told, and it starts again where Ray itself gives up."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray
    import ray.train
    from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, UserCallback, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.distributed.failures import Unwanted, failures_of, plain, why_no_group
from orchestrator.distributed.offer import resources_of
from orchestrator.distributed.places import give_back_places
from orchestrator.errors import InterruptedRunError, OrchestratorError, TrainingError
from orchestrator.job import CHECKPOINTS, ERROR_FILE, RAY_FOLDER, Noted, Plan

if TYPE_CHECKING:
    from orchestrator.training import WorkerSpec

_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
_START_TIMEOUT_S = 20.0
"""How long Ray Train waits for the workers' place before it asks for it anew; until then it hears of nothing else."""
_STALE_RESOURCES_S = 5.0
"""How long a new elastic group waits for its place: what it was planned by may be of before a node was lost."""
_MOST_RENDEZVOUS = 3
_ANSWER_S = 10.0
_POLL_S = 0.5


def fit(
    plan: Plan,
    spec: WorkerSpec,
    work: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    leaving: Callable[[], bool] = lambda: False,
) -> Exception | None:
    """Run the trainer to its end; what it failed with, None if it did not.

    `work` runs in each worker with the `config`, which holds the `queue`, `threads` and `use_gpu` as well. `leaving`:
    whether the driver ends it, and may leave Ray at any moment, which ends the process if this asks Ray for something.
    """
    scaling = plan.job.scaling
    if os.environ.get(_START_TIMEOUT, "") in ("", str(_STALE_RESOURCES_S), str(_START_TIMEOUT_S)):  # else the user's
        os.environ[_START_TIMEOUT] = str(_STALE_RESOURCES_S if scaling.is_elastic else _START_TIMEOUT_S)
    queue, num_lost, failed_starts, num_begun = config["queue"], 0, 0, 0
    while True:
        try:
            _trainer(plan, spec, work, config).fit()
            return None
        except WorkerGroupError as error:
            return _training_error(error, spec, scaling.max_failures)
        except ray.exceptions.ActorDiedError:
            if leaving():
                return None
            num_lost += 1
            died = "the process that keeps the workers (Ray Train's controller) died"
            if num_lost > scaling.max_failures or not _goes_on_without(queue):
                return TrainingError(
                    died + (f", {num_lost} times" if num_lost > 1 else ""),
                    mend="see whether its node has memory left; the same command goes on from the last checkpoint",
                )
            text = f"{died}; restart {num_lost} of {scaling.max_failures}, {_from_where(spec)}"
            queue.put.remote(Noted(text, is_warning=True))
        except Exception as error:
            if not isinstance(error, ControllerError):
                return error
            if isinstance(error.controller_failure, Unwanted):
                return InterruptedRunError("stopped while workers were to be started", mend="the same command goes on")
            if leaving():
                return None
            # Workers that do not find one another: Ray gives up, whatever its limit of failures.
            begun = _num_begun(queue)
            failed_starts, num_begun = 1 + (failed_starts if begun == num_begun else 0), begun
            why = f"the workers could not be started: {why_no_group(error)}"
            if failed_starts == _MOST_RENDEZVOUS:
                return TrainingError(
                    f"{why}, in {_MOST_RENDEZVOUS} attempts", expected="workers that reach one another",
                    mend="see that each node reaches the others by its own address (GLOO_SOCKET_IFNAME names the "
                    "network, where a node has several); the same command goes on from the last checkpoint",
                )  # fmt: skip
            queue.put.remote(Noted(f"{why}; attempt {failed_starts + 1} of {_MOST_RENDEZVOUS}", is_warning=True))


def end_controller(queue: Any, thread: threading.Thread, within_s: float) -> None:
    """Kill the controller that `fit` in this thread waits for, so that it comes back, as it does where it is `leaving`.

    Ray ends a process one of whose threads waits for an answer while it is shut down, if the answer comes just then. A
    controller that has not begun yet asks whether it is wanted, and ends by itself.
    """
    until = time.monotonic() + within_s
    while thread.is_alive() and time.monotonic() < until:
        with contextlib.suppress(Exception):  # of Ray's own, by its private name: `ray.kill` wants the handle
            controller = ray.get(queue.standing.remote(), timeout=_ANSWER_S)[1]
            if controller is not None:
                ray._private.worker.global_worker.core_worker.kill_actor(ray.ActorID.from_hex(controller), True)
        thread.join(_POLL_S)


def _goes_on_without(queue: Any) -> bool:
    """Whether the workers may be started anew after their controller has died; what was theirs is free then."""
    with contextlib.suppress(ray.exceptions.RayError):
        if ray.is_initialized() and not ray.get(queue.is_stopping.remote(), timeout=_ANSWER_S):
            _waiting, controller, _num = ray.get(queue.standing.remote(), timeout=_ANSWER_S)
            give_back_places(controller)
            ray.get(queue.lost.remote(), timeout=_ANSWER_S)
            return True
    return False


def _num_begun(queue: Any) -> int:
    """How many workers have ever begun."""
    with contextlib.suppress(ray.exceptions.RayError):
        return int(ray.get(queue.standing.remote(), timeout=_ANSWER_S)[2])
    return 0


def _from_where(spec: WorkerSpec) -> str:
    """What the next start begins with, as far as the storage tells."""
    with contextlib.suppress(OrchestratorError):
        if not spec.held_run().commits(CHECKPOINTS):
            return "from the beginning: no checkpoint was written yet"
    return "from the last checkpoint"


class _Trainer(TorchTrainer):  # type: ignore[misc]  # Ray has no types
    """Without two helpers, each a process of its own: one gives back the workers' place where their controller has died
    (see `places`), the other hands out Ray's datasets, of which a job has none.
    """

    def _create_default_callbacks(self) -> list[Any]:
        without = ("PlacementGroupCleanerCallback", "DatasetsCallback")
        return [one for one in super()._create_default_callbacks() if type(one).__name__ not in without]


def _trainer(
    plan: Plan, spec: WorkerSpec, work: Callable[[dict[str, Any]], None], config: dict[str, Any]
) -> TorchTrainer:
    scaling, use_gpu = plan.job.scaling, config["use_gpu"]
    shares_gpus = use_gpu and scaling.gpus_per_worker < 1  # NCCL takes no two of a group on one
    return _Trainer(
        work,
        train_loop_config=config,
        torch_config=TorchConfig(
            # Objects are exchanged between CPUs.
            backend="cpu:gloo,cuda:nccl" if use_gpu and not shares_gpus else "gloo",
            timeout_s=plan.exchange_timeout_s,
        ),
        scaling_config=ScalingConfig(
            num_workers=(scaling.fewest_workers, plan.num_workers) if scaling.is_elastic else plan.num_workers,
            use_gpu=use_gpu,
            resources_per_worker=resources_of(plan, config["threads"], use_gpu),
            accelerator_type=scaling.accelerator_type if use_gpu else None,
            placement_strategy=scaling.placement.replace("-", "_").upper(),
        ),
        run_config=RunConfig(
            name=f"{plan.name}-{int(time.time() * 1000):x}",
            # Ray Train's own files are of no use to us, whose checkpoints stand in the run; so they stay apart.
            storage_path=str(spec.held_run().folder / RAY_FOLDER),
            failure_config=FailureConfig(max_failures=scaling.max_failures),
            callbacks=[_Failures(config["queue"], spec, scaling.max_failures), *_asks_before(config["queue"])],
        ),
    )


def _training_error(error: WorkerGroupError, spec: WorkerSpec, again: int) -> TrainingError:
    with contextlib.suppress(OrchestratorError):
        spec.held_run().write(ERROR_FILE, plain(str(error)))
    who = "; ".join(f"worker {rank}: {why}" for rank, why in failures_of(error.worker_failures).items())
    return TrainingError(
        f"{who}{f', after {again} restarts' if again > 1 else ', after a restart' if again else ''}",
        expected="workers that live to the end",
        mend=f"{ERROR_FILE} of the run has all that they said; the same command goes on from the last checkpoint",
    )


class _Failures(UserCallback):  # type: ignore[misc]
    """Tells the driver of workers that died; called in the process of Ray Train's controller."""

    def __init__(self, queue: Any, spec: WorkerSpec, max_failures: int) -> None:
        self._queue = queue
        self._spec = spec
        self._max_failures = max_failures

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """`worker_exceptions`: {rank: error}."""
        self._queue.failed.remote(failures_of(worker_exceptions), self._max_failures, _from_where(self._spec))


def _asks_before(queue: Any) -> list[Any]:
    """A callback that asks the driver before workers are started, and ends the trainer where it wants none any more.

    Ray Train itself hears of nothing while it waits for their place, and would begin anew when one had failed.
    """
    try:
        from ray.train.v2._internal.execution.callback import ControllerCallback  # noqa: PLC0415  # for its developers
    except ImportError:  # then they start, and stop at once
        return []

    class Asks(ControllerCallback):  # type: ignore[misc]
        def on_controller_start_worker_group(self, **_of_group: Any) -> None:
            try:
                unwanted = ray.get(queue.starting.remote(ray.get_runtime_context().get_actor_id()))
            except ray.exceptions.ActorDiedError:  # it is started again if it dies alone: the driver has gone
                unwanted = True
            except ray.exceptions.RayError:
                unwanted = False
            if unwanted:
                raise Unwanted

    return [Asks()]
