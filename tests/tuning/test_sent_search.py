"""A search and a ranking as they travel to a cluster: the same from any directory, and checked before they do."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from ray import tune

import orchestrator
from orchestrator.distributed.preflight import wanted_of
from orchestrator.errors import JobError, RefusedError
from orchestrator.gate import drafted
from orchestrator.tuning import RankTable, rank_to_send, run_rank, run_search, search_to_send
from tests.whole.test_train import silent

SPACE = {"learning_rate": {"loguniform": ["1e-3", 1e-1]}}


@pytest.fixture
def job(tiny_resnet: Path, digits: Path) -> dict[str, Any]:
    """With relative places."""
    Path("net").symlink_to(tiny_resnet)
    Path("digits").symlink_to(digits)
    return {
        "backbone": "net", "data": "digits", "method": "head", "storage": "runs", "training": {"epochs": 2},
        "scaling": {"threads_per_worker": 1},
    }  # fmt: skip


def travelled(tree: dict[str, Any]) -> dict[str, Any]:
    """As the driver reads it; it joins no cluster here."""
    read: dict[str, Any] = json.loads(json.dumps(tree))
    if "scaling" in read:
        assert read["scaling"].pop("address", "auto") == "auto"
    return read


def test_a_search_is_the_same_there_from_any_directory(job: dict[str, Any], tmp_path: Path) -> None:
    asked = {**job, "search.num_trials": 2, "search.space": {**SPACE, "backbone": {"grid": ["net"]}}}
    sent = search_to_send(drafted(None, asked), silent)
    assert sent.storage == str(tmp_path / "runs")
    assert not Path("runs").exists(), "here nothing is written"
    assert "learning_rate" not in sent.tree["training"]
    assert "backbone" not in sent.tree
    assert sent.tree["search"]["space"]["backbone"] == {"grid_search": [str(tmp_path / "net")]}
    Path("elsewhere").mkdir()
    os.chdir("elsewhere")
    place, told = run_search(travelled(sent.tree), False, silent, lambda: False)
    assert place == f"{sent.storage}/{sent.name}"
    assert [row["trial"] for row in told["trials"]] == [1, 2]
    os.chdir("..")
    block = {"num_trials": 2, "space": {**SPACE, "backbone": {"grid": [str(tmp_path / "net")]}}}
    here = orchestrator.search({**job, "search": block}, report=silent)
    assert str(here.path) == place, "it has another name here"
    assert here.as_dict() == told


def test_a_search_that_a_cluster_would_refuse_is_refused_here(job: dict[str, Any]) -> None:
    for search, said in (
        ({"space": {"method": {"choice": ["head", "best"]}}}, "best"),
        ({"space": {}}, "the space of a search is empty"),
        ({"space": SPACE, "num_trials": 0}, "num_trials = 0"),
    ):
        with pytest.raises(JobError, match=said):
            search_to_send(drafted(None, {**job, "search": search}), silent)
    objects = {**job, "search": {"space": {"learning_rate": tune.loguniform(1e-3, 1e-1)}}}
    with pytest.raises(RefusedError, match=r"search\.space holds what does not travel with a job") as caught:
        search_to_send(drafted(None, objects), silent)
    assert caught.value.reason == "usage"
    with pytest.raises(RefusedError, match="nothing/at-all"):
        search_to_send(drafted(None, {**job, "backbone": "nothing/at-all", "search": {"space": SPACE}}), silent)


@pytest.mark.usefixtures("job")
def test_a_ranking_is_the_same_there_from_any_directory(tmp_path: Path) -> None:
    asked = {"data": "digits", "storage": "runs", "rank": {"backbones": ["absent", "net"], "num_samples": 64}}
    sent = rank_to_send(drafted(None, asked), silent)
    assert sent.tree["rank"]["backbones"] == ["absent", str(tmp_path / "net")]
    assert not Path("runs").exists()
    assert not {"backbone", "method", "name"} & set(sent.tree)
    Path("elsewhere").mkdir()
    os.chdir("elsewhere")
    place, told = run_rank(travelled(sent.tree), False, silent, lambda: False)
    assert place == sent.storage
    table = RankTable.from_dict(json.loads(json.dumps(told)))
    assert table.as_dict() == told
    assert [row.state for row in table.rows] == ["ranked", "refused"]
    assert table.best.backbone == str(tmp_path / "net")


@pytest.mark.usefixtures("job")
def test_a_ranking_that_cannot_be_is_refused_here() -> None:
    for fields, said in (
        ({}, "takes its backbones from the block rank"),
        ({"rank": {"backbone": "net"}}, r"rank\.backbone = 'net'"),
        ({"rank": {"backbones": ["net"], "num_samples": 1}}, r"rank\.num_samples = 1"),
        ({"rank": {"backbones": []}}, "there is no backbone to rank"),
        ({"rank": {"backbones": ["net"]}, "backbone": "net"}, "backbone is set, and a ranking has none"),
    ):
        with pytest.raises(JobError, match=said):
            rank_to_send(drafted(None, {"data": "digits", **fields}), silent)
    with pytest.raises(RefusedError, match="none of 1 backbones can be used"):
        rank_to_send(drafted(None, {"data": "digits", "rank": {"backbones": ["absent"]}}), silent)


def test_where_a_block_does_not_belong_it_is_said(job: dict[str, Any]) -> None:
    with pytest.raises(JobError) as caught:
        orchestrator.plan({**job, "rank": {"backbones": ["net"]}})
    assert "--kind rank" in caught.value.mend


def test_the_nodes_are_asked_for_each_of_its_backbones(job: dict[str, Any], tiny_resnet: Path) -> None:
    """And not for the first alone."""
    shutil.copytree(tiny_resnet, "second")
    sent = search_to_send(
        drafted(None, {**job, "search.space": {**SPACE, "backbone": {"grid": ["net", "second"]}}}), silent
    )
    assert [one.backbone.source for one in (sent.plan, *sent.others)] == ["net", "second"]
    wanted = wanted_of(sent, {})
    assert [Path(one["path"]).name for one in wanted["backbones"]] == [tiny_resnet.name, "second"]
