"""What Ray has set aside for workers (its placement groups), by who asked for it, and giving back what nobody uses.

Ray's own helper for that asks its dashboard whether a trainer lives: where there is none it never learns of it, and
holds up the end of each job for 12 s. Whom a group is for, Ray's public table does not say; where the private one is
read otherwise one day, no group is known.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

_GONE_WITHIN_S = 30.0


def places_of(controller: str | None) -> list[str]:
    """Ids of the groups that are set aside for the workers of a controller, by its actor id.

    With None: of those that this driver itself has asked for, as Ray Tune does for its trials.
    """
    job = ray.get_runtime_context().get_job_id()
    return [
        group.placement_group_id.hex()
        for group in _groups()
        if group.creator_job_id.hex() == job and group.state == type(group).CREATED and _creator_of(group) == controller
    ]


def give_back_places(controller: str | None = None) -> None:
    """Remove what controllers of this job that have died had set aside: Ray keeps it as long as the job lives.

    `controller`: the actor id of one that is known to be dead. The workers end with it, before this returns.
    """
    job, until = ray.get_runtime_context().get_job_id(), time.monotonic() + _GONE_WITHIN_S
    while True:
        left = [
            group
            for group in _groups()
            if group.creator_job_id.hex() == job
            and (creator := _creator_of(group)) is not None
            and (group.creator_actor_dead or creator == controller)
            and group.state != type(group).REMOVED
        ]
        if not left or time.monotonic() > until:
            return
        for group in left:
            with contextlib.suppress(Exception):  # whatever it is, the group stays for another try
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
        time.sleep(0.1)


def _creator_of(group: Any) -> str | None:
    """The actor that has asked for the group, None for the driver."""
    actor: str = group.creator_actor_id.hex()
    return None if not actor.strip("f") else actor


def _groups() -> Iterator[Any]:
    with contextlib.suppress(Exception):  # private to Ray, and its cluster may be gone
        from ray._private.state import state  # noqa: PLC0415
        from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # noqa: PLC0415

        for data in state._connect_and_get_accessor().get_placement_group_table():
            yield PlacementGroupTableData.FromString(data)
