"""The driver: a Job -> a Plan -> a worker in this process, or several on Ray -> a Run."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import (
    InterruptedRunError,
    JobError,
    OrchestratorError,
    RefusedError,
    TrainingError,
    missing_extra,
)
from orchestrator.gate import (
    ResolvedBackbone,
    drafted,
    gone_on_with,
    idle_workers,
    makes_again,
    note_lost_plan,
    prepare,
    refuse_changes,
    refuse_inside_data,
    resolve_backbone,
    rows_written,
    run_name,
    same_learning,
    texts_of,
    without_rows,
)
from orchestrator.job import (
    CHECKPOINTS,
    DATA_FOLDER,
    ERROR_FILE,
    HeldRun,
    Job,
    Noted,
    PhaseBegan,
    Plan,
    Report,
    Run,
    Stop,
    Storage,
    hold,
    is_uri,
    open_storage,
    run_in,
    stop_on_signal,
)
from orchestrator.modality import registry
from orchestrator.progress import progress
from orchestrator.rehearsal import rehearsed
from orchestrator.tracking import require_trackers, tracked

if TYPE_CHECKING:
    from orchestrator.training import WorkerSpec


def finetune(
    job: Job | Mapping[str, Any] | str | Path | None = None,
    /,
    *misplaced: object,
    fresh: bool = False,
    verify_content: bool = False,
    report: Report | None = None,
    stop: Stop | None = None,
    **fields: Any,
) -> Run:
    """Train, and return the finished Run.

    `job` is a Job, a dict or the path of a YAML file; `fields` are set on top of it: `method="full"`,
    `data="photos/"`, `training={"epochs": 3}`, `**{"training.epochs": 3}` or `epochs=3`, the name of a setting that
    one group alone has; `size=64` of the modality's own. `orchestrator settings` lists them. The same call again goes
    on with an unfinished run and returns a finished one; `fresh` starts over. With `verify_content` every sample is
    read to find out whether there are features of it, where by default a file of the same size and time of modification
    is taken to be the same.

    `report` is called with what happens (`orchestrator.job.Event`); by default a progress bar shows it. `stop` is asked
    often; once it returns true the run stops, resumable. By default Ctrl-C and SIGTERM do that; a caller that gives
    a `stop` handles signals itself.

    Raises `RefusedError` (with `JobError`, `DataError`, `PluginError` and `ChangedError`) before anything is downloaded
    or scheduled, `TrainingError` when it failed, and `InterruptedRunError` after it was stopped: the same call again
    resumes.
    """
    _refuse_misplaced(misplaced)
    return _start(job, fields, fresh, verify_content, report, stop)


def pretrain(
    job: Job | Mapping[str, Any] | str | Path | None = None,
    /,
    *misplaced: object,
    fresh: bool = False,
    report: Report | None = None,
    stop: Stop | None = None,
    **fields: Any,
) -> Run:
    """`finetune` with method `scratch`: train the backbone's architecture from random weights.

    The run is a backbone for a later `finetune`.
    """
    _refuse_misplaced(misplaced)
    return _start(job, {**fields, "method": "scratch"}, fresh, False, report, stop)


def _refuse_misplaced(misplaced: Sequence[object]) -> None:
    if misplaced:
        raise JobError(
            f"{len(misplaced) + 1} values stand without a name", expected="a job file alone, and fields by name",
            mend="name them: backbone=..., data=...",
        )  # fmt: skip


@dataclass(frozen=True)
class RunOptions:
    """What is asked of this call alone, and is no part of the job."""

    fresh: bool
    verify_content: bool
    report: Report
    stop: Stop | None


def _start(
    job: Job | Mapping[str, Any] | str | Path | None, fields: Mapping[str, Any], fresh: bool, verify_content: bool,
    report: Report | None, stop: Stop | None,
) -> Run:  # fmt: skip
    with contextlib.nullcontext(report) if report is not None else progress() as report:
        options = RunOptions(fresh, verify_content, report, stop)
        draft = drafted(job, fields)
        known = without_rows(draft)
        require_trackers(known.log)
        report(PhaseBegan("looking at backbone and data"))
        resolved = resolve_backbone(known)
        # Rows that the caller holds are written down once, on the storage, and are a table from then on.
        with rows_written(draft, open_storage(known.storage)) as settled:
            try:
                return _run(settled.job(), resolved, options)
            except InterruptedRunError as error:
                if fresh:
                    error.mend = "the same command without --fresh goes on from there"
                raise


def _run(job: Job, resolved: ResolvedBackbone, options: RunOptions) -> Run:
    run = _run_of(job, resolved, options)
    refuse_inside_data(run.place, job)
    if is_uri(run.storage.place) and run.busy:  # in a directory that is known at once
        options.report(PhaseBegan("looking whether the one that holds this run is alive: up to a minute"))
    with hold(run.storage, run.name) as held:
        was_there = held.read("plan.json") is not None
        plan = _laid_out(run, held, job, resolved, options)
        again = makes_again(run, held, options.report)
        if run.finished and not again:
            text = "this run was finished before: these are its figures, nothing was trained (--fresh starts over)"
            options.report(Noted(text))
            for warning in run.results.get("warnings", ()):
                options.report(Noted(warning, is_warning=True))
            with tracked(job.log, held, plan, run, options.report):  # of which something may not have been sent
                return run
        for line in (*plan.adaptations, *plan.data.notes):
            options.report(Noted(str(line)))
        for line in (*plan.warnings, *plan.data.warnings):
            options.report(Noted(line, is_warning=True))
        if os.environ.get("RAY_ADDRESS") and plan.job.scaling.address is None:
            options.report(
                Noted("RAY_ADDRESS is set, and this job runs on this machine: --address auto joins that cluster")
            )
        try:
            _work(held, plan, resolved.plugin.extra, options, job.log)
        except RefusedError:
            if not was_there:
                _forget(held)
            raise
    return run


def _forget(run: HeldRun) -> None:
    """Leave nothing of a run that was refused before its first checkpoint: the next start begins as it is asked to."""
    with contextlib.suppress(OrchestratorError):  # somebody else's by now, or the storage is away
        left = run.leaving()
        if not left.commits(CHECKPOINTS):
            left.clear()


def train_as_planned(run: Run, report: Report, stop: Stop) -> Run:
    """Train a run that was laid out to its end, as its plan says: neither its job nor its data is looked at again.

    `report` and `stop` as of `finetune`, and so is what it raises.
    """
    with hold(run.storage, run.name) as held:
        plan = run.plan
        if not run.finished:
            options = RunOptions(False, False, report, stop)
            _work(held, plan, registry.get(plan.job.modality).extra, options, plan.job.log)
    return run


def _work(held: HeldRun, plan: Plan, extra: str, options: RunOptions, log: Sequence[str]) -> None:
    """Have the plan's workers train; returns once the run has finished. `log`: the services that hear of it."""
    run = run_in(held.storage, held.name)
    with (
        _errors_of_libraries(held, extra),
        stop_on_signal(options.stop) as should_stop,
        tracked(log, held, plan, run, options.report) as report,
    ):
        work = _on_ray if plan.ray else _in_process
        work(_worker_spec(held, plan, options), plan, report, should_stop)
        if not run_in(held.storage, held.name).finished:
            raise InterruptedRunError("stopped before the first step", mend="the same command goes on")


def _run_of(job: Job, resolved: ResolvedBackbone, options: RunOptions) -> Run:
    """The run of that name. A job without one may have begun on another number of workers: then it goes on with that.

    How many microbatches a batch has is part of a run's name, and by default there is one for each worker.
    """
    storage = open_storage(job.storage)
    run = run_in(storage, job.name or run_name(job, resolved.card))
    if job.name is not None or job.training.num_microbatches is not None or options.fresh or run.is_there:
        return run
    return run_like(storage, run.name, job) or run


def run_like(storage: Storage, name: str, job: Job) -> Run | None:
    """A run that has begun and learns what the job asks for, though the job's own name would be that one."""
    prefix = name.rpartition("-")[0]
    storage.require()
    for other in (run_in(storage, one) for one in storage.children()):
        with contextlib.suppress(RefusedError):  # damaged, or of an earlier version
            like_it = other.name.rpartition("-")[0] == prefix and not other.is_earlier
            has_begun = like_it and (other.finished or storage.commits(f"{other.name}/{CHECKPOINTS}"))
            if has_begun and same_learning(job, other.plan):
                return other
    return None


def _worker_spec(run: HeldRun, plan: Plan, options: RunOptions) -> WorkerSpec:
    from orchestrator.training import WorkerSpec

    name = plan.job.modality
    return WorkerSpec(
        plan.model_dump_json(), run.storage.place, run.lease, options.verify_content,
        registry.get(name) if registry.is_registered(name) else None,
    )  # fmt: skip


def _laid_out(run: Run, held: HeldRun, job: Job, resolved: ResolvedBackbone, options: RunOptions) -> Plan:
    """The run's plan: of an unfinished run the one that it began with, else a new one, with its sample table."""
    if not options.fresh and held.read("plan.json") is not None:
        with _samples_made_again(run, held, options.report) as folder:
            began, plan = run.plan, prepare(job, resolved, folder)[0]
            refuse_changes(run.place, began, plan)
        has_nothing = not run.finished and not held.commits(CHECKPOINTS) and not held.torn(CHECKPOINTS)
        if has_nothing and began.recipe.num_microbatches != plan.recipe.num_microbatches:
            return _laid_out(run, held, job, resolved, replace(options, fresh=True))
        plan = gone_on_with(began, plan)
        if has_nothing:
            options.report(Noted("going on with a run that was cut off before its first checkpoint: from step 0"))
        idle, parts = idle_workers(plan), plan.recipe.num_microbatches
        if idle and not run.finished:
            options.report(Noted(
                f"the run began with batches in {'one part' if parts == 1 else f'{parts} parts'}, one for each worker: "
                f"{idle} of {plan.num_workers} workers have none in a step (--fresh starts over, with one for each)"
            ))  # fmt: skip
        return plan
    from orchestrator.data import tables_in

    if not options.fresh:
        note_lost_plan(run, options.report)
    with held.scratch() as folder:
        plan, prepared = prepare(job, resolved, folder)
        plan = rehearsed(plan, prepared, resolved)
        texts = texts_of(job, plan, prepared)  # what cannot be written down is found before anything is removed
        held.clear()  # also what is left of one that a start over was cut off in removing
        tables_in(held.storage).put(folder, held)
    for name, text in texts.items():  # plan.json, written last, says that the run is there
        held.write(name, text)
    return plan


@contextlib.contextmanager
def _samples_made_again(run: Run, held: HeldRun, report: Report) -> Iterator[Path | None]:
    """Where a run that goes on has no sample table: a folder for one, which is kept if it is the one that it had.

    So it is in a run that was copied to another storage. Raises `RefusedError` where it is of an earlier version, or
    the data gives another table.
    """
    from orchestrator.data import key_of, table_key, table_of, tables_in

    if run.finished or (not run.is_earlier and table_of(run) is not None):
        yield None
        return
    key, why = key_of(run), "is of an earlier version" if run.is_earlier else "has lost its samples"
    if key is not None and not run.is_earlier:
        with held.scratch() as folder:
            yield folder
            if table_key(folder) == key:
                tables_in(held.storage).put(folder, held)
                report(Noted("its sample table was not in its storage: made again from the data, and the same"))
                return
        why += ", and its data gives others"
    raise RefusedError(
        "damaged", f"the run {run.place} {why}, and cannot be gone on with",
        expected=f"its sample table, in {DATA_FOLDER}/ of its storage",
        mend="start over with fresh (--fresh), or keep both: name (--name)",
    )  # fmt: skip


@contextlib.contextmanager
def _errors_of_libraries(run: HeldRun, extra: str) -> Iterator[None]:
    """What a library raises becomes one of ours, with its own text; the trace goes into the run."""
    try:
        with run.storage.at_work():
            yield
    except (OrchestratorError, KeyboardInterrupt):
        raise
    except Exception as error:
        refusal = missing_extra(error, extra) if isinstance(error, ImportError) else None
        if refusal is not None:
            raise refusal from error
        with contextlib.suppress(OrchestratorError):  # the disk may be what is full
            run.write(ERROR_FILE, traceback.format_exc())
        raise TrainingError(
            f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}",
            mend=f"the whole trace is in {run.place}/{ERROR_FILE}; the same command goes on from the last checkpoint",
        ) from error


# --- who works ---


def _in_process(spec: WorkerSpec, plan: Plan, report: Report, should_stop: Stop) -> None:
    """One worker, in this process: no cluster, and nothing of Ray is imported."""
    from orchestrator.network import find_device, start_worker
    from orchestrator.training import run_worker

    device, deterministic = find_device(plan.job.scaling.device), plan.job.training.deterministic
    if plan.job.scaling.device == "auto":
        report(Noted(f"device auto: {'no GPU here, so on the CPU' if device.type == 'cpu' else f'on {device}'}"))
    with start_worker(plan.threads_per_worker, device, deterministic=deterministic) as worker:
        run_worker(spec, worker, report, should_stop)


def _on_ray(spec: WorkerSpec, plan: Plan, report: Report, should_stop: Stop) -> None:
    """Workers of Ray Train."""
    from orchestrator.distributed.cluster import run_on_ray

    run_on_ray(plan, spec, report, should_stop)
