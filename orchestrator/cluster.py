"""What is Ray's: joining a cluster, the trainer, and the events that come back from its workers."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.errors import InterruptedRunError, OrchestratorError, RefusedError, first_line
from orchestrator.plans import Plan
from orchestrator.sink import EventSink

_EVENT_EVERY_S = 0.1
_STOP_EVERY_S = 0.5
_EXCHANGE_TIMEOUT_S = 12 * 3600
_PASSED_ON = (
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_HUB_DISABLE_XET",
    "OMP_WAIT_POLICY",
)  # never a token: Ray shows these to all


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
    return plan.num_workers * plan.threads_per_worker


def event_sink() -> Any:
    """The handle of a new sink."""
    return ray.remote(num_cpus=0)(EventSink).remote()


def fit(plan: Plan, config: dict[str, Any]) -> Exception | None:
    """Run the trainer to its end; what it failed with, None if it did not."""
    gpus = ray.cluster_resources().get("GPU", 0)
    use_gpu = plan.job.scaling.device != "cpu" and gpus >= plan.num_workers
    if plan.job.scaling.device == "gpu" and not use_gpu:
        return RefusedError(
            "resources",
            f"{plan.num_workers} workers want a GPU each, and the cluster has {gpus:g}",
            mend="lower scaling.num_workers, or use device auto",
        )
    needed, there = plan.num_workers * plan.threads_per_worker, ray.cluster_resources().get("CPU", 0)
    if needed > there:
        return RefusedError(
            "resources",
            f"{plan.num_workers} workers x {plan.threads_per_worker} threads need {needed} CPUs, and the cluster "
            f"has {there:g}",
            mend="lower scaling.num_workers or scaling.threads_per_worker",
        )
    trainer = TorchTrainer(
        _worker,
        train_loop_config=config,
        # A worker that has run the body over its share waits for the others: half an hour, the default, may be short.
        torch_config=TorchConfig(timeout_s=_EXCHANGE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=plan.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": plan.threads_per_worker},
        ),
        run_config=RunConfig(
            name=f"{plan.name}-{int(time.time() * 1000):x}",
            # Ray Train's own files are of no use to us, whose checkpoints stand in the run; so they stay apart.
            storage_path=str(Path(config["run"]) / ".ray"),
            failure_config=FailureConfig(max_failures=plan.job.scaling.max_failures),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        return error
    return None


def _worker(config: dict[str, Any]) -> None:
    """One worker process. An error of ours goes to the driver at once: trying again would end the same."""
    from orchestrator.loop import run_worker  # noqa: PLC0415  # for the worker alone: it is 2 s of imports

    sink, stop_file = config["sink"], Path(config["stop_file"])
    if stop_file.exists():  # restarted after such an error
        return
    last = {"event": 0.0, "stop": 0.0}
    pending = {"num": 0}

    def events(event: dict[str, Any]) -> None:
        if event["kind"] == "advance" and "epoch" not in event:
            pending["num"] += event["num"]
            if time.monotonic() - last["event"] < _EVENT_EVERY_S:
                return
            event = {**event, "num": pending["num"]}
        elif pending["num"]:
            sink.put.remote({"kind": "advance", "num": pending["num"]})
        pending["num"] = 0
        last["event"] = time.monotonic()
        sink.put.remote(event)

    def should_stop() -> bool:
        if time.monotonic() - last["stop"] < _STOP_EVERY_S:
            return False
        last["stop"] = time.monotonic()
        return stop_file.exists()

    context = ray.train.get_context()
    try:
        run_worker({**config, "events": events, "should_stop": should_stop, "local_rank": context.get_local_rank()})
    except InterruptedRunError as error:  # all workers stop at the same step, so none is left waiting
        ray.get(sink.put.remote({"kind": "error", "error": error}))
    except OrchestratorError as error:
        ray.get(sink.put.remote({"kind": "error", "error": error}))
        raise
