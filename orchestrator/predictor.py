"""A finished run on new inputs: predictions for files, figures for labelled data."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from orchestrator.backbone import read_card, read_tensors, require_harmless
from orchestrator.data import LEAVE_OUT, MAX_AT_ONCE, Samples, columns_of, input_columns, label_columns, prepare as data
from orchestrator.errors import BadSampleError, DataError, RefusedError, TrainingError
from orchestrator.features import SampleSource
from orchestrator.gate import drafted, materialised, num_cores
from orchestrator.job import DATA_FOLDER, SAMPLES, Data, Plan, Run, open_run, shown
from orchestrator.modality import Collate, Modality, registry
from orchestrator.network import Network, Worker, find_device, freeze, set_mode, start_worker
from orchestrator.training import Objective, Predictions, evaluate_batch, make_objective, measure

import numpy as np  # isort: skip


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


@dataclass
class _Loaded:
    run: Run
    plan: Plan
    modality: Modality
    network: Network
    objective: Objective
    collate: Collate
    worker: Worker


def predict(run: Run | str | Path, inputs: Iterable[Input] | str | Path | bytes, top: int = 3) -> list[Prediction]:
    """One Prediction for each input: the path of a file, or its bytes; of text the text itself, or a tuple of two.

    A folder stands for all files of the modality's kind below it, in order. An input that cannot be read gets a
    Prediction with its `problem`, and the others theirs.
    """
    with ExitStack() as resources:
        loaded = _load(run, resources)
        given: list[Input] = [inputs] if isinstance(inputs, (str, Path, bytes)) else list(inputs)
        asked = [one for some in given for one in _files(some, loaded.modality)]
        found: list[Prediction] = []
        for start in range(0, len(asked), MAX_AT_ONCE):
            found += _predict_some(loaded, asked[start : start + MAX_AT_ONCE], top)
        return found


def evaluate(run: Run | str | Path, labelled: str | Path | Data | Iterable[Any]) -> dict[str, Any]:
    """The figures of a finished run on labelled data, as in its results.json: a place, a `Data`, or rows.

    All of the data counts, but where it comes with a test split: then that alone. Columns that are not named are those
    of the run, where the table has them.

    Raises `DataError` for a label that the model never learnt.
    """
    with ExitStack() as resources, TemporaryDirectory() as folder:
        loaded = _load(run, resources)
        pool = resources.enter_context(ThreadPoolExecutor(max_workers=loaded.plan.threads_per_worker))
        task, classes = loaded.plan.job.task, loaded.plan.classes
        assert loaded.modality.decode is not None
        spec, notes = _as_the_run(_data(labelled, Path(folder)), loaded.plan)
        prepared = data.prepare(spec, loaded.modality, loaded.plan.backbone, task, classes, Path(folder))
        samples = Samples(Path(folder), _fields(loaded.modality))
        source = SampleSource(samples, loaded.modality.decode, loaded.collate, spec.on_bad_sample == "skip", pool)
        rows = np.arange(len(samples.targets))
        if loaded.modality.length_bucketing:
            rows = samples.order_by_length(rows)
        parts = []
        for some in samples.batches(rows):
            try:
                batch = source.batch(some, train=False)
            except TrainingError as error:
                raise DataError(error.message, mend=f"mend or remove it, or {LEAVE_OUT}") from None
            if batch is not None:
                outputs = evaluate_batch(loaded.network.logits, batch.to(loaded.worker.device).inputs)
                parts.append(loaded.objective.columns(batch.rows, outputs, batch.targets, len(rows)))
        if not parts:
            raise DataError(f"{shown(spec.path)} holds no sample that can be read")
        predictions = Predictions(*(np.concatenate(column) for column in zip(*parts, strict=True)))
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


def _data(labelled: str | Path | Data | Iterable[Any], folder: Path) -> Data:
    if isinstance(labelled, Data):
        return labelled
    return materialised(drafted(None, {"backbone": "-", "data": labelled}), folder / DATA_FOLDER).job().data


def _fields(modality: Modality) -> tuple[str, ...]:
    return tuple(field.name for field in modality.sample)


def _as_the_run(spec: Data, plan: Plan) -> tuple[Data, list[str]]:
    """The data with what the user left open as the run had it, where its tables have that; and notes."""
    run, named = plan.job.data, spec.model_fields_set
    columns = columns_of(spec, [*input_columns(run), *label_columns(run)])
    found: dict[str, Any] = {}
    for key, names in (("input_column", input_columns(run)), ("label_column", label_columns(run))):
        if key not in named and names and all(name in columns for name in names):
            found[key] = getattr(run, key)
    spec = spec.model_copy(update=found)
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
        )
    return spec, [f"the target {target!r} is compared with the column {name!r}" for target, name in pairs]


def _num_seen(loaded: _Loaded, samples: Samples) -> int | None:
    """How many of the samples the run itself was trained on, or its best epoch chosen by; None if nothing tells."""
    if not (loaded.run.path / SAMPLES).is_dir():
        return None
    own = Samples(loaded.run.path / SAMPLES, _fields(loaded.modality))
    return samples.num_among(own, np.concatenate([own.rows("train"), own.rows("validation")]))


def _load(run: Run | str | Path, resources: ExitStack) -> _Loaded:
    """The run's network, on this machine's device, until `resources` are closed."""
    run = run if isinstance(run, Run) else open_run(run)
    _ = run.results  # refuses an unfinished one
    plan = run.plan
    card = read_card(str(run.path))
    require_harmless(card)
    try:
        read_tensors(card)
    except RefusedError as error:
        raise RefusedError("damaged", error.message, mend="train it again: --fresh") from None
    here = plan.job.scaling.model_copy(update={"device": "auto"})  # not where it was trained, but where we are
    plan = plan.model_copy(
        update={
            "backbone": card,
            "weights": "trained",
            "job": plan.job.model_copy(update={"scaling": here}),
            "threads_per_worker": num_cores(),
        }
    )
    modality = registry.get(plan.job.modality)
    assert modality.build is not None
    assert modality.batch is not None
    worker = resources.enter_context(start_worker(plan.threads_per_worker, find_device("auto")))
    network = modality.build(plan, run.model)
    freeze(network, plan)
    network.module.to(worker.device, memory_format=torch.channels_last)
    set_mode(network, plan, training=False)
    return _Loaded(run, plan, modality, network, make_objective(plan, network), modality.batch(plan, run.model), worker)


def _files(one: Input, modality: Modality) -> list[Input]:
    """The files of a folder that the modality reads; anything else, an empty folder too, as it is."""
    first = modality.sample[0]
    if first.kind != "file" or not isinstance(one, (str, Path)) or not os.path.isdir(one):
        return [one]
    found = [file for file in Path(one).rglob("*") if file.suffix.lower() in first.suffixes and file.is_file()]
    below = [file for file in found if not any(part.startswith(".") for part in file.relative_to(one).parts)]
    return [*sorted(below)] or [one]


def _predict_some(loaded: _Loaded, asked: list[Input], top: int) -> list[Prediction]:
    decode = loaded.modality.decode
    assert decode is not None
    names = [f"input {i + 1}" if isinstance(one, bytes) else _shown(one) for i, one in enumerate(asked)]
    decoded: list[Any] = []
    problems: dict[int, str] = {}
    for i, one in enumerate(asked):
        try:
            decoded.append(decode(_sample(one, loaded.modality)))
        except BadSampleError as error:
            problems[i] = error.message
        except OSError as error:
            problems[i] = f"cannot be read: {error.strerror}"
    scores: Iterator[torch.Tensor] = iter(())
    if decoded:
        inputs = {name: tensor.to(loaded.worker.device) for name, tensor in loaded.collate(decoded, False).items()}
        scores = iter(loaded.objective.scores(evaluate_batch(loaded.network.logits, inputs)))
    return [
        Prediction(name, "", 0.0, (), problems[i])
        if i in problems
        else _prediction(name, next(scores), loaded.plan, top)
        for i, name in enumerate(names)
    ]


def _sample(one: Input, modality: Modality) -> dict[str, bytes]:
    """A text is the text itself, everything else the path of a file."""
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


def _shown(one: Input) -> str:
    return " | ".join(one) if isinstance(one, tuple) else str(one)


def _prediction(name: str, scores: torch.Tensor, plan: Plan, top: int) -> Prediction:
    if plan.job.task == "regression":
        values = tuple(zip(plan.classes, scores.tolist(), strict=True))
        return Prediction(name, "", values[0][1], values)
    best = scores.topk(min(top, len(plan.classes)))
    ranked = tuple((plan.classes[k], v) for k, v in zip(best.indices.tolist(), best.values.tolist(), strict=True))
    label = ranked[0][0]
    if plan.job.task == "multi-label":
        label = " + ".join(plan.classes[k] for k in (scores > 0.5).nonzero().flatten().tolist())
    return Prediction(name, label, ranked[0][1], ranked)
