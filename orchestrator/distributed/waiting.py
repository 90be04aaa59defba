"""Waiting for workers on a cluster: a person sees what is asked for and what there is, and it has an end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import ray

from orchestrator.distributed.offer import lacking
from orchestrator.errors import RefusedError, TrainingError
from orchestrator.job import Noted, Plan, Report

_TOLD_EVERY_S = 60.0
_MOST_STARTS = 5
"""How often workers may get their place and end before one of them has begun."""


class NoPlaceError(RefusedError):
    """The cluster had no place for too long."""


class Wait:
    """Of one job, whose workers wait at its beginning, and again wherever a node of theirs is lost."""

    def __init__(self, plan: Plan, threads: int, use_gpu: bool, report: Report) -> None:
        self._plan, self._threads, self._use_gpu, self._report = plan, threads, use_gpu, report
        self._began: float | None = None
        self._told = 0.0
        self._places: list[str] = []

    def look(self, waiting: bool, places: Sequence[str]) -> None:
        """Called often; `waiting`: no worker runs. `places`: what Ray has set aside for them (`places_of`).

        Raises `RefusedError` once there was no place for too long, and `TrainingError` where workers get one, and end
        again and again before they have begun, which Ray itself tries for ever, and tells nobody.
        """
        now = time.monotonic()
        if not waiting:
            self._began = None
            self._places.clear()
            return
        if places:  # they start, and wait for nobody
            self._began = None
            self._started_in(places[-1])
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
        raise NoPlaceError(
            "resources",
            f"no place on the cluster for {self._plan.job.scaling.wait_s:g} s: {wanted or 'all is free'}",
            mend="the same command goes on once there is one; or raise scaling.wait_s, or lower scaling.num_workers",
        )

    def _started_in(self, place: str) -> None:
        if place in self._places:
            return
        self._places.append(place)
        if len(self._places) > _MOST_STARTS:
            raise TrainingError(
                f"the workers ended {_MOST_STARTS} times before they had begun",
                expected="nodes on which a process of the job starts",
                mend="see on the nodes whether memory is full or a library fails to load, which the logs of Ray's "
                "workers say; the same command goes on from the last checkpoint",
            )
        if len(self._places) > 1:
            text = f"the workers ended before they had begun; attempt {len(self._places)} of {_MOST_STARTS}"
            self._report(Noted(text, is_warning=True))


def _count_nodes_anew() -> None:
    """Have Ray Train plan an elastic group by the nodes that there are now: by itself it counts them every 20 s.

    Of Ray's own, and by no public name: where it is called otherwise, those 20 s stay.
    """
    with contextlib.suppress(ValueError, AttributeError, ray.exceptions.RayError):
        ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")._tick.remote()
