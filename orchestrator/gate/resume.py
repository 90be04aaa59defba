"""A plan against the one that an unfinished run began with: may it go on, and by which of the two. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.errors import ChangedError
from orchestrator.job import NOT_LEARNT, Job, Plan, is_materialised

_WHO_WORKS = ("num_workers", "threads_per_worker", "num_extractors", "extractor_threads", "ray")


def as_it_began(job: Job, began: Plan) -> Job:
    """The job with what it leaves open decided as the run decided it: how many microbatches a batch has."""
    if job.training.num_microbatches is not None or began.job.training.num_microbatches is not None:
        return job
    training = job.training.model_copy(update={"num_microbatches": began.recipe.num_microbatches})
    return job.model_copy(update={"training": training})


def same_learning(job: Job, began: Plan) -> bool:
    """Whether the job asks to learn what the run learns, wherever and on how many workers."""
    return as_it_began(job, began).identity() == as_it_began(began.job, began).identity()


def refuse_changes(place: str, began: Plan, now: Plan) -> None:
    """Raise `ChangedError` where the run at `place` began with another job, other data or another backbone."""
    jobs = [as_it_began(plan.job, began) for plan in (began, now)]
    for what, before, after in (
        ("the job", *(job.digest() for job in jobs)),
        ("the data", began.data.fingerprint, now.data.fingerprint),
        ("the backbone", began.backbone.commit, now.backbone.commit),
    ):
        if before != after:
            raise ChangedError(
                f"{what} of the run {place} has changed since it began" + _differences(what, began, now),
                expected=f"{what} as it was: {str(before).removeprefix('sha256:')[:12]}",
                mend="start over with fresh (--fresh), or keep both: name (--name)",
            )


def gone_on_with(began: Plan, now: Plan) -> Plan:
    """The plan of a run that goes on: its recipe and its data, on the workers that are asked for now.

    As long as the same workers are asked for, they have the threads that they had, also on a larger machine: so the run
    ends as if it had never stopped.
    """
    scaling = now.job.scaling
    same = began.job.scaling.model_copy(update={"num_extractors": scaling.num_extractors}) == scaling
    who = {name: getattr(now, name) for name in _WHO_WORKS}
    if same:
        who["threads_per_worker"] = _threads(began, now)
    job = began.job.model_copy(update={"feature_store": now.job.feature_store, "scaling": scaling})
    return began.model_copy(update={"job": job, **who})


def _threads(began: Plan, now: Plan) -> int:
    """As many as before, or as this machine has where those are fewer: more than the cores are many times slower."""
    if now.job.scaling.threads_per_worker is not None or not now.threads_per_worker:
        return began.threads_per_worker
    return min(began.threads_per_worker, now.threads_per_worker)


def idle_workers(plan: Plan) -> int:
    """How many workers have no microbatch to compute: of a run that began on fewer."""
    return max(0, plan.num_workers - plan.recipe.num_microbatches)


def _differences(what: str, began: Plan, now: Plan) -> str:
    """What changed, in words, as far as the plans tell."""
    if what == "the data":
        were, are = (", ".join(f"{k} {n}" for k, n in one.data.num_samples.items()) for one in (began, now))
        return f": samples were {were}, are {are}"
    if what != "the job":
        return ""
    old, new = (_flat(plan.job.model_dump(mode="json", exclude=dict(NOT_LEARNT))) for plan in (began, now))
    if any(is_materialised(str(new[key])) and old.get(key) != new[key] for key in new):
        return ": the rows of the data are others"
    changes = [f"{key}: {old.get(key)} -> {new.get(key)}" for key in new | old if old.get(key) != new.get(key)]
    before, after = (as_it_began(plan.job, began).num_microbatches for plan in (began, now))
    if before != after:
        changes.append(f"training.num_microbatches: {before} -> {after}")
    return ": " + ", ".join(changes[:3])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
