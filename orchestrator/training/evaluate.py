"""What a network says of a split: each worker does its share, and all get all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator.data import Ints
from orchestrator.features import Batch, Source, split_evenly
from orchestrator.job import Phase
from orchestrator.network import Inputs, autocast, channels_last, set_mode
from orchestrator.tasks import Predictions
from orchestrator.training.rates import rate_factor
from orchestrator.training.state import Session


def predict_split(session: Session, split: str) -> Predictions | None:
    """The predictions for a split's samples, on all workers; None if somebody asked to stop meanwhile."""
    rows = session.samples.rows(split)

    def fields_of(batch: Batch) -> list[Any]:
        outputs = evaluate_batch(session.forward, batch.inputs, autocast(session.plan, session.worker))
        return session.objective.prediction_fields(batch.rows, outputs, batch.targets, len(rows))

    columns = columns_of(session, rows, session.source(split), fields_of)
    if columns is None:
        return None
    if not columns:
        empty = np.zeros(0, np.int64)
        return Predictions(empty, empty, empty, np.zeros((0, 0), np.float32), np.zeros(0, np.float32))
    return Predictions(*columns)


def columns_of(
    session: Session, rows: Ints, source: Source, fields_of: Callable[[Batch], Sequence[npt.NDArray[Any]]]
) -> list[npt.NDArray[Any]] | None:
    """What `fields_of` gives for the samples, arrays of one entry each, put together: on all workers; all call this.

    Each worker reads its share, with the network as for evaluation. [] where no sample can be read; None if somebody
    asked to stop meanwhile.
    """
    worker = session.worker
    set_mode(session.network, session.phase, training=False)
    own_rows = split_evenly(rows, worker.rank, worker.num_workers)
    if session.length_bucketing:
        own_rows = session.samples.order_by_length(own_rows)
    parts, stopped = [], False
    for batch in session.loader.each(source, session.samples.batches(own_rows)):
        stopped = session.should_stop()
        if stopped:
            break
        if batch is not None:
            parts.append(fields_of(batch))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else None
    gathered = worker.all_gather((columns, stopped))
    if any(stopped for _, stopped in gathered):
        return None
    there = [columns for columns, _ in gathered if columns is not None]
    return [np.concatenate(column) for column in zip(*there, strict=True)]


def evaluate_batch(
    forward: Callable[[Inputs], Tensor], inputs: Inputs, precision: AbstractContextManager[Any]
) -> Tensor:
    """float32 [samples, classes], on the CPU. `precision`: that of training, so that both see the same network."""
    with torch.no_grad(), precision:
        return forward(channels_last(inputs)).float().cpu()


def epoch_figures(task: str, predictions: Predictions) -> dict[str, float]:
    """`validation_loss` and, where the task has such a thing, `validation_accuracy`; {} without samples."""
    if not len(predictions.rows):
        return {}
    figures = {"validation_loss": float(predictions.loss.mean())}
    if task != "regression":
        right = predictions.predicted == predictions.targets
        figures["validation_accuracy"] = float((right if right.ndim == 1 else right.all(axis=1)).mean())
    return figures


def epoch_line(session: Session, phase: Phase, predictions: Predictions, samples_per_s: float) -> dict[str, Any]:
    """What metrics.jsonl has of the epoch that ends; `predictions`: of the validation split."""
    state, plan = session.state, session.plan
    line: dict[str, Any] = {
        "epoch": state.num_epochs_ended(plan.recipe) + 1,
        "step": state.steps_done(plan.recipe),
        "train_loss": state.epoch_loss / (state.epoch_weight or 1.0),
        "train_accuracy": state.epoch_correct / max(1.0, state.epoch_samples),
        "learning_rate": phase.highest_rate * rate_factor(plan, phase.num_steps, state.step - 1),
        "seconds": round(session.seconds(), 3),
        "samples_per_s": round(samples_per_s, 1),
    }
    if plan.job.task == "regression" or not state.epoch_samples:
        del line["train_accuracy"]
    if phase.solver == "probe":
        del line["learning_rate"]
    return line | epoch_figures(plan.job.task, predictions)
