"""A backbone's files from a node that has them, for a process that is no worker of a group, where the Hub fails."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.backbone import fetch, files_of, place_for
from orchestrator.errors import RefusedError
from orchestrator.job import BackboneCard, Plan, written_whole

_CHUNK_BYTES = 64 * 2**20
_ANSWERED_S = 60.0


def require_backbone(plan: Plan) -> None:
    """Return once the files of the plan's backbone are on this node.

    From the Hub, or, whatever it says by now, from another node. Raises `RefusedError`, the Hub's, where none has them.
    """
    card, with_weights = plan.backbone, plan.weights != "random"
    try:
        fetch(card, with_weights)
    except RefusedError:
        if card.kind != "hub" or not ray.is_initialized() or not _copied(card, files_of(card, with_weights)):
            raise


def _copied(card: BackboneCard, names: Sequence[str]) -> bool:
    """Whether some other node had them, and this one has them now."""
    here = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if not node["Alive"] or node["NodeID"] == here:
            continue
        with contextlib.suppress(ray.exceptions.RayError):  # it went, or lacks this package: another one may have them
            sizes: list[int] | None = ray.get(on_node(node["NodeID"], _sizes).remote(card, names), timeout=_ANSWERED_S)
            if sizes is None:
                continue
            ask = on_node(node["NodeID"], _chunk)
            for name, size in zip(names, sizes, strict=True):
                with written_whole(place_for(card, name)) as out:
                    for start in range(0, size, _CHUNK_BYTES):
                        out.write(ray.get(ask.remote(card, name, start)))
            return True
    return False


def on_node(node_id: str, function: Callable[..., Any]) -> Any:
    """A task of Ray's on that node alone, which takes no core and is not tried again: `.remote(...)` calls it."""
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(function)


def _sizes(card: BackboneCard, names: Sequence[str]) -> list[int] | None:
    """Of all these files, None where one is not on this node."""
    places = [place_for(card, name) for name in names]
    return [place.stat().st_size for place in places] if all(place.is_file() for place in places) else None


def _chunk(card: BackboneCard, name: str, start: int) -> bytes:
    with place_for(card, name).open("rb") as file:
        file.seek(start)
        return file.read(_CHUNK_BYTES)
