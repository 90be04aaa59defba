"""Samples -> predictions, in the order of the inputs; some hundred samples are in memory at once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from orchestrator.data import split_by_size
from orchestrator.job import Data, Noted, Plan, Report, Run, make_job
from orchestrator.predictor.inputs import Asked, Columns, as_inputs, asked_about
from orchestrator.training import LoadedRun, load_run

_WINDOW = 1024
"""So many samples are sorted by their length and computed together."""
_WINDOW_BYTES = 64 * 2**20
"""Fewer, where a table holds this much of them itself."""


@dataclass(frozen=True)
class Prediction:
    """What the model says of one input."""

    input: str
    """The path as it was given, the text, `input 3` of bytes, `table.parquet row 3` of bytes in a table."""
    label: str | None
    """The class; multi-label: the classes above one half, joined by ' + ', '' if there is none; regression: None. With
    a `problem`: ''."""
    score: float | None
    """The probability of the first of `top`; regression: None. With a `problem` it means nothing: 0."""
    top: tuple[tuple[str, float], ...]
    """The most probable classes, in falling order; regression: every target with its value."""
    labels: tuple[str, ...] | None = None
    """Multi-label: the classes above one half, in the model's order; None for other tasks."""
    problem: str = ""
    """Why there is no prediction."""
    path: str = ""
    """The absolute path, or the URI, of the input's file; '' where it has none."""
    table: str = ""
    """The absolute path of the table that it stands in; '' where it stands in none."""
    row: int = 0
    """Its row in that table, from 1; also of rows that a program gave, and of lines of standard input; else 0."""

    @property
    def values(self) -> dict[str, float]:
        """Regression: {target: its value}; {} for other tasks, and where there is a problem."""
        return dict(self.top) if self.label is None else {}

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints; without what there is not."""
        found: dict[str, Any] = {"input": self.input}
        found |= {"path": self.path} if self.path else {}
        found |= {"table": self.table} if self.table else {}
        found |= {"row": self.row} if self.row else {}
        if self.problem:
            return found | {"problem": self.problem}
        if self.label is None:
            return found | {"values": self.values}
        said = {"label": self.label, "score": self.score, "top": [list(one) for one in self.top]}
        return found | said | ({} if self.labels is None else {"labels": list(self.labels)})


class Tables:
    """What the user says of tables. Raises `JobError` for a separator or an encoding that is none."""

    def __init__(
        self, input_column: str | tuple[str, ...] | None, root: str | None, separator: str | None, encoding: str | None,
        report: Report | None,
    ) -> None:  # fmt: skip
        form = make_job(backbone="-", data={"path": "-", "separator": separator, "encoding": encoding}).data
        self._given = (input_column,) if isinstance(input_column, str) else tuple(input_column or ())
        self._root, self._separator, self._encoding, self._report = root, form.separator, form.encoding, report

    def columns(self, run: Data) -> Columns:
        """What the user says, and where he says nothing what the run read its data by."""
        return Columns(run, self._note, self._given, self._root, self._separator, self._encoding)

    def _note(self, text: str) -> None:
        if self._report is None:
            warnings.warn(text, stacklevel=2)
        else:
            self._report(Noted(text))


def predict(
    run: Run | str | Path,
    inputs: Any,
    top: int = 3,
    *,
    input_column: str | tuple[str, ...] | None = None,
    root: str | None = None,
    separator: str | None = None,
    encoding: str | None = None,
    report: Report | None = None,
) -> list[Prediction]:
    """One Prediction for each input: the path of a file, or its bytes; of text the text itself, or a tuple of two.

    `inputs` is one of them, an iterable, or a table or rows (dicts) in memory, as `finetune(data=...)` takes them.

    A folder stands for all files of the modality's kind below it, in order; a table (.csv, .tsv, .parquet, .jsonl) for
    its rows, by `input_column`, by default the columns of the run or the usual names, its paths relative to `root`, by
    default its folder. `separator` and `encoding` of tables that are text are those of the run by default, if it had
    any, else told by the file. Of a model for text a str is a text, never a file: a table or a file of text is a
    `Path`. An input that cannot be read, or that the network cannot take, gets a Prediction with its `problem`, and the
    others theirs. `report` is called with how tables were read, where that is not plain (`orchestrator.job.Noted`); by
    default it is a warning.

    Raises `RefusedError` for a run that has not finished or is damaged, and for a table that cannot be read.
    """
    with ExitStack() as resources:
        tables = Tables(input_column, root, separator, encoding, report)
        given = as_inputs(inputs)  # before the network is loaded
        return list(predictions(load_run(run, resources), given, top, tables))


def predictions(
    loaded: LoadedRun,
    inputs: Iterable[Any],
    top: int,
    tables: Tables,
) -> Iterator[Prediction]:
    """The same of what `as_inputs` gives, one after the other: nothing is kept of those that were taken."""
    for asked in _windows(asked_about(inputs, loaded.modality, tables.columns(loaded.plan.job.data))):
        outcomes = _outcomes(loaded, asked)
        for i, one in enumerate(asked):
            yield _prediction(one, outcomes[i], loaded.plan, top)


def _windows(asked: Iterator[Asked]) -> Iterator[list[Asked]]:
    window: list[Asked] = []
    held = 0
    for one in asked:
        window.append(one)
        held += one.held
        if len(window) == _WINDOW or held >= _WINDOW_BYTES:
            yield window
            window, held = [], 0
    if window:
        yield window


def _outcomes(loaded: LoadedRun, asked: Sequence[Asked]) -> dict[int, Tensor | str]:
    """Number in `asked` -> scores, float32 [classes], or what is wrong."""
    sizes = np.array([one.num_bytes for one in asked], np.int64)
    # Like lengths together waste no padding; results come in the order of the inputs all the same.
    order = np.argsort(sizes, kind="stable") if loaded.modality.length_bucketing else np.arange(len(asked))
    outcomes: dict[int, Tensor | str] = {}
    for piece in split_by_size(sizes[order]):
        numbers = order[piece].tolist()
        outcomes |= zip(numbers, loaded.outcomes([asked[number].read for number in numbers]), strict=True)
    return outcomes


def _prediction(one: Asked, outcome: Tensor | str, plan: Plan, top: int) -> Prediction:
    where = {"path": one.path, "table": one.table, "row": one.row}
    numbers = plan.job.task == "regression"
    if isinstance(outcome, str):
        nothing = (None, None) if numbers else ("", 0.0)
        return Prediction(one.name, nothing[0], nothing[1], (), None, outcome, **where)  # type: ignore[arg-type]
    label, ranked, labels = _said(outcome, plan, top)
    score = None if numbers else ranked[0][1]
    return Prediction(one.name, label, score, ranked, labels, **where)  # type: ignore[arg-type]


def _said(
    scores: Tensor, plan: Plan, top: int
) -> tuple[str | None, tuple[tuple[str, float], ...], tuple[str, ...] | None]:  # fmt: skip
    """(label, top, labels) of a Prediction."""
    if plan.job.task == "regression":
        return None, tuple(zip(plan.classes, scores.tolist(), strict=True)), None
    best = scores.topk(max(1, min(top, len(plan.classes))))
    ranked = tuple((plan.classes[k], v) for k, v in zip(best.indices.tolist(), best.values.tolist(), strict=True))
    if plan.job.task == "multi-label":
        labels = tuple(plan.classes[k] for k in (scores > 0.5).nonzero().flatten().tolist())
        return " + ".join(labels), ranked, labels
    return ranked[0][0], ranked, None
