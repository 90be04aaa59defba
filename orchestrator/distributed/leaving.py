"""The notice that a node of the workers is taken away: they write a checkpoint in time, and start again without it."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import ray

from orchestrator.distributed.events import DriverChannel

_FOR_THE_CHECKPOINT_S = 30.0
"""Before the node's end; of a shorter notice, half."""
_ASK_EVERY_S = 1.0
_NOTICE_GRACE_S = 15.0
"""How long after one worker has heard of it another one may."""
_STAYS_S = 5.0
_END_GRACE_S = 120.0
"""How long after the node's end Ray may take to end the group."""


class NodeNotice:
    """Whether this process's node is taken away, for one that is no worker of Ray Train's and hears of nothing."""

    def __init__(self) -> None:
        self._asked_at = self._stop_at = 0.0
        self._deadline_ms: int | None = None

    def is_due(self) -> bool:
        """Whether it is time to write the checkpoint and to stop."""
        if time.monotonic() - self._asked_at > _ASK_EVERY_S:
            self._asked_at = time.monotonic()
            deadline_ms = _draining().get(ray.get_runtime_context().get_node_id())
            if deadline_ms != self._deadline_ms:
                self._deadline_ms, self._stop_at = deadline_ms, _stop_at(deadline_ms or 0)
        return self._deadline_ms is not None and time.monotonic() >= self._stop_at

    def wait_for_the_end(self, channel: DriverChannel) -> None:
        """Stay until the node ends, which Ray counts as no failure; return where the driver wants to stop.

        Where the node stays beyond its end, this process ends: Ray puts nothing on that node any more.
        """
        left_s = max(0.0, (self._deadline_ms or 0) / 1000 - time.time())
        until = time.monotonic() + left_s + _STAYS_S
        while not channel.wait_whether_to_stop():
            if time.monotonic() > until:
                os._exit(1)
            time.sleep(0.5)


class Notice:
    """What Ray has told this worker of nodes that are taken away.

    Ray tells each worker of the group. `ray.train.get_preemption_info` has the same and is a barrier, which would cost
    each step more than the step; here the workers agree in the exchange that a step has anyway.
    """

    def __init__(self) -> None:
        self._deadline_ms: int | None = None
        self._stop_at = 0.0

    def is_due(self) -> bool:
        """Whether it is time to write the checkpoint and to stop. Until then it goes on: nothing is won by less, since
        Ray counts on the node as long as it lives, and starts no group without it before.
        """
        info = _info()
        if info is None:
            return False
        if info.deadline_ms != self._deadline_ms or self._deadline_ms is None:  # a second node may have less
            self._deadline_ms = info.deadline_ms
            self._stop_at = _stop_at(info.deadline_ms or 0)
        return not info.deadline_ms or time.monotonic() >= self._stop_at


def wait_for_the_end(channel: DriverChannel, rank: int) -> None:
    """Stay, after the checkpoint, until Ray ends this process with its group; return where the driver wants to stop.

    Ray does so at the node's end, and counts no failure then. A worker that ended by itself would count as one, and if
    all returned, the training would count as done. Raises `RuntimeError` where Ray does nothing of the kind.
    """
    until = time.monotonic() + _NOTICE_GRACE_S
    info = _info()
    while info is None:
        if time.monotonic() > until:
            raise RuntimeError("the other workers stopped for a node that is taken away, and this one knows of none")
        time.sleep(0.1)
        info = _info()
    if rank == 0:
        channel.queue.taken_away.remote(list(info.preempted_ranks))
    left_s = max(0.0, (info.deadline_ms or 0) / 1000 - time.time())
    until = time.monotonic() + left_s + _END_GRACE_S
    while not channel.wait_whether_to_stop():
        if time.monotonic() > until:
            raise RuntimeError("a node was taken away, and Ray has not started the workers again")
        time.sleep(0.5)


def _stop_at(deadline_ms: int) -> float:
    left_s = deadline_ms / 1000 - time.time()
    return time.monotonic() + left_s - min(_FOR_THE_CHECKPOINT_S, left_s / 2)


def _draining() -> dict[str, int]:
    """{id of a node that is taken away: when, in ms since 1970, 0 for at once}"""
    with contextlib.suppress(Exception):  # private to Ray: without it a node that is taken away is one that is lost
        from ray._private.state import state  # noqa: PLC0415

        return dict(state.get_draining_nodes())
    return {}


def _info() -> Any:
    """Ray's `PreemptionInfo` for this worker, None while no node of the group is taken away."""
    with contextlib.suppress(Exception):  # private to Ray: without it a node that is taken away is one that is lost
        from ray.train.v2._internal.execution.context import get_train_context  # noqa: PLC0415

        return get_train_context().preemption_context.preemption_info
    return None
