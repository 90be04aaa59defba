"""What one worker does, stage after stage: what stands before the first step, training, evaluation, export.

The same in this process and in each process of a Ray cluster; phase.py has the steps.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from orchestrator.errors import InterruptedRunError, OrchestratorError
from orchestrator.features import MakeRemoteExtractor, Source, make_mix, run_body_once
from orchestrator.job import SPLITS, Event, Noted, PhaseBegan, Report
from orchestrator.network import Replicated, Worker, adapt
from orchestrator.tasks import make_objective
from orchestrator.training import checkpoint as ckpt
from orchestrator.training.assembly import WorkerSpec, assembled
from orchestrator.training.audit import Audit
from orchestrator.training.batches import BatchLoader
from orchestrator.training.finish import evaluate_splits, export_run
from orchestrator.training.fitted import can_be_fitted
from orchestrator.training.outbox import Outbox
from orchestrator.training.phase import PhaseLoop
from orchestrator.training.record import Record, write_lineage
from orchestrator.training.refit import begin_refit, first_weights
from orchestrator.training.state import Session, TrainState


def run_worker(
    spec: WorkerSpec, worker: Worker, report: Report, should_stop: Callable[[], bool],
    extractors: MakeRemoteExtractor | None = None,
) -> None:  # fmt: skip
    """Train as the plan says, and leave the finished run in its directory.

    `report` is called with what happens, by the worker of rank 0 alone; `should_stop` is asked after each step, by all.
    `extractors`: what has other processes run a frozen body. Raises `InterruptedRunError` once all have stopped.
    """
    started = time.monotonic()
    with ExitStack() as resources:
        session = _prepare(
            spec, worker, report if worker.rank == 0 else _silence, should_stop, extractors, started, resources
        )
        trained = train(session)
        evaluated = evaluate_splits(session)
        export_run(session, trained, evaluated)


def _silence(_event: Event) -> None:
    pass


# --- what stands before the first step ---


def _prepare(
    spec: WorkerSpec, worker: Worker, report: Report, should_stop: Callable[[], bool],
    extractors: MakeRemoteExtractor | None, started: float, resources: ExitStack,
) -> Session:  # fmt: skip
    plan, run = spec.read_plan(), spec.held_run()
    modality = spec.find_modality(plan)
    report(PhaseBegan("loading the backbone"))
    network, raw = assembled(plan, run, worker, modality, resources, lambda text: report(Noted(text)), should_stop)
    if plan.recipe.adapter is not None:
        adapt(network, plan.recipe.adapter, plan.job.training.seed)
    strategy = Replicated(network, worker)
    strategy.broadcast_new()  # what began at random is rank 0's on all
    sources: dict[str, dict[str, Source]] = {"samples": dict.fromkeys(SPLITS, raw)}
    forwards: dict[str, Any] = {"samples": network.logits}
    lineage: Mapping[str, Any] = {"features": "every step"}
    if plan.recipe.needs_features:
        features, lineage = run_body_once(
            plan, run, network, modality, raw, worker, report, should_stop, resources,
            verify=spec.verify_content, extractors=extractors,
        )  # fmt: skip
        if features is not None:
            sources["features"], forwards["features"] = dict(features.sources), features.forward
    if worker.rank == 0:
        write_lineage(run, plan, network, worker, lineage)
    return Session(
        plan=plan, run=run, worker=worker, network=network, strategy=strategy, objective=make_objective(plan, network),
        samples=raw.samples, raw=raw, sources=sources, forwards=forwards,
        loader=BatchLoader(worker.device, resources), length_bucketing=modality.length_bucketing,
        mix=make_mix(plan, modality),
        report=report, should_stop=should_stop, started=started,
    )  # fmt: skip


# --- the phases ---


def train(session: Session) -> TrainState:
    """All phases, each from the best weights of the one before; where the run stands then, at the end of the last one.

    The best weights of all are in the network afterwards. Raises `InterruptedRunError` on all workers if asked to stop.
    """
    resumed = _newest_checkpoint(session)
    best: ckpt.Tensors = {}
    if resumed is not None:
        session.state = TrainState.restored(resumed.state, session.plan.recipe)
        recipe = session.state.recipe(session.plan.recipe)
        session.plan = session.plan.model_copy(update={"recipe": recipe})
        session.raw.skipped.update({int(row): why for row, why in session.state.skipped.items()})
        best = resumed.best
        steps = session.state.steps_done(recipe)
        session.report(Noted(f"going on from step {steps} of {recipe.num_steps}"))
    if session.worker.rank == 0:
        session.outbox = Outbox(session.run, session.report, session.should_stop)
        session.record = Record(session.run, session.state.num_epochs_ended(session.plan.recipe), session.outbox)
    if session.plan.job.training.audit:
        session.audit = Audit(session.run, session.worker, session.state.steps_done(session.plan.recipe))
    session.saved_at = time.monotonic()
    initial = first_weights(session)
    try:
        for number in range(session.state.phase, len(session.plan.recipe.phases)):
            if number > session.state.phase:
                session.state.phase, session.state.step, session.state.epochs_ended = number, 0, 0
            if session.phase.refits and begin_refit(session, initial):
                best = {}
            if session.phase.solver == "probe" and not can_be_fitted(session):
                num = session.phase.epochs_in_steps
                session.report(Noted(f"the head is not one linear layer on stored features: trained in {num} epochs"))
                session.decide(number, solver="steps", epochs=num, num_steps=num * session.plan.recipe.steps_per_epoch)
            if session.phase.loss == "contrastive" and not can_be_fitted(session):
                session.report(Noted("the head is not one linear layer on features: trained by the task's loss"))
                session.decide(number, loss="task")
            best = PhaseLoop(session, best, resumed).run()
            resumed = None
        _settle(session)
    except InterruptedRunError:
        _settle(session)  # it goes on from there once that is on the storage
        raise
    except Exception:
        with contextlib.suppress(OrchestratorError):  # of what ended it, the epochs before tell
            _settle(session)
        raise
    except BaseException:  # a second Ctrl-C does not wait
        if session.outbox is not None:
            session.outbox.drop()
        raise
    return session.state


def _settle(session: Session) -> None:
    """Return once all that was given to the storage is there."""
    if session.record is not None:
        session.record.settle()


def _newest_checkpoint(session: Session) -> ckpt.Checkpoint | None:
    """The one that rank 0 chose, on all workers; what lies beyond it is removed, before another one is written."""
    run, worker = session.run, session.worker

    def note(text: str) -> None:
        session.report(Noted(text, is_warning=True))

    step: int | None = worker.all_gather(ckpt.newest_step(run, note) if worker.rank == 0 else None)[0]
    checkpoint = None if step is None else ckpt.load(run, step)
    worker.barrier()  # nobody removes what another one is still reading
    if worker.rank == 0:
        ckpt.forget_after(run, step)
    return checkpoint
