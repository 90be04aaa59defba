"""What a run writes down while it works: a line an epoch, event files, what it left out, where everything came from."""

from __future__ import annotations

import io
import json
import math
import platform
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from orchestrator.job import METRICS_FILE, HeldRun, Plan, read_lines
from orchestrator.network import Network, Worker, adapted_modules, is_adapter
from orchestrator.tasks import finite
from orchestrator.training.outbox import Outbox

_SKIPPED = "skipped.jsonl"
_TENSORBOARD = "tensorboard"
_EPOCHS = re.compile(r".*\.epoch-(\d+)")
_PUBLISHED_EVERY_S = 1.0
"""Small networks have hundreds of epochs a second."""


class Record:
    """The epochs of a run, as metrics.jsonl and as event files for TensorBoard.

    They go to the storage once a second at most, and whenever `publish` or `settle` is called: before a checkpoint that
    counts their epochs as ended. Lines that were not there yet when a run was cut off are of epochs that come again.
    """

    def __init__(self, run: HeldRun, num_epochs: int, outbox: Outbox | None = None) -> None:
        """`num_epochs`: of the run's lines those of the first epochs are kept, the others will be written again.

        `outbox`: what writes them beside the loop.
        """
        self._outbox = outbox
        self._run = outbox.run if outbox is not None else run
        lines = read_lines(run.read(METRICS_FILE))
        self._lines = [line for line in lines if line.get("epoch", math.inf) <= num_epochs]
        self._pending: list[Mapping[str, Any]] = []
        self._published = -math.inf
        if self._lines != lines:
            self._write()
        for file in run.children(_TENSORBOARD):
            match = _EPOCHS.fullmatch(file)
            if match and int(match[1]) > num_epochs:
                run.delete(f"{_TENSORBOARD}/{file}")

    def add(self, line: Mapping[str, Any]) -> None:
        """One more epoch."""
        self._pending.append(line)
        waits = self._outbox is not None and self._outbox.busy
        if not waits and time.monotonic() - self._published >= _PUBLISHED_EVERY_S:
            self.publish()

    def settle(self) -> None:
        """Return once all epochs are on the storage."""
        self.publish()
        if self._outbox is not None:
            self._outbox.wait()

    def publish(self) -> None:
        """Have all epochs written, before what is given to the outbox from now on."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        if self._outbox is None:
            self._write_down(pending)
        else:
            self._outbox.put(partial(self._write_down, pending))

    def _write_down(self, pending: Sequence[Mapping[str, Any]]) -> None:
        self._lines += [finite(dict(line)) for line in pending]
        self._write()
        _show_in_tensorboard(self._run, pending)
        self._published = time.monotonic()

    def _write(self) -> None:
        self._run.write(METRICS_FILE, _as_text(self._lines))


def _show_in_tensorboard(run: HeldRun, lines: Sequence[Mapping[str, Any]]) -> None:
    """The figures of some epochs as an event file of its own, so that a run that goes on replaces no other's."""
    now = time.time()
    records = _Records()
    records.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    for line in lines:
        for name, value in line.items():
            if name not in ("epoch", "step", "kept"):
                event = Event(wall_time=now, step=line["step"], summary=scalar(name, value))
                records.write(event.SerializeToString())
    name = f"events.out.tfevents.{int(now)}.{platform.node()}.epoch-{lines[-1]['epoch']:05d}"
    run.write(f"{_TENSORBOARD}/{name}", records.content.getvalue())


class _Records(RecordWriter):  # type: ignore[misc]  # tensorboardX has no types
    """An event file in memory. One on a disk that is full would print a trace of its own, from a thread."""

    def __init__(self) -> None:
        self.content = self._writer = io.BytesIO()


def write_skipped(run: HeldRun, problems: Mapping[str, str]) -> None:
    """skipped.jsonl: the lines that are there, and one more for each place of `problems` that has none yet.

    `problems`: {what the sample is called: why it was left out}, of all workers and since the run began. What was left
    out before the start has its lines already. The file is written whole, and the same again after an interruption.
    """
    if not problems:
        return
    lines = read_lines(run.read(_SKIPPED))
    known = {line.get("place") for line in lines}
    met = [{"place": place, "problem": why} for place, why in problems.items() if place not in known]
    run.write(_SKIPPED, _as_text([*lines, *met]))


def _as_text(lines: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def write_lineage(run: HeldRun, plan: Plan, network: Network, worker: Worker, met: Mapping[str, Any]) -> None:
    """lineage.json: where everything came from, and `met`, what only the running job can know."""
    card = plan.backbone
    libraries = ("orchestrator", "torch", "transformers", "timm", "ray", "numpy")
    versions = {name: _version(name) for name in libraries}
    everything = ("",) if plan.recipe.trains_everything else network.head
    moving = {one for name in everything for one in network.module.get_submodule(name).parameters()}
    moving |= {one for name, one in network.module.named_parameters() if is_adapter(name)}
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
        **({"adapted": adapted_modules(network)} if plan.recipe.adapter is not None else {}),
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
    run.write("lineage.json", json.dumps(lineage, indent=1, ensure_ascii=False))


def _license(config: Mapping[str, Any]) -> str | None:
    name = config.get("license") or (config.get("pretrained_cfg") or {}).get("license")
    return str(name) if name else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ImportError:
        return None
