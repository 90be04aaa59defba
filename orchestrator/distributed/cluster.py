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

from orchestrator.distributed.sink import EventSink, Line
from orchestrator.errors import InterruptedRunError, OrchestratorError, RefusedError, first_line
from orchestrator.job.plans import Plan

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
    return plan.num_workers * plan.threads_per_worker + plan.num_extractors * plan.extractor_threads


def event_sink() -> Any:
    """The handle of a new sink."""
    return ray.remote(num_cpus=0)(EventSink).remote()


def fit(plan: Plan, config: dict[str, Any]) -> Exception | None:
    """Run the trainer to its end; what it failed with, None if it did not."""
    num_workers, threads, extractors = plan.num_workers, plan.threads_per_worker, plan.num_extractors
    who, least, lower = f"{num_workers} workers", num_workers, "lower scaling.num_workers"
    cores = num_workers * threads
    if extractors:  # of them one that has a place is enough to go on
        who, least, lower = f"{who} and 1 of {extractors} extractors", least + 1, "leave out scaling.num_extractors"
        cores += plan.extractor_threads
    gpus, cpus = (ray.cluster_resources().get(kind, 0) for kind in ("GPU", "CPU"))
    use_gpu = plan.job.scaling.device != "cpu" and gpus >= num_workers
    if (use_gpu or plan.job.scaling.device == "gpu") and gpus < least:
        return RefusedError(
            "resources",
            f"{who} want a GPU each, and the cluster has {gpus:g}",
            mend=f"{lower}, or use device cpu",
        )
    if cores > cpus:
        return RefusedError(
            "resources",
            f"{who} need {cores} CPUs ({threads} threads a worker), and the cluster has {cpus:g}",
            mend=f"{lower}, or lower scaling.threads_per_worker",
        )
    config = {**config, "num_extractors": extractors, "use_gpu": use_gpu}
    trainer = TorchTrainer(
        _worker,
        train_loop_config=config,
        # A worker that has run the body over its share waits for the others: half an hour, the default, may be short.
        torch_config=TorchConfig(timeout_s=_EXCHANGE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": threads},
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
    from orchestrator.training.loop import run_worker  # noqa: PLC0415  # for the worker alone: it is 2 s of imports

    line = Line(config["sink"], Path(config["stop_file"]))
    if line.stop_file.exists():  # restarted after such an error
        return
    extractors = None
    if config["num_extractors"]:
        from orchestrator.distributed.extractors import Extractors  # noqa: PLC0415

        extractors = Extractors(config, line, config["num_extractors"], config["use_gpu"])
    config = {
        **config, "events": line.tell, "should_stop": line.should_stop, "extractors": extractors,
        "local_rank": ray.train.get_context().get_local_rank(),
    }  # fmt: skip
    try:
        run_worker(config)
    except InterruptedRunError as error:  # all workers stop at the same step, so none is left waiting
        ray.get(line.sink.put.remote({"kind": "error", "error": error}))
    except OrchestratorError as error:
        ray.get(line.sink.put.remote({"kind": "error", "error": error}))
        raise
