"""Probes that trials share: where the first phase of `lp-ft` is the same, one trial trains it for all of them.

<search>/probes/<key>/      the checkpoint of a run at the end of that phase, as the run committed it
<search>/probes/<key>.jsonl the lines of its epochs
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path

from orchestrator.errors import RefusedError
from orchestrator.job import METRICS_FILE, HeldRun, Plan, Run, read_lines
from orchestrator.training import STATE_FILE, checkpoint_name

FOLDER = "probes"
_OF_LATER_PHASES = {
    "learning_rate", "head_learning_rate", "layer_decay", "loss", "epochs", "batch_norm", "checkpoint_every_s",
    "checkpoint_every_steps", "num_microbatches",
}  # fmt: skip
"""Of `training`: what the first phase does not go by, or what its own entry in the recipe says."""


def probe_key(plan: Plan) -> str | None:
    """Sixteen hex digits of all that the first phase depends on; None where there is no such phase."""
    first, recipe = plan.recipe.phases[0], plan.recipe
    if len(recipe.phases) < 2 or first.trains != "head":
        return None
    whole = [
        first.model_dump(mode="json"), recipe.batch_size, recipe.steps_per_epoch, recipe.num_microbatches,
        plan.backbone.commit, plan.data.fingerprint, plan.input, plan.job.settings, plan.class_weights, plan.views,
        plan.job.training.model_dump(mode="json", exclude=_OF_LATER_PHASES),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


def keep_probe(run: Run, probes: Path) -> None:
    """Keep the checkpoint that a run has at the end of its first phase, unless there is one; called in that moment."""
    plan = run.plan
    key = probe_key(plan)
    source = run.path / checkpoint_name(plan.recipe.phases[0].num_steps)
    if key is None or (probes / key).exists() or not source.is_dir():
        return
    if json.loads((source / STATE_FILE).read_text(encoding="utf-8"))["phase"]:
        return  # the next phase's first one has its place by now, and with it what this trial alone has decided
    partial = probes / f".{key}.{uuid.uuid4().hex[:8]}"
    lines = [line for line in run.metrics if line.get("epoch", 0) <= plan.recipe.phases[0].epochs]
    with contextlib.suppress(OSError):  # another trial was first, or the disk is full: then each trains its own
        shutil.copytree(source, partial)
        partial.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        os.replace(partial.with_suffix(".jsonl"), probes / f"{key}.jsonl")
        os.rename(partial, probes / key)
    shutil.rmtree(partial, ignore_errors=True)


def begin_behind_probe(held: HeldRun, plan: Plan, search: str) -> None:
    """Give a run that has not begun the checkpoint of a probe like its own, if there is one."""
    key = probe_key(plan)
    if key is None:
        return
    with contextlib.suppress(RefusedError), held.storage.opened(f"{search}/{FOLDER}/{key}") as source:
        lines = read_lines(held.storage.read_text(f"{search}/{FOLDER}/{key}.jsonl"))
        held.write(METRICS_FILE, "".join(json.dumps(line) + "\n" for line in lines))
        with held.committing(checkpoint_name(plan.recipe.phases[0].num_steps)) as folder:
            for file in source.iterdir():
                shutil.copy(file, folder)
