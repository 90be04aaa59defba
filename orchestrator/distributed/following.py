"""The lines of a job from the first one to the last, whatever breaks on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator

from orchestrator.distributed.head import AwayError, ClusterJob, Head
from orchestrator.distributed.telling import Ended, parse_line
from orchestrator.errors import OrchestratorError
from orchestrator.job import Noted, Report

_POLL_S = 0.5
_PATIENCE_S = 1800.0
"""How long a head may be away."""
_LOGS_PATIENCE_S = 5.0
"""How long the output of a job that is over may be away, while the head answers."""


def lines_of(head: Head, id: str, report: Report | None = None) -> Iterator[str]:
    """What a job writes, line by line, until its state is the last one: the end of a stream is not the end of a job.

    That the cluster does not answer is reported, and it is asked again. Raises `OrchestratorError` after half an hour,
    and where the cluster knows no such job any more.
    """
    num, num_silent, is_told, away_since = 0, 0, False, 0.0
    while True:
        try:
            job = head.job(id)
            away_since = 0.0
            if job is None:
                raise OrchestratorError(
                    f"the cluster at {head.address} knows {id} no more: it was made again",
                    mend="submit it again: its run goes on from its storage",
                )
            if job.is_over:
                yield from last_lines(head, job, num)
                return
            if job.node_id:
                num_silent += 1  # of a stream that a proxy lets not through, say, all is asked for each third time
                lines = head.lines(id, is_over=False) if num_silent % 3 == 0 else head.stream(job)
                for i, line in enumerate(lines):
                    num_silent = 0
                    if i < num:
                        continue
                    num += 1
                    yield line
                    if isinstance(parse_line(line), Ended):
                        break
            is_told = is_told and num_silent > 0
        except AwayError as error:
            if not is_told and report is not None:
                report(Noted(f"{error.message}; it is asked again", is_warning=True))
            is_told = True
            away_since = away_since or time.monotonic()
            if time.monotonic() - away_since > _PATIENCE_S:
                raise
        time.sleep(_POLL_S)


def last_lines(head: Head, job: ClusterJob, num: int = 0) -> list[str]:
    """What a job that is over has written behind so many lines, or Ray's own last words on it where that is lost.

    Its output lies on the node where its driver ran, which may be gone. Raises `AwayError` where the head is.
    """
    until = time.monotonic() + _LOGS_PATIENCE_S
    while True:
        try:
            return head.lines(job.id)[num:]
        except AwayError:
            head.job(job.id)  # raises, if it is the head that is away
            if time.monotonic() > until:
                return job.message.splitlines()
        time.sleep(_POLL_S)
