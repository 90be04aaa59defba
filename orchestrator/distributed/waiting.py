"""Waiting for a place on a cluster: a person sees what is asked for and what there is, and it has an end."""

from __future__ import annotations

import contextlib
import time

import ray

from orchestrator.distributed.offer import lacking
from orchestrator.errors import RefusedError
from orchestrator.job import Noted, Plan, Report

_TOLD_EVERY_S = 60.0


class Wait:
    """Of one job, whose workers wait at its beginning, and again wherever a node of theirs is lost."""

    def __init__(self, plan: Plan, threads: int, use_gpu: bool, report: Report) -> None:
        self._plan, self._threads, self._use_gpu, self._report = plan, threads, use_gpu, report
        self._began: float | None = None
        self._told = 0.0

    def look(self, waiting: bool) -> None:
        """Called often; `waiting`: no group of workers runs. Raises `RefusedError` once that was so for too long."""
        now = time.monotonic()
        if not waiting or _has_place():
            self._began = None
            return
        if self._began is None:
            self._began = self._told = now
        if self._plan.job.scaling.is_elastic:
            _count_nodes_anew()
        left_s = self._began + self._plan.job.scaling.wait_s - now
        if left_s > 0 and now - self._told < _TOLD_EVERY_S:
            return
        self._told = now
        wanted = lacking(self._plan, self._threads, self._use_gpu)
        if left_s > 0:
            waits = f"still waiting for a place: {wanted}" if wanted else "all is free, and Ray starts the workers"
            self._report(Noted(f"{waits}; {left_s / 60:.0f} min are left"))
            return
        raise RefusedError(
            "resources",
            f"no place on the cluster for {self._plan.job.scaling.wait_s:g} s: {wanted or 'all is free'}",
            mend="the same command goes on once there is one; or raise scaling.wait_s, or lower scaling.num_workers",
        )


def _count_nodes_anew() -> None:
    """Have Ray Train plan an elastic group by the nodes that there are now: by itself it counts them every 20 s.

    Of Ray's own, and by no public name: where it is called otherwise, those 20 s stay.
    """
    with contextlib.suppress(ValueError, AttributeError, ray.exceptions.RayError):
        ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")._tick.remote()


def _has_place() -> bool:
    """Whether Ray has set aside what a group of this job wants: then it starts, and waits for nobody."""
    job = ray.get_runtime_context().get_job_id()  # with which the ids of its placement groups end
    groups = ray.util.placement_group_table().items()
    return any(key.endswith(job) and group["state"] == "CREATED" for key, group in groups)
