"""What a cluster has to give to a job: devices and threads of each process, and whether it has to wait for them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import ray

from orchestrator.errors import RefusedError
from orchestrator.job import Noted, Plan, Report


def offer_of(plan: Plan, report: Report) -> dict[str, Any]:
    """{"use_gpu", "threads", "extractor_threads"} of each process. Raises `RefusedError` for what no node could give.

    What an autoscaler could add counts as there; that the job has to wait for it, or for others, is reported.
    """
    there, most = ray.cluster_resources(), most_resources()
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


def most_resources() -> Mapping[str, float]:
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
