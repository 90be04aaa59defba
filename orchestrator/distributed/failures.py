"""Why the workers of a job ended, in a few words: Ray's errors, and those of gloo and NCCL, for a person."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray
    from ray.train import ControllerError

from orchestrator.errors import first_line

_LONGEST_WHY = 300
_LOST_PEER = re.compile(
    r"(?:[Cc]onnection closed by peer|[Cc]onnection reset by peer|[Rr]emote process exited)(?: \[([\d.a-f:]+)\])?"
)
"""What gloo and NCCL say in a worker that lives, once another one has died."""
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Unwanted(Exception):
    """The trainer is not to start workers any more: the driver has ended, or wants to."""


def plain(text: str) -> str:
    """Without the colours that Ray puts into its traces."""
    return _ANSI.sub("", text)


def failures_of(errors: Mapping[int, BaseException]) -> dict[int, str]:
    """{rank: in a few words why it ended}; those are left out that failed because another one was gone."""
    died = {rank: why for rank, error in sorted(errors.items()) if (why := _died(error))}
    return died or {rank: plain(_said(error))[:_LONGEST_WHY] for rank, error in sorted(errors.items())}


def _died(error: BaseException | None) -> str:
    """How the process ended, '' where it only failed."""
    while error is not None:
        if isinstance(error, ray.exceptions.OutOfMemoryError):
            return "it was ended because its node's memory was full"
        if isinstance(error, ray.exceptions.NodeDiedError):
            return "its node died"
        if isinstance(error, ray.exceptions.ActorDiedError | ray.exceptions.ActorUnavailableError):
            return "its process died"
        error = getattr(error, "health_check_failure", None) or error.__cause__
    return ""


def _said(error: BaseException) -> str:
    raised = getattr(error, "_base_exc", error)  # Ray Train's wrapper says the whole trace
    text = first_line(raised)
    if lost := _LOST_PEER.search(text):
        return f"it lost {f'the worker on {lost[1]}' if lost[1] else 'another worker'}, which is gone or out of reach"
    return f"{type(raised).__name__}: {text}"


def why_no_group(error: ControllerError) -> str:
    """The last line of what Ray's controller failed with: before it stands the trace."""
    lines = [line.strip() for line in plain(str(error.controller_failure)).splitlines() if line.strip()]
    return (lines or [type(error.controller_failure).__name__])[-1][:_LONGEST_WHY]
