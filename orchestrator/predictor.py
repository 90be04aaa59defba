"""A finished run on new inputs: predictions for files, figures for labelled data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orchestrator import data, hub, registry
from orchestrator.errors import BadSampleError, DataError, RefusedError
from orchestrator.loop import EVALUATION_BATCH, predict_batch
from orchestrator.metrics import Predictions, measure
from orchestrator.modality import Collate, Modality
from orchestrator.model import Network, freeze, set_mode
from orchestrator.planning import num_cores
from orchestrator.plans import Plan
from orchestrator.runs import Run, open_run
from orchestrator.spec import Data
from orchestrator.weights import read_tensors
from orchestrator.worker import Worker, start_worker

import numpy as np  # isort: skip


@dataclass(frozen=True)
class Prediction:
    """What the model says of one input."""

    input: str
    label: str
    score: float
    """The softmax probability of `label`."""
    top: tuple[tuple[str, float], ...]
    """The most probable classes, the first being `label`."""
    problem: str = ""
    """Why there is no prediction."""


@dataclass
class _Loaded:
    run: Run
    plan: Plan
    modality: Modality
    network: Network
    collate: Collate
    worker: Worker


def predict(
    run: Run | str | Path, inputs: Iterable[str | Path | bytes] | str | Path | bytes, top: int = 3
) -> list[Prediction]:
    """One Prediction for each input: the path of a file, or its bytes.

    An input that cannot be read gets a Prediction with its `problem`, and the others theirs.
    """
    loaded = _load(run)
    asked = [inputs] if isinstance(inputs, (str, Path, bytes)) else list(inputs)
    found: list[Prediction] = []
    for start in range(0, len(asked), EVALUATION_BATCH):
        found += _predict_some(loaded, asked[start : start + EVALUATION_BATCH], top)
    return found


def evaluate(run: Run | str | Path, labelled: str | Data) -> dict[str, Any]:
    """The figures of a finished run on labelled data, as in its results.json.

    All of the data counts, but where it comes with a test split: then that alone.

    Raises `DataError` for a label that the model never learnt.
    """
    loaded = _load(run)
    spec = labelled if isinstance(labelled, Data) else Data(path=str(labelled))
    prepared = data.prepare(spec, loaded.modality, loaded.plan.backbone, loaded.plan.job.task, loaded.plan.classes)
    field = loaded.modality.sample[0].name
    decode = loaded.modality.decode
    assert decode is not None
    root = Path(prepared.summary.root)
    uris, contents = prepared.table.column("uri").to_pylist(), prepared.table.column("content").to_pylist()
    labels = prepared.table.column("label").to_numpy().astype(np.int64)
    parts = []
    num_broken = 0
    with ThreadPoolExecutor(max_workers=loaded.plan.threads_per_worker) as pool:
        for start in range(0, len(uris), EVALUATION_BATCH):
            rows = np.arange(start, min(start + EVALUATION_BATCH, len(uris)))

            def one(row: int) -> object:
                try:
                    content = contents[row]
                    return decode({field: content if content is not None else (root / uris[row]).read_bytes()})
                except (BadSampleError, OSError) as error:
                    return DataError(f"{uris[row] or f'row {row + 1}'}: {getattr(error, 'message', error)}")

            decoded = list(pool.map(one, rows.tolist()))
            broken = [found for found in decoded if isinstance(found, DataError)]
            if broken and spec.on_bad_sample == "fail":
                raise broken[0]
            num_broken += len(broken)
            rows = rows[[not isinstance(found, DataError) for found in decoded]]
            if not len(rows):
                continue
            inputs = loaded.collate([found for found in decoded if not isinstance(found, DataError)], False)
            inputs = {name: tensor.to(loaded.worker.device) for name, tensor in inputs.items()}
            parts.append(predict_batch(loaded.network.logits, rows, inputs, torch.from_numpy(labels[rows])))
    figures = measure(
        Predictions(*(np.concatenate(column) for column in zip(*parts, strict=True))), loaded.plan.classes
    )
    return {**figures, "num_seen": _num_seen(loaded, root, uris), "num_skipped": len(prepared.skipped) + num_broken}


def _num_seen(loaded: _Loaded, root: Path, uris: list[str]) -> int:
    """How many of the files the run itself was trained on, or its best epoch chosen by."""
    samples = data.Samples(loaded.run.path / "samples.arrow", loaded.plan.data.root, "")
    rows = np.concatenate([samples.rows("train"), samples.rows("validation")])
    used = {samples.place(int(row)) for row in rows}
    return sum(bool(uri) and str(root / uri) in used for uri in uris)


def _load(run: Run | str | Path) -> _Loaded:
    run = run if isinstance(run, Run) else open_run(run)
    _ = run.results  # refuses an unfinished one
    plan = run.plan
    card = hub.read_card(str(run.path))
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
    worker = start_worker(plan)
    network = modality.build(plan, run.model)
    freeze(network, plan)
    network.module.to(worker.device, memory_format=torch.channels_last)
    set_mode(network, plan, training=False)
    return _Loaded(run, plan, modality, network, modality.batch(plan, run.model), worker)


def _predict_some(loaded: _Loaded, asked: list[str | Path | bytes], top: int) -> list[Prediction]:
    field = loaded.modality.sample[0].name
    decode = loaded.modality.decode
    assert decode is not None
    names = [f"input {i + 1}" if isinstance(one, bytes) else str(one) for i, one in enumerate(asked)]
    decoded: list[Any] = []
    problems: dict[int, str] = {}
    for i, one in enumerate(asked):
        try:
            decoded.append(decode({field: one if isinstance(one, bytes) else Path(one).read_bytes()}))
        except BadSampleError as error:
            problems[i] = error.message
        except OSError as error:
            problems[i] = f"cannot be read: {error.strerror}"
    scores: Iterator[torch.Tensor] = iter(())
    if decoded:
        inputs = {name: tensor.to(loaded.worker.device) for name, tensor in loaded.collate(decoded, False).items()}
        with torch.no_grad():
            scores = iter(loaded.network.logits(inputs).float().softmax(dim=-1).cpu())
    found = []
    for i, name in enumerate(names):
        if i in problems:
            found.append(Prediction(name, "", 0.0, (), problems[i]))
            continue
        values, which = next(scores).topk(min(top, len(loaded.plan.classes)))
        best = tuple((loaded.plan.classes[k], float(v)) for k, v in zip(which.tolist(), values.tolist(), strict=True))
        found.append(Prediction(name, best[0][0], best[0][1], best))
    return found
