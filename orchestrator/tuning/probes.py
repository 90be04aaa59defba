"""Probes that trials share: where the first phase of `lp-ft` is the same, one trial trains it for all of them.

<search>/probes/<key>/   the files of a run's checkpoint at the end of that phase, and the lines of its epochs
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from orchestrator.errors import OrchestratorError, RefusedError
from orchestrator.job import METRICS_FILE, HeldRun, Plan, Run
from orchestrator.training import STATE_FILE, checkpoint_name

FOLDER = "probes"
_EPOCHS = "epochs.jsonl"
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


def keep_probe(run: Run, plan: Plan, search: HeldRun) -> bool:
    """Keep the checkpoint that a run has at the end of its first phase; whether there is nothing left to wait for.

    A checkpoint goes to its storage while training goes on: until it is there, this is called again. Nothing that goes
    wrong here hurts the run: then each trial trains its own.
    """
    key = probe_key(plan)
    first = plan.recipe.phases[0]
    try:
        if key is None or search.children(f"{FOLDER}/{key}"):
            return True
        with search.scratch() as folder:
            # A copy that was held against its manifest: the run itself may write the next one under that name.
            run.storage.fetch(f"{run.name}/{checkpoint_name(first.num_steps)}", folder / key)
            if json.loads((folder / key / STATE_FILE).read_text(encoding="utf-8"))["phase"]:
                return True  # it is the next phase's first one, which has its place, and what was decided
            lines = [line for line in run.metrics if line.get("epoch", 0) <= first.epochs]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / key / _EPOCHS).write_text(text, encoding="utf-8")
            if not search.children(f"{FOLDER}/{key}"):  # another trial's, which somebody may be reading
                search.commit(folder / key, f"{FOLDER}/{key}")
    except (OrchestratorError, OSError, ValueError) as error:
        return getattr(error, "reason", "") != "not_found"
    return True


def begin_behind_probe(held: HeldRun, plan: Plan, search: str) -> None:
    """Give a run that has not begun the checkpoint of a probe like its own, if there is one."""
    key = probe_key(plan)
    if key is None:
        return
    try:
        with held.storage.opened(f"{search}/{FOLDER}/{key}") as source:
            if not (source / _EPOCHS).is_file():  # of an earlier version
                return
            # Lines without a checkpoint are dropped when the run begins, so they come first.
            held.write(METRICS_FILE, (source / _EPOCHS).read_text(encoding="utf-8"))
            with held.committing(checkpoint_name(plan.recipe.phases[0].num_steps)) as folder:
                _copy(source, folder)
    except (RefusedError, OSError) as error:  # it trains its own
        if held.storage.has_failed(error):
            raise


def _copy(source: Path, folder: Path) -> None:
    """The files of a checkpoint."""
    for file in source.iterdir():
        if file.name != _EPOCHS and not file.name.startswith("."):
            shutil.copy(file, folder)
