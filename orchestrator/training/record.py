"""What a run writes down while it works: a line an epoch, event files, and where everything came from."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from orchestrator.job import Plan, write_file
from orchestrator.network import Network, Worker


def add_epoch(run: Path, line: Mapping[str, Any]) -> None:
    """One more line in metrics.jsonl, and the same for TensorBoard."""
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    _show_in_tensorboard(run, line)


def _show_in_tensorboard(run: Path, line: Mapping[str, Any]) -> None:
    """The epoch's figures as an event file of its own, so that a run that goes on replaces no other's."""
    place = run / "tensorboard"
    suffix = f".epoch-{line['epoch']:05d}"
    for old in place.glob(f"*{suffix}"):
        old.unlink()
    with SummaryWriter(str(place), filename_suffix=suffix) as writer:
        for name, value in line.items():
            if name not in ("epoch", "step"):
                writer.add_scalar(name, value, line["step"])


def cut_metrics(run: Path, num_epochs: int) -> None:
    """Keep the lines of the first epochs alone: the others will be written again, and one that was cut off too."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, KeyError):
            if json.loads(line)["epoch"] <= num_epochs:
                kept.append(line)
    write_file(file, "".join(f"{line}\n" for line in kept))


def write_lineage(run: Path, plan: Plan, network: Network, worker: Worker, found: Mapping[str, Any]) -> None:
    """Where everything came from, and what only the running job can know."""
    card = plan.backbone
    libraries = ("orchestrator", "torch", "transformers", "timm", "ray", "numpy")
    versions = {name: _version(name) for name in libraries}
    trained = sum(p.numel() for p in network.module.parameters() if p.requires_grad)
    total = sum(p.numel() for p in network.module.parameters())
    lineage = {
        "backbone": {
            "source": card.source, "kind": card.kind, "commit": card.commit, "type": card.model_type,
            "license": _license(card.config), "lineage": card.lineage,
        },
        "method": plan.job.method,
        "data": {"path": plan.job.data.path, "fingerprint": plan.data.fingerprint, "counts": plan.data.num_samples},
        "classes": list(plan.classes),
        "seed": plan.job.training.seed,
        "adaptations": [str(adaptation) for adaptation in plan.adaptations],
        "head": list(network.head),
        "new_tensors": list(network.new) if plan.weights == "pretrained" else "all",
        "unused_tensors": list(network.unused),
        "trained_parameters": trained,
        "frozen_parameters": total - trained,
        "device": str(worker.device),
        "num_workers": worker.num_workers,
        "threads_per_worker": worker.threads,
        "versions": {"python": platform.python_version(), **versions},
        **found,
    }  # fmt: skip
    write_file(run / "lineage.json", json.dumps(lineage, indent=1, ensure_ascii=False))


def _license(config: Mapping[str, Any]) -> str | None:
    found = config.get("license") or (config.get("pretrained_cfg") or {}).get("license")
    return str(found) if found else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ImportError:
        return None
