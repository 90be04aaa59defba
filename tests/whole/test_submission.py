"""What is sent to a cluster, before one is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

import orchestrator
from orchestrator.errors import DataError, RefusedError
from orchestrator.gate import drafted
from orchestrator.submission import _checked, _for_the_cluster, _sent
from orchestrator.tuning.sent_ranking import sent_tree


def test_rows_of_a_program_do_not_travel() -> None:
    draft = drafted(None, {"backbone": "b", "data": [{"text": "a", "label": "b"}]})
    with pytest.raises(DataError, match="rows that this program holds do not travel") as caught:
        _checked(draft)
    assert "Parquet" in caught.value.mend


def test_a_key_in_a_place_is_refused_and_not_shown() -> None:
    draft = drafted(None, {"backbone": "b", "data": "d", "settings": {"table": "https://host/data.csv?sig=abcdefgh"}})
    with pytest.raises(RefusedError, match="holds a password or a key") as caught:
        _checked(draft)
    assert "abcdefgh" not in str(caught.value)


def test_the_job_that_is_sent_means_the_same_anywhere(tiny_resnet: Path, flat_digits: Path) -> None:
    fields = {"backbone": str(tiny_resnet), "data": str(flat_digits), "storage": "runs", "method": "full"}
    plan = orchestrator.plan(**fields)
    sent = _for_the_cluster(orchestrator.Job.model_validate({**fields, "data": {"path": str(flat_digits)}}), plan)
    assert sent.name == plan.name
    assert sent.storage == str(Path("runs").absolute())
    assert sent.scaling.address == "auto"
    assert sent.digest() == plan.job.digest(), "where it runs changes nothing of what is learnt"


def test_a_storage_is_the_same_place_however_it_is_written(
    tiny_resnet: Path, flat_digits: Path, tmp_path: Path
) -> None:
    """On a node the folder that `..` leads out of need not be there; and the place says which job it is."""
    plan = orchestrator.plan(backbone=str(tiny_resnet), data=str(flat_digits), storage="../runs")
    assert _for_the_cluster(plan.job, plan).storage == str(tmp_path.parent / "runs")
    assert sent_tree(plan.job)["storage"] == str(tmp_path.parent / "runs")


@pytest.mark.parametrize("more", [{"num_workers": 16, "min_workers": 2}, {"num_workers": 4, "threads_per_worker": 64}])
@pytest.mark.parametrize("kind", ["finetune", "search"])
def test_the_cores_of_this_machine_are_no_limit_to_what_is_sent(
    tiny_resnet: Path, flat_digits: Path, kind: str, more: dict[str, int]
) -> None:
    fields = {"backbone": str(tiny_resnet), "data": str(flat_digits), "method": "full", "scaling": more,
              "training": {"batch_size": 80}}  # fmt: skip
    if kind == "search":
        fields["search"] = {"num_trials": 2, "space": {"learning_rate": {"loguniform": [1e-5, 1e-2]}}}
    else:
        with pytest.raises(RefusedError, match=r"more than the \d+ cores here"):
            orchestrator.plan(**fields)
    sent = _sent(drafted(None, fields), kind, lambda _: None)
    assert sent.tree["scaling"] == {**more, "address": "auto"}
    assert sent.plan.num_workers == more["num_workers"]
