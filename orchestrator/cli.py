"""The command line. It says the same things as Python and YAML; each command imports what it needs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.errors import (
    REASONS,
    InterruptedRunError,
    JobError,
    OrchestratorError,
    RefusedError,
    missing_extra,
)

if TYPE_CHECKING:
    from orchestrator.runs import Run

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Take a network that was trained on the same kind of input, give it a new last layer, train that layer "
    "or everything, and get a Hugging Face model back.\n\n"
    "Exit codes: 0 done, 1 failed, 2 refused before the start, 130 interrupted (the same command goes on).",
)

_JOB = "The job"
_DATA = "Data"
_TRAINING = "Training"
_WHERE = "Where it runs"

JobFile = Annotated[Path | None, typer.Argument(metavar="[JOB.yaml]", help="a job file; flags win over it")]
Modality = Annotated[str | None, typer.Option(help="image, or another that `plugins` lists", rich_help_panel=_JOB)]
Backbone = Annotated[
    str | None,
    typer.Option(help="org/name[@revision] on the Hub, a directory, or an earlier run", rich_help_panel=_JOB),
]
Method = Annotated[
    str | None,
    typer.Option(help="head: new last layer only; full: everything; scratch: random weights", rich_help_panel=_JOB),
]
TaskName = Annotated[
    str | None,
    typer.Option("--task", help="single-label, multi-label or regression", rich_help_panel=_JOB),
]
Name = Annotated[str | None, typer.Option(help="of the run; made from the job by default", rich_help_panel=_JOB)]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="any setting: training.epochs=3 (repeatable)", rich_help_panel=_JOB
    ),
]
DataPath = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="class folders, a .csv, .parquet or .jsonl, a Hub data set (org/name); a path or a URI (s3://…)",
        rich_help_panel=_DATA,
    ),
]
LabelColumn = Annotated[
    list[str] | None,
    typer.Option(help="a table's column of labels (repeatable: one column a label or target)", rich_help_panel=_DATA),
]
InputColumn = Annotated[
    list[str] | None,
    typer.Option(help="a table's column of paths, bytes or texts (twice for pairs of texts)", rich_help_panel=_DATA),
]
SplitColumn = Annotated[
    str | None, typer.Option(help="a table's column that says train, validation or test", rich_help_panel=_DATA)
]
GroupColumn = Annotated[
    str | None,
    typer.Option(help="samples of one group stay on one side of every split", rich_help_panel=_DATA),
]
NumTrain = Annotated[int | None, typer.Option(help="train on so many samples only", rich_help_panel=_DATA)]
OnBad = Annotated[str | None, typer.Option(help="fail or skip: what a broken sample does", rich_help_panel=_DATA)]
Epochs = Annotated[int | None, typer.Option(rich_help_panel=_TRAINING)]
BatchSize = Annotated[int | None, typer.Option(help="samples a step, over all workers", rich_help_panel=_TRAINING)]
LearningRate = Annotated[float | None, typer.Option(rich_help_panel=_TRAINING)]
Seed = Annotated[int | None, typer.Option(rich_help_panel=_TRAINING)]
Size = Annotated[int | None, typer.Option(help="input size, where the modality has one", rich_help_panel=_TRAINING)]
Workers = Annotated[int | None, typer.Option(help="more than one: processes on Ray", rich_help_panel=_WHERE)]
Address = Annotated[str | None, typer.Option(help="a Ray cluster; 'local' starts one here", rich_help_panel=_WHERE)]
Storage = Annotated[str | None, typer.Option(help="the directory of the runs [default: runs]", rich_help_panel=_WHERE)]
Fresh = Annotated[bool, typer.Option("--fresh", help="start over, removing what the run holds")]
Json = Annotated[bool, typer.Option("--json", help="print the result, or the refusal, as JSON")]


@app.command()
def finetune(
    job: JobFile = None, backbone: Backbone = None, data: DataPath = None, method: Method = None,
    modality: Modality = None, task: TaskName = None, name: Name = None, set_: Set = None,
    input_column: InputColumn = None, label_column: LabelColumn = None, split_column: SplitColumn = None,
    group_column: GroupColumn = None, num_train: NumTrain = None, on_bad_sample: OnBad = None, epochs: Epochs = None,
    batch_size: BatchSize = None, learning_rate: LearningRate = None, seed: Seed = None, size: Size = None,
    workers: Workers = None, address: Address = None, storage: Storage = None, fresh: Fresh = False,
    json_: Json = False,
) -> None:  # fmt: skip
    """Train a backbone on your data. The same command again goes on with an unfinished run.

    orchestrator finetune --backbone microsoft/resnet-50 --data photos/

    orchestrator finetune job.yaml --method full --set training.epochs=3
    """
    from orchestrator.train import finetune as run_finetune

    _report(run_finetune(job, fresh=fresh, **_fields(locals())), json_)


@app.command()
def pretrain(
    job: JobFile = None, backbone: Backbone = None, data: DataPath = None, modality: Modality = None,
    task: TaskName = None, name: Name = None, set_: Set = None, input_column: InputColumn = None,
    label_column: LabelColumn = None, split_column: SplitColumn = None, group_column: GroupColumn = None,
    num_train: NumTrain = None, on_bad_sample: OnBad = None, epochs: Epochs = None, batch_size: BatchSize = None,
    learning_rate: LearningRate = None, seed: Seed = None, size: Size = None, workers: Workers = None,
    address: Address = None, storage: Storage = None, fresh: Fresh = False, json_: Json = False,
) -> None:  # fmt: skip
    """Train a backbone's architecture from random weights. The run is a backbone for `finetune`.

    orchestrator pretrain --backbone microsoft/resnet-50 --data many-photos/ --name base

    orchestrator finetune --backbone runs/base --data my-photos/
    """
    from orchestrator.train import pretrain as run_pretrain

    _report(run_pretrain(job, fresh=fresh, **_fields(locals())), json_)


@app.command()
def plan(
    job: JobFile = None, backbone: Backbone = None, data: DataPath = None, method: Method = None,
    modality: Modality = None, task: TaskName = None, name: Name = None, set_: Set = None,
    input_column: InputColumn = None, label_column: LabelColumn = None, split_column: SplitColumn = None,
    group_column: GroupColumn = None, num_train: NumTrain = None, on_bad_sample: OnBad = None, epochs: Epochs = None,
    batch_size: BatchSize = None, learning_rate: LearningRate = None, seed: Seed = None, size: Size = None,
    workers: Workers = None, address: Address = None, storage: Storage = None, json_: Json = False,
) -> None:  # fmt: skip
    """Print what `finetune` would do, and run nothing."""
    from orchestrator.console import show_plan
    from orchestrator.planning import plan as make_plan

    made = make_plan(job, **_fields(locals()))
    if json_:
        print(made.model_dump_json(indent=1))
    else:
        show_plan(made)


@app.command()
def check(
    backbone: Annotated[str, typer.Argument(help="org/name[@revision], a directory, or an earlier run")],
    modality: Annotated[str, typer.Option(help="what your data is")] = "image",
    data: Annotated[str | None, typer.Option(help="hold the data against it too")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="data.… or settings.… (repeatable)")
    ] = None,
    size: Annotated[int | None, typer.Option(help="input size")] = None,
    task: Annotated[str | None, typer.Option(help="single-label, multi-label or regression")] = None,
    input_column: InputColumn = None,
    label_column: LabelColumn = None,
    json_: Json = False,
) -> None:
    """Say whether a backbone fits a modality, from its metadata files alone, and what your data is to it.

    orchestrator check microsoft/resnet-50 --modality image

    orchestrator check facebook/wav2vec2-base --modality audio --data recordings/
    """
    from orchestrator.planning import inspect
    from orchestrator.spec import make_job

    job = make_job(**{"data": "-", "backbone": backbone, **_fields(locals())})
    found = inspect(backbone, modality, job.data if data is not None else None, job.settings, job.task)
    card = found.card
    if json_:
        print(
            json.dumps(
                {
                    "accepted": True,
                    "backbone": card.source,
                    "kind": card.kind,
                    "commit": card.commit,
                    "library": card.library,
                    "type": card.model_type,
                    "architecture": found.row.architecture,
                    "modality": modality,
                    "input": dict(found.fit.input) if found.fit else None,
                    "adaptations": [one.model_dump() for one in found.fit.adaptations] if found.fit else [],
                    "warnings": list(found.fit.warnings) if found.fit else [],
                },
                ensure_ascii=False,
            )
        )
        return
    from orchestrator.console import out, pairs, table

    rows: list[tuple[str, object]] = [
        ("accepted", f"{card.source} for {modality}"),
        (
            "what",
            f"{card.library} {card.model_type}, {card.kind}" + (f" @ {card.commit}" if card.commit else ""),
        ),
    ]
    if found.fit is not None:
        rows.append(("input", ", ".join(f"{key} {value}" for key, value in found.fit.input.items())))
        rows += [("warning", one) for one in found.fit.warnings]
    out.print(pairs(rows))
    if found.profile is not None:
        measured = {key: str(value) for key, value in found.profile.ranges.items()}
        measured |= {key: ", ".join(f"{w} x {n}" for w, n in c.items()) for key, c in found.profile.counts.items()}
        out.print(table([f"of {found.profile.num_measured} samples", "measured"], list(measured.items())))
    if found.fit is not None and found.fit.adaptations:
        cells = [[one.what, one.received, one.used, f"{one.share:.0%}"] for one in found.fit.adaptations]
        out.print(table(["adapted", "the data", "becomes", "samples"], cells, right=(3,)))
    elif found.profile is not None:
        out.print("nothing has to be adapted")


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="the directory of a finished run")],
    files: Annotated[list[str], typer.Argument(help="files to classify; of a text model, the texts themselves")],
    top: Annotated[int, typer.Option(min=1, help="so many classes each")] = 3,
    json_: Json = False,
) -> None:
    """Classify files with a finished run. Exit code 1 if one of them cannot be read."""
    from orchestrator.predictor import predict as run_predict

    found = run_predict(run, files, top)
    if json_:
        rows = [
            {"input": one.input, "problem": one.problem}
            if one.problem
            else {
                "input": one.input,
                "label": one.label,
                "score": one.score,
                "top": [list(t) for t in one.top],
            }
            for one in found
        ]
        print(json.dumps(rows, ensure_ascii=False))
    else:
        from orchestrator.console import out, table

        out.print(
            table(
                ["input", "label", "score", "then"],
                [
                    [one.input, "", "", one.problem]
                    if one.problem
                    else [
                        one.input,
                        one.label,
                        f"{one.score:.3f}",
                        ", ".join(f"{k} {v:.3f}" for k, v in one.top[1:]),
                    ]
                    for one in found
                ],
                right=(2,),
            )
        )
    if any(one.problem for one in found):
        raise typer.Exit(1)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="the directory of a finished run")],
    data: Annotated[str, typer.Option(help="labelled data: a folder of class folders, or a table")],
    input_column: InputColumn = None,
    label_column: LabelColumn = None,
    label_separator: Annotated[str | None, typer.Option(help="between several labels of one cell")] = None,
    on_bad_sample: OnBad = None,
    json_: Json = False,
) -> None:
    """Figures of a finished run on labelled data that it has not seen."""
    from orchestrator.predictor import evaluate as run_evaluate
    from orchestrator.spec import make_job

    fields = {
        "path": data,
        "input_column": one_or_all(input_column) if input_column else None,
        "label_column": one_or_all(label_column) if label_column else None,
        "label_separator": label_separator,
        "on_bad_sample": on_bad_sample,
    }
    spec = make_job(backbone="-", data={key: value for key, value in fields.items() if value is not None}).data
    figures = run_evaluate(run, spec)
    if json_:
        print(json.dumps(figures, ensure_ascii=False))
        return
    from orchestrator.console import figure, out, show_results, table

    show_results({"task": figures["task"], "data": figures})
    if figures["num_seen"]:
        out.print(
            f"{figures['num_seen']} of these samples were in the run's own training or validation: "
            "the figures are better than on new data"
        )
    for note in figures["notes"]:
        out.print(note, markup=False, soft_wrap=True)
    if figures["task"] == "regression":
        rows = [[name, figure(one["mae"]), figure(one["r2"])] for name, one in figures["per_class"].items()]
        out.print(table(["target", "MAE", "R2"], rows, right=(1, 2)))
    else:
        worst = sorted((v, k) for k, v in figures["per_class"].items() if v is not None)[:10]
        what = "accuracy" if figures["task"] == "single-label" else "F1"
        out.print(table(["class", what], [[name, figure(value)] for value, name in worst], right=(1,)))
    if figures["num_skipped"]:
        out.print(f"{figures['num_skipped']} samples could not be read and were left out")


@app.command()
def runs(
    storage: Annotated[str, typer.Option(help="the directory of the runs")] = "runs",
    json_: Json = False,
) -> None:
    """List the runs and how far they are."""
    from orchestrator.plans import FIGURES
    from orchestrator.runs import list_runs

    found = list_runs(storage)
    rows: list[dict[str, Any]] = []
    for run in found:
        metrics = run.metrics
        state, results = ("finished" if run.finished else "unfinished"), {}
        try:
            results = run.results if run.finished else {}
        except RefusedError:
            state = "damaged"
        figures = results.get("test") or results.get("validation") or {}
        shown = FIGURES[results.get("task", "single-label")][0]
        rows.append(
            {
                "name": run.name,
                "state": state,
                "epochs": metrics[-1]["epoch"] if metrics else 0,
                "figure": shown[0],
                "value": figures.get(shown[1]),
                "seconds": results.get("seconds"),
            }
        )
    if json_:
        print(json.dumps(rows, ensure_ascii=False))
        return
    from orchestrator.console import figure, out, table

    if not rows:
        out.print(f"there are no runs in {storage}", markup=False)
        return
    cells = [
        [r["name"], r["state"], r["epochs"], "" if r["value"] is None else f"{r['figure']} {figure(r['value'])}",
         "" if r["seconds"] is None else f"{r['seconds']:.0f}"]
        for r in rows
    ]  # fmt: skip
    out.print(table(["run", "state", "epochs", "result", "seconds"], cells, right=(2, 3, 4)))


@app.command()
def plugins(
    types: Annotated[str | None, typer.Option(metavar="MODALITY", help="list its model types")] = None,
    json_: Json = False,
) -> None:
    """List the modality plugins: what they take, and which backbones fit."""
    from orchestrator import registry
    from orchestrator.console import out, table

    if types is not None:
        rules = registry.get(types).rules
        if json_:
            print(json.dumps({"types": sorted(rules.accepts), "timm": sorted(rules.timm)}))
            return
        out.print(f"{types}, from {rules.generated_from}", markup=False)
        out.print(", ".join(sorted(rules.accepts)), markup=False)
        if rules.timm:
            out.print(f"and {len(rules.timm)} timm architectures", markup=False)
        return
    found = registry.listings()
    if json_:
        print(
            json.dumps(
                [
                    {
                        "name": one.name,
                        "distribution": one.distribution,
                        "version": one.version,
                        "takes": one.modality.title if one.modality else None,
                        "trainable": bool(one.modality and one.modality.trainable),
                        "types": sorted(one.modality.rules.accepts) if one.modality else [],
                        "num_timm": len(one.modality.rules.timm) if one.modality else 0,
                        "error": one.error or None,
                    }
                    for one in found
                ]
            )
        )
        return
    rows = []
    for one in found:
        if one.modality is None:
            rows.append([one.name, f"{one.distribution} {one.version}", f"broken: {one.error}", ""])
            continue
        rules = one.modality.rules
        families = f"{len(rules.accepts)} types" + (f", {len(rules.timm)} timm" if rules.timm else "")
        examples = ", ".join(list(rules.accepts)[:3])
        state = one.modality.title if one.modality.trainable else f"{one.modality.title} (check only, no training yet)"
        rows.append([one.name, f"{one.distribution} {one.version}".strip(), state, f"{families}: {examples}, …"])
    out.print(table(["modality", "from", "takes", "backbone families"], rows))


@app.command()
def reasons() -> None:
    """List every `reason` that a refusal can have."""
    from orchestrator.console import out, pairs

    out.print(pairs(list(REASONS.items())))


_DOTTED = {
    "split_column": "data.split_column", "group_column": "data.group_column", "num_train": "data.num_train",
    "on_bad_sample": "data.on_bad_sample", "epochs": "training.epochs", "batch_size": "training.batch_size",
    "learning_rate": "training.learning_rate", "seed": "training.seed", "size": "settings.size",
    "workers": "scaling.num_workers", "address": "scaling.address",
}  # fmt: skip
_COLUMNS = {"input_column": "data.input_column", "label_column": "data.label_column"}
_PLAIN = ("modality", "backbone", "data", "task", "method", "name", "storage")


def _fields(given: dict[str, Any]) -> dict[str, Any]:
    """The job's fields out of a command's flags; those that were not given are left out."""
    from orchestrator.spec import parse_setting

    fields = {key: given[key] for key in _PLAIN if given.get(key) is not None}
    fields |= {_DOTTED[key]: given[key] for key in _DOTTED if given.get(key) is not None}
    fields |= {_COLUMNS[key]: one_or_all(given[key]) for key in _COLUMNS if given.get(key)}
    return fields | dict(parse_setting(text) for text in given.get("set_") or [])


def one_or_all(columns: list[str]) -> str | list[str]:
    """A column alone is a name, several are a list, as in a job file."""
    return columns[0] if len(columns) == 1 else columns


def _report(run: Run, as_json: bool) -> None:
    from orchestrator.console import out, pairs, show_results

    results = run.results
    if as_json:
        print(json.dumps({"run": str(run.path), **results}, ensure_ascii=False))
        return
    show_results(results)
    where = _short(run.path)
    out.print(
        pairs(
            [
                ("model", f"{where}/model"),
                ("metrics", f"{where}/metrics.jsonl, {where}/results.json"),
                ("next", f"orchestrator predict {where} {_inputs(run)}"),
            ]
        )
    )


def _inputs(run: Run) -> str:
    """What `predict` takes of such a run."""
    from orchestrator import registry

    return '"A TEXT"...' if registry.get(run.plan.job.modality).sample[0].kind == "text" else "FILE..."


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


_UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # click's, wherever this version of typer keeps it


def main() -> None:
    """The entry point: every error becomes a message and an exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a command; its exit code."""
    as_json = "--json" in arguments
    try:
        if not arguments:
            app(["--help"], standalone_mode=False, prog_name="orchestrator")
            return 2
        code = app(arguments, standalone_mode=False, prog_name="orchestrator")
        if code == InterruptedRunError.exit_code:  # typer makes this of a KeyboardInterrupt, in silence
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except _UsageError as error:
        known = arguments[0] in {getattr(one.callback, "__name__", "") for one in app.registered_commands}
        hint = f"orchestrator {arguments[0]} --help" if known else ""
        message = getattr(error, "format_message", error.__str__)()
        return _fail(JobError(message, mend=hint or "orchestrator --help"), as_json)
    except OrchestratorError as error:
        return _fail(error, as_json)
    except BrokenPipeError:
        return 0
    except OSError as error:  # one that a run met on its way is a TrainingError by now
        place = error.filename or "the file system"
        return _fail(JobError(f"{place} cannot be used: {error.strerror or error}"), as_json)
    except ModuleNotFoundError as error:
        refusal = missing_extra(error)
        if refusal is None:
            raise
        return _fail(refusal, as_json)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(InterruptedRunError("interrupted", mend="the same command goes on"), as_json)


def _fail(error: OrchestratorError, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"accepted": False, **error.as_dict()}, ensure_ascii=False))
    else:
        from orchestrator.console import show_error

        show_error(error)
    return error.exit_code


if __name__ == "__main__":
    main()
