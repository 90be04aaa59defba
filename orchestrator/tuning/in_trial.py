"""A trial in its own process: its run is trained up to its final figures, and the search hears of it.

What Tune sees of it are its epochs. An error goes to the search by the queue that workers have to their driver: raised
here, Tune would take it for the death of the process, after which the trial begins once more.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray import cloudpickle, tune

from orchestrator.distributed.between_nodes import require_backbone
from orchestrator.distributed.events import DriverChannel
from orchestrator.distributed.leaving import NodeNotice
from orchestrator.distributed.shared_storage import require_seen
from orchestrator.distributed.waiting import NoPlaceError
from orchestrator.errors import InterruptedRunError, TrainingError, first_line
from orchestrator.job import Advanced, EpochEnded, Event, HeldRun, Lease, Noted, PhaseBegan, Run, open_storage, run_in
from orchestrator.modality import Modality, registry
from orchestrator.train import train_as_planned
from orchestrator.training import FINAL_FIGURES
from orchestrator.tuning.probes import keep_probe
from orchestrator.tuning.stopping import LAST_EPOCH
from orchestrator.tuning.trials import KEPT, Key

STORAGE, RUN, LEASE, NUMBER, REPEAT = "storage", "run", "lease", "number", "repeat"
"""What a trial's process is given, beside what was drawn for it."""
FIGURES = ("train_loss", "validation_loss", "validation_accuracy")
_TELL_EVERY_S = 5.0
_FIRST_WAIT_S = 0.2
"""After which it is looked once more whether a probe is on the storage; each later wait is twice as long."""


def key_of(config: Mapping[str, Any]) -> Key:
    """Which trial it is."""
    return config[NUMBER], config[REPEAT]


def line_of(figures: Mapping[str, Any]) -> dict[str, Any]:
    """An epoch as the record has it, of its line in metrics.jsonl; the figures are those of what the run would keep."""
    line = {name: figures[name] for name in ("epoch", *FIGURES) if name in figures}
    if KEPT not in figures:
        return line
    if figures[KEPT] == "average":
        line |= {name: figures[f"average_{name}"] for name in line if f"average_{name}" in figures}
    return {**line, KEPT: True}


def lines_of(run: Run) -> list[dict[str, Any]]:
    """The epochs of a trial's run."""
    return [line_of(figures) for figures in run.metrics]


def run_trial(config: Mapping[str, Any], channel: DriverChannel, modality: Modality | None = None) -> None:
    """Train the run of a trial up to its final figures, or until the driver wants no more; Tune hears of each epoch."""
    try:
        _train(config, channel, modality)
    except Exception as error:
        try:
            told = cloudpickle.dumps(error)
        except Exception:  # it holds what cannot travel
            told = cloudpickle.dumps(TrainingError(f"{type(error).__name__}: {first_line(error)}"))
        ray.get(channel.queue.put.remote((key_of(config), told)))


def _train(config: Mapping[str, Any], channel: DriverChannel, modality: Modality | None) -> None:
    if modality is not None and not registry.is_registered(modality.name):
        registry.register(modality)
    storage = open_storage(config[STORAGE])
    run, search = run_in(storage, config[RUN]), HeldRun(storage, Lease(**config[LEASE]))
    require_seen(search, ray.util.get_node_ip_address())
    plan, notice = run.plan, NodeNotice()
    trained = probed = False
    asked_at, wait_s, told_at = -math.inf, _FIRST_WAIT_S, -math.inf

    def report(event: Event) -> None:
        nonlocal trained, probed, asked_at, wait_s, told_at
        if plan.ray and isinstance(event, Advanced) and time.monotonic() - told_at > _TELL_EVERY_S:
            told_at = time.monotonic()
            channel.queue.works.remote()
        if isinstance(event, PhaseBegan):
            trained = event.text == FINAL_FIGURES
        if isinstance(event, Noted) and not event.text.startswith("device auto"):  # which the search has said
            channel.queue.put.remote((key_of(config), event))
        if probed and time.monotonic() - asked_at > wait_s:
            probed, asked_at, wait_s = not keep_probe(run, plan, search), time.monotonic(), 2 * wait_s
        if isinstance(event, EpochEnded):
            epoch = event.figures["epoch"]
            probed = probed or epoch == plan.recipe.phases[0].epochs
            line = line_of(event.figures)
            tune.report({**line, "training_iteration": epoch, LAST_EPOCH: event.num_epochs})

    if not plan.ray:  # else its workers see to it
        require_backbone(plan)

    def should_stop() -> bool:  # workers of its own hear of their nodes' ends themselves
        return trained or channel.should_stop() or (not plan.ray and notice.is_due())

    with contextlib.suppress(InterruptedRunError):
        while True:
            try:
                train_as_planned(run, report, should_stop)
                break
            except NoPlaceError:  # as long as others of the search work, theirs becomes free
                if ray.get(channel.queue.idle_s.remote()) > plan.job.scaling.wait_s:
                    raise
    if not trained and not plan.ray and notice.is_due() and not channel.wait_whether_to_stop():
        notice.wait_for_the_end(channel)
    if probed:  # by now all that the run has is on the storage
        keep_probe(run, plan, search)
