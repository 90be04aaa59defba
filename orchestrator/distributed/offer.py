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
    most = {kind: max(most.get(kind, 0), there.get(kind, 0)) for kind in {"CPU", "GPU", *most, *there}}
    use_gpu = _use_gpu(plan, most, report)
    num_workers, extractors = plan.job.scaling.fewest_workers, plan.num_extractors
    # One extractor that has a place beside the workers is enough to go on.
    threads = plan.threads_per_worker or _threads_of(plan, num_workers + min(1, extractors), use_gpu)
    extractor_threads = plan.extractor_threads or threads
    who, lower = f"{num_workers} workers", "lower scaling.num_workers"
    cores = num_workers * threads
    if extractors:
        who, lower = f"{who} and 1 of {extractors} extractors", "leave out scaling.num_extractors"
        cores += extractor_threads
    largest = max((node.get("CPU", 0) for node in _nodes()), default=0)
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
    if waits_for := lacking(plan, threads, use_gpu, extractor_threads):
        report(Noted(f"the job waits for its place on the cluster: {waits_for}"))
    return {"use_gpu": use_gpu, "threads": threads, "extractor_threads": extractor_threads}


def lacking(plan: Plan, threads: int, use_gpu: bool, extractor_threads: int = 0) -> str:
    """What the job wants and the cluster has not free now, in words; '' where it lacks nothing."""
    cores = plan.job.scaling.fewest_workers * threads + (extractor_threads if plan.num_extractors else 0)
    wanted = {"CPU": cores, **({"GPU": _num_gpus(plan), **_kind(plan)} if use_gpu else {})}
    free = ray.available_resources()
    return ", ".join(
        f"{num:g} {kind.removeprefix('accelerator_type:')}s are wanted and {free.get(kind, 0):g} are free"
        for kind, num in wanted.items()
        if num > free.get(kind, 0)
    )


def resources_of(plan: Plan, threads: int, use_gpu: bool) -> dict[str, float]:
    """What Ray sets aside for each worker."""
    return {"CPU": threads, **({"GPU": plan.job.scaling.gpus_per_worker} if use_gpu else {})}


def _kind(plan: Plan) -> dict[str, float]:
    """{Ray's resource for a kind of GPU: how much of it is asked for}. A node that has that kind has 1 of it."""
    kind = plan.job.scaling.accelerator_type
    return {f"accelerator_type:{kind}": 0.001} if kind else {}


def gpu_places(num_gpus: float, share: float) -> int:
    """How many processes have a place on so many GPUs, each with that share of one: a process is on one GPU alone."""
    return int(num_gpus) * int(1 / share + 1e-9)


def _num_gpus(plan: Plan) -> float:
    return _num_processes(plan) * plan.job.scaling.gpus_per_worker


def _num_processes(plan: Plan) -> int:
    return plan.job.scaling.fewest_workers + (1 if plan.num_extractors else 0)


def _use_gpu(plan: Plan, most: Mapping[str, float], report: Report) -> bool:
    """Whether the processes get GPUs. Raises `RefusedError` where GPUs are asked for that no node type could give."""
    scaling, gpus, least = plan.job.scaling, most.get("GPU", 0), _num_gpus(plan)
    wanted = "gpu" if scaling.accelerator_type and scaling.device == "auto" else scaling.device
    if wanted == "cpu" or (wanted == "auto" and not gpus):
        if wanted == "auto":
            report(Noted("device auto: the cluster has no GPU, so all run on CPUs"))
        return False
    lacks = [kind.partition(":")[2] for kind in _kind(plan) if not most.get(kind)]
    places = gpu_places(gpus, scaling.gpus_per_worker)
    if places >= _num_processes(plan) and not lacks:
        if wanted == "auto":
            report(Noted(f"device auto: on {least:g} of the cluster's {gpus:g} GPUs"))
        return True
    each = "a GPU" if scaling.gpus_per_worker == 1 else f"{scaling.gpus_per_worker:g} of a GPU"
    what = f"{_num_processes(plan)} processes want {each} each, and the cluster has {gpus:g}"
    if lacks:
        kinds = ", ".join(sorted(kind.partition(":")[2] for kind in most if kind.startswith("accelerator_type:")))
        what = f"GPUs of the kind {lacks[0]} are wanted, and the cluster has {kinds or 'no kind that it tells'}"
    if wanted == "gpu":
        lower = "correct scaling.accelerator_type" if lacks else "lower scaling.num_workers"
        raise RefusedError("resources", what, mend=f"{lower}, or use device cpu")
    report(Noted(f"{what}: all run on CPUs; for the GPUs, lower scaling.num_workers to {max(1, places)}"))
    return False


def most_resources() -> Mapping[str, float]:
    """What an autoscaler could give, {} where there is none, or where it does not tell."""
    with contextlib.suppress(Exception):  # private to Ray, which uses it for its own data sets
        from ray._private.state import state  # noqa: PLC0415

        return state.get_max_resources_from_cluster_config() or {}
    return {}


def _node_types() -> list[Mapping[str, float]]:
    """What each node is like that an autoscaler could add, as many times as it could; [] where there is none."""
    with contextlib.suppress(Exception):  # private to Ray, as above
        from ray._private.state import state  # noqa: PLC0415

        config = state.get_cluster_config()
        if config is not None:
            groups = config.node_group_configs
            return [dict(group.resources) for group in groups for _ in range(min(max(group.max_count, 0), 1000))]
    return []


def _nodes() -> list[Mapping[str, float]]:
    """The resources of each node that there is, and of each that there could be."""
    return [*(node["Resources"] for node in ray.nodes() if node["Alive"]), *_node_types()]


def _threads_of(plan: Plan, num: int, use_gpu: bool) -> int:
    """The most cores that each of `num` processes can have, if all are to have a place; at least 1.

    On today's nodes; where these have no place for all, with those that an autoscaler could add.
    """
    today = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    share = plan.job.scaling.gpus_per_worker
    for nodes in (today, [*today, *_node_types()]):
        for threads in range(int(max((node.get("CPU", 0) for node in nodes), default=1)), 0, -1):
            places = (
                min(node.get("CPU", 0) // threads, gpu_places(node.get("GPU", 0), share) if use_gpu else math.inf)
                for node in nodes
            )
            if sum(places) >= num:
                return threads
    return 1
