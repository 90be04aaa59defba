"""A ranking as a job for a cluster: what it is asked for beside its data stands in the job's block `rank`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestrator.distributed.request import Sent
from orchestrator.errors import JobError, did_you_mean
from orchestrator.job import Draft, Job, Report, Stop, local_path, open_storage, whole, whole_storage
from orchestrator.tuning.ranking import NUM_FROM_HUB, NUM_SAMPLES, first_candidate, rank, ranked_job, ranking_digest
from orchestrator.tuning.settings import first_fault

RANK_BLOCK = "rank"


class RankSettings(BaseModel):
    """What a ranking is asked for beside its data: the block `rank` of a job file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbones: tuple[str, ...] = Field((), description="org/name, directories, or earlier runs")
    from_hub: str | None = Field(None, description="more of the Hub: 'image-classification, < 100M'")
    num_from_hub: int = Field(NUM_FROM_HUB, ge=1, description="so many of them at most")
    num_samples: int = Field(NUM_SAMPLES, ge=2, description="the last who are left are compared on so many")


def rank_to_send(draft: Draft, report: Report) -> Sent:
    """The ranking of that data and its block `rank`. Raises `RefusedError` where none of its backbones is let through.

    One that is let through is enough here: the others are looked at there, and are rows with the reason.
    """
    tree = dict(draft.tree)
    settings = _rank_settings(tree.pop(RANK_BLOCK, None))
    names, job = ranked_job(settings.backbones, settings.from_hub, settings.num_from_hub, settings.num_samples, tree)
    plan = first_candidate(names, job, report).plan
    fields = {key: value for key, value in sent_tree(job).items() if key not in ("backbone", "method", "name")}
    backbones = [whole_backbone(name) for name in settings.backbones]
    block = {**settings.model_dump(mode="json", exclude_unset=True), "backbones": backbones}
    name = f"rank-{job.modality}-{ranking_digest(job, names)}"
    return Sent({**fields, RANK_BLOCK: block}, name, fields["storage"], plan, on_workers=False)


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


def sent_tree(job: Job) -> dict[str, Any]:
    """The job as plain data, with whole paths."""
    tree = job.at_whole_paths().model_dump(mode="json", exclude_defaults=True)
    return {**tree, "storage": whole_storage(open_storage(job.storage).place)}


def whole_backbone(name: str) -> str:
    """The same backbone from any directory."""
    return whole(name) if local_path(name).is_dir() else name


def _rank_settings(block: Any) -> RankSettings:
    if not isinstance(block, Mapping):
        raise JobError(
            f"a ranking takes its backbones from the block {RANK_BLOCK} of its job", expected="a block of settings",
            mend=f"for example {RANK_BLOCK}: {{backbones: [microsoft/resnet-50, facebook/convnext-tiny-224]}}",
        )  # fmt: skip
    try:
        return RankSettings.model_validate(block)
    except ValidationError as error:
        name, said, mend = first_fault(error)
        raise JobError(
            f"{RANK_BLOCK}.{said}", expected="one of " + ", ".join(RankSettings.model_fields),
            mend=did_you_mean(name.rpartition(".")[2], RankSettings.model_fields) or mend,
        ) from None  # fmt: skip
