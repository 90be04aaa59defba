"""`orchestrator predict` and `orchestrator evaluate`: a finished run on new inputs, and on labelled data."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.errors import DataError
from orchestrator.terminal.flags import Json, takes_flags

if TYPE_CHECKING:
    from orchestrator.job import Run

FinishedRun = Annotated[str, typer.Argument(help="a finished run: its directory, its name in runs, or s3://…")]


@takes_flags("--separator", "--encoding")
def predict(
    fields: dict[str, Any],
    run: FinishedRun,
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="files, folders of them, or tables; of a text model also the texts themselves; - for the lines of "
            "standard input"
        ),
    ],
    top: Annotated[int, typer.Option(min=1, help="so many classes each")] = 3,
    output: Annotated[
        str | None,
        typer.Option(help="write a table instead: .csv, .parquet or .jsonl, with the scores of all classes"),
    ] = None,
    input_column: Annotated[
        list[str] | None, typer.Option(help="of tables; default: that of the run, or the usual names (twice for pairs)")
    ] = None,
    root: Annotated[str | None, typer.Option(help="what a table's paths are relative to; default: its folder")] = None,
    json_: Json = False,
) -> None:
    """Say what a finished run predicts for new inputs. Exit code 1 if one of them cannot be read.

    orchestrator predict runs/NAME photo.jpg more-photos/

    orchestrator predict runs/NAME table.csv --output predictions.csv
    """
    from orchestrator.job import open_finished

    opened = open_finished(run)  # before torch is imported, which takes seconds
    from orchestrator.predictor import predict as run_predict, require_output, write
    from orchestrator.progress import progress
    from orchestrator.terminal import answers

    asked = [one for given in inputs for one in (_lines() if given == "-" else [as_input(given, opened)])]
    columns = tuple(input_column or ()) or None
    form = {key.removeprefix("data."): value for key, value in fields.items()}
    if output is not None:
        require_output(output, asked)  # before the network is loaded
        with progress() as report:
            written = write(opened, asked, output, columns, root, report=report, **form)
        answers.show_written(written, json_)
        if written.num_problems:
            raise typer.Exit(1)
        return
    with progress() as report:
        predictions = run_predict(opened, asked, top, input_column=columns, root=root, report=report, **form)
    answers.show_predictions(predictions, opened.plan.job.task, json_)
    if any(one.problem for one in predictions):
        raise typer.Exit(1)


def as_input(given: str, run: Run) -> str | Path:
    """An argument of `predict`: of a text model a file that is there is read, and all else is a text.

    Raises `DataError` for what is no text, but the name of a file that is not there.
    """
    from orchestrator.job import TABLE_SUFFIXES
    from orchestrator.modality import registry

    sample = registry.get(run.plan.job.modality).sample[0]
    if sample.kind != "text":
        return given
    if os.path.isfile(given) or (os.path.isdir(given) and os.sep in given):
        return Path(given)
    if given.lower().endswith((*TABLE_SUFFIXES, *sample.suffixes)) and not any(map(str.isspace, given)):
        raise DataError(
            f"there is no file {given}", expected="a table or a file of text that is there, or a text",
            mend="check the path; a text that looks like one: give it on standard input (-)",
        )  # fmt: skip
    return given


def _lines() -> list[str]:
    """The lines of standard input, each with its number; what is no UTF-8 as in an argument."""
    from orchestrator.predictor import Line

    lines = sys.stdin.buffer.read().decode(errors="surrogateescape").removesuffix("\n").split("\n")
    return [Line(line.removesuffix("\r"), number) for number, line in enumerate(lines, 1)]


@takes_flags("--input-column", "--label-column", "--label-separator", "--separator", "--encoding", "--on-bad-sample")
def evaluate(
    fields: dict[str, Any],
    run: FinishedRun,
    data: Annotated[str, typer.Option(help="labelled data: a folder of class folders, or a table")],
    json_: Json = False,
) -> None:
    """Figures of a finished run on labelled data that it has not seen."""
    from orchestrator.job import make_job, open_finished

    opened = open_finished(run)  # before torch is imported, which takes seconds
    spec = make_job(backbone="-", data=data, **fields).data
    from orchestrator.predictor import evaluate as run_evaluate
    from orchestrator.terminal import answers

    answers.show_evaluation(run_evaluate(opened, spec), json_)
