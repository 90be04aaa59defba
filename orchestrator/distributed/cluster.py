"""A job on Ray: joining a cluster, what it has to give, the trainer, and following it to its end."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

# Read by Ray when it is imported.
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a trainer whose Ray was shut down would start another one
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray
    import ray.train
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.distributed.events import DriverChannel, EventQueue, watch_driver
from orchestrator.errors import InterruptedRunError, OrchestratorError, RefusedError, first_line
from orchestrator.job import Event, Failed, Noted, PhaseBegan, Plan, Report

if TYPE_CHECKING:
    from orchestrator.training import WorkerSpec

_POLL_S = 0.2
_STOP_GRACE_S = 60.0
"""How long workers may take to end their step once they are asked to stop."""
_ENDED_GRACE_S = 10.0
_TRAINER_GRACE_S = 60.0
"""How long the trainer may take to see that its workers are gone, and to start those once more that then stop."""
_EXCHANGE_TIMEOUT_S = 12 * 3600
_PASSED_ON = (
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_HUB_DISABLE_XET",
    "OMP_WAIT_POLICY",
)  # never a token: Ray shows these to all


def run_on_ray(plan: Plan, spec: WorkerSpec, report: Report, should_stop: Callable[[], bool]) -> None:
    """Train with worker processes of Ray Train, on a cluster of this machine or the one at `scaling.address`.

    Raises what a worker raised, `RefusedError` where the cluster has too little, and
    `InterruptedRunError` once all workers have stopped; none of them works on the run any more when this returns.
    """
    report(PhaseBegan("starting workers"))
    with joined(plan):
        offer = _offer(plan, report)
        queue = _event_queue()
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
            _follow(thread, queue, report, should_stop)
        except BaseException as error:
            _end(thread, queue, error)
            raise
        finally:
            if ray.is_initialized():
                ray.kill(queue)
            shutil.rmtree(spec.held_run().folder / ".ray", ignore_errors=True)
    if failed and failed[0] is not None:
        raise failed[0]


# --- joining ---


@contextlib.contextmanager
def joined(plan: Plan) -> Iterator[None]:
    """Connected to the plan's cluster.

    One that is started here serves the later calls of this process too, as far as its cores suffice: a start takes some
    3 s. Ray stops it when the process ends. One that was there is left again.
    """
    address = plan.job.scaling.address
    here = address in (None, "local")
    if ray.is_initialized() and _started and (not here or _started[0] < _num_cpus(plan)):
        _stop()
    if ray.is_initialized():
        yield
        return
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the command line's own process
    quiet: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {"env_vars": environment},
    }
    try:
        if here:
            ray.init(
                address="local",
                num_cpus=_num_cpus(plan),
                include_dashboard=False,
                **quiet,
            )
            _started[:] = [_num_cpus(plan)]
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError) as error:
        raise RefusedError(
            "resources",
            f"there is no Ray cluster to join at {address}: {first_line(error)}",
            mend="start one with `ray start --head`, correct scaling.address, or leave it out",
        ) from None
    try:
        yield
    finally:
        if not here:
            ray.shutdown()


_started: list[int] = []
"""The cores of the cluster that this process has started, if it has."""


def _stop() -> None:
    _started.clear()
    ray.shutdown()


def _num_cpus(plan: Plan) -> int:
    return plan.num_workers * max(1, plan.threads_per_worker) + plan.num_extractors * max(1, plan.extractor_threads)


def _event_queue() -> Any:
    """The handle of a new queue: on the driver's node, whose end ends the driver too, and started again if it dies."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
    return ray.remote(**options)(EventQueue).remote()


# --- what the cluster has to give ---


def _offer(plan: Plan, report: Report) -> dict[str, Any]:
    """{"use_gpu", "threads", "extractor_threads"} of each process. Raises `RefusedError` for what no node could give.

    What an autoscaler could add counts as there; that the job has to wait for it, or for others, is reported.
    """
    there, most = ray.cluster_resources(), _most_resources()
    most = {kind: max(most.get(kind, 0), there.get(kind, 0)) for kind in ("CPU", "GPU")}
    use_gpu = _use_gpu(plan, most["GPU"], report)
    num_workers, extractors = plan.num_workers, plan.num_extractors
    # One extractor that has a place beside the workers is enough to go on.
    threads = plan.threads_per_worker or _threads_of(num_workers + min(1, extractors), use_gpu)
    extractor_threads = plan.extractor_threads or threads
    who, lower = f"{num_workers} workers", "lower scaling.num_workers"
    cores = num_workers * threads
    if extractors:
        who, lower = f"{who} and 1 of {extractors} extractors", "leave out scaling.num_extractors"
        cores += extractor_threads
    largest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if max(threads, extractor_threads if extractors else 0) > largest and most["CPU"] <= there.get("CPU", 0):
        raise RefusedError(
            "resources", f"a process of {threads} threads has no place: the largest node has {largest:g} CPUs",
            mend="lower scaling.threads_per_worker",
        )  # fmt: skip
    if cores > most["CPU"]:
        raise RefusedError(
            "resources",
            f"{who} need {cores} CPUs ({threads} threads a worker), and the cluster has {most['CPU']:g}",
            mend=f"{lower}, or lower scaling.threads_per_worker",
        )
    free = ray.available_resources()
    lacking = [
        f"{wanted:g} {kind}s are wanted and {free.get(kind, 0):g} are free"
        for kind, wanted in (("CPU", cores), ("GPU", _num_gpus(plan) if use_gpu else 0))
        if wanted > free.get(kind, 0)
    ]
    if lacking:
        report(Noted(f"the job waits for its place on the cluster: {', '.join(lacking)}"))
    return {"use_gpu": use_gpu, "threads": threads, "extractor_threads": extractor_threads}


def _num_gpus(plan: Plan) -> int:
    return plan.num_workers + (1 if plan.num_extractors else 0)


def _use_gpu(plan: Plan, gpus: float, report: Report) -> bool:
    """Whether each process gets a GPU. Raises `RefusedError` where GPUs are asked for that no node type could give."""
    wanted, least = plan.job.scaling.device, _num_gpus(plan)
    if wanted == "cpu" or (wanted == "auto" and not gpus):
        return False
    if gpus >= least:
        return True
    what = f"{least} processes want a GPU each, and the cluster has {gpus:g}"
    if wanted == "gpu":
        raise RefusedError("resources", what, mend="lower scaling.num_workers, or use device cpu")
    report(Noted(f"{what}: all run on CPUs; for the GPUs, lower scaling.num_workers to {max(1, int(gpus))}"))
    return False


def _most_resources() -> Mapping[str, float]:
    """What an autoscaler could give, {} where there is none, or where it does not tell."""
    with contextlib.suppress(Exception):  # private to Ray, which uses it for its own data sets
        from ray._private.state import state  # noqa: PLC0415

        return state.get_max_resources_from_cluster_config() or {}
    return {}


def _threads_of(num: int, use_gpu: bool) -> int:
    """The most cores that each of `num` processes can have, if all are to have a place on today's nodes; at least 1."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = int(max((node.get("CPU", 0) for node in nodes), default=1))
    for threads in range(most, 1, -1):
        places = (min(node.get("CPU", 0) // threads, node.get("GPU", 0) if use_gpu else math.inf) for node in nodes)
        if sum(places) >= num:
            return threads
    return 1


# --- the trainer ---


def _fit(plan: Plan, spec: WorkerSpec, config: dict[str, Any]) -> Exception | None:
    """Run the trainer to its end; what it failed with, None if it did not."""
    trainer = TorchTrainer(
        _worker,
        train_loop_config=config,
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if config["use_gpu"] else "gloo",  # objects are exchanged between CPUs
            # A worker that has run the body over its share waits for the others: half an hour, the default, may be
            # short.
            timeout_s=_EXCHANGE_TIMEOUT_S,
        ),
        scaling_config=ScalingConfig(
            num_workers=plan.num_workers,
            use_gpu=config["use_gpu"],
            resources_per_worker={"CPU": config["threads"], **({"GPU": 1} if config["use_gpu"] else {})},
        ),
        run_config=RunConfig(
            name=f"{plan.name}-{int(time.time() * 1000):x}",
            # Ray Train's own files are of no use to us, whose checkpoints stand in the run; so they stay apart.
            storage_path=str(spec.held_run().folder / ".ray"),
            failure_config=FailureConfig(max_failures=plan.job.scaling.max_failures),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        return error
    return None


def _worker(config: dict[str, Any]) -> None:
    """One worker process. An error of ours goes to the driver at once; one that Ray starts again after it stops."""
    channel = DriverChannel(config["queue"])
    if channel.wait_whether_to_stop():  # restarted after such an error, or after it had to end itself
        return
    watch_driver(config["queue"])
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
    try:
        local_rank, deterministic = ray.train.get_context().get_local_rank(), config["deterministic"]
        with start_worker(config["threads"], device, local_rank, deterministic) as worker:
            run_worker(config["spec"], worker, channel.tell, channel.should_stop, extractors)
    except InterruptedRunError as error:  # all workers stop at the same step, so none is left waiting
        channel.tell_for_sure(Failed(error))
    except OrchestratorError as error:
        channel.tell_for_sure(Failed(error))
        raise
    finally:
        channel.flush()


# --- following it ---


def _follow(thread: threading.Thread, queue: Any, report: Report, should_stop: Callable[[], bool]) -> None:
    """Report what happens until the trainer has ended. Raises the error of a worker that failed."""
    asked_at = 0.0
    alive = True
    while alive:
        thread.join(_POLL_S)
        alive = thread.is_alive()  # asked before the events are taken: so those of the end are among them
        for event in _take(queue, stop=bool(asked_at)):
            if isinstance(event, Failed):
                raise event.error
            report(event)
        if alive and should_stop() and not asked_at:
            asked_at = time.monotonic()
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


def _end(thread: threading.Thread, queue: Any, error: BaseException) -> None:
    """Return once no worker works on the run any more: first they are asked to stop, then Ray ends them."""
    impatient = isinstance(error, _NoAnswer | KeyboardInterrupt)
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(queue.take.remote(True), timeout=_ENDED_GRACE_S)
    thread.join(0 if impatient else _STOP_GRACE_S)
    if thread.is_alive():
        ended_by = time.monotonic() + _ENDED_GRACE_S
        with contextlib.suppress(ray.exceptions.RayError):
            while ray.get(queue.end.remote(), timeout=_ENDED_GRACE_S) and time.monotonic() < ended_by:
                time.sleep(_POLL_S)
        # Ray ends a process one of whose threads asks it something while it is shut down: so the trainer ends first.
        thread.join(_TRAINER_GRACE_S)
    if thread.is_alive():
        _stop()  # with the driver go all processes that it has started on the cluster, restarted ones too
        thread.join(_ENDED_GRACE_S)
