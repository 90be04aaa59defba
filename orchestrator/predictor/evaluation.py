"""Figures of a finished run on labelled data."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from orchestrator.data import (
    LEAVE_OUT,
    Ints,
    Samples,
    columns_of,
    formed_as_run,
    input_columns,
    label_columns,
    num_seen,
    prepare_data,
)
from orchestrator.errors import DataError, TrainingError, fault_of_sample
from orchestrator.features import SampleSource
from orchestrator.gate import drafted, materialised
from orchestrator.job import DATA_FOLDER, Data, Plan, Run, shown
from orchestrator.tasks import Predictions, compute_metrics
from orchestrator.training import LoadedRun, load_run


def evaluate(run: Run | str | Path, labelled: str | Path | Data | Iterable[Any]) -> dict[str, Any]:
    """The figures of a finished run on labelled data: a place, a `Data`, or rows.

    They are a dict, with the keys that the splits have in results.json, so that both can be compared and written as
    JSON; beside them `task`, `num_seen` (samples that the run was trained on; None if nothing tells), `num_skipped` and
    `notes`.

    All of the data counts, but where it comes with a test split: then that alone. Columns that are not named are those
    of the run, where the table has them.

    Raises `DataError` for a label that the model never learnt.
    """
    with ExitStack() as resources, TemporaryDirectory() as folder:
        loaded = load_run(run, resources)
        pool = resources.enter_context(ThreadPoolExecutor(max_workers=loaded.plan.threads_per_worker))
        task, classes = loaded.plan.job.task, loaded.plan.classes
        spec, notes = _as_the_run(_data(labelled, Path(folder)), loaded.plan)
        prepared = prepare_data(spec, loaded.modality, loaded.plan.backbone, task, classes, Path(folder))
        samples = Samples(Path(folder), loaded.fields)
        source = SampleSource(samples, loaded.decode, loaded.collate, spec.on_bad_sample == "skip", pool)
        predictions = _predictions(loaded, source)
        if predictions is None:
            raise DataError(
                f"{shown(spec.path)} holds no sample that can be read", mend="mend the data, or name other data"
            )
        every = np.arange(len(samples.targets))
        seen = num_seen(loaded.run, samples, every, loaded.fields, "train", "validation")
        if seen is None:
            notes.append("the run has no sample table of this version: nothing tells whether it was trained on these")
        return {
            "task": task,
            **compute_metrics(task, predictions, classes),
            "num_seen": seen,
            "num_skipped": len(prepared.skipped) + len(source.skipped),
            "notes": [*notes, *prepared.summary.warnings, *prepared.summary.notes],
        }


def _predictions(loaded: LoadedRun, source: SampleSource) -> Predictions | None:
    """For all samples of the source that can be read, None if there is none."""
    samples = source.samples
    rows = np.arange(len(samples.targets))
    if loaded.modality.length_bucketing:
        rows = samples.order_by_length(rows)
    parts = []
    for some in samples.batches(rows):
        try:
            parts += _columns(loaded, source, some, len(rows))
        except TrainingError as error:
            raise DataError(error.message, mend=f"mend or remove it, or {LEAVE_OUT}") from None
    return Predictions(*(np.concatenate(column) for column in zip(*parts, strict=True))) if parts else None


def _columns(loaded: LoadedRun, source: SampleSource, rows: Ints, num_rows: int) -> list[list[Any]]:
    """The columns of `Predictions` for these rows, a batch or several: where they fail together, each is tried alone.

    Raises `TrainingError` for one that the network cannot take, unless such are left out.
    """
    try:
        batch = source.batch(rows, train=False)
        if batch is None:
            return []
        return [loaded.objective.prediction_fields(batch.rows, loaded.outputs(batch.inputs), batch.targets, num_rows)]
    except Exception as error:
        fault = fault_of_sample(error)
        if fault is None:
            raise
    if len(rows) == 1:
        source.leave_out(int(rows[0]), fault)
        return []
    return [part for row in rows for part in _columns(loaded, source, row[None], num_rows)]


def _data(labelled: str | Path | Data | Iterable[Any], folder: Path) -> Data:
    if isinstance(labelled, Data):
        return labelled
    return materialised(drafted(None, {"backbone": "-", "data": labelled}), folder / DATA_FOLDER).job().data


def _as_the_run(spec: Data, plan: Plan) -> tuple[Data, list[str]]:
    """The data with what the user left open as the run had it, where its tables have that; and notes."""
    run, named = plan.job.data, spec.model_fields_set
    spec, notes = formed_as_run(spec, run)
    columns = columns_of(spec, [*input_columns(run), *label_columns(run)])
    of_the_run: dict[str, Any] = {}
    for key, names in (("input_column", input_columns(run)), ("label_column", label_columns(run))):
        if key not in named and names and all(name in columns for name in names):
            of_the_run[key] = getattr(run, key)
    spec = spec.model_copy(update=of_the_run)
    if plan.job.task == "multi-label" and columns and "label_separator" not in named and len(label_columns(spec)) == 1:
        spec = spec.model_copy(update={"label_separator": run.label_separator})
    if plan.job.task == "regression":
        spec, of_names = _in_order(spec, plan)
        notes += of_names
    return spec, notes


def _in_order(spec: Data, plan: Plan) -> tuple[Data, list[str]]:
    """The data with its columns in the order of the run's targets; a note on those of another name.

    Raises `DataError` where a target's own column stands in the place of another one.
    """
    names, targets = label_columns(spec), plan.classes
    if sorted(names) == sorted(targets):
        return spec.model_copy(update={"label_column": targets}), []
    pairs = [(target, name) for target, name in zip(targets, names, strict=False) if target != name]
    crossed = [(target, name) for target, name in pairs if name in targets]
    if crossed:
        raise DataError(
            f"data.label_column names {', '.join(names)}: {crossed[0][1]!r} would be compared with what the model says "
            f"of {crossed[0][0]!r}",
            expected=f"a column for each target, in this order: {', '.join(targets)}",
            mend="name the columns in the order of the model's targets",
        )
    return spec, [f"the target {target!r} is compared with the column {name!r}" for target, name in pairs]
