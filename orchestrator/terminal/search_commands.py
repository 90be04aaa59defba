"""`orchestrator search`: many trials of a job, what they come to while they run, and in the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.errors import JobError, counted
from orchestrator.job import (
    Advanced,
    EpochEnded,
    Event,
    Noted,
    PhaseBegan,
    Report,
    TrialsAdvanced,
    figure,
    parse_setting,
)
from orchestrator.progress import err, progress
from orchestrator.terminal.answers_json import print_json
from orchestrator.terminal.console import out, pairs, show_results, table
from orchestrator.terminal.flags import Json, takes_flags

if TYPE_CHECKING:
    from orchestrator.tuning import SearchResult, Trial

_NUM_SHOWN = 10
_COMMAND = "Search"


@takes_flags()
def search(
    fields: dict[str, Any],
    job: Annotated[
        Path | None, typer.Argument(metavar="[JOB.yaml]", help="a job file with a block `search`; flags win over it")
    ] = None,
    space: Annotated[
        list[str] | None,
        typer.Option(
            help="learning_rate='{loguniform: [1e-5, 1e-2]}', method='[head, full]' (repeatable)",
            metavar="KEY=DOMAIN",
            rich_help_panel=_COMMAND,
        ),
    ] = None,
    num_trials: Annotated[
        int | None, typer.Option(help="in all [default: a grid's points, else 16]", rich_help_panel=_COMMAND)
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="stops trials early: asha, median", rich_help_panel=_COMMAND)
    ] = None,
    search_alg: Annotated[
        str | None, typer.Option(help="proposes values: random, grid, optuna", rich_help_panel=_COMMAND)
    ] = None,
    max_concurrent: Annotated[
        int | None, typer.Option(help="trials side by side [default: what there is room for]", rich_help_panel=_COMMAND)
    ] = None,
    time_budget: Annotated[
        float | None, typer.Option(help="seconds after which no more is tried", rich_help_panel=_COMMAND)
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="validation_accuracy or validation_loss", rich_help_panel=_COMMAND)
    ] = None,
    search_seed: Annotated[int | None, typer.Option(help="of what is drawn", rich_help_panel=_COMMAND)] = None,
    num_seeds: Annotated[
        int | None, typer.Option(help="train the best three with so many seeds", rich_help_panel=_COMMAND)
    ] = None,
    max_failed: Annotated[
        int | None,
        typer.Option(help="so many failed trials, and no other, end the search [default: 3]", rich_help_panel=_COMMAND),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over, removing all trials")] = False,
    json_: Json = False,
) -> None:
    """Try many settings, and keep the best run. The same command again goes on with what was cut off.

    orchestrator search job.yaml --num-trials 50

    orchestrator search --backbone microsoft/resnet-50 --data photos/ --space learning_rate='{loguniform: [1e-4, 1e-1]}'
    """
    from orchestrator.tuning import search as run_search

    given = dict(_domain(text) for text in space) if space else None
    with live() as report:
        result = run_search(
            job, given, num_trials=num_trials, scheduler=scheduler, search_alg=search_alg,
            max_concurrent=max_concurrent, time_budget=time_budget, metric=metric, seed=search_seed,
            num_seeds=num_seeds, max_failed=max_failed, fresh=fresh, report=report, **fields,
        )  # fmt: skip
    show_search(result, json_)


def _domain(text: str) -> tuple[str, Any]:
    key, value = parse_setting(text)
    if not isinstance(value, (list, dict)):
        raise JobError(
            f"--space {text!r} says not what to draw from", expected="KEY=[VALUE, ...] or KEY={loguniform: [A, B]}",
            mend=f"for example --space {key}='[1, 2]'; one value for all trials: --set {key}={value}",
        )  # fmt: skip
    return key, value


# --- while it runs ---


@contextlib.contextmanager
def live() -> Iterator[Report]:
    """A function that shows events: on a terminal the best trials so far above a bar, elsewhere a line now and then."""
    if not err.is_terminal:
        with progress() as report:
            yield report
        return
    with Live(console=err, transient=True, refresh_per_second=4) as screen:
        yield _Screen(screen)


class _Screen:
    """The best trials so far, and what is done now."""

    def __init__(self, screen: Live) -> None:
        self._screen = screen
        self._phase, self._done = PhaseBegan(""), 0
        self._trials: TrialsAdvanced | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, PhaseBegan):
            self._phase, self._done = event, event.done
        elif isinstance(event, Advanced):
            self._done += event.num
        elif isinstance(event, TrialsAdvanced):
            self._trials = event
        elif isinstance(event, Noted):
            what, style = ("warning", "bold yellow") if event.is_warning else ("note", "yellow")
            self._screen.console.print(Text(f"  {what} ", style=style).append(event.text, style="default"))
        if not isinstance(event, EpochEnded):
            self._screen.update(self._shown())

    def _shown(self) -> Group:
        share = f" {self._done / self._phase.total:.0%}" if self._phase.total else ""
        line = Text(f"{self._phase.text}{share}", style="bold")
        if self._trials is None:
            return Group(line)
        return Group(trials_table(self._trials), Text(counts(self._trials)), line)


def trials_table(event: TrialsAdvanced) -> Table:
    """The best trials so far."""
    names = list(dict.fromkeys(name for _, _, config in event.best for name in config))
    rows = [[number, figure(score), *(config.get(name, "") for name in names)] for number, score, config in event.best]
    return table(["trial", event.metric.replace("_", " "), *(one.replace("_", " ") for one in names)], rows, (0, 1))


def counts(event: TrialsAdvanced) -> str:
    """`12 of 16 trials, 2 running, 1 failed, some 40 s left`"""
    parts = [f"{event.num_done} of {event.num_trials} trials"]
    parts += [f"{event.num_running} running"] if event.num_running else []
    parts += [f"{event.num_failed} failed"] if event.num_failed else []
    left = event.seconds_left
    if left:
        parts.append(f"some {left:.0f} s left" if left < 120 else f"some {left / 60:.0f} min left")
    return ", ".join(parts)


# --- in the end ---


def show_search(result: SearchResult, as_json: bool) -> None:
    """The trials in order, the best run, and what is to be known of its score."""
    if as_json:
        print_json(result.as_dict())
        return
    order = result.ranked
    out.print(_table(result, order[:_NUM_SHOWN]))
    more = len(order) - _NUM_SHOWN
    if more > 0:
        out.print(f"and {counted(more, 'trial')} more in search.csv")
    for one in [one for one in result.trials if one.score is None][:3]:
        out.print(f"trial {one.number} {one.state}: {one.error}", markup=False, soft_wrap=True)
    if result.best_run is None:
        return
    show_results(result.best_run.results)
    where = _relative(result)
    out.print(pairs([
        ("note", result.caveat),
        ("search", f"{where}/search.csv, {where}/search.png"),
        ("model", f"{where.rpartition('/')[0] + '/' if '/' in where else ''}{result.best_run.name}/model"),
        ("next", f"orchestrator predict {where} FILE..."),
    ]))  # fmt: skip


def show_trials(tree: Mapping[str, Any]) -> None:
    """The trials of a search that comes from a cluster, as `SearchResult.as_dict` gives it."""
    metric, rows = tree["metric"], tree["trials"]
    scored = [row for row in rows if row[metric] is not None]
    scored.sort(key=lambda row: float(row[metric]), reverse=not metric.endswith("loss"))
    known = ("trial", "repeat", "state", metric, "epochs", "of", "seconds", "error")
    names = [key for key in (rows[0] if rows else {}) if key not in known]
    cells = [
        [row["trial"], figure(row[metric]), row["epochs"],
         *(f"{row[name]:.3g}" if isinstance(row[name], float) else row[name] for name in names)]
        for row in scored[:_NUM_SHOWN]
    ]  # fmt: skip
    titles = [one.rpartition(".")[2].replace("_", " ") for one in names]
    out.print(table(["trial", metric.replace("_", " "), "epochs", *titles], cells, (0, 1)))
    if len(scored) > _NUM_SHOWN:
        out.print(f"and {counted(len(scored) - _NUM_SHOWN, 'trial')} more")
    for row in [one for one in rows if one[metric] is None][:3]:
        out.print(f"trial {row['trial']} {row['state']}: {row['error']}", markup=False, soft_wrap=True)
    out.print(pairs([("note", tree["caveat"])]))


def _table(result: SearchResult, trials: Sequence[Trial]) -> Table:
    from orchestrator.tuning import shown_config

    configs = [shown_config(one.config, result.keys) for one in trials]
    names = list(dict.fromkeys(name for config in configs for name in config))
    rows = []
    for one, config in zip(trials, configs, strict=True):
        mean = result.mean_score(one)
        epochs = f"{len(one.lines)}" + ("" if len(one.lines) == one.num_epochs else f" of {one.num_epochs}")
        rows.append([one.number, figure(mean), epochs, *(config.get(name, "") for name in names)])
    metric = result.metric.key.replace("_", " ")
    return table(["trial", metric, "epochs", *(one.replace("_", " ") for one in names)], rows, (0, 1))


def _relative(result: SearchResult) -> str:
    if isinstance(result.search.at, Path) and result.path.is_relative_to(Path.cwd()):
        return str(result.path.relative_to(Path.cwd()))
    return result.place
