"""`orchestrator runs`: the runs of a storage, one of them whole, and several beside each other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from orchestrator.errors import RefusedError, counted
from orchestrator.job import (
    BEST_OF_SEARCH,
    SEARCH_FILE,
    Method,
    Plan,
    Run,
    figure,
    figures_of,
    is_run_at,
    is_trial_of,
    is_uri,
    list_places,
    local_path,
    open_run,
    read_lines,
    run_in,
    shown,
)
from orchestrator.terminal.answers_json import print_json
from orchestrator.terminal.comparison import figure_rows, judge
from orchestrator.terminal.console import cut_middle, out, pairs, settings_line, show_results, table, when
from orchestrator.terminal.flags import Json, name_flags

app = typer.Typer(invoke_without_command=True)
Storage = Annotated[str, typer.Option(help="where the runs lie: a directory or s3://…")]
StorageOf = Annotated[str | None, typer.Option(help="where the runs lie: a directory or s3://… [default: runs]")]
State = Literal["running", "finished", "unfinished", "damaged"]
Order = Literal["name", "date", "result"]
_WIDEST_PLACE = 24
_ERRORS = ("MAE", "RMSE", "scaled MAE")
"""Figures of which the smaller is the better."""
_EPOCHS_SHOWN = 10
_ASKED_AT_ONCE = 8
_SUMMARY = (
    "backbone", "source", "data", "method", "task", "epochs", "num_epochs", "best_epoch", "figure", "value", "seconds",
)  # fmt: skip


@app.callback()
def runs(
    context: typer.Context,
    storage: Storage = "runs",
    backbone: Annotated[str | None, typer.Option(help="those whose backbone's name holds this")] = None,
    data: Annotated[str | None, typer.Option(help="those whose data's place holds this")] = None,
    method: Annotated[Method | None, typer.Option(help="those of this method", metavar="METHOD")] = None,
    state: Annotated[State | None, typer.Option(help="those that are so")] = None,
    sort: Annotated[Order, typer.Option(help="date: newest first; result: best first")] = "name",
    json_: Json = False,
) -> None:
    """List the runs and how far they are.

    orchestrator runs --data flowers --sort result

    orchestrator runs show NAME

    orchestrator runs compare NAME OTHER
    """
    context.obj = storage
    if context.invoked_subcommand is not None:
        given = {"backbone": backbone, "data": data, "method": method, "state": state, "json": json_ or None}
        odd = [name for name, value in given.items() if value is not None]
        if odd:
            raise RefusedError("usage", f"--{odd[0]} stands before {context.invoked_subcommand}, which has no list",
                               mend=f"leave it out, or give it behind {context.invoked_subcommand}")  # fmt: skip
        return
    runs, searches = list_places(storage)
    alone = [run for run in runs if not any(is_trial_of(one, run.name) for one in searches)]
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:  # of a store each is several requests
        rows = [*pool.map(_summary, alone), *pool.map(_summary_of_search, searches)]
    rows.sort(key=lambda row: str(row["name"]))
    num_all = len(rows)
    rows = [
        row for row in rows
        if (backbone is None or backbone in (row["source"] or "")) and (data is None or data in (row["data"] or ""))
        and method in (None, row["method"]) and state in (None, row["state"])
    ]  # fmt: skip
    if sort == "date":
        rows.sort(key=lambda row: row["changed"], reverse=True)
    elif sort == "result":
        rows.sort(key=_by_result)
    _show_list(rows, storage, num_all, json_)


@app.command("show")
def show(
    context: typer.Context,
    run: Annotated[str, typer.Argument(help="the run's place, or its name in the storage")],
    storage: StorageOf = None,
    json_: Json = False,
) -> None:
    """Show one run: what it was asked for, what it is made of, its epochs and its figures."""
    opened = _open(run, storage or context.obj)
    plan, summary = opened.plan, _summary(opened)
    if json_:
        job = plan.job.model_dump(mode="json", exclude_defaults=True)
        results = opened.results if opened.finished else None
        print_json({**summary, "job": job, "metrics": opened.metrics, "results": results})
        return
    counts, card = plan.data.num_samples, plan.backbone
    rows: list[tuple[str, object]] = [
        ("run", opened.place),
        ("state", f"{summary['state']}, {when(summary['changed'])}"),
        ("backbone", f"{card.source} @ {card.short_commit} ({card.model_type}, {card.kind})"),
        ("data", shown(plan.job.data.path)),
        ("samples", f"train {counts['train']}, validation {counts['validation']}, test {counts['test']}"),
        ("method", f"{plan.job.method}, {plan.job.task}, {len(plan.classes)} {_outputs(plan)}"),
        ("input", settings_line(plan.input)),
        ("settings", settings_line(_settings(opened, but=("backbone", "data.path", "method"))) or "the defaults"),
    ]
    if summary["seconds"] is not None:
        rows.append(("took", f"{summary['seconds']:.0f} s"))
    out.print(pairs(rows))
    _show_epochs(opened.metrics, summary["best_epoch"])
    if opened.finished:
        show_results(opened.results)
        if warnings := [*opened.plan.data.warnings, *opened.results.get("warnings", ())]:
            out.print(pairs([("warning", name_flags(one)) for one in warnings]))
    else:
        out.print(pairs([("next", opened.mend)]))


@app.command("compare")
def compare(
    context: typer.Context,
    runs: Annotated[list[str], typer.Argument(help="two or more runs: places, or names in the storage")],
    storage: StorageOf = None,
    json_: Json = False,
) -> None:
    """Show several runs beside each other: the settings that differ, and the figures."""
    if len(runs) < 2:
        raise RefusedError("usage", "one run alone is not compared", expected="two runs or more",
                           mend=f"name another one, or look at it: orchestrator runs show {runs[0]}")  # fmt: skip
    opened = [_open(run, storage or context.obj) for run in runs]
    settings = [_settings(run) for run in opened]
    names = sorted({name for one in settings for name in one})
    differing = [name for name in names if len({str(one.get(name)) for one in settings}) > 1]
    figures = [_figures(run) for run in opened]
    if json_:
        print_json([
            {"name": run.name, "settings": {name: one.get(name) for name in differing}, "figures": measured}
            for run, one, measured in zip(opened, settings, figures, strict=True)
        ])  # fmt: skip
        return
    rows: list[list[object]] = [[name, *(_setting(one.get(name)) for one in settings)] for name in differing]
    rows += figure_rows(opened, figures)
    out.print(table(["", *(run.name for run in opened)], rows))
    judge(opened, figures)


# --- what is known of a run ---


def _open(run: str, storage: str) -> Run:
    """By its directory, or its name in the storage. Raises `RefusedError`."""
    if is_uri(run) or (not is_uri(storage) and _is_there(local_path(run))):
        return open_run(run)
    if is_uri(storage):
        return open_run(f"{storage.rstrip('/')}/{run}")
    named = local_path(storage) / run
    return open_run(named if _is_there(named) else run)


def _is_there(place: Path) -> bool:
    return is_run_at(place) or (place / SEARCH_FILE).is_file()


def _summary(run: Run) -> dict[str, Any]:
    """What the list shows, None for what a damaged run does not tell."""
    state, metrics = run.state, _metrics(run)
    results = run.results if state == "finished" else {}
    plan = _plan(run)
    task = plan.job.task if plan else None
    figures = results.get("test") or results.get("validation") or {}
    title, key = figures_of(task or "single-label", figures)[0]
    return {
        "name": run.name,
        "state": state,
        "backbone": plan.backbone.name if plan else None,
        "source": plan.backbone.source if plan else None,
        "data": shown(plan.job.data.path) if plan else None,
        "method": plan.job.method if plan else None,
        "task": task,
        "epochs": metrics[-1].get("epoch", 0) if metrics else 0,
        "num_epochs": results.get("num_epochs") or (plan.recipe.num_epochs if plan else None),
        "best_epoch": results.get("best_epoch"),
        "figure": title,
        "value": figures.get(key),
        "seconds": results.get("seconds"),
        "changed": run.changed,
    }


def _summary_of_search(search: Run) -> dict[str, Any]:
    """The same of a search: that of its best run, with how many trials there are."""
    try:
        spec = json.loads(search.read(SEARCH_FILE) or "{}")
        num_trials, best = int(spec.get("num_trials", 0)), spec.get(BEST_OF_SEARCH)
    except (ValueError, TypeError, AttributeError):
        num_trials, best = 0, None
    num_done = len({line.get("number") for line in read_lines(search.read("trials.jsonl"))})
    state = "running" if search.busy else "finished" if best and num_done >= num_trials else "unfinished"
    of_best = _summary(run_in(search.storage, best)) if isinstance(best, str) else dict.fromkeys(_SUMMARY)
    return {
        **of_best, "name": search.name, "state": state, "search": f"{num_done} of {num_trials} trials",
        "best": best, "changed": search.changed_at(SEARCH_FILE, "trials.jsonl"),
    }  # fmt: skip


def _plan(run: Run) -> Plan | None:
    try:
        return run.plan
    except RefusedError:
        return None


def _metrics(run: Run) -> list[dict[str, Any]]:
    try:
        return run.metrics
    except RefusedError:
        return []


def _figures(run: Run) -> dict[str, Any]:
    return run.figures if run.finished and (run.results.get("test") or run.results.get("validation")) else {}


def _settings(run: Run, but: Sequence[str] = ()) -> dict[str, Any]:
    """{dotted name: value} of the job's settings that differ from their defaults, with the backbone and the data."""
    job = run.plan.job
    given = _dotted(job.model_dump(mode="json", exclude_defaults=True))
    given |= {"backbone": job.backbone, "data.path": shown(job.data.path), "method": job.method}
    return {name: value for name, value in sorted(given.items()) if name not in ("name", "storage", *but)}


def _dotted(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _dotted(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return flat


def _outputs(plan: Plan) -> str:
    return "targets" if plan.job.task == "regression" else "classes"


def _by_result(row: Mapping[str, Any]) -> tuple[bool, str, str, float]:
    """The best first among those of one task and figure; behind all of them those without any."""
    if row["value"] is None:
        return True, "", "", 0.0
    badness = float(row["value"]) if row["figure"] in _ERRORS else -float(row["value"])
    return False, row["task"] or "", row["figure"] or "", badness


# --- how it is shown ---


def _show_list(rows: Sequence[Mapping[str, Any]], storage: str, num_all: int, as_json: bool) -> None:
    if as_json:
        print_json([{**row, "changed": when(row["changed"])} for row in rows])
        return
    if not rows:
        gone = "" if is_uri(storage) or local_path(storage).exists() else ": it does not exist"
        none = f"there are no runs in {storage}{gone}"
        if num_all:
            none = f"none of the {counted(num_all, 'run')} in {storage} is so"
        out.print(none, markup=False)
        return
    # A name is whole on a line of its own: it is typed again, or copied.
    cells = [[f"{row['name']}\n  {_what(row)}", _result(row), when(row["changed"])[:10]] for row in rows]
    out.print(table(["run", "result", "changed"], cells, whole=(0, 2)))


def _what(row: Mapping[str, Any]) -> str:
    if "search" in row and row["method"] is None:
        return f"search, {row['search']}"
    if "search" in row:
        num = row["search"].split(" of ")[0]
        return f"search, {num} trials, the best {row['best'].removeprefix(row['name'])[1:]}: {row['method']}, " + (
            cut_middle(row["backbone"], _WIDEST_PLACE)
        )
    if row["method"] is None:
        return "its plan cannot be read"
    data = Path(row["data"]).name or row["data"]
    return f"{row['method']}, {cut_middle(row['backbone'], _WIDEST_PLACE)}, {cut_middle(data, _WIDEST_PLACE)}"


def _result(row: Mapping[str, Any]) -> str:
    if "search" in row and row["state"] != "finished":
        return f"{row['state']}, {row['search']}"
    if row["state"] != "finished":
        of = f", epoch {row['epochs']} of {row['num_epochs']}" if row["num_epochs"] else ""
        return f"{row['state']}{of}"
    return "no figure" if row["value"] is None else f"{row['figure']} {figure(row['value'])}"


def _show_epochs(metrics: Sequence[Mapping[str, Any]], kept: int | None) -> None:
    """The last epochs, and the one whose weights were kept."""
    shown = [line for line in metrics if line["epoch"] == kept] if kept not in _last(metrics) else []
    shown += metrics[-_EPOCHS_SHOWN:]
    if not shown:
        return
    names = ("train_loss", "validation_loss", "train_accuracy", "validation_accuracy")
    keys = [key for key in names if any(key in line for line in shown)]
    cells = [
        [f"{line['epoch']}{' kept' if line['epoch'] == kept else ''}", *(figure(line.get(key)) for key in keys)]
        for line in shown
    ]
    right = range(1, len(keys) + 1)
    out.print(table(["epoch", *(key.replace("_", " ") for key in keys)], cells, tuple(right)))


def _last(metrics: Sequence[Mapping[str, Any]]) -> set[int]:
    return {line["epoch"] for line in metrics[-_EPOCHS_SHOWN:]}


def _setting(value: object) -> str:
    return "default" if value is None else str(value)
