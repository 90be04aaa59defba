"""What one worker does, top to bottom. The same in this process and in each process of a Ray cluster.

A step's batch is a fixed list of logical microbatches, whatever the number of workers; each worker computes its
share of them one after the other, and the gradients are added up. What is random depends on (seed, step,
microbatch) alone, the order of the samples on (seed, epoch). So 1 and 8 workers learn the same thing, and a run
that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator.data import Samples
from orchestrator.errors import InterruptedRunError, TrainingError
from orchestrator.features import FeatureSource, MakeRemoteExtractor, SampleSource, Source, run_body_once, split_evenly
from orchestrator.job import SPLITS, Advanced, EpochEnded, Event, Noted, PhaseBegan, Plan, Report, write_file
from orchestrator.network import (
    Inputs,
    MicrobatchStatistics,
    Network,
    Replicated,
    Worker,
    autocast,
    channels_last,
    make_optimizer,
    seed_for,
    set_mode,
)
from orchestrator.training import checkpoint as ckpt
from orchestrator.training.assembly import WorkerSpec, assembled
from orchestrator.training.export import export
from orchestrator.training.metrics import Predictions, measure
from orchestrator.training.objective import Objective, fold, make_objective
from orchestrator.training.record import add_epoch, cut_metrics, write_lineage

_BUCKET_STEPS = 32
_ORDER, _STEP = 1, 2  # what a random number is for

Ints = npt.NDArray[np.int64]


@dataclass
class TrainState:
    """Where a run stands. JSON, in every checkpoint."""

    step: int = 0
    epoch_loss: float = 0.0
    epoch_correct: float = 0.0
    epoch_samples: float = 0.0
    epoch_weight: float = 0.0
    best_epoch: int = -1
    best_loss: float = math.inf
    best_accuracy: float = -1.0
    """0 where the task has no accuracy: then the loss alone decides."""
    seconds: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass
class Session:
    """What this worker holds while it works."""

    plan: Plan
    run: Path
    worker: Worker
    network: Network
    objective: Objective
    forward: Callable[[Inputs], Tensor]
    train: Source
    validation: Source
    test: Source
    samples: Samples
    length_bucketing: bool
    raw: SampleSource
    report: Report
    should_stop: Callable[[], bool]
    started: float
    state: TrainState = field(default_factory=TrainState)
    saved_at: float = 0.0

    def seconds(self) -> float:
        """Of work on this run, those of earlier processes included."""
        return self.state.seconds + time.monotonic() - self.started


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
        _train(session)
        _finish(session)


def _silence(_event: Event) -> None:
    pass


# --- what stands before the first step ---


def _prepare(
    spec: WorkerSpec, worker: Worker, report: Report, should_stop: Callable[[], bool],
    extractors: MakeRemoteExtractor | None, started: float, resources: ExitStack,
) -> Session:  # fmt: skip
    plan, run = spec.read_plan(), Path(spec.run)
    modality = spec.find_modality(plan)
    report(PhaseBegan("loading the backbone"))
    network, raw = assembled(plan, run, worker, modality, resources)
    samples = raw.samples
    lineage: dict[str, Any] = {"features": plan.features}
    session = Session(
        plan=plan, run=run, worker=worker, network=network, objective=make_objective(plan, network),
        forward=network.logits, length_bucketing=modality.length_bucketing,
        train=raw, validation=raw, test=raw, samples=samples, raw=raw, report=report,
        should_stop=should_stop, started=started,
    )  # fmt: skip
    if plan.features == "once":
        once, found = run_body_once(
            plan, run, network, modality, raw, worker, report, should_stop, resources,
            verify=spec.verify_content, extractors=extractors,
        )  # fmt: skip
        lineage |= found
        if once is not None:
            session.forward = once.forward
            session.train, session.validation, session.test = (once.sources[name] for name in SPLITS)
    if worker.rank == 0:
        write_lineage(run, plan, network, worker, lineage)
    return session


# --- the loop ---


def _train(session: Session) -> None:
    plan, schedule, worker, state = session.plan, session.plan.schedule, session.worker, session.state
    optimizer, named = make_optimizer(session.network, plan)
    mine = ckpt.trained_tensors(session.network.module, session.network.head if plan.job.method == "head" else ("",))
    rows = session.samples.rows("train")
    best: ckpt.Tensors = {}
    found = ckpt.newest(session.run / "checkpoints")
    if found is not None:
        ckpt.load_into(found.weights, mine)
        ckpt.restore_optimizer(optimizer, named, found.optimizer)
        best = found.best
        found.state.pop("step")
        session.state = state = TrainState(step=found.step, **found.state)
        session.raw.skipped.update({int(row): why for row, why in state.skipped.items()})
        session.report(Noted(f"going on from step {found.step} of {schedule.num_steps}"))
    worker.barrier()  # nobody prunes a checkpoint that another one is still reading
    if worker.rank == 0:
        cut_metrics(session.run, state.step)
    session.saved_at = time.monotonic()
    session.report(
        PhaseBegan(
            f"training {'the head' if plan.job.method == 'head' else 'everything'}", schedule.num_steps, state.step,
            "steps", len(rows) / schedule.steps_per_epoch,
        )
    )  # fmt: skip
    order_of, batches = -1, [rows]
    epoch_started = time.monotonic()
    while state.step < schedule.num_steps:
        epoch, within = divmod(state.step, schedule.steps_per_epoch)
        if epoch != order_of:
            order_of, batches = epoch, _batches(session, rows, epoch)
            if isinstance(session.train, FeatureSource):
                session.train.epoch = epoch
            set_mode(session.network, plan, training=True)  # only an epoch's evaluation changes it
        stop = _step(session, optimizer, named, batches[within])
        state.step += 1
        session.report(Advanced(1))
        if within + 1 == schedule.steps_per_epoch:
            better = _end_epoch(session, epoch, time.monotonic() - epoch_started)
            if better:
                best = ckpt.copy_of(mine)
            epoch_started = time.monotonic()
        last = state.step == schedule.num_steps
        if worker.rank == 0 and (last or stop or _checkpoint_due(session)):
            _save(session, mine, best, ckpt.optimizer_tensors(optimizer, named))
        if stop and not last:
            worker.barrier()
            raise InterruptedRunError(
                f"stopped at step {state.step} of {schedule.num_steps}",
                mend="the same command goes on from there",
            )
    ckpt.load_into({name: tensor.to(mine[name].device) for name, tensor in best.items()}, mine)


def _batches(session: Session, rows: Ints, epoch: int) -> list[Ints]:
    """The rows of each step of an epoch: a permutation, and, where samples differ in length, like lengths together.

    Those are sorted among a quarter of the epoch at most: length often tells the class, and batches of one class
    each learn badly. A frozen body, whose features have one length, has no use for it.
    """
    random = np.random.default_rng((_ORDER, session.plan.job.training.seed, epoch))
    order = rows[random.permutation(len(rows))]
    num = session.plan.schedule.steps_per_epoch
    batches = [split_evenly(order, number, num) for number in range(num)]
    together = min(_BUCKET_STEPS, num // 4)
    if not session.length_bucketing or session.plan.job.method == "head" or together < 2:
        return batches
    for start in range(0, num, together):
        window = batches[start : start + together]
        ordered = session.samples.order_by_length(np.concatenate(window))
        batches[start : start + together] = np.split(ordered, np.cumsum([len(one) for one in window])[:-1])
    return [batches[i] for i in random.permutation(num)]


def _step(session: Session, optimizer: torch.optim.Optimizer, named: dict[str, torch.nn.Parameter], rows: Ints) -> bool:
    """One optimizer step over all microbatches of a batch; whether somebody asked to stop."""
    plan, worker, state = session.plan, session.worker, session.state
    num_microbatches = plan.schedule.num_microbatches
    statistics = MicrobatchStatistics(session.network.module, worker, num_microbatches)
    totals = torch.zeros(5, dtype=torch.float64)
    for microbatch in range(worker.rank, num_microbatches, worker.num_workers):
        seed_for(_STEP, plan.job.training.seed, state.step, microbatch)
        batch = session.train.batch(split_evenly(rows, microbatch, num_microbatches), train=True)
        if batch is None:
            continue
        batch = batch.to(worker.device)
        with statistics.of(microbatch):
            with autocast(plan, worker):
                logits = session.forward(channels_last(batch.inputs))
            loss, weight = session.objective.loss(logits.float(), batch.targets)
            loss.backward()  # type: ignore[no-untyped-call]
        num_right = session.objective.num_right(logits.detach(), batch.targets)
        totals += torch.tensor([loss.item(), weight, num_right, len(batch.rows), 0.0], dtype=torch.float64)
    totals[4] = float(session.should_stop())
    totals = worker.all_reduce_sum(totals.to(worker.device if worker.device.type == "cuda" else "cpu")).cpu()
    loss_sum, weight, num_right, num_samples, stops = totals.tolist()
    if not math.isfinite(loss_sum):
        raise TrainingError(
            f"the loss is {loss_sum} at step {state.step}",
            expected="a finite loss",
            mend="lower training.learning_rate, and start over with --fresh",
        )
    if weight:
        parameters = list(named.values())
        with Replicated(session.network, worker).reduction(parameters) as reduction:
            reduction.finish(1.0 / weight)
        if plan.job.training.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, plan.job.training.clip_norm)
        factor = _rate_factor(plan, state.step)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        statistics.average()
    state.epoch_loss += loss_sum
    state.epoch_correct += num_right
    state.epoch_samples += num_samples
    state.epoch_weight += weight
    return bool(stops > 0)


def _rate_factor(plan: Plan, step: int) -> float:
    """Linear warm-up from 0, then cosine to 0 (Loshchilov & Hutter 2017, arXiv 1608.03983) or constant."""
    training, total = plan.job.training, plan.schedule.num_steps
    warmup = round(training.warmup_fraction * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if training.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _end_epoch(session: Session, epoch: int, seconds: float) -> bool:
    """Evaluate, write the epoch's line; whether it is the best so far."""
    state, plan = session.state, session.plan
    num_samples = max(1.0, state.epoch_samples)
    line: dict[str, Any] = {
        "epoch": epoch + 1,
        "step": state.step,
        "train_loss": state.epoch_loss / (state.epoch_weight or 1.0),
        "train_accuracy": state.epoch_correct / num_samples,
        "learning_rate": plan.schedule.head_learning_rate * _rate_factor(plan, state.step - 1),
        "seconds": round(session.seconds(), 3),
        "samples_per_s": round(num_samples / max(seconds, 1e-9), 1),
    }
    state.epoch_loss = state.epoch_correct = state.epoch_samples = state.epoch_weight = 0.0
    accurate = plan.job.task != "regression"
    if not accurate:
        del line["train_accuracy"]
    found = _predict(session, session.validation, session.samples.rows("validation"))
    if len(found.rows):
        line["validation_loss"] = float(found.loss.mean())
        if accurate:
            right = found.predicted == found.targets
            line["validation_accuracy"] = float((right if right.ndim == 1 else right.all(axis=1)).mean())
        # The most right; of equals the surest. Small validation sets have many equals, and with several labels a
        # sample hardly any is wholly right at first: there the loss decides.
        accuracy = line["validation_accuracy"] if plan.job.task == "single-label" else 0.0
        better = (accuracy, -line["validation_loss"]) > (state.best_accuracy, -state.best_loss)
    else:
        better = True
    if better:
        state.best_epoch = epoch + 1
        state.best_accuracy = accuracy if len(found.rows) else -1.0
        state.best_loss = line.get("validation_loss", math.inf)
    if session.worker.rank == 0:
        add_epoch(session.run, line)
    session.report(EpochEnded(line, plan.schedule.epochs, plan.job.task))
    return better


def _predict(session: Session, source: Source, rows: Ints) -> Predictions:
    """What the network says of a split's samples; each worker does its share and gets all."""
    worker = session.worker
    set_mode(session.network, session.plan, training=False)
    mine = split_evenly(rows, worker.rank, worker.num_workers)
    if session.length_bucketing:
        mine = session.samples.order_by_length(mine)
    parts = []
    for some in session.samples.batches(mine):
        batch = source.batch(some, train=False)
        if batch is None:
            continue
        outputs = evaluate_batch(session.forward, batch.to(worker.device).inputs)
        parts.append(session.objective.columns(batch.rows, outputs, batch.targets, len(rows)))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else None
    gathered = [columns for columns in worker.gather(columns) if columns is not None]
    if not gathered:
        empty = np.zeros(0, np.int64)
        return Predictions(empty, empty, empty, np.zeros((0, 0), np.float32), np.zeros(0, np.float32))
    return Predictions(*(np.concatenate(column) for column in zip(*gathered, strict=True)))


def evaluate_batch(forward: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
    """float32 [samples, classes], on the CPU."""
    with torch.no_grad():
        return forward(channels_last(inputs)).float().cpu()


def _checkpoint_due(session: Session) -> bool:
    training = session.plan.job.training
    every = training.checkpoint_every_steps
    if every is not None:
        return session.state.step % every == 0
    return time.monotonic() - session.saved_at > training.checkpoint_every_s


def _save(session: Session, mine: ckpt.Tensors, best: ckpt.Tensors, optimizer: ckpt.Tensors) -> None:
    entries = {
        **session.state.__dict__,
        "seconds": session.seconds(),
        "skipped": {str(row): why for row, why in session.raw.skipped.items()},
    }
    ckpt.save(session.run / "checkpoints", ckpt.Checkpoint(session.state.step, mine, best, optimizer, entries))
    session.saved_at = time.monotonic()


# --- what stands behind the last step ---


def _finish(session: Session) -> None:
    """Final figures, the exported model, and results.json, which says that the run is done."""
    plan, state = session.plan, session.state
    session.report(PhaseBegan("final figures"))
    splits = {name: getattr(session, name) for name in ("validation", "test")}
    found = {name: _predict(session, source, session.samples.rows(name)) for name, source in splits.items()}
    skips = [skip for part in session.worker.gather(session.raw.skipped) for skip in part.items()]
    if session.worker.rank != 0:
        return
    if skips:
        with (session.run / "skipped.jsonl").open("a", encoding="utf-8") as file:
            for row, why in sorted(dict(skips).items()):
                place = session.samples.place(row)
                file.write(json.dumps({"place": place, "problem": why}, ensure_ascii=False) + "\n")
    results: dict[str, Any] = {
        "name": plan.name,
        "task": plan.job.task,
        "method": plan.job.method,
        "backbone": plan.backbone.source,
        "num_train": plan.data.num_samples["train"],
        "best_epoch": state.best_epoch,
        "num_skipped": plan.data.num_skipped + len(dict(skips)),
        "seconds": round(session.seconds(), 3),
    }
    for name, predictions in found.items():
        if len(predictions.rows):
            results[name] = measure(plan.job.task, predictions, plan.classes)
    session.report(PhaseBegan("writing the model"))
    lineage = json.loads((session.run / "lineage.json").read_text(encoding="utf-8"))
    fold(session.objective, session.network)
    export(session.network, plan, results, lineage, session.run / "model")
    shutil.rmtree(session.run / "features", ignore_errors=True)
    results["seconds"] = round(session.seconds(), 3)
    write_file(session.run / "results.json", json.dumps(results, indent=1, ensure_ascii=False))
