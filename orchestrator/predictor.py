"""A finished run on new inputs: predictions for files, figures for labelled data."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import Tensor

from orchestrator.data import (
    LEAVE_OUT,
    Ints,
    Samples,
    columns_of,
    input_columns,
    label_columns,
    prepare_data,
    split_by_size,
    table_of,
)
from orchestrator.errors import BadSampleError, DataError, TrainingError, fault_of_sample
from orchestrator.features import SampleSource
from orchestrator.gate import drafted, materialised
from orchestrator.job import DATA_FOLDER, Data, Plan, Run, shown
from orchestrator.modality import Modality, Sample
from orchestrator.training import LoadedRun, Predictions, load_run, measure

Input = str | Path | bytes | tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """What the model says of one input."""

    input: str
    label: str
    """The class; multi-label: the classes above one half, joined by ' + ', '' if there is none; regression: ''."""
    score: float
    """The probability of the first of `top`; regression: the value of the first target."""
    top: tuple[tuple[str, float], ...]
    """The most probable classes, in falling order; regression: every target with its value."""
    problem: str = ""
    """Why there is no prediction."""


# --- predictions for inputs ---


def predict(run: Run | str | Path, inputs: Iterable[Input] | str | Path | bytes, top: int = 3) -> list[Prediction]:
    """One Prediction for each input: the path of a file, or its bytes; of text the text itself, or a tuple of two.

    A folder stands for all files of the modality's kind below it, in order. An input that cannot be read, or that the
    network cannot take, gets a Prediction with its `problem`, and the others theirs.
    """
    with ExitStack() as resources:
        loaded = load_run(run, resources)
        given: list[Input] = [inputs] if isinstance(inputs, (str, Path, bytes)) else list(inputs)
        asked = [one for some in given for one in _files(some, loaded.modality)]
        sizes = np.array([_num_bytes(one, loaded.modality) for one in asked], np.int64)
        # Like lengths together waste no padding; results come in the order of the inputs all the same.
        order = np.argsort(sizes, kind="stable") if loaded.modality.length_bucketing else np.arange(len(asked))
        outcomes: dict[int, Tensor | str] = {}
        for piece in split_by_size(sizes[order]):
            numbers = order[piece].tolist()
            reads = [partial(_sample, asked[number], loaded.modality) for number in numbers]
            outcomes |= zip(numbers, loaded.outcomes(reads), strict=True)
        return [_prediction(_name(i, one), outcomes[i], loaded.plan, top) for i, one in enumerate(asked)]


def _files(one: Input, modality: Modality) -> list[Input]:
    """The files of a folder that the modality reads; anything else, an empty folder too, as it is."""
    first = modality.sample[0]
    if first.kind != "file" or not isinstance(one, (str, Path)) or not os.path.isdir(one):
        return [one]
    files = [file for file in Path(one).rglob("*") if file.suffix.lower() in first.suffixes and file.is_file()]
    visible = [file for file in files if not any(part.startswith(".") for part in file.relative_to(one).parts)]
    return [*sorted(visible)] or [one]


def _num_bytes(one: Input, modality: Modality) -> int:
    """Of the file, 0 where it cannot be asked; of a text its characters."""
    if isinstance(one, bytes):
        return len(one)
    if modality.sample[0].kind == "text":
        return sum(map(len, one)) if isinstance(one, tuple) else len(str(one))
    try:
        return os.stat(str(one)).st_size
    except (OSError, ValueError):
        return 0


def _name(number: int, one: Input) -> str:
    """What the input is called in its Prediction."""
    if isinstance(one, bytes):
        return f"input {number + 1}"
    return " | ".join(one) if isinstance(one, tuple) else str(one)


def _sample(one: Input, modality: Modality) -> Sample:
    """{field: its bytes}; a text is the text itself, everything else the path of a file. Raises `BadSampleError`."""
    if isinstance(one, bytes):
        return {modality.sample[0].name: one}
    if modality.sample[0].kind == "file":
        if os.path.isdir(str(one)):
            raise BadSampleError(f"is a folder, and holds no file of {', '.join(modality.sample[0].suffixes)}")
        return {modality.sample[0].name: Path(str(one)).read_bytes()}
    texts = one if isinstance(one, tuple) else (str(one),)
    if len(texts) > len(modality.sample):
        raise BadSampleError(f"{len(texts)} texts, and {modality.name} takes {len(modality.sample)} at most")
    # A lone surrogate, which an argument that is not in UTF-8 becomes, is for `decode` to refuse.
    return {
        field.name: text.encode(errors="surrogatepass") for field, text in zip(modality.sample, texts, strict=False)
    }


def _prediction(name: str, outcome: Tensor | str, plan: Plan, top: int) -> Prediction:
    if isinstance(outcome, str):
        return Prediction(name, "", 0.0, (), outcome)
    if plan.job.task == "regression":
        values = tuple(zip(plan.classes, outcome.tolist(), strict=True))
        return Prediction(name, "", values[0][1], values)
    best = outcome.topk(max(1, min(top, len(plan.classes))))
    ranked = tuple((plan.classes[k], v) for k, v in zip(best.indices.tolist(), best.values.tolist(), strict=True))
    label = ranked[0][0]
    if plan.job.task == "multi-label":
        label = " + ".join(plan.classes[k] for k in (outcome > 0.5).nonzero().flatten().tolist())
    return Prediction(name, label, ranked[0][1], ranked)


# --- figures on labelled data ---


def evaluate(run: Run | str | Path, labelled: str | Path | Data | Iterable[Any]) -> dict[str, Any]:
    """The figures of a finished run on labelled data, as in its results.json: a place, a `Data`, or rows.

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
        num_seen = _num_seen(loaded, samples)
        if num_seen is None:
            notes.append("the run has no sample table of this version: nothing tells whether it was trained on these")
        return {
            "task": task,
            **measure(task, predictions, classes),
            "num_seen": num_seen,
            "num_skipped": len(prepared.skipped) + len(source.skipped),
            "notes": notes,
        }


def _predictions(loaded: LoadedRun, source: SampleSource) -> Predictions | None:
    """For all samples of the source that can be read, None if there is none."""
    samples = source.samples
    rows = np.arange(len(samples.targets))
    if loaded.modality.length_bucketing:
        rows = samples.order_by_length(rows)
    parts: list[Sequence[Any]] = []
    for some in samples.batches(rows):
        try:
            parts += _columns(loaded, source, some, len(rows))
        except TrainingError as error:
            raise DataError(error.message, mend=f"mend or remove it, or {LEAVE_OUT}") from None
    return Predictions(*(np.concatenate(column) for column in zip(*parts, strict=True))) if parts else None


def _columns(loaded: LoadedRun, source: SampleSource, rows: Ints, num: int) -> list[Sequence[Any]]:
    """The predictions for these of `num` rows. Where they fail together, each is tried alone."""
    try:
        batch = source.batch(rows, train=False)
        if batch is None:
            return []
        return [loaded.objective.columns(batch.rows, loaded.outputs(batch.inputs), batch.targets, num)]
    except Exception as error:
        fault = fault_of_sample(error)
        if fault is None:
            raise
    if len(rows) == 1:
        source.leave_out(int(rows[0]), fault)
        return []
    return [part for i in range(len(rows)) for part in _columns(loaded, source, rows[i : i + 1], num)]


def _data(labelled: str | Path | Data | Iterable[Any], folder: Path) -> Data:
    if isinstance(labelled, Data):
        return labelled
    return materialised(drafted(None, {"backbone": "-", "data": labelled}), folder / DATA_FOLDER).job().data


def _as_the_run(spec: Data, plan: Plan) -> tuple[Data, list[str]]:
    """The data with what the user left open as the run had it, where its tables have that; and notes."""
    run, named = plan.job.data, spec.model_fields_set
    columns = columns_of(spec, [*input_columns(run), *label_columns(run)])
    of_the_run: dict[str, Any] = {}
    for key, names in (("input_column", input_columns(run)), ("label_column", label_columns(run))):
        if key not in named and names and all(name in columns for name in names):
            of_the_run[key] = getattr(run, key)
    spec = spec.model_copy(update=of_the_run)
    if plan.job.task == "multi-label" and columns and "label_separator" not in named and len(label_columns(spec)) == 1:
        spec = spec.model_copy(update={"label_separator": run.label_separator})
    return _in_order(spec, plan) if plan.job.task == "regression" else (spec, [])


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


def _num_seen(loaded: LoadedRun, samples: Samples) -> int | None:
    """How many of the samples the run itself was trained on, or its best epoch chosen by; None if nothing tells."""
    table = table_of(loaded.run.path)
    if table is None:
        return None
    own = Samples(table, loaded.fields)
    return samples.num_among(own, np.concatenate([own.rows("train"), own.rows("validation")]))
