"""The preflight on the cluster: each node is asked what it has, and the answers are printed.

Ray and nothing else; where the cluster has a place for the job's workers is asked where the rest is there too.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.distributed.nodes import look, read_token, remove_tokens, token_file, write_token
from orchestrator.distributed.offer import HEAD
from orchestrator.distributed.request import read_request

_KIND = "accelerator_type:"


def main() -> int:
    """Ask, and print; 0 whatever the answers are."""
    request = read_request()
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    storage, token = request["storage"], request["token"]
    trouble = ""
    try:
        write_token(storage, token_file(token, "head"), token.encode())
    except Exception as error:  # whatever it is, it is the answer
        trouble = f"{type(error).__name__}: {error}"
    try:
        found = _asked(request)
        for one in found:
            one["storage_trouble"] = trouble if one["is_head"] else ""
            one["echo"] = _echo(storage, token, one["node_id"])
    finally:
        if not trouble:
            remove_tokens(storage, token)
    refusal = _refusal(request["plan"]) if request["plan"] else None
    told = {"orchestrator": "Found", "nodes": found, "refusal": refusal}  # as `telling` reads it
    print(json.dumps(told), flush=True)
    return 0


def _refusal(plan: str) -> dict[str, Any] | None:
    """Why the cluster has no place for a plan's workers, as its driver would say it; None where it has one."""
    with contextlib.suppress(Exception):  # this node has told of a library that is lacking; the driver says the rest
        from orchestrator.distributed.offer import offer_of  # noqa: PLC0415
        from orchestrator.errors import RefusedError  # noqa: PLC0415
        from orchestrator.job import read_plan_json  # noqa: PLC0415

        try:
            offer_of(read_plan_json(plan), lambda _: None)
        except RefusedError as error:
            return error.as_dict()
    return None


def _asked(request: dict[str, Any]) -> list[dict[str, Any]]:
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    asked = {}
    for id in nodes:
        here = NodeAffinitySchedulingStrategy(id, soft=False)
        task = ray.remote(num_cpus=0, max_retries=1, scheduling_strategy=here)(look)
        asked[task.remote({**request, "node_id": id})] = id
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=request["timeout_s"])
    facts: dict[str, Any] = {asked[one]: {"error": f"no answer in {request['timeout_s']:g} s"} for one in late}
    for one in ready:
        try:
            facts[asked[one]] = ray.get(one)
        except Exception as error:  # the node died, or its environment could not be made
            facts[asked[one]] = {"error": (str(error).strip().splitlines() or [type(error).__name__])[-1]}
    return [
        {
            "node": node["NodeManagerAddress"],
            "node_id": id,
            "is_head": HEAD in node["Resources"],
            "resources": {kind: node["Resources"].get(kind, 0) for kind in ("CPU", "GPU")},
            "gpu_kinds": sorted(kind.removeprefix(_KIND) for kind in node["Resources"] if kind.startswith(_KIND)),
            "facts": facts[id],
        }
        for id, node in nodes.items()
    ]


def _echo(storage: str, token: str, node_id: str) -> str:
    """What the head reads of a node's file, '' where it reads what it should."""
    try:
        return "" if read_token(storage, token_file(token, node_id)) == token.encode() else "it reads otherwise"
    except Exception as error:  # likewise
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
