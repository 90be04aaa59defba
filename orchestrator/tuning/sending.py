"""A search or a ranking as a job for a cluster: checked here, sent whole, and run there as anywhere.

What it is asked for beside its job stands in the job's block `search` or `rank`, as in a job file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestrator.distributed.request import Sent
from orchestrator.errors import JobError, RefusedError, did_you_mean
from orchestrator.job import DirectoryStorage, Draft, Job, Report, Stop, hold, nearest_value, whole
from orchestrator.tuning.directory import directory_of
from orchestrator.tuning.layout import Layout
from orchestrator.tuning.ranking import NUM_FROM_HUB, NUM_SAMPLES, first_candidate, rank, ranked_job, ranking_digest
from orchestrator.tuning.settings import BLOCK, settings_and_space
from orchestrator.tuning.space import Space, draft_with, make_space, values_of
from orchestrator.tuning.study import backbones_of, first_plan, search, search_name

RANK_BLOCK = "rank"


class RankSettings(BaseModel):
    """What a ranking is asked for beside its data: the block `rank` of a job file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbones: tuple[str, ...] = Field((), description="org/name, directories, or earlier runs")
    from_hub: str | None = Field(None, description="more of the Hub: 'image-classification, < 100M'")
    num_from_hub: int = Field(NUM_FROM_HUB, ge=1, description="so many of them at most")
    num_samples: int = Field(NUM_SAMPLES, ge=2, description="the last who are left are compared on so many")


def search_to_send(draft: Draft, report: Report) -> Sent:
    """The search of that job and its block. Raises `RefusedError`, as `search` does before anything starts."""
    bare, settings, asked = settings_and_space(draft, None, {})
    _refuse_objects({"scheduler": settings.scheduler, "search_alg": settings.search_alg, "space": asked})
    space = make_space(asked, bare)
    first = draft_with(bare, next(space.draws(settings.seed))).job()
    with (
        TemporaryDirectory(prefix="orchestrator-search-") as folder,
        hold(DirectoryStorage(Path(folder)), "search") as held,
    ):
        layout = Layout(bare, held, report)
        plans = [first_plan(layout, space, settings, one) for one in backbones_of(space, first)]
    tree = _tree(first)
    for key in space.domains:
        _take_out(tree, key)
    block = {**settings.model_dump(mode="json", exclude_unset=True), "space": _at_whole_paths(asked, space)}
    sent = Draft({**tree, BLOCK: block}, "", {})
    name = first.name or search_name(first, make_space(block["space"], replace(sent, tree=tree)), settings)
    scaling = {**tree.get("scaling", {}), "address": "auto"}
    return Sent({**sent.tree, "name": name, "scaling": scaling}, name, tree["storage"], plans[0])


def rank_to_send(draft: Draft, report: Report) -> Sent:
    """The ranking of that data and its block `rank`. Raises `RefusedError` where none of its backbones is let through.

    One that is let through is enough here: the others are looked at there, and are rows with the reason.
    """
    tree = dict(draft.tree)
    settings = _rank_settings(tree.pop(RANK_BLOCK, None))
    names, job = ranked_job(settings.backbones, settings.from_hub, settings.num_from_hub, settings.num_samples, tree)
    plan = first_candidate(names, job, report).plan
    fields = {key: value for key, value in _tree(job).items() if key not in ("backbone", "method", "name")}
    backbones = [_whole_backbone(name) for name in settings.backbones]
    block = {**settings.model_dump(mode="json", exclude_unset=True), "backbones": backbones}
    name = f"rank-{job.modality}-{ranking_digest(job, names)}"
    return Sent({**fields, RANK_BLOCK: block}, name, fields["storage"], plan)


def run_search(tree: Mapping[str, Any], fresh: bool, report: Report, stop: Stop) -> tuple[str, dict[str, Any]]:
    """On the cluster: (where the search lies, what came of it, as `orchestrator search --json` prints it)."""
    result = search(tree, fresh=fresh, report=report, stop=stop)
    return str(result.path), result.as_dict()


def run_rank(tree: Mapping[str, Any], fresh: bool, report: Report, stop: Stop) -> tuple[str, dict[str, Any]]:  # noqa: ARG001
    """On the cluster: (the storage with the features, the table as `orchestrator rank --json` prints it).

    There is nothing to start afresh: features of other data or of another body have another key.
    """
    fields = {key: value for key, value in tree.items() if key != RANK_BLOCK}
    asked = RankSettings.model_validate(tree[RANK_BLOCK])
    table = rank(
        asked.backbones, from_hub=asked.from_hub, num_from_hub=asked.num_from_hub, num_samples=asked.num_samples,
        report=report, stop=stop, **fields,
    )  # fmt: skip
    return str(fields["storage"]), table.as_dict()


def _tree(job: Job) -> dict[str, Any]:
    """The job as plain data, with whole paths."""
    tree = job.at_whole_paths().model_dump(mode="json", exclude_defaults=True)
    return {**tree, "storage": directory_of(job.storage).place}


def _take_out(tree: dict[str, Any], key: str) -> None:
    group, _, inner = key.rpartition(".")
    if not group:
        tree.pop(inner, None)
    elif group in tree:
        tree[group] = {name: value for name, value in tree[group].items() if name != inner}


def _at_whole_paths(asked: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """The space with whole paths of backbones that lie in folders."""
    backbones = values_of(space.domains.get("backbone"))
    return {**asked, **({"backbone": [_whole_backbone(one) for one in backbones]} if backbones else {})}


def _whole_backbone(name: str) -> str:
    return whole(name) if Path(name).is_dir() else name


def _refuse_objects(asked: Mapping[str, Any]) -> None:
    """Raise `RefusedError` for what is no plain data: it would have to be pickled."""
    for key, value in asked.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise RefusedError(
                "usage", f"{BLOCK}.{key} holds what does not travel with a job: {error}",
                expected="names and numbers, as in a job file: asha, {loguniform: [1e-5, 1e-2]}",
                mend="write it as docs/search.md shows, or join the cluster: orchestrator search --address HOST:6379",
            ) from None  # fmt: skip


def _rank_settings(block: Any) -> RankSettings:
    if not isinstance(block, Mapping):
        raise JobError(
            f"a ranking takes its backbones from the block {RANK_BLOCK} of its job", expected="a block of settings",
            mend=f"for example {RANK_BLOCK}: {{backbones: [microsoft/resnet-50, facebook/convnext-tiny-224]}}",
        )  # fmt: skip
    try:
        return RankSettings.model_validate(block)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        name = ".".join(map(str, fault["loc"]))
        raise JobError(
            f"{RANK_BLOCK}.{name} = {fault.get('input')!r}: {str(fault['msg'])[:1].lower()}{str(fault['msg'])[1:]}",
            expected="one of " + ", ".join(RankSettings.model_fields),
            mend=did_you_mean(str(fault["loc"][-1]), RankSettings.model_fields) or nearest_value(fault),
        ) from None  # fmt: skip
