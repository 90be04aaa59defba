"""What a cluster has to give to a job: devices and threads of each process, and whether it has to wait for them."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import yaml

from orchestrator.errors import RefusedError
from orchestrator.job import Noted, Plan, Report

NODE_TYPES = "ORCHESTRATOR_NODE_TYPES"
"""In the head's environment: what an autoscaler could add, [{"resources": {"CPU": 8, "GPU": 1}, "max": 16}]."""
_BOOTSTRAP = "ray_bootstrap_config.yaml"
"""What `ray up` leaves in the home directory of the head."""
_MOST_NODES = 1000
HEAD = "node:__internal_head__"
"""What Ray calls a resource of the head alone."""


def offer_of(plan: Plan, report: Report) -> dict[str, Any]:
    """{"use_gpu", "threads", "extractor_threads"} of each process. Raises `RefusedError` for what no node could give.

    What an autoscaler could add counts as there; that the job has to wait for it, or for others, is reported.
    """
    nodes = nodes_possible()
    most = totals(nodes)
    use_gpu = _use_gpu(plan, nodes, report)
    num_workers, extractors = plan.job.scaling.fewest_workers, plan.num_extractors
    # One extractor that has a place beside the workers is enough to go on.
    threads = plan.threads_per_worker or _threads_of(plan, num_workers + min(1, extractors), use_gpu)
    extractor_threads = plan.extractor_threads or threads
    who, lower = f"{num_workers} workers", "lower scaling.num_workers"
    cores = num_workers * threads
    if extractors:
        who, lower = f"{who} and 1 of {extractors} extractors", "leave out scaling.num_extractors"
        cores += extractor_threads
    largest = max((node.get("CPU", 0) for node in nodes), default=0)
    if grows_by_unknown():
        pass
    elif max(threads, extractor_threads if extractors else 0) > largest:
        raise RefusedError(
            "resources", f"a process of {threads} threads has no place: the largest node has {largest:g} CPUs",
            mend="lower scaling.threads_per_worker",
        )  # fmt: skip
    elif cores > most.get("CPU", 0):
        raise RefusedError(
            "resources",
            f"{who} need {cores} CPUs ({threads} threads a worker), and the cluster has {most.get('CPU', 0):g}",
            mend=f"{lower}, or lower scaling.threads_per_worker",
        )
    elif not _have_a_place(plan, nodes, threads, use_gpu, num_workers):
        each = ", ".join(f"{num:g}" for num in sorted((node.get("CPU", 0) for node in nodes), reverse=True)[:8])
        how = plan.job.scaling.placement
        strict = how.startswith("strict")
        raise RefusedError(
            "resources",
            f"{num_workers} workers of {threads} threads have no place{f' {how}' if strict else ''}: the nodes have "
            f"{each} CPUs",
            mend="lower scaling.threads_per_worker or scaling.num_workers"
            + (f", or use placement {how.removeprefix('strict-')}" if strict else ""),
        )
    if waits_for := lacking(plan, threads, use_gpu, extractor_threads):
        report(Noted(f"the job waits for its place on the cluster: {waits_for}"))
    return {"use_gpu": use_gpu, "threads": threads, "extractor_threads": extractor_threads}


def lacking(plan: Plan, threads: int, use_gpu: bool, extractor_threads: int = 0) -> str:
    """What the job wants and the cluster has not free now, in words; '' where it lacks nothing."""
    cores = plan.job.scaling.fewest_workers * threads + (extractor_threads if plan.num_extractors else 0)
    wanted = {"CPU": cores, **({"GPU": _num_gpus(plan), **kind_of(plan)} if use_gpu else {})}
    free = ray.available_resources()
    return ", ".join(
        f"{num:g} {kind.removeprefix('accelerator_type:')}s are wanted and {free.get(kind, 0):g} are free"
        for kind, num in wanted.items()
        if num > free.get(kind, 0)
    )


def resources_of(plan: Plan, threads: int, use_gpu: bool) -> dict[str, float]:
    """What Ray sets aside for each worker."""
    return {"CPU": threads, **({"GPU": plan.job.scaling.gpus_per_worker} if use_gpu else {})}


def kind_of(plan: Plan) -> dict[str, float]:
    """{Ray's resource for a kind of GPU: how much of it each process asks for}; {} for any kind.

    A node that has that kind has 1 of it.
    """
    kind = plan.job.scaling.accelerator_type
    return {f"accelerator_type:{kind}": 0.001} if kind else {}


def gpu_places(num_gpus: float, share: float) -> int:
    """How many processes have a place on so many GPUs, each with that share of one: a process is on one GPU alone."""
    return int(num_gpus) * int(1 / share + 1e-9)


def _num_gpus(plan: Plan) -> float:
    return _num_processes(plan) * plan.job.scaling.gpus_per_worker


def _num_processes(plan: Plan) -> int:
    return plan.job.scaling.fewest_workers + (1 if plan.num_extractors else 0)


def _use_gpu(plan: Plan, nodes: Sequence[Mapping[str, float]], report: Report) -> bool:
    """Whether the processes get GPUs. Raises `RefusedError` where GPUs are asked for that no node type could give."""
    scaling, most, least = plan.job.scaling, totals(nodes), _num_gpus(plan)
    gpus = most.get("GPU", 0)
    wanted = scaling.wanted_device
    if wanted == "cpu" or (wanted == "auto" and not gpus):
        if wanted == "auto":
            grows = "; device gpu waits for some that its autoscaler adds" if grows_by_unknown() else ""
            report(Noted(f"device auto: the cluster has no GPU, so all run on CPUs{grows}"))
        return False
    if wanted == "gpu" and grows_by_unknown():
        return True
    lacks = [kind.partition(":")[2] for kind in kind_of(plan) if not most.get(kind)]
    there = sum(gpu_places(node.get("GPU", 0), scaling.gpus_per_worker) for node in of_its_kind(plan, nodes))
    if there >= _num_processes(plan) and not lacks:
        if wanted == "auto":
            report(Noted(f"device auto: on {least:g} of the cluster's {gpus:g} GPUs"))
        return True
    each = "a GPU" if scaling.gpus_per_worker == 1 else f"{scaling.gpus_per_worker:g} of a GPU"
    what = f"{_num_processes(plan)} processes want {each} each, and the cluster has {gpus:g}"
    kinds = ""
    if lacks:
        kinds = ", ".join(sorted(kind.partition(":")[2] for kind in most if kind.startswith("accelerator_type:")))
        what = f"GPUs of the kind {lacks[0]} are wanted, and the cluster has {kinds or 'no kind that it tells'}"
    if wanted == "gpu":
        lower = "correct scaling.accelerator_type" if lacks else "lower scaling.num_workers"
        if lacks and not kinds:
            lower = (
                f'have the nodes tell their kind, with "accelerator_type:{lacks[0]}": 1 among their resources (in '
                f"{NODE_TYPES} on the head too, where an autoscaler adds them), or leave scaling.accelerator_type out"
            )
        raise RefusedError("resources", what, mend=f"{lower}, or use device cpu")
    report(Noted(f"{what}: all run on CPUs; for the GPUs, lower scaling.num_workers to {max(1, there)}"))
    return False


def nodes_today() -> list[Mapping[str, float]]:
    """The resources of each node that there is."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def nodes_possible() -> list[Mapping[str, float]]:
    """The resources of each node that there is, and of each that an autoscaler could add to these."""
    there, coming = nodes_today(), _node_types()
    for node in there:
        if HEAD not in node and (like_it := next((one for one in coming if _is_of_type(node, one)), None)):
            coming.remove(like_it)  # it has come
    return [*there, *coming]


def _is_of_type(node: Mapping[str, float], type: Mapping[str, float]) -> bool:
    """Whether the node may be one that an autoscaler has added: by its cores, its GPUs and their kind."""
    kinds = {"CPU", "GPU", *(kind for kind in type if kind.startswith("accelerator_type:"))}
    return all(node.get(kind, 0) == type.get(kind, 0) for kind in kinds)


def totals(nodes: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """What nodes have together."""
    found: dict[str, float] = {}
    for node in nodes:
        for kind, num in node.items():
            found[kind] = found.get(kind, 0) + num
    return found


def of_its_kind(plan: Plan, nodes: Iterable[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Those whose GPUs are of the kind that the job asks for; all, where it asks for none."""
    return [node for node in nodes if all(node.get(kind) for kind in kind_of(plan))]


def grows_by_unknown() -> bool:
    """Whether an autoscaler adds nodes of which nobody here knows what they are: the job waits, and is not refused.

    KubeRay starts a head without Ray's own monitor where its autoscaler runs beside it, and says with what command.
    """
    return "--no-monitor" in os.environ.get("KUBERAY_GEN_RAY_START_CMD", "") and not _node_types()


def _node_types() -> list[Mapping[str, float]]:
    """What each node is like that an autoscaler could add, as many times as it could; [] where there is none.

    Ray tells nobody (2.60: `get_cluster_config` is None whatever autoscaler runs). So by the head's environment, which
    the files for KubeRay set, or by the file that `ray up` leaves on the head, where drivers of submitted jobs run.
    """
    if said := os.environ.get(NODE_TYPES):
        try:
            return _each(json.loads(said))
        except (TypeError, AttributeError, KeyError, ValueError):
            raise RefusedError(
                "resources", f"{NODE_TYPES} on the head does not say what nodes there can be: {said[:80]}",
                expected='[{"resources": {"CPU": 8, "GPU": 1}, "max": 16}]',
                mend="correct it where the head is started, or take it away",
            ) from None  # fmt: skip
    with contextlib.suppress(OSError, yaml.YAMLError, TypeError, AttributeError, KeyError, ValueError):
        config = yaml.safe_load((Path.home() / _BOOTSTRAP).read_text())
        types = {name: one for name, one in config["available_node_types"].items() if name != config["head_node_type"]}
        most = config.get("max_workers", 2)  # Ray's own default
        return _each([{**one, "max": one.get("max_workers", most)} for one in types.values()])[:_MOST_NODES]
    return []


def _each(types: Sequence[Mapping[str, Any]]) -> list[Mapping[str, float]]:
    """Node types that may come so many times, one by one."""
    return [
        {str(kind): float(num) for kind, num in one["resources"].items()}
        for one in types
        for _ in range(min(max(int(one["max"]), 0), _MOST_NODES))
    ]


def places(plan: Plan, nodes: Iterable[Mapping[str, float]], threads: int, use_gpu: bool) -> list[int]:
    """How many processes of so many threads have a place on each node."""
    share = plan.job.scaling.gpus_per_worker
    found = (
        min(node.get("CPU", 0) // threads, gpu_places(node.get("GPU", 0), share) if use_gpu else math.inf)
        for node in (of_its_kind(plan, nodes) if use_gpu else nodes)
    )
    return [int(one) for one in found]


def most_threads(plan: Plan, nodes: Sequence[Mapping[str, float]], num: int, use_gpu: bool) -> int:
    """The most cores that each of `num` processes can have, if all are to have a place at once; 0 where they have none.

    The workers among them have theirs as `scaling.placement` has it.
    """
    largest = int(max((node.get("CPU", 0) for node in nodes), default=0))
    return next((one for one in range(largest, 0, -1) if _have_a_place(plan, nodes, one, use_gpu, num)), 0)


def _have_a_place(plan: Plan, nodes: Iterable[Mapping[str, float]], threads: int, use_gpu: bool, num: int) -> bool:
    found, workers = places(plan, nodes, threads, use_gpu), plan.job.scaling.fewest_workers
    if plan.job.scaling.placement == "strict-pack" and max(found, default=0) < workers:
        return False
    if plan.job.scaling.placement == "strict-spread" and sum(one >= 1 for one in found) < workers:
        return False
    return sum(found) >= num


def _threads_of(plan: Plan, num: int, use_gpu: bool) -> int:
    """That each of `num` processes gets: on today's nodes, or where these have no place for all, on those to come.

    On GPUs an elastic group has more workers, as many as there are GPUs for, and cores are divided among these.
    """
    for nodes in (nodes_today(), nodes_possible()):
        more = 0
        if use_gpu and plan.job.scaling.is_elastic:
            more = min(plan.num_workers - plan.job.scaling.fewest_workers, sum(places(plan, nodes, 1, use_gpu)) - num)
        if threads := most_threads(plan, nodes, num + max(0, more), use_gpu):
            return threads
    return 1
