"""The notice that a node of the workers is taken away: they write a checkpoint, and start again without it."""

from __future__ import annotations

import contextlib
import os
import time

import ray

_NOTICE_GRACE_S = 15.0
"""How long after one worker has heard of it another one may."""


def leaving_ranks() -> tuple[int, ...]:
    """The ranks whose node is taken away, as far as this worker was told; () while none is.

    Ray tells each worker of the group. `ray.train.get_preemption_info` has the same and is a barrier, which would cost
    each step more than the step; here the workers agree in the exchange that a step has anyway.
    """
    with contextlib.suppress(Exception):  # private to Ray: without it a node that is taken away is one that is lost
        from ray.train.v2._internal.execution.context import get_train_context  # noqa: PLC0415

        info = get_train_context().preemption_context.preemption_info
        return tuple(info.preempted_ranks) if info is not None else ()
    return ()


def leave(rank: int) -> None:
    """End this worker's part after the checkpoint, so that Ray starts the group again without that node.

    A death on a node that is taken away is what Ray does not count as a failure; those on other nodes return, since
    what they raised would count. Raises `RuntimeError` where this worker was never told: then Ray starts it again too.
    """
    until = time.monotonic() + _NOTICE_GRACE_S
    while not (ranks := leaving_ranks()):
        if time.monotonic() > until:
            raise RuntimeError("the other workers stopped for a node that is taken away, and this one knows of none")
        time.sleep(0.1)
    if rank in ranks:
        os._exit(1)


def is_taken_away(error: BaseException | None) -> bool:
    """Whether a worker ended because its node was taken away, as Ray saw it."""
    while error is not None:
        if isinstance(error, ray.exceptions.RayActorError):
            return bool(error.preempted)
        error = getattr(error, "health_check_failure", None) or error.__cause__
    return False
