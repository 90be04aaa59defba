"""What a job needs of every node, and which node lacks what. Pure: the asking is `preflight_job`'s and `nodes`'."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.backbone import files_of
from orchestrator.distributed.nodes import describe
from orchestrator.distributed.request import Sent
from orchestrator.distributed.telling import Ended, error_of
from orchestrator.errors import RefusedError
from orchestrator.job import Plan, is_dataset, is_uri, local_path

TITLES = ("node", "Python", "Ray", "torch", "storage", "free", "CPUs", "GPUs")
_SHOWN = 4
_LEAST_ROOM_BYTES = 256 * 2**20
_COPIES = 3
"""Of weights and optimizer that a run holds at most: two checkpoints and one that is being written."""


@dataclass(frozen=True)
class Fault:
    """What a node lacks."""

    node: str
    lacks: str
    mend: str


@dataclass(frozen=True)
class Preflight:
    """What was found on the nodes, and what was wanted of them."""

    nodes: Sequence[Mapping[str, Any]]
    wanted: Mapping[str, Any]
    refusal: Mapping[str, str] | None = None
    """Why all nodes together have no place for the job's workers."""

    @property
    def code(self) -> str:
        """What was delivered: each distribution with its version and the digest of its code."""
        return ", ".join(f"{one['name']} {one['version']} ({one['digest']})" for one in self.wanted["delivered"])

    @property
    def faults(self) -> list[Fault]:
        """What is lacking, node by node."""
        return [fault for node in self.nodes for fault in _faults(node, self)]

    @property
    def head(self) -> Mapping[str, Any]:
        """Of the head node, {} where it did not answer."""
        facts: Mapping[str, Any] = next((one["facts"] for one in self.nodes if one["is_head"]), {})
        return {} if "error" in facts else facts

    @property
    def rows(self) -> list[list[str]]:
        """A line a node, under `TITLES`."""
        return [_row(node) for node in self.nodes]

    def require(self) -> None:
        """Raise `RefusedError` where a node lacks something."""
        faults = self.faults
        if not self.nodes:
            faults = [Fault("the cluster", "has no node that is alive", "start one: ray start --address=HEAD:6379")]
        if not faults:
            if self.refusal is not None:
                raise error_of(Ended(RefusedError.exit_code, error=self.refusal))
            return
        shown = "; ".join(f"{one.node}: {one.lacks}" for one in faults[:_SHOWN])
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise RefusedError(
            "cluster", f"{shown}{more}", expected="nodes that all have what the job needs",
            mend="; ".join(dict.fromkeys(one.mend for one in faults)),
        )  # fmt: skip


def wanted_of(sent: Sent, code: Mapping[str, Any]) -> dict[str, Any]:
    """What the nodes are asked for a job; `code` is of `wheels.as_wanted`. Plain data without a secret."""
    plan = sent.plan
    plans = (plan, *sent.others)
    sizes = [one.parameters for one in plans if one.parameters]
    trained = max((one.weights_bytes + one.optimizer_bytes + one.gradients_bytes for one in sizes), default=0)
    kept = max((one.weights_bytes + one.optimizer_bytes for one in sizes), default=0)
    return {
        **code,
        "plan": plan.model_dump_json() if sent.on_workers else "",
        "storage": sent.storage,
        "modality": plan.job.modality,
        "backbones": [_backbone(one) for one in plans],
        "data": {place: describe(place) for place in _places(plan)},
        "device": plan.job.scaling.device,
        "gpu_kind": plan.job.scaling.accelerator_type,
        "memory_bytes": trained,
        "disk_bytes": max(_LEAST_ROOM_BYTES, _COPIES * kept),
    }


def _backbone(plan: Plan) -> dict[str, Any]:
    card = plan.backbone
    files = {name: card.files[name] for name in files_of(card, with_weights=plan.weights != "random")}
    here = card.path is not None and not is_uri(card.source)  # a run in a store: each node fetches it from there
    path = str(Path(str(card.path)).absolute()) if here else None
    if path is not None:
        files = {name: (Path(path) / name).stat().st_size for name in files}
    return {"source": card.source, "path": path, "repo_id": card.repo_id, "commit": card.commit, "files": files}


def _places(plan: Plan) -> Iterable[str]:
    data = plan.job.at_whole_paths().data
    for place in dict.fromkeys((data.path, data.validation, data.test, data.root)):
        if place is not None and (is_uri(place) or not is_dataset(place)) and not place.startswith("hf://"):
            yield place if is_uri(place) else str(local_path(place))


# --- one node ---


def _faults(node: Mapping[str, Any], of: Preflight) -> Iterable[Fault]:
    name, facts, wanted = node["node"], node["facts"], of.wanted
    if "error" in facts:
        yield Fault(name, f"it did not answer: {facts['error']}", "look at that node's log, or take it off the cluster")
        return
    yield from _software(name, facts, of)
    yield from _storage(node, of)
    yield from _room(node, wanted)
    for place, found in facts["data"].items():
        if (why := _error(found)) or found != wanted["data"][place]:
            yield Fault(name, f"the data {place} {f'cannot be read: {why}' if why else 'is not the same as here'}",
                        "give a place that all nodes see: a shared folder, or s3://...")  # fmt: skip
    for source, found in facts["backbones"].items():
        if why := _error(found):
            yield Fault(name, f"the backbone {source} is not to be had: {why}",
                        "give a folder that all nodes see, or let them reach the Hub")  # fmt: skip
    yield from _memory(node, of)


def _room(node: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterable[Fault]:
    """For the run, and for what has still to be downloaded from the Hub; for both where they share a disk."""
    name, facts = node["node"], node["facts"]
    sizes = facts["backbones"].values() if _works(node, wanted) else ()
    coming = sum(size for size in sizes if isinstance(size, int))
    both = coming if facts["one_disk"] is True else 0
    room, cache_room = facts["free_bytes"], facts["cache_free_bytes"]
    if isinstance(room, int) and room < wanted["disk_bytes"] + both:
        takes = f"the run takes {_size(wanted['disk_bytes'])}{f', the backbone {_size(both)} more' if both else ''}"
        yield Fault(name, f"{_size(room)} are free on its disk, and {takes}",
                    "make room there, or give another storage")  # fmt: skip
    if isinstance(cache_room, int) and cache_room < coming - both:
        lacks = f"{_size(cache_room)} are free where it keeps what comes from the Hub, and {_size(coming)} have to come"
        yield Fault(name, lacks, "make room there, or set HF_HOME on that node to a disk that has it")


def _works(node: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether the work is done there: on nodes with cores, of the kind that the job asks for, or on the head alone."""
    if not wanted["plan"]:
        return bool(node["is_head"])
    resources, device, kind = node["resources"], wanted["device"], wanted["gpu_kind"]
    of_kind = kind is None or device == "cpu" or kind in node.get("gpu_kinds", ())
    return bool(resources["CPU"] and (resources["GPU"] or device != "gpu") and of_kind)


def _memory(node: Mapping[str, Any], of: Preflight) -> Iterable[Fault]:
    """Where the work is done: in the node's own memory or that of its GPUs."""
    name, facts, wanted = node["node"], node["facts"], of.wanted
    if not _works(node, wanted):
        return
    memory, needed = facts["memory_bytes"], wanted["memory_bytes"]
    gpus = facts["gpus"] if isinstance(facts["gpus"], list) and wanted["device"] != "cpu" else []
    if node["resources"]["GPU"] and gpus:
        if min(gpus) < needed:
            yield Fault(name, f"a GPU of {_size(min(gpus))} is smaller than the {_size(needed)} of one worker",
                        "take a larger GPU, a smaller backbone, or device cpu")  # fmt: skip
    elif isinstance(memory, int) and memory < needed:
        yield Fault(name, f"its {_size(memory)} of memory are less than the {_size(needed)} of one worker",
                    "take a larger node, or a smaller backbone")  # fmt: skip


def _software(name: str, facts: Mapping[str, Any], of: Preflight) -> Iterable[Fault]:
    for kind, title in (("python", "Python"), ("ray", "Ray"), ("torch", "torch")):
        here, head = facts[kind], of.head.get(kind)
        if why := _error(here):
            yield Fault(name, f"{title}: {why}", f"install {kind} there, as on the other nodes")
        elif head is not None and not _error(head) and _compared(kind, here) != _compared(kind, head):
            yield Fault(name, f"it has {title} {here}, and the head has {head}", f"install the same {kind} everywhere")
    lacking = facts["lacking"]
    if why := _error(lacking):
        yield Fault(name, f"what is installed there cannot be told: {why}", "install it there: pip install packaging")
    elif lacking:
        yield Fault(name, f"it lacks {', '.join(lacking)}",
                    "on every node: pip install " + " ".join(f"'{one.split(' (')[0]}'" for one in lacking))  # fmt: skip
        return  # of which the rest comes
    for module, digest in facts["code"].items():
        if (why := _error(digest)) or digest != of.wanted["modules"][module]:
            yield Fault(name, f"{module} there {f'does not load: {why}' if why else f'is other code ({digest})'}",
                        "see that nothing stands before PYTHONPATH on that node")  # fmt: skip
    if why := _error(facts["modality"]):
        yield Fault(name, f"the modality {of.wanted['modality']} does not load: {why}",
                    "install on every node what its distribution needs")  # fmt: skip


def _compared(kind: str, version: str) -> str:
    """What has to be the same: of torch not its build (+cpu, +cu126), which differs by what a node has.

    Of Python the minor version: Ray lets in a node of another patch version only where somebody told it to
    (RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL).
    """
    return version.rpartition(".")[0] if kind == "python" else version.partition("+")[0]


def _storage(node: Mapping[str, Any], of: Preflight) -> Iterable[Fault]:
    storage, several = of.wanted["storage"], len(of.nodes) > 1
    mend = "give a storage that every node sees: a shared folder, or s3://bucket/runs"
    if node["storage_trouble"]:
        yield Fault(node["node"], f"{storage} cannot be written: {node['storage_trouble']}", mend)
    elif (why := _error(node["facts"]["storage"])) or (why := node["echo"]):
        shared = f"it does not see in {storage} what the head wrote there" if several else f"{storage} cannot be used"
        yield Fault(node["node"], f"{shared} ({why})", mend)


def _row(node: Mapping[str, Any]) -> list[str]:
    facts, cpus = node["facts"], node["resources"]["CPU"]
    gpus = " ".join([f"{node['resources']['GPU']:g}", *node.get("gpu_kinds", ())])
    name = f"{node['node']}{' (head)' if node['is_head'] else ''}"
    if "error" in facts:
        return [name, *["-"] * 5, f"{cpus:g}", gpus]
    seen = "no" if _error(facts["storage"]) or node["echo"] or node["storage_trouble"] else "seen"
    room = facts["free_bytes"]
    return [
        name, *(_shown(facts[one]) for one in ("python", "ray", "torch")), seen,
        _size(room) if isinstance(room, int) else "-", f"{cpus:g}", gpus,
    ]  # fmt: skip


def _error(fact: object) -> str:
    return str(fact["error"]) if isinstance(fact, Mapping) and set(fact) == {"error"} else ""


def _shown(fact: object) -> str:
    return "-" if _error(fact) else str(fact)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MB"
