"""A job on Ray: its workers, and following them to their end."""

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
    import ray.train.torch

from orchestrator.distributed.events import DriverChannel, watch_driver
from orchestrator.distributed.joining import event_queue, joined, shut_down
from orchestrator.distributed.leaving import Notice, wait_for_the_end
from orchestrator.distributed.offer import offer_of
from orchestrator.distributed.places import places_of
from orchestrator.distributed.shared_storage import refuse_apart, require_seen
from orchestrator.distributed.trainer import end_controller, fit
from orchestrator.distributed.waiting import Wait
from orchestrator.errors import InterruptedRunError, OrchestratorError, PluginError
from orchestrator.job import RAY_FOLDER, Event, Failed, Noted, PhaseBegan, Plan, Report

if TYPE_CHECKING:
    from orchestrator.training import WorkerSpec

_POLL_S = 0.25
_STOP_GRACE_S = 60.0
"""How long workers may take to end their step once they are asked to stop."""
_ENDED_GRACE_S = 10.0
_TRAINER_GRACE_S = 60.0
"""How long the trainer may take to see that its workers are gone, and to start those once more that then stop."""
_NOBODY_GRACE_S = 2.0
"""The same where no worker runs, and the connection to Ray is ours to end."""
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
        leaving = threading.Event()
        config = {
            "spec": spec,
            "queue": queue,
            "num_extractors": plan.num_extractors,
            "deterministic": plan.job.training.deterministic,
            **offer,
        }

        def train() -> None:
            failed.append(fit(plan, spec, _worker, config, leaving.is_set))

        thread = threading.Thread(target=train, daemon=True)
        thread.start()
        try:
            _follow(thread, queue, report, should_stop, Wait(plan, offer["threads"], offer["use_gpu"], report))
        except BaseException as error:
            leaving.set()
            _end(thread, queue, error, is_ours)
            raise
        finally:
            if ray.is_initialized():
                ray.kill(queue)
            shutil.rmtree(spec.held_run().folder / RAY_FOLDER, ignore_errors=True)
    if failed and failed[0] is not None:
        raise failed[0]


# --- one worker ---


def _worker(config: dict[str, Any]) -> None:
    """One worker process. An error of ours goes to the driver at once; one that Ray starts again after it stops."""
    channel = DriverChannel(config["queue"])
    if channel.wait_whether_to_stop():  # restarted after such an error, or after it had to end itself
        return
    watch_driver(config["queue"], trains=True)
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
            with contextlib.suppress(ray.exceptions.RayError):
                waiting, controller, _num = ray.get(queue.standing.remote())
                wait.look(waiting, places_of(controller) if controller else [])
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
        end_controller(queue, thread, _ENDED_GRACE_S)
        shut_down()  # with the driver go all processes that it has started on the cluster, restarted ones too
        thread.join(_ENDED_GRACE_S)
