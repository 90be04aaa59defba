"""What a search is asked for beside its job and its space: from Python, flags, or the `search:` block of a job file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestrator.errors import JobError, did_you_mean
from orchestrator.job import Draft, nearest_value

BLOCK = "search"
"""The block of a job file: these settings; all else in it, or in its own block `space`, is the space."""


class SearchSettings(BaseModel):
    """How a search goes about it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)

    num_trials: int | None = Field(
        None, ge=1, le=100_000, description="trials in all; default: all points of a grid, otherwise 16"
    )
    scheduler: Any = Field(
        None, description="what stops trials early: asha, median, {asha: {grace_period: 2}}, or a scheduler of ray.tune"
    )
    search_alg: Any = Field(
        None, description="what proposes values: random, grid, optuna, or an algorithm of ray.tune.search"
    )
    max_concurrent: int | None = Field(
        None, ge=1, description="trials side by side that train more than a head; default: what there is room for"
    )
    time_budget: float | None = Field(
        None, gt=0, description="seconds after which no more is tried; the same command goes on from there"
    )
    metric: str | None = Field(None, description="validation_accuracy or validation_loss; default: by the task")
    seed: int = Field(0, ge=0, lt=2**32, description="of what is drawn; that of a trial's training is training.seed")
    num_seeds: int = Field(1, ge=1, le=100, description="the best three are trained with so many seeds")
    max_failed: int = Field(3, ge=1, description="so many failed trials, and none that ended well, end the search")


def first_fault(error: ValidationError) -> tuple[str, str, str]:
    """(the setting's dotted name, what is wrong with its value, what to do) of the first fault."""
    fault = error.errors(include_url=False)[0]
    name, message = ".".join(map(str, fault["loc"])), str(fault["msg"])
    return name, f"{name} = {fault.get('input')!r}: {message[:1].lower()}{message[1:]}", nearest_value(fault)


def settings_and_space(
    draft: Draft, space: Mapping[str, Any] | None, given: Mapping[str, Any]
) -> tuple[Draft, SearchSettings, Mapping[str, Any]]:
    """(the job without its search block, the settings, the space); what is given wins over the file.

    Raises `JobError`.
    """
    tree = dict(draft.tree)
    block = tree.pop(BLOCK, None)
    place = f"{draft.source}:{draft.lines[BLOCK]}: " if BLOCK in draft.lines else ""
    if block is not None and not isinstance(block, Mapping):
        raise JobError(f"{place}{BLOCK} is a block of settings", mend="give it a space: learning_rate: {loguniform: …}")
    own = {key: value for key, value in (block or {}).items() if key in SearchSettings.model_fields}
    rest = {key: value for key, value in (block or {}).items() if key not in own}
    inner = rest.pop("space", None)
    if inner is not None and (rest or not isinstance(inner, Mapping)):
        odd = next(iter(rest), "space")
        raise JobError(
            f"{place}{BLOCK}.{odd} stands beside {BLOCK}.space" if rest else f"{place}{BLOCK}.space is no mapping",
            expected="all keys in the one place", mend=did_you_mean(odd, SearchSettings.model_fields)
            or f"move {odd} into space",
        )  # fmt: skip
    try:
        settings = SearchSettings.model_validate({**own, **{key: one for key, one in given.items() if one is not None}})
    except ValidationError as error:
        name, said, mend = first_fault(error)
        where = place if name in own and given.get(name) is None else ""
        raise JobError(f"{where}{said}", mend=mend) from None
    of_the_file = inner if inner is not None else rest
    return replace(draft, tree=tree), settings, of_the_file if space is None else space
