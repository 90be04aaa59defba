"""Whether all nodes of a cluster see the directory that a run lies in."""

from __future__ import annotations

import uuid
import warnings
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray

from orchestrator.distributed.between_nodes import on_node
from orchestrator.errors import RefusedError
from orchestrator.job import DirectoryStorage, HeldRun

_ANSWERED_S = 60.0
"""A node that has not answered by then says nothing: whether it can work, the job will tell."""


class NotSeenError(RefusedError):
    """A node does not see the directory that a run, or a search with its trials, lies in."""


def refuse_apart(run: HeldRun) -> None:
    """Raise `RefusedError` where the run lies in a directory that some node which may work on it does not see.

    Beside those that have cores the driver's own, which has begun the run there.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"] and (node["Resources"].get("CPU") or node["NodeID"] == here)]
    if len(nodes) < 2 or not isinstance(run.storage, DirectoryStorage):
        return
    token = uuid.uuid4().hex
    with run.scratch() as folder:
        (folder / "token").write_text(token)
        file = str(folder / "token")
        asked = {on_node(node["NodeID"], _content).remote(file): node["NodeManagerAddress"] for node in nodes}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWERED_S)
        apart = sorted(asked[answer] for answer in answered if _answer(answer) not in (token, None))
    if apart:
        raise _not_shared(
            f"{run.storage.place} is not the same directory on all {len(nodes)} nodes of the cluster: not on "
            + ", ".join(apart[:5]) + (f" and {len(apart) - 5} more" if len(apart) > 5 else "")
        )  # fmt: skip


def require_seen(run: HeldRun, node: str) -> None:
    """Raise `RefusedError` in a worker whose node does not see the run's directory: it joined later than the driver.

    What has its name there is a run of before, and its lease an older one.
    """
    if not isinstance(run.storage, DirectoryStorage):
        return
    last = run.storage.last_lease(run.name)
    if last is None or (last != run.lease and 0 < last.number <= run.lease.number):
        raise _not_shared(f"the node {node} does not see the run in {run.storage.place}")


def _not_shared(what: str) -> NotSeenError:
    return NotSeenError(
        "usage", what,
        expected="a storage that all nodes see: s3://bucket/runs, or a directory of a file system that they share",
        mend="give it such a place: --storage",
    )  # fmt: skip


def _content(file: str) -> str:
    """What a file holds on this node, '' where it is not there."""
    try:
        return Path(file).read_text()
    except OSError:
        return ""


def _answer(answer: Any) -> str | None:
    """A node's answer; None where it died, or lacks this package, which is said elsewhere."""
    try:
        return str(ray.get(answer))
    except ray.exceptions.RayError:
        return None
