"""Which backbone to take: candidates through the gate, a race on frozen features, a table."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator.backbone import find_on_hub
from orchestrator.errors import JobError, OrchestratorError, RefusedError, TrainingError
from orchestrator.gate import ResolvedBackbone, drafted, rows_written, without_rows
from orchestrator.job import (
    DirectoryStorage,
    HeldRun,
    Job,
    Noted,
    Report,
    Stop,
    hold,
    open_storage,
    patient,
    shown,
    stop_on_signal,
)
from orchestrator.modality import registry
from orchestrator.network import find_device, start_worker
from orchestrator.probing import SCORES
from orchestrator.progress import progress
from orchestrator.tuning.candidates import Candidate, Gate, failed_row, num_parameters, refused_row, require_meant
from orchestrator.tuning.race import Race
from orchestrator.tuning.standings import RankRow, RankTable, compare

NUM_SAMPLES = 10_000
"""Samples of the last comparison, by default: more change no order."""
NUM_FROM_HUB = 8


def rank(
    backbones: Sequence[str] = (),
    *,
    from_hub: str | None = None,
    num_from_hub: int = NUM_FROM_HUB,
    num_samples: int = NUM_SAMPLES,
    report: Report | None = None,
    stop: Stop | None = None,
    **fields: Any,
) -> RankTable:
    """Compare frozen backbones on your data, by a cross-validated linear probe on their features; the best first.

    `backbones` are what `finetune` takes as one; `from_hub` asks the Hub for more: "image-classification, < 100M" are
    the most downloaded of that task with fewer parameters, at most `num_from_hub` of them. `fields` are those of
    `finetune`: `data="photos/"`, `modality="text"`, `size=96`. Each candidate goes through the gate; one that is
    refused or fails is a row with the reason. All run on samples of the training and validation splits, a few at first;
    who falls behind leaves. The features lie where jobs look for them: the `finetune` that follows with the best one
    computes none. `report` and `stop` as of `finetune`.

    Raises `RefusedError` for a job that cannot be meant, data that cannot be learnt from, or where all candidates are
    refused; `TrainingError` where all of the others failed; `InterruptedRunError` after it was stopped, when the same
    call goes on with the features that are there.
    """
    with contextlib.nullcontext(report) if report is not None else progress() as report, contextlib.ExitStack() as held:
        should_stop = held.enter_context(stop_on_signal(stop))
        names, rows = _names(backbones, from_hub, num_from_hub)
        job = _job(names, rows, num_samples, fields)
        storage = open_storage(job.storage)
        # A run of its own that nobody sees: it holds the sample table while features are computed of it.
        began = held.enter_context(hold(storage, f".rank-{ranking_digest(job, names)}"))
        held.callback(_forgotten, began)
        run = patient(began, lambda text: report(Noted(text, is_warning=True)), lambda _away_s: should_stop())
        gate = Gate(job, run, report)
        known: dict[str, ResolvedBackbone] = {}
        for name in names:
            try:
                known[name] = gate.resolved(name)
            except RefusedError as error:
                rows.append(refused_row(name, error))
        _require_some(known, rows)
        # Rows that the caller holds are where the jobs that follow have them too.
        draft = drafted(None, {**fields, "backbone": next(iter(known)), "method": "head"})
        written = held.enter_context(rows_written(draft, storage)).job()
        gate.job = job = job.model_copy(update={"data": written.data})
        candidates: list[Candidate] = []
        for name, resolved in known.items():
            try:
                candidates.append(gate.admit(name, resolved))
            except RefusedError as error:
                nobody_can_train = not candidates and error.reason == "data"
                if nobody_can_train or storage.has_failed(error):
                    raise
                rows.append(refused_row(name, error))
        _require_some(candidates, rows)
        first = candidates[0].plan
        device = find_device(job.scaling.device)
        with storage.at_work(), start_worker(first.threads_per_worker, device) as worker:
            race = Race(run, worker, registry.get(job.modality), first.job.training.seed, report, should_stop)
            ranked = race.run(candidates, num_samples)
        if not ranked:
            raise _all_failed(candidates)
        return _table(ranked, candidates, rows, job)


def _forgotten(run: HeldRun) -> None:
    with contextlib.suppress(OrchestratorError):  # what ended the ranking is said, not that its storage is away
        run.leaving().clear()


def ranked_job(
    backbones: Sequence[str], from_hub: str | None, num_from_hub: int, num_samples: int, fields: dict[str, Any]
) -> tuple[list[str], Job]:
    """(the candidates, the job that they have in common), as `rank` takes them. Raises `RefusedError`."""
    names, rows = _names(backbones, from_hub, num_from_hub)
    _require_some(names, rows)
    return names, _job(names, rows, num_samples, fields)


def first_candidate(names: Sequence[str], job: Job, report: Report) -> Candidate:
    """The first that the gate lets through. Raises `RefusedError` where it lets none."""
    rows: list[RankRow] = []
    with (
        TemporaryDirectory(prefix="orchestrator-rank-") as folder,
        hold(DirectoryStorage(Path(folder)), "rank") as held,
    ):
        gate = Gate(job, held, report)
        for name in names:
            try:
                return gate.admit(name, gate.resolved(name))
            except RefusedError as error:
                if error.reason == "data":  # nobody could be trained on it
                    raise
                rows.append(refused_row(name, error))
    _require_some((), rows)
    raise AssertionError("a ranking has a candidate")


def ranking_digest(job: Job, names: Sequence[str]) -> str:
    """Of what is compared: the data and what is made of it, and the backbones."""
    return hashlib.sha256(json.dumps([job.identity(), list(names)]).encode()).hexdigest()[:8]


def _names(backbones: Sequence[str], from_hub: str | None, num_from_hub: int) -> tuple[list[str], list[RankRow]]:
    """(the candidates, each once; rows of those that the Hub names and that are skipped)."""
    if isinstance(backbones, str):
        raise JobError("backbones is one text", expected="a list of backbones", mend=f"backbones=[{backbones!r}]")
    names, rows = list(backbones), []
    if from_hub is not None:
        for found in find_on_hub(from_hub, num_from_hub):
            if found.refusal is None:
                names.append(found.name)
            else:
                rows.append(refused_row(found.name, found.refusal))
    if not names and not rows:
        raise JobError(
            "there is no backbone to rank", expected="two or more",
            mend="name some, or ask the Hub: from_hub='image-classification, < 100M' (--from-hub)",
        )  # fmt: skip
    return list(dict.fromkeys(names)), rows


def _job(names: Sequence[str], rows: Sequence[RankRow], num_samples: int, fields: dict[str, Any]) -> Job:
    """The job that all candidates have in common, with a dash where rows of a program are. Raises `JobError`."""
    for name in ("backbone", "method", "name"):
        if name in fields:
            raise JobError(
                f"{name} is set, and a ranking has none", expected="backbones, data and settings of the input",
                mend=f"leave {name} out",
            )  # fmt: skip
    if num_samples < 2:
        raise JobError(f"num_samples = {num_samples}", expected="2 or more", mend="leave it out")
    job = without_rows(drafted(None, {**fields, "backbone": names[0] if names else rows[0].backbone, "method": "head"}))
    if job.scaling.num_workers > 1 or job.scaling.num_extractors or job.scaling.address:
        raise JobError(
            "a ranking runs in this process", expected="scaling without workers, extractors and an address",
            mend="leave them out; the features that it stores are those of any job",
        )  # fmt: skip
    require_meant(job)
    training = job.training.model_copy(update={"features": "once", "views": None})
    return job.model_copy(update={"training": training})


def _require_some(accepted: Any, rows: Sequence[RankRow]) -> None:
    """Raise `RefusedError` where no candidate was let through."""
    if accepted:
        return
    problems = [(row.name, row.problem or {}) for row in rows]
    why = "; ".join(f"{name}: {problem['message']} ({problem['reason']})" for name, problem in problems)
    raise RefusedError(
        problems[0][1]["reason"], f"none of {len(rows)} backbones can be used: {why}",
        expected=problems[0][1]["expected"], mend=problems[0][1]["mend"],
    )  # fmt: skip


def _all_failed(candidates: Sequence[Candidate]) -> TrainingError:
    problems = [(one.name, one.problem or {}) for one in candidates]
    why = "; ".join(f"{name}: {problem['message']}" for name, problem in problems)
    return TrainingError(f"each of {len(candidates)} backbones failed: {why}", mend=problems[0][1].get("mend", ""))


def _table(
    ranked: Sequence[Candidate], candidates: Sequence[Candidate], rows: Sequence[RankRow], job: Job
) -> RankTable:
    best = ranked[0]
    left = [one for one in candidates if one not in ranked and one.problem is None]
    left.sort(key=lambda one: (one.num_samples, one.standings[one.num_samples].key), reverse=True)
    made = [_row(one, best, "ranked") for one in ranked] + [_row(one, best, "left") for one in left]
    made += [failed_row(one) for one in candidates if one.problem is not None and one not in ranked]
    return RankTable(
        (*made, *rows), job.task, SCORES[job.task], best.num_samples, job.modality, shown(job.data.path)
    )  # fmt: skip


def _row(candidate: Candidate, best: Candidate, state: Any) -> RankRow:
    standing = candidate.standings[candidate.num_samples]
    behind, is_beyond_noise = compare(best.standings[candidate.num_samples].fold_scores, standing.fold_scores)
    of_best = candidate is best
    return RankRow(
        candidate.source, candidate.name, state, standing.score, standing.interval, standing.neighbours,
        candidate.num_samples, None if of_best or behind != behind else behind, None if of_best else is_beyond_noise,
        num_parameters(candidate.plan), candidate.samples_per_s, round(candidate.seconds, 2), candidate.full_minutes,
        candidate.full_is_measured, candidate.problem,
    )  # fmt: skip
