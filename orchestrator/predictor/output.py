"""Predictions -> a table in CSV, Parquet or JSON lines: a row an input, with the scores of all classes."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from orchestrator.errors import JobError
from orchestrator.job import Report, Run, beside, local_path
from orchestrator.predictor.inputs import Input, as_inputs
from orchestrator.predictor.predictions import Prediction, Tables, predictions
from orchestrator.training import load_run

_BATCH_ROWS = 1024
_Write = Callable[[Sequence[dict[str, Any]]], None]


@dataclass(frozen=True)
class Written:
    """What was written."""

    file: Path
    num_rows: int
    num_problems: int
    """Rows that have a `problem` instead of scores."""


def require_output(output: str | Path, inputs: Iterable[Input]) -> Path:
    """The path of the table to write. Raises `JobError` where it cannot be, or is one of the inputs."""
    place = local_path(output).absolute()
    if place.suffix.lower() not in _WRITERS:
        raise JobError(
            f"{output} is no table that can be written", expected="a file ending in " + ", ".join(_WRITERS),
            mend="give it one of these suffixes"
            + ("; for standard output leave it out, with --json for JSON" if place.parent == Path("/dev") else ""),
        )  # fmt: skip
    if place.is_dir() or not place.parent.is_dir():
        what = "is a folder" if place.is_dir() else "lies in a folder that is not there"
        raise JobError(f"{output} {what}", expected="a file in a folder that is there", mend="name another place")
    paths = [one for one in inputs if isinstance(one, (str, Path))]
    if place.exists() and any(os.path.exists(one) and os.path.samefile(one, place) for one in paths):
        raise JobError(f"{output} is one of the inputs, and would be replaced", mend="name another file")
    return place


def write(
    run: Run | str | Path, inputs: Any, output: str | Path,
    input_column: str | tuple[str, ...] | None = None, root: str | None = None, separator: str | None = None,
    encoding: str | None = None, report: Report | None = None,
) -> Written:  # fmt: skip
    """Write a table of predictions for inputs as `predict` takes them; an earlier one of that name is replaced.

    Its columns are `input`, `path`, `table`, `row`, `label`, `score`, `problem`, and of every class `score_CLASS` (of
    every target `value_TARGET`); what there is not is empty. Multi-label: in Parquet and JSON lines also the list
    `labels`. It is there whole or not at all.
    """
    given: list[Input] = list(as_inputs(inputs))
    place, num_rows, num_problems = require_output(output, given), 0, 0
    tables = Tables(input_column, root, separator, encoding, report)
    partial = beside(place)
    with ExitStack() as resources:
        loaded = load_run(run, resources)
        task, classes = loaded.plan.job.task, loaded.plan.classes
        names = _names(task, classes)
        resources.enter_context(_written_or_refused(output, partial))
        resources.callback(partial.unlink, missing_ok=True)
        with _WRITERS[place.suffix.lower()](partial, names) as write_rows:
            rows: list[dict[str, Any]] = []
            for one in predictions(loaded, given, len(classes), tables):
                rows.append(_row(one, task, names))
                num_rows += 1
                num_problems += bool(one.problem)
                if len(rows) == _BATCH_ROWS:
                    write_rows(rows)
                    rows = []
            write_rows(rows)
        os.replace(partial, place)
    return Written(place, num_rows, num_problems)


@contextmanager
def _written_or_refused(output: str | Path, partial: Path) -> Iterator[None]:
    """What the system refuses to the file that is written is raised as `JobError`, under the output's name.

    An error of another file is raised as it is.
    """
    try:
        yield
    except OSError as error:
        if error.filename not in (None, str(partial)):
            raise
        raise JobError(
            f"{output} cannot be written: {error.strerror or error}", expected="a folder to write into, with room",
            mend="make room, or name another place",
        ) from error  # fmt: skip


def _names(task: str, classes: Sequence[str]) -> dict[str, pa.DataType]:
    first = {"input": pa.string(), "path": pa.string(), "table": pa.string(), "row": pa.int64()}
    label = {} if task == "regression" else {"label": pa.string(), "score": pa.float32()}
    label |= {"labels": pa.list_(pa.string())} if task == "multi-label" else {}
    of_each = "value" if task == "regression" else "score"
    return {**first, **label, "problem": pa.string(), **{f"{of_each}_{name}": pa.float32() for name in classes}}


def _row(one: Prediction, task: str, names: Iterable[str]) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(names)
    row |= {"input": _written(one.input), "path": _written(one.path), "table": _written(one.table)}
    row |= {"row": one.row or None, "problem": one.problem or None}
    if one.problem:
        return row
    if task == "regression":
        return row | {f"value_{name}": value for name, value in one.top}
    row |= {"label": one.label, "score": one.score} | {f"score_{name}": value for name, value in one.top}
    return row if one.labels is None else row | {"labels": list(one.labels)}


def _written(text: str) -> str | None:
    """As UTF-8 can hold it: bytes of a name that are none, and halves of characters, become \\x and \\u."""
    return text.encode(errors="backslashreplace").decode() or None


@contextmanager
def _csv(file: Path, names: dict[str, pa.DataType]) -> Iterator[_Write]:
    with open(file, "w", encoding="utf-8", newline="") as out:
        plain = [name for name, kind in names.items() if not pa.types.is_list(kind)]
        writer = csv.DictWriter(out, plain, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        yield writer.writerows


@contextmanager
def _json_lines(file: Path, _names: dict[str, pa.DataType]) -> Iterator[_Write]:
    with open(file, "w", encoding="utf-8") as out:
        yield lambda rows: out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@contextmanager
def _parquet(file: Path, names: dict[str, pa.DataType]) -> Iterator[_Write]:
    schema = pa.schema(names)
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        yield lambda rows: writer.write_table(pa.Table.from_pylist(list(rows), schema=schema))


_WRITERS = {".csv": _csv, ".parquet": _parquet, ".jsonl": _json_lines}
