"""What a run writes down while it works: a line an epoch, event files, what it left out, where everything came from."""

from __future__ import annotations

import contextlib
import json
import math
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from orchestrator.job import Plan, sync, write_file
from orchestrator.network import Network, Worker
from orchestrator.training.metrics import finite

_METRICS, _SKIPPED = "metrics.jsonl", "skipped.jsonl"


def add_epoch(run: Path, line: Mapping[str, Any]) -> None:
    """One more line in metrics.jsonl, null for what is not finite, and the same for TensorBoard."""
    with (run / _METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite(dict(line))) + "\n")
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
    file = run / _METRICS
    if file.exists():
        _write_lines(file, [line for line in _read_lines(file) if line.get("epoch", math.inf) <= num_epochs])


def settle_metrics(run: Path) -> None:
    """Return once the lines of metrics.jsonl are on the disk."""
    with contextlib.suppress(FileNotFoundError):  # no epoch has ended yet
        sync(run / _METRICS)


def write_skipped(run: Path, problems: Mapping[str, str]) -> None:
    """skipped.jsonl: the lines that are there, and one more for each place of `problems` that has none yet.

    `problems`: {what the sample is called: why it was left out}, of all workers and since the run began. What was left
    out before the start has its lines already. The file is written whole, and the same again after an interruption.
    """
    if not problems:
        return
    lines = _read_lines(run / _SKIPPED)
    known = {line.get("place") for line in lines}
    met = [{"place": place, "problem": why} for place, why in problems.items() if place not in known]
    _write_lines(run / _SKIPPED, [*lines, *met])


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, without a last one that was cut off; [] where there is no file."""
    lines = []
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    for one in text.split("\n"):  # and at no other character that Unicode calls the end of a line: paths hold such
        with contextlib.suppress(ValueError):
            line = json.loads(one)
            if isinstance(line, dict):
                lines.append(line)
    return lines


def _write_lines(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    write_file(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_lineage(run: Path, plan: Plan, network: Network, worker: Worker, met: Mapping[str, Any]) -> None:
    """lineage.json: where everything came from, and `met`, what only the running job can know."""
    card = plan.backbone
    libraries = ("orchestrator", "torch", "transformers", "timm", "ray", "numpy")
    versions = {name: _version(name) for name in libraries}
    everything = ("",) if plan.recipe.trains_everything else network.head
    moving = {one for name in everything for one in network.module.get_submodule(name).parameters()}
    trained = sum(one.numel() for one in moving)
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
        **met,
    }  # fmt: skip
    write_file(run / "lineage.json", json.dumps(lineage, indent=1, ensure_ascii=False))


def _license(config: Mapping[str, Any]) -> str | None:
    name = config.get("license") or (config.get("pretrained_cfg") or {}).get("license")
    return str(name) if name else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ImportError:
        return None
