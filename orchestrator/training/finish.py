"""The stages behind the last step: figures of the best weights, the exported model, and results.json, the last file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import InterruptedRunError, OrchestratorError, counted
from orchestrator.job import METRICS_FILE, Noted, PhaseBegan, read_lines
from orchestrator.network import merge
from orchestrator.tasks import Predictions, compute_metrics, fold_target_scale, what_was_chosen
from orchestrator.training.convergence import find_problems
from orchestrator.training.evaluate import predict_split
from orchestrator.training.export import export
from orchestrator.training.record import write_skipped
from orchestrator.training.state import Session, TrainState

_COMPARED = 16
FINAL_FIGURES = "final figures"
"""What is told when all is trained, and the test split not read yet; who stops a run here has its last checkpoint."""


@dataclass(frozen=True)
class Evaluated:
    """What the stage `evaluate` gives, on all workers."""

    figures: Mapping[str, Mapping[str, Any]]
    """Split -> its figures; splits without samples are left out."""
    skipped: Mapping[int, str]
    """Row of the sample table -> why it could not be read, of all workers and since the run began."""


def evaluate_splits(session: Session) -> Evaluated:
    """The figures of validation and test split, of the weights that the network has.

    Called by all workers; raises `InterruptedRunError` on all if asked to stop.
    """
    session.report(PhaseBegan(FINAL_FIGURES))
    predictions: dict[str, Predictions] = {}
    for split in ("validation", "test"):
        one = predict_split(session, split)
        if one is None:
            raise InterruptedRunError("stopped before the final figures", mend="the same command goes on from there")
        if len(one.rows):
            predictions[split] = one
    task, classes = session.plan.job.task, session.plan.classes
    skipped = dict(skip for part in session.worker.all_gather(session.raw.skipped) for skip in part.items())
    figures = {}
    if session.worker.rank == 0:
        figures = {split: compute_metrics(task, one, classes) for split, one in predictions.items()}
    return Evaluated(session.worker.all_gather(figures)[0], dict(sorted(skipped.items())))


def export_run(session: Session, trained: TrainState, evaluated: Evaluated) -> None:
    """Commit the model, and write results.json, which says that the run is done. Called by all workers."""
    run, plan = session.run, session.plan
    if plan.recipe.adapter is not None:
        merge(session.network)
    fold_target_scale(session.objective, session.network)  # on all workers: what is gathered is what is exported
    state_dict = session.strategy.full_state()
    if state_dict is None:
        return
    lines = read_lines(run.read(METRICS_FILE))
    in_steps = [line for line in lines if "learning_rate" in line]  # a probe's loss is as low as it gets at once
    places = {session.samples.place(row): why for row, why in evaluated.skipped.items()}
    write_skipped(run, places)
    results: dict[str, Any] = {
        "name": plan.name,
        "task": plan.job.task,
        "method": plan.job.method,
        "backbone": plan.backbone.source,
        "num_train": plan.data.num_samples["train"],
        "epochs": len(lines),
        "best_epoch": trained.best_epoch,
        "num_epochs": plan.recipe.num_epochs,
        **({"averaged": trained.best_is_average} if plan.job.training.ema is not None else {}),
        "num_skipped": plan.data.num_skipped + len(evaluated.skipped),
        "seconds": round(session.seconds(), 3),
        **evaluated.figures,
        "warnings": [str(one) for one in find_problems(plan, in_steps, evaluated.figures, lambda: _are_alike(session))],
    }
    first = [phase for phase in plan.recipe.phases if not phase.refits]
    candidates = [one for i in range(len(first)) if (one := trained.candidates.get(str(i))) is not None]
    best = trained.chosen_epoch if trained.chosen_epoch > 0 else trained.best_epoch
    chosen = what_was_chosen(plan, best, candidates, trained.comparison)
    if chosen is not None:
        results["chosen"], results["why"] = chosen
    if trained.chosen_epoch > 0:
        results["refitted"] = (
            f"after {counted(best, 'epoch')} again on {len(session.samples.rows('train')):,} samples, "
        )
        results["refitted"] += "those of the validation among them"
    session.report(PhaseBegan("writing the model"))
    lineage = json.loads(run.read("lineage.json") or "{}")
    lineage |= {"candidates": candidates, "comparison": trained.comparison, "decided": trained.decided}
    if trained.chosen_epoch > 0:
        lineage["chosen_epoch"] = trained.chosen_epoch
    run.write("lineage.json", json.dumps(lineage, indent=1, ensure_ascii=False))
    export(session.network, state_dict, plan, results, lineage, run)
    run.delete("features")  # those that were kept for this run alone
    results["seconds"] = round(session.seconds(), 3)
    run.write("results.json", json.dumps(results, indent=1, ensure_ascii=False))
    run.collect_orphans(older_s=0)
    for warning in results["warnings"]:
        session.report(Noted(warning, is_warning=True))


def _are_alike(session: Session) -> bool:
    """Whether some training samples are one and the same once they are the network's input."""
    with contextlib.suppress(OrchestratorError):  # those of stored features may be gone by now
        batch = session.raw.batch(session.samples.rows("train")[:_COMPARED], train=False)
        if batch is not None and len(batch.rows) > 1:
            return all(bool((tensor == tensor[:1]).all()) for tensor in batch.inputs.values())
    return False
