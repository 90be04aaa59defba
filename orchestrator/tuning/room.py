"""How many trials of a search a cluster has room for side by side, and what each of them gets."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.distributed.offer import (
    grows_by_unknown,
    most_threads,
    nodes_possible,
    nodes_today,
    of_its_kind,
    places,
    totals,
)
from orchestrator.errors import RefusedError
from orchestrator.job import Plan

_MOST_HERE = 8
"""Trials side by side on this machine, unless more are asked for: each holds a network and its samples in memory."""


@dataclass(frozen=True)
class Room:
    """What trials get of the cluster."""

    num_side_by_side: int
    threads: int
    """Of each worker."""
    use_gpu: bool
    num_pending: int = 1
    """Trials that ask for a place at once: as many as nodes that are to come have room for, and one at least."""


def room_for(plan: Plan, most: int, asked: int | None) -> Room:
    """How many trials like that the cluster has room for side by side, at most `asked` and `most`; at least one.

    What an autoscaler could add counts as there. Raises `RefusedError` where there is room for none.
    """
    scaling, nodes = plan.job.scaling, nodes_possible()
    processes = max(scaling.fewest_workers, plan.num_extractors)
    on_gpus = sum(places(plan, nodes, 1, use_gpu=True)) // processes
    use_gpu = scaling.wanted_device == "gpu" or (scaling.wanted_device == "auto" and on_gpus > 0)
    room = sum(places(plan, nodes, scaling.threads_per_worker or 1, use_gpu)) // processes
    if room < 1 and grows_by_unknown():
        return Room(asked or 1, scaling.threads_per_worker or 1, use_gpu, asked or 1)  # they wait for what comes
    if room < 1:
        threads = scaling.threads_per_worker or 1
        there, kind = totals(nodes), f"{scaling.accelerator_type} " if use_gpu and scaling.accelerator_type else ""
        gpus = totals(of_its_kind(plan, nodes)).get("GPU", 0)
        raise RefusedError(
            "resources",
            f"a trial needs {processes} processes of {threads} threads{' and a GPU each' if use_gpu else ''}, and the "
            f"cluster has {there.get('CPU', 0):g} CPUs and {gpus:g} {kind}GPUs",
            mend="lower scaling.num_workers or scaling.threads_per_worker"
            + (", or use device cpu" if use_gpu and not on_gpus else ""),
        )
    wanted = min(most, room, asked or (room if use_gpu else _MOST_HERE))
    threads = scaling.threads_per_worker or most_threads(plan, nodes, processes * wanted, use_gpu)
    today = sum(places(plan, nodes_today(), threads, use_gpu)) // processes
    return Room(wanted, threads, use_gpu, max(1, wanted - today))
