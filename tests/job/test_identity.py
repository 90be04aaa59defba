"""What a job is known by: what is learnt, and not where, on how many workers, or by which version's defaults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import Field

from orchestrator.errors import JobError, RefusedError
from orchestrator.job import Job, Run, Training, make_job
from orchestrator.job.plans import PLAN_VERSION, read_plan_json

JOBS = [
    {"method": "head"},
    {"method": "full", "training": {"epochs": 3, "optimizer": "sgd", "seed": 7}},
    {"method": "scratch", "scaling": {"num_workers": 4}, "data": {"path": "y", "num_train": 9}},
    {"modality": "text", "task": "multi-label", "settings": {"head": "native"}, "training": {"num_microbatches": 3}},
]


class LaterTraining(Training):
    novelty: float = Field(0.5, description="a setting that a later version brings")


class LaterJob(Job):
    training: LaterTraining = LaterTraining()
    another: str | None = None


@pytest.mark.parametrize("fields", JOBS)
def test_a_new_setting_changes_no_job_that_does_not_use_it(fields: dict[str, object]) -> None:
    job = {"backbone": "a/b", "data": "x", **fields}
    assert LaterJob.model_validate(job).digest() == Job.model_validate(job).digest()
    used = {**job, "training": {**fields.get("training", {}), "novelty": 0.6}}  # type: ignore[dict-item]
    assert LaterJob.model_validate(used).digest() != Job.model_validate(job).digest()


def test_a_default_that_is_said_is_the_same_job() -> None:
    said = make_job(backbone="a/b", data="x", method="auto", training={"seed": 0, "schedule": "cosine"})
    assert said.digest() == make_job(backbone="a/b", data="x").digest()


@pytest.mark.parametrize(
    "change",
    [
        {"storage": "elsewhere"}, {"name": "mine"}, {"feature_store": "s3://b/f"},
        {"scaling": {"device": "cpu", "threads_per_worker": 3, "max_failures": 9, "num_extractors": 2}},
        {"scaling": {"address": "auto"}}, {"training": {"checkpoint_every_s": 5.0}},
        {"training": {"checkpoint_every_steps": 5}},
    ],
)  # fmt: skip
def test_where_and_on_what_it_runs_is_no_part_of_it(change: dict[str, object]) -> None:
    job = make_job(backbone="a/b", data="x")
    assert make_job(job, **change).digest() == job.digest()


def test_the_resolved_number_of_microbatches_is_a_part_of_it() -> None:
    def digest(**fields: object) -> str:
        return make_job(backbone="a/b", data="x", **fields).digest()

    assert digest(scaling={"num_workers": 2}) == digest(training={"num_microbatches": 2}) != digest()
    assert digest(scaling={"num_workers": 2}, training={"num_microbatches": 1}) == digest()


def test_the_old_name_of_microbatches_is_understood_and_said(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("backbone: a/b\ndata: x\ntraining:\n  num_shards: 4\n")
    for job in (make_job(file), make_job(backbone="a/b", data="x", **{"training.num_shards": 4})):
        assert job.training.num_microbatches == 4
        assert job.notes == ("training.num_shards is called training.num_microbatches now",)
    won = make_job(file, training={"num_microbatches": 2})  # a flag wins over the file, whatever the name there
    assert won.training.num_microbatches == 2
    both = {"num_shards": 4, "num_microbatches": 2}
    with pytest.raises(JobError, match="both are set") as caught:
        make_job(backbone="a/b", data="x", training=both)
    assert caught.value.mend == "leave out training.num_shards"
    file.write_text("backbone: a/b\ndata: x\ntraining:\n  num_shards: 0\n")
    with pytest.raises(JobError, match=r"job.yaml:4: training.num_microbatches = 0"):
        make_job(file)


def test_a_plan_of_an_earlier_version_is_read_as_one_of_today(tmp_path: Path) -> None:
    earlier = {
        "version": 1, "name": "r", "weights": "pretrained", "classes": ["a", "b"],
        "job": {"backbone": "a/b", "method": "head", "data": {"path": "x"}, "training": {"num_shards": 3, "epochs": 2}},
        "backbone": {"source": "a/b", "kind": "hub", "name": "b"}, "row": {"head": ["classifier"]},
        "data": {"fingerprint": "f", "root": "x", "num_samples": {"train": 8}, "per_class": {"train": [4, 4]}},
        "input": {}, "features": "once", "num_workers": 3,
        "schedule": {
            "epochs": 2, "batch_size": 4, "num_shards": 3, "learning_rate": 0.1, "head_learning_rate": 0.2,
            "batch_norm": "frozen", "steps_per_epoch": 2, "num_steps": 4,
        },
    }  # fmt: skip
    plan = read_plan_json(json.dumps(earlier))
    assert plan.version == PLAN_VERSION
    assert (plan.recipe.num_microbatches, plan.job.training.num_microbatches) == (3, 3)
    (phase,) = plan.recipe.phases
    assert (phase.trains, phase.source, phase.num_steps, phase.head_learning_rate) == ("head", "features", 4, 0.2)
    (tmp_path / "plan.json").write_text(json.dumps({**earlier, "version": PLAN_VERSION + 1}))
    with pytest.raises(RefusedError, match="this package reads up to") as caught:
        _ = Run(tmp_path).plan
    assert caught.value.reason == "damaged"
