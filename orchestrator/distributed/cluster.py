"""A job on Ray: the trainer with its workers, and following it to its end."""

from __future__ import annotations

import contextlib
import os
import shutil
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

from orchestrator.distributed.events import DriverChannel, watch_driver
from orchestrator.distributed.failures import Unwanted, failures_of, plain, why_no_group
from orchestrator.distributed.joining import event_queue, joined, shut_down
from orchestrator.distributed.leaving import Notice, wait_for_the_end
from orchestrator.distributed.offer import offer_of, resources_of
from orchestrator.distributed.shared_storage import refuse_apart, require_seen
from orchestrator.distributed.waiting import Wait
from orchestrator.errors import InterruptedRunError, OrchestratorError, PluginError, TrainingError
from orchestrator.job import CHECKPOINTS, ERROR_FILE, RAY_FOLDER, Event, Failed, Noted, PhaseBegan, Plan, Report

if TYPE_CHECKING:
    from orchestrator.training import WorkerSpec

_POLL_S = 0.2
_STOP_GRACE_S = 60.0
"""How long workers may take to end their step once they are asked to stop."""
_ENDED_GRACE_S = 10.0
_TRAINER_GRACE_S = 60.0
"""How long the trainer may take to see that its workers are gone, and to start those once more that then stop."""
_NOBODY_GRACE_S = 2.0
"""The same where no worker runs, and the connection to Ray is ours to end."""
_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
_START_TIMEOUT_S = 20.0
"""How long Ray Train waits for the workers' place before it asks for it anew; until then it hears of nothing else."""
_STALE_RESOURCES_S = 5.0
"""How long a new elastic group waits for its place: what it was planned by may be of before a node was lost."""
_MOST_RENDEZVOUS = 3
_LOOK_EVERY_S = 2.0


def run_on_ray(plan: Plan, spec: WorkerSpec, report: Report, should_stop: Callable[[], bool]) -> None:
    """Train with worker processes of Ray Train, on a cluster of this machine or the one at `scaling.address`.

    Raises what a worker raised, `RefusedError` where the cluster has too little, and
    `InterruptedRunError` once all workers have stopped; none of them works on the run any more when this returns.
    """
    report(PhaseBegan("starting workers"))
    with joined(plan, report) as is_ours:
        refuse_apart(spec.held_run())
        offer = offer_of(plan, report)
        queue = event_queue()
        failed: list[Exception | None] = []
        config = {
            "spec": spec,
            "queue": queue,
            "num_extractors": plan.num_extractors,
            "deterministic": plan.job.training.deterministic,
            **offer,
        }
        thread = threading.Thread(target=lambda: failed.append(_fit(plan, spec, config)), daemon=True)
        thread.start()
        try:
            _follow(thread, queue, report, should_stop, Wait(plan, offer["threads"], offer["use_gpu"], report))
        except BaseException as error:
            _end(thread, queue, error, is_ours)
            raise
        finally:
            if ray.is_initialized():
                ray.kill(queue)
            shutil.rmtree(spec.held_run().folder / RAY_FOLDER, ignore_errors=True)
    if failed and failed[0] is not None:
        raise failed[0]


# --- the trainer ---


def _fit(plan: Plan, spec: WorkerSpec, config: dict[str, Any]) -> Exception | None:
    """Run the trainer to its end; what it failed with, None if it did not."""
    scaling = plan.job.scaling
    if os.environ.get(_START_TIMEOUT, "") in ("", str(_STALE_RESOURCES_S), str(_START_TIMEOUT_S)):  # else the user's
        os.environ[_START_TIMEOUT] = str(_STALE_RESOURCES_S if scaling.is_elastic else _START_TIMEOUT_S)
    for attempt in range(1, _MOST_RENDEZVOUS + 1):
        try:
            _trainer(plan, spec, config).fit()
            break
        except WorkerGroupError as error:
            return _training_error(error, spec, scaling.max_failures)
        except ray.exceptions.ActorDiedError:
            return TrainingError(
                "the process that keeps the workers (Ray Train's controller) died",
                mend="see whether its node has memory left; the same command goes on from the last checkpoint",
            )
        except Exception as error:
            if not isinstance(error, ControllerError):
                return error
            if isinstance(error.controller_failure, Unwanted):
                return InterruptedRunError("stopped while workers were to be started", mend="the same command goes on")
            # Workers that do not find one another: Ray gives up, whatever its limit of failures.
            why = f"the workers could not be started: {why_no_group(error)}"
            if attempt == _MOST_RENDEZVOUS:
                return TrainingError(
                    f"{why}, in {_MOST_RENDEZVOUS} attempts", expected="workers that reach one another",
                    mend="see that each node reaches the others by its own address (GLOO_SOCKET_IFNAME names the "
                    "network, where a node has several); the same command goes on from the last checkpoint",
                )  # fmt: skip
            config["queue"].put.remote(Noted(f"{why}; attempt {attempt + 1} of {_MOST_RENDEZVOUS}", is_warning=True))
    return None


def _trainer(plan: Plan, spec: WorkerSpec, config: dict[str, Any]) -> TorchTrainer:
    scaling, use_gpu = plan.job.scaling, config["use_gpu"]
    shares_gpus = use_gpu and scaling.gpus_per_worker < 1  # NCCL takes no two of a group on one
    return TorchTrainer(
        _worker,
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
            callbacks=[_Failures(config["queue"], spec, scaling.max_failures), *_ends_unwanted(config["queue"])],
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


class _Failures(UserCallback):  # type: ignore[misc]  # Ray has no types
    """Tells the driver of workers that died; called in the process of Ray Train's controller."""

    def __init__(self, queue: Any, spec: WorkerSpec, max_failures: int) -> None:
        self._queue = queue
        self._spec = spec
        self._max_failures = max_failures

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """`worker_exceptions`: {rank: error}."""
        self._queue.failed.remote(failures_of(worker_exceptions), self._max_failures, self._from_where())

    def _from_where(self) -> str:
        """What the next start begins with, as far as the storage tells."""
        with contextlib.suppress(OrchestratorError):
            if not self._spec.held_run().commits(CHECKPOINTS):
                return "from the beginning: no checkpoint was written yet"
        return "from the last checkpoint"


def _ends_unwanted(queue: Any) -> list[Any]:
    """A callback that ends the trainer before it starts workers that the driver does not want any more.

    Ray Train itself hears of nothing while it waits for their place, and would begin anew when one had failed.
    """
    try:
        from ray.train.v2._internal.execution.callback import ControllerCallback  # noqa: PLC0415  # for its developers
    except ImportError:  # then they start, and stop at once
        return []

    class Ends(ControllerCallback):  # type: ignore[misc]  # Ray has no types
        def on_controller_start_worker_group(self, **_of_group: Any) -> None:
            try:
                unwanted = ray.get(queue.is_stopping.remote())
            except ray.exceptions.ActorDiedError:  # it is started again if it dies alone: the driver has gone
                unwanted = True
            except ray.exceptions.RayError:
                unwanted = False
            if unwanted:
                raise Unwanted

    return [Ends()]


def _worker(config: dict[str, Any]) -> None:
    """One worker process. An error of ours goes to the driver at once; one that Ray starts again after it stops."""
    channel = DriverChannel(config["queue"])
    if channel.wait_whether_to_stop():  # restarted after such an error, or after it had to end itself
        return
    watch_driver(config["queue"])
    context = ray.train.get_context()
    node = ray.util.get_node_ip_address()
    config["queue"].began.remote(context.get_world_rank(), f"process {os.getpid()} on {node}")
    import torch  # noqa: PLC0415  # for the worker alone, as what follows: 2 s of imports

    from orchestrator.network import start_worker  # noqa: PLC0415
    from orchestrator.training import run_worker  # noqa: PLC0415

    extractors = None
    if config["num_extractors"]:
        from orchestrator.distributed.extractors import Extractors  # noqa: PLC0415

        extractors = Extractors(
            config["spec"], channel, config["num_extractors"], config["extractor_threads"], config["use_gpu"]
        )
    device = ray.train.torch.get_device() if config["use_gpu"] else torch.device("cpu")
    notice = Notice()

    def should_stop() -> bool:
        return channel.should_stop() or notice.is_due()

    try:
        require_seen(config["spec"].held_run(), node)
        local_rank, deterministic = context.get_local_rank(), config["deterministic"]
        with start_worker(config["threads"], device, local_rank, deterministic) as worker:
            run_worker(config["spec"], worker, channel.tell, should_stop, extractors)
    except InterruptedRunError as error:  # all workers stop at the same step, so none is left waiting
        channel.flush()
        if not channel.wait_whether_to_stop():
            wait_for_the_end(channel, context.get_world_rank())
        channel.tell_for_sure(Failed(error))
    except OrchestratorError as error:
        if isinstance(error, PluginError):  # the driver has it
            error.message = f"on the node {node}: {error.message}"
            error.mend = (
                "install what brings it on every node of the cluster, as where the job was started, "
                "or let `orchestrator submit` deliver it"
            )
        channel.tell_for_sure(Failed(error))
        raise
    finally:
        channel.flush()


# --- following it ---


def _follow(thread: threading.Thread, queue: Any, report: Report, should_stop: Callable[[], bool], wait: Wait) -> None:
    """Report what happens until the trainer has ended. Raises the error of a worker that failed."""
    asked_at = looked_at = 0.0
    alive = True
    while alive:
        thread.join(_POLL_S)
        alive = thread.is_alive()  # asked before the events are taken: so those of the end are among them
        for event in _take(queue, stop=bool(asked_at)):
            if isinstance(event, Failed):
                raise event.error
            report(event)
        if alive and time.monotonic() - looked_at > _LOOK_EVERY_S:
            looked_at = time.monotonic()
            wait.look(_is_waiting(queue))
        if alive and should_stop() and not asked_at:
            asked_at = time.monotonic()
            if _is_waiting(queue):
                raise InterruptedRunError("stopped while no worker ran", mend="the same command goes on")
            report(Noted("stopping after this step"))
        if asked_at and time.monotonic() - asked_at > _STOP_GRACE_S:
            raise _NoAnswer("stopped; the workers did not answer", mend="the same command goes on")


class _NoAnswer(InterruptedRunError):
    """The workers were asked to stop, and have not."""


def _take(queue: Any, stop: bool) -> list[Event]:
    try:
        events: list[Event] = ray.get(queue.take.remote(stop))
    except ray.exceptions.RayActorError:  # it died, and is started again: some events are lost, and no work
        return []
    return events


def _is_waiting(queue: Any) -> bool:
    try:
        return bool(ray.get(queue.is_waiting.remote()))
    except ray.exceptions.RayError:
        return False


def _end(thread: threading.Thread, queue: Any, error: BaseException, is_ours: bool) -> None:
    """Return once no worker works on the run any more: first they are asked to stop, then Ray ends them.

    `is_ours`: whether the connection to Ray is, which else stays as it is: a trainer that waits for its workers' place
    hears of it when Ray Train asks for that anew, and ends then.
    """
    impatient = isinstance(error, _NoAnswer | KeyboardInterrupt)
    nobody = _is_waiting(queue)  # works: the job waits for its place, and workers that come yet stop before they begin
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(queue.take.remote(True), timeout=_ENDED_GRACE_S)
    thread.join(0 if impatient else _NOBODY_GRACE_S if nobody else _STOP_GRACE_S)
    if thread.is_alive():
        ended_by = time.monotonic() + _ENDED_GRACE_S
        with contextlib.suppress(ray.exceptions.RayError):
            while ray.get(queue.end.remote(), timeout=_ENDED_GRACE_S) and time.monotonic() < ended_by:
                time.sleep(_POLL_S)
        # Ray ends a process one of whose threads asks it something while it is shut down: so the trainer ends first.
        thread.join(_NOBODY_GRACE_S if nobody and is_ours else _TRAINER_GRACE_S)
    if thread.is_alive() and is_ours:
        shut_down()  # with the driver go all processes that it has started on the cluster, restarted ones too
        thread.join(_ENDED_GRACE_S)
