"""A search: trials of one job over a space, side by side where they share work; the best one becomes a finished run."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.errors import ChangedError, OrchestratorError, RefusedError
from orchestrator.gate import drafted, rows_written
from orchestrator.job import (
    BEST_OF_SEARCH,
    SEARCH_FILE,
    Draft,
    HeldRun,
    Job,
    Noted,
    PhaseBegan,
    Plan,
    Report,
    Stop,
    Storage,
    is_trial_of,
    open_storage,
    patient,
    run_in,
    stop_on_signal,
    this_process,
)
from orchestrator.progress import progress
from orchestrator.train import train_as_planned
from orchestrator.tuning.layout import Layout, refuse_changed
from orchestrator.tuning.pictures import draw_pictures
from orchestrator.tuning.probes import FOLDER
from orchestrator.tuning.proposals import make_algorithm
from orchestrator.tuning.result import CSV_FILE, SearchResult, as_csv, search_of
from orchestrator.tuning.settings import SearchSettings, settings_and_space
from orchestrator.tuning.space import Config, Space, draft_with, make_space, values_of
from orchestrator.tuning.trials import Book, Metric, make_metric
from orchestrator.tuning.work import Work

_NUM_TRIALS = 16
_NUM_LOOKED_AT = 20
"""Draws for a backbone before it is said that none of them can be."""
_NUM_KEPT = 3
"""The best so many trials keep their checkpoints."""
_VERSION = 1
_BEFORE = {"samples.json", "features.json"}
"""What is there of a search that was cut off before it began."""


def search(
    job: Job | Mapping[str, Any] | str | Path | None = None,
    /,
    space: Mapping[str, Any] | None = None,
    *,
    num_trials: int | None = None,
    scheduler: Any = None,
    search_alg: Any = None,
    max_concurrent: int | None = None,
    time_budget: float | None = None,
    metric: str | None = None,
    seed: int | None = None,
    num_seeds: int | None = None,
    max_failed: int | None = None,
    fresh: bool = False,
    report: Report | None = None,
    stop: Stop | None = None,
    **fields: Any,
) -> SearchResult:
    """Try settings of a job, and return the trials with the best of them as a finished run.

    `job` and `fields` as of `finetune`; a job file may have all else in its block `search`. `space`: keys of the job,
    `learning_rate` as well as `training.learning_rate`, and what their values are drawn from: domains of `ray.tune`,
    lists, {"grid_search": [...]}, or as in a job file {"loguniform": [1e-5, 1e-2]}.

    `num_trials`: in all, 16 by default, or all points of a grid. `scheduler`, `search_alg`: Ray Tune's own, or `asha`,
    `median`; `random`, `grid`, `optuna`. `max_concurrent`: trials side by side that train more than a head.
    `time_budget`: seconds. `metric`: `validation_accuracy` or `validation_loss`. `seed`: of what is drawn.
    `num_seeds`: the best three are trained with so many. `max_failed`: so many failures and no success end it.

    Trials of a frozen body are heads that are trained side by side on features that are computed once. All others are
    runs in processes of Ray Tune's. Trials are judged by the validation split; the test split is read once, by the best
    one. The same call again goes on with what was cut off, with more trials if `num_trials` is raised; `fresh` starts
    over. `report` and `stop` as of `finetune`.

    Raises `RefusedError` before anything starts, `TrainingError` where trials only fail, and `InterruptedRunError`
    after it was stopped, when the same call goes on.
    """
    given = {
        "num_trials": num_trials, "scheduler": scheduler, "search_alg": search_alg, "max_concurrent": max_concurrent,
        "time_budget": time_budget, "metric": metric, "seed": seed, "num_seeds": num_seeds, "max_failed": max_failed,
    }  # fmt: skip
    with contextlib.nullcontext(report) if report is not None else progress() as report:
        draft, settings, asked = settings_and_space(drafted(job, fields), space, given)
        storage = open_storage(str(draft.tree.get("storage") or Job.model_fields["storage"].default))
        # Rows that the caller holds are written down once, on the storage, and are a table from then on.
        with rows_written(draft, storage) as written, stop_on_signal(stop) as should_stop:
            return _search(written, storage, make_space(asked, written), settings, fresh, report, should_stop)


def _search(
    draft: Draft,
    storage: Storage,
    space: Space,
    settings: SearchSettings,
    fresh: bool,
    report: Report,
    should_stop: Stop,
) -> SearchResult:
    first = draft_with(draft, next(space.draws(settings.seed))).job()
    metric = make_metric(first.task, settings.metric)
    algorithm = make_algorithm(settings.search_alg, space, settings.seed)
    digest = _digest(first, space, settings, metric)
    name = first.name or search_name(first, space, settings)
    with _held(storage, name, fresh) as began:
        held = patient(began, lambda text: report(Noted(text, is_warning=True)), lambda _away_s: should_stop())
        book = Book(held)
        if book.spec and book.spec.get("digest") != digest:
            raise _changed(held, book.spec, space)
        layout = Layout(draft, held, report)
        plans = [first_plan(layout, space, settings, one) for one in backbones_of(space, first)]
        refuse_changed(held.place, book.spec.get("seen", {}), layout.seen())
        metric = replace(metric, num_validation=plans[0].data.num_samples["validation"])
        work = Work(
            space, settings, metric, layout, book, algorithm, report, should_stop,
            num_trials=_num_trials(space, settings), num_epochs=max(plan.recipe.num_epochs for plan in plans),
        )  # fmt: skip
        keys = list(space.domains)
        book.write_spec({
            "version": _VERSION, "digest": digest, "metric": metric.key, "mode": metric.mode, "task": metric.task,
            "space": space.described(), "seed": settings.seed, "num_trials": work.num_trials,
            "num_validation": metric.num_validation,
            **{key: value for key, value in book.spec.items() if key == BEST_OF_SEARCH}, "seen": layout.seen(),
        })  # fmt: skip
        with storage.at_work():
            grid = work.run()
            best = work.best()
            if best is not None:
                report(PhaseBegan(f"the best trial, number {best.number}, to its end"))
                run = layout.lay_out(best.key, best.config, layout.plan_of(best.key, best.config))
                train_as_planned(run, report, should_stop)
                book.write_spec({**book.spec, BEST_OF_SEARCH: run.name})
            _prune(layout, [one.key for one in work.ranked()[:_NUM_KEPT]], book)
            result = search_of(run_in(held.storage, held.name))
            held.write(CSV_FILE, as_csv(result))
            for file, content in draw_pictures(result, space, report).items():
                held.write(file, content)
        report(Noted(result.caveat))
    return SearchResult(result.search, result.trials, metric, tuple(keys), result.best_run, result.num_validation, grid)


def _digest(job: Job, space: Space, settings: SearchSettings, metric: Metric) -> str:
    """Of what is searched: job, space, seed, metric; not of how many trials, how, or where."""
    identity = job.identity()
    for key in space.domains:
        group, _, inner = key.rpartition(".")
        place = identity.get(group, {}) if group else identity
        if isinstance(place, dict):
            place.pop(inner, None)
    known = {key: value for key, value in identity.items() if value != {}}
    whole = [_VERSION, known, space.described(), settings.seed, metric.key]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:8]


def _changed(held: HeldRun, before: Mapping[str, Any], space: Space) -> ChangedError:
    was, now = before.get("space", {}), space.described()
    odd = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    what = f"{odd[0]}: {was.get(odd[0])} -> {now.get(odd[0])}" if odd else "its job, seed or metric"
    return ChangedError(
        f"the search {held.place} began with another space or job: {what}",
        expected="the same, but for num_trials",
        mend="start over with fresh (--fresh), or keep both: name (--name)",
    )


def _num_trials(space: Space, settings: SearchSettings) -> int:
    if space.is_grid:
        return min(settings.num_trials or space.num_grid_points, space.num_grid_points)
    return settings.num_trials or max(_NUM_TRIALS, space.num_grid_points)


def search_name(first: Job, space: Space, settings: SearchSettings) -> str:
    """Of a search that is given none; `first`: the job of its first trial."""
    digest = _digest(first, space, settings, make_metric(first.task, settings.metric))
    return f"search-{first.modality}-{digest}"


def backbones_of(space: Space, first: Job) -> list[str]:
    """All that its trials begin with."""
    return values_of(space.domains.get("backbone")) or [first.backbone]


def first_plan(layout: Layout, space: Space, settings: SearchSettings, backbone: str) -> Plan:
    """The plan of a trial of that backbone. Raises `RefusedError` where none of the first draws can be."""
    problem: RefusedError | None = None
    draws = space.draws(settings.seed)
    for _ in range(_NUM_LOOKED_AT):
        config: Config = next(draws)
        if "backbone" in space.domains:
            config = {**config, "backbone": backbone}
        try:
            return layout.plan_of((0, 0), config)
        except RefusedError as error:
            if layout.search.storage.has_failed(error):
                raise
            problem = problem or error
    assert problem is not None
    raise problem


# --- the search's own place ---


@contextlib.contextmanager
def _held(storage: Storage, name: str, fresh: bool) -> Iterator[HeldRun]:
    """The search's place, for this process alone. Raises `RefusedError` where something else has its place."""
    there = storage.children(name)
    if storage.local_folder(name).is_file() or (SEARCH_FILE not in there and set(there) - _BEFORE):
        what = "a run" if "plan.json" in there else "something else"
        raise RefusedError(
            "usage", f"{storage.place_of(name)} is {what}, and no search", expected="a free name, or a search's",
            mend="give the search another name (--name)",
        )  # fmt: skip
    with storage.acquire(name, this_process()) as lease:
        run = HeldRun(storage, lease)
        run.collect_orphans()
        if fresh:
            for child in [one for one in storage.children() if is_trial_of(run_in(storage, name), one)]:
                with storage.acquire(child, lease.owner) as of_trial:
                    storage.delete(child, of_trial)
                    storage.give_up(of_trial)
            for file in reversed(run.children("")):  # what says that it is a search goes last
                if file != SEARCH_FILE:
                    run.delete(file)
            run.delete(SEARCH_FILE)
        try:
            yield run
        finally:
            with contextlib.suppress(OrchestratorError):  # a store that is away: what ended it is said, not this
                left = run.leaving()
                if SEARCH_FILE not in left.children(""):
                    for file in left.children(""):
                        left.delete(file)
                    storage.give_up(lease)


def _prune(layout: Layout, kept: list[tuple[int, int]], book: Book) -> None:
    """Remove the checkpoints of trials that have ended, but of the best; their plans and epochs stay."""
    layout.search.delete(FOLDER)
    for key in book.trials:
        run = layout.run_of(key)
        if key in kept or not run.storage.children(f"{run.name}/checkpoints"):
            continue
        with contextlib.suppress(RefusedError), run.storage.acquire(run.name, "a search") as lease:
            run.storage.delete(f"{run.name}/checkpoints", lease)
