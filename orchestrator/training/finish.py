"""What stands behind the last step: final figures, the exported model, and results.json, which says that it is done."""

from __future__ import annotations

import json
import shutil
from typing import Any

from orchestrator.errors import InterruptedRunError
from orchestrator.job import PhaseBegan, write_file
from orchestrator.training.evaluate import predict_split
from orchestrator.training.export import export
from orchestrator.training.metrics import measure
from orchestrator.training.objective import fold
from orchestrator.training.record import write_skipped
from orchestrator.training.state import Session


def finish(session: Session) -> None:
    """Measure, export, and write the results; called by all workers. Raises `InterruptedRunError` if asked to stop."""
    plan, state = session.plan, session.state
    session.report(PhaseBegan("final figures"))
    predictions = {split: predict_split(session, split) for split in ("validation", "test")}
    if None in predictions.values():
        raise InterruptedRunError("stopped before the final figures", mend="the same command goes on from there")
    skips = dict(skip for part in session.worker.gather(session.raw.skipped) for skip in part.items())
    fold(session.objective, session.network)  # on all workers: what is gathered is what is exported
    state_dict = session.strategy.gather()
    if state_dict is None:
        return
    write_skipped(session.run, {session.samples.place(row): why for row, why in sorted(skips.items())})
    results: dict[str, Any] = {
        "name": plan.name,
        "task": plan.job.task,
        "method": plan.job.method,
        "backbone": plan.backbone.source,
        "num_train": plan.data.num_samples["train"],
        "best_epoch": state.best_epoch,
        "num_skipped": plan.data.num_skipped + len(skips),
        "seconds": round(session.seconds(), 3),
    }
    for split, one in predictions.items():
        if one is not None and len(one.rows):
            results[split] = measure(plan.job.task, one, plan.classes)
    session.report(PhaseBegan("writing the model"))
    lineage = json.loads((session.run / "lineage.json").read_text(encoding="utf-8"))
    export(session.network, state_dict, plan, results, lineage, session.run / "model")
    shutil.rmtree(session.run / "features", ignore_errors=True)
    results["seconds"] = round(session.seconds(), 3)
    write_file(session.run / "results.json", json.dumps(results, indent=1, ensure_ascii=False))
