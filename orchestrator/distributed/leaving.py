"""The notice that a node of the workers is taken away: they write a checkpoint in time, and start again without it."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import ray

_NOTICE_GRACE_S = 15.0
"""How long after one worker has heard of it another one may."""


class Notice:
    """What Ray has told this worker of nodes that are taken away.

    Ray tells each worker of the group. `ray.train.get_preemption_info` has the same and is a barrier, which would cost
    each step more than the step; here the workers agree in the exchange that a step has anyway.
    """

    def __init__(self) -> None:
        self._leave_at: float | None = None
        self._deadline_ms: int | None = None

    def is_due(self) -> bool:
        """Whether it is time to write the checkpoint and leave: half of the time that is given is left for that.

        Until then it goes on: Ray counts on the node as long as it lives, and starts no group without it before.
        """
        info = _info()
        if info is None:
            return False
        if not info.deadline_ms:
            return True
        if self._leave_at is None or info.deadline_ms != self._deadline_ms:  # a second node may have less
            left_s = info.deadline_ms / 1000 - time.time()
            self._deadline_ms, self._leave_at = info.deadline_ms, time.monotonic() + left_s / 2
        return time.monotonic() >= self._leave_at


def leave(rank: int) -> None:
    """End this worker's part after the checkpoint, so that Ray starts the group again without that node.

    A death on a node that is taken away is what Ray does not count as a failure; those on other nodes return, since
    what they raised would count. Raises `RuntimeError` where this worker was never told: then Ray starts it again too.
    """
    until = time.monotonic() + _NOTICE_GRACE_S
    while (info := _info()) is None:
        if time.monotonic() > until:
            raise RuntimeError("the other workers stopped for a node that is taken away, and this one knows of none")
        time.sleep(0.1)
    if rank in info.preempted_ranks:
        os._exit(1)


def is_taken_away(error: BaseException | None) -> bool:
    """Whether a worker ended because its node was taken away, as Ray saw it."""
    while error is not None:
        if isinstance(error, ray.exceptions.RayActorError):
            return bool(error.preempted)
        error = getattr(error, "health_check_failure", None) or error.__cause__
    return False


def _info() -> Any:
    """Ray's `PreemptionInfo` for this worker, None while no node of the group is taken away."""
    with contextlib.suppress(Exception):  # private to Ray: without it a node that is taken away is one that is lost
        from ray.train.v2._internal.execution.context import get_train_context  # noqa: PLC0415

        return get_train_context().preemption_context.preemption_info
    return None
