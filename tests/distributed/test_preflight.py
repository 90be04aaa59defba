"""Which node lacks what: real facts of this machine, and each of them changed in turn."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.backbone import fetch
from orchestrator.distributed import nodes
from orchestrator.distributed.nodes import describe, look, read_token, remove_tokens, token_file, write_token
from orchestrator.distributed.preflight import Preflight, wanted_of
from orchestrator.distributed.request import Sent
from orchestrator.distributed.wheels import as_wanted, own_delivery
from orchestrator.errors import RefusedError
from tests.hub_server import Hub, Repository

TOKEN = "f" * 32


@pytest.fixture(scope="module")
def asked(tiny_resnet: Path, flat_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the nodes are asked for a job on this machine."""
    plan = orchestrator.plan(backbone=str(tiny_resnet), data=str(flat_digits), method="full")
    sent = Sent({}, "run", str(tmp_path_factory.mktemp("storage") / "runs"), plan)
    return {**wanted_of(sent, as_wanted([own_delivery("image")])), "token": TOKEN, "timeout_s": 9.0}


@pytest.fixture(scope="module")
def this_machine(asked: dict[str, Any]) -> dict[str, Any]:
    """This machine as a node, alone in its cluster."""
    write_token(asked["storage"], token_file(TOKEN, "head"), TOKEN.encode())
    facts = look({**asked, "node_id": "n0"})
    assert read_token(asked["storage"], token_file(TOKEN, "n0")).decode() == TOKEN
    remove_tokens(asked["storage"], TOKEN)
    assert list(Path(asked["storage"]).iterdir()) == []
    return {
        "node": "10.0.0.1", "node_id": "n0", "is_head": True, "resources": {"CPU": 2, "GPU": 0}, "facts": facts,
        "storage_trouble": "", "echo": "",
    }  # fmt: skip


def test_a_machine_that_has_everything(asked: dict[str, Any], this_machine: dict[str, Any]) -> None:
    preflight = Preflight([this_machine], asked)
    assert preflight.faults == []
    preflight.require()
    assert preflight.rows[0][0] == "10.0.0.1 (head)"
    assert preflight.rows[0][4] == "seen"


def error(text: str) -> dict[str, str]:
    return {"error": text}


@pytest.mark.parametrize(
    ("changes", "words", "mend"),
    [
        ({"python": "3.9.1"}, "it has Python 3.9.1, and the head has", "install the same python"),
        ({"torch": error("PackageNotFoundError: torch")}, "torch: PackageNotFoundError", "install torch there"),
        ({"lacking": ["typer>=0.15"]}, "it lacks typer>=0.15", "pip install 'typer>=0.15'"),
        ({"lacking": ["torch>=2.9 (it has 2.4)"]}, "torch>=2.9 (it has 2.4)", "pip install 'torch>=2.9'"),
        ({"code": {"orchestrator": "0123"}}, "orchestrator there is other code (0123)", "PYTHONPATH"),
        ({"modality": error("PluginError: x")}, "the modality image does not load: PluginError: x", "on every node"),
        ({"storage": error("FileNotFoundError: y")}, "does not see in", "s3://bucket/runs"),
        ({"free_bytes": 1000}, "0 MB are free on its disk", "make room"),
        ({"data": "changed"}, "is not the same as here", "a place that all nodes see"),
        ({"backbones": {"b": error("OSError: z")}}, "the backbone b is not to be had: OSError: z", "reach the Hub"),
        ({"memory_bytes": 10}, "of memory are less than", "a larger node"),
        ({"cache_free_bytes": 10, "backbones": {"b": 2**30}, "one_disk": False},
         "0 MB are free where it keeps what comes from the Hub, and 1.0 GB have to come", "HF_HOME"),
        ({"free_bytes": 2**30, "cache_free_bytes": 2**30, "backbones": {"b": 2**30}, "one_disk": True},
         "and the run takes 256 MB, the backbone 1.0 GB more", "make room"),
    ],
)  # fmt: skip
def test_what_a_node_lacks_is_told_with_the_node(
    changes: dict[str, Any], words: str, mend: str, asked: dict[str, Any], this_machine: dict[str, Any]
) -> None:
    other = copy.deepcopy(this_machine)
    other |= {"node": "10.0.0.2", "node_id": "n1", "is_head": False}
    if "data" in changes:
        changes = {"data": dict.fromkeys(other["facts"]["data"], "0" * 12)}
    other["facts"] |= changes
    with pytest.raises(RefusedError) as caught:
        Preflight([this_machine, other], asked).require()
    assert caught.value.reason == "cluster"
    assert words in caught.value.message
    assert "10.0.0.2: " in caught.value.message
    assert "10.0.0.1" not in caught.value.message
    assert mend in caught.value.mend


def test_a_head_without_cuda_and_a_worker_with_it_are_one_cluster(
    asked: dict[str, Any], this_machine: dict[str, Any]
) -> None:
    """The builds that cluster/docker has, and a patch version of Python that Ray has let in; shown is all of it."""
    head, other = copy.deepcopy(this_machine), copy.deepcopy(this_machine)
    other |= {"node": "10.0.0.2", "node_id": "n1", "is_head": False}
    head["facts"] |= {"torch": "2.14.1+cpu", "python": "3.11.9"}
    for build in ("2.14.1", "2.14.1+cu126"):
        other["facts"] |= {"torch": build, "python": "3.11.14"}
        preflight = Preflight([head, other], asked)
        assert preflight.faults == []
        assert preflight.rows[1][1:4:2] == ["3.11.14", build]
    for changes in ({"torch": "2.14.0+cpu"}, {"python": "3.12.9"}, {"ray": "1.0.0"}):
        (fault,) = Preflight([head, {**other, "facts": {**other["facts"], **changes}}], asked).faults
        assert ", and the head has " in fault.lacks


def test_what_all_nodes_together_have_no_place_for(asked: dict[str, Any], this_machine: dict[str, Any]) -> None:
    """It is said in the words of the job's driver, behind what single nodes lack."""
    refusal = RefusedError("resources", "2 processes want a GPU each, and the cluster has 1", mend="use device cpu")
    with pytest.raises(RefusedError, match="and the cluster has 1") as caught:
        Preflight([this_machine], asked, refusal.as_dict()).require()
    assert (caught.value.reason, caught.value.mend) == ("resources", "use device cpu")
    lacking = copy.deepcopy(this_machine)
    lacking["facts"]["lacking"] = ["typer>=0.15"]
    with pytest.raises(RefusedError, match="it lacks typer"):
        Preflight([lacking], asked, refusal.as_dict()).require()


def test_what_was_delivered_and_the_kind_of_gpus_is_shown(asked: dict[str, Any], this_machine: dict[str, Any]) -> None:
    node = {**this_machine, "resources": {"CPU": 8, "GPU": 2}, "gpu_kinds": ["L4"]}
    preflight = Preflight([node], asked)
    assert preflight.rows[0][-2:] == ["8", "2 L4"]
    ours = own_delivery("image")
    assert preflight.code == f"{ours.name} {ours.version} ({ours.digest})"


def test_a_gpu_that_is_too_small(asked: dict[str, Any], this_machine: dict[str, Any]) -> None:
    node = copy.deepcopy(this_machine)
    node["resources"]["GPU"], node["facts"]["gpus"] = 1, [1000]
    with pytest.raises(RefusedError, match="a GPU of 0 MB is smaller than"):
        Preflight([node], asked).require()
    Preflight([node], {**asked, "device": "cpu"}).require()


def test_nodes_that_no_worker_has_a_place_on_are_no_hindrance(
    asked: dict[str, Any], this_machine: dict[str, Any]
) -> None:
    """A GPU of another kind than was asked for may be too small; so may a node without one, where GPUs are wanted."""
    small, large = (copy.deepcopy(this_machine) for _ in range(2))
    small |= {"resources": {"CPU": 4, "GPU": 1}, "gpu_kinds": ["T4"]}
    small["facts"]["gpus"] = [1000]
    large |= {"resources": {"CPU": 4, "GPU": 1}, "gpu_kinds": ["H100"]}
    large["facts"]["gpus"] = [2**40]
    Preflight([small, large], {**asked, "device": "gpu", "gpu_kind": "H100"}).require()
    with pytest.raises(RefusedError, match="a GPU of 0 MB is smaller than"):
        Preflight([small, large], {**asked, "device": "gpu"}).require()
    node = copy.deepcopy(this_machine)
    node["facts"]["memory_bytes"] = 10
    Preflight([node, large], {**asked, "device": "gpu"}).require()
    with pytest.raises(RefusedError, match="of memory are less than"):
        Preflight([node, large], asked).require()


def test_memory_is_wanted_where_workers_run(asked: dict[str, Any], this_machine: dict[str, Any]) -> None:
    """Not on a head without cores; and where a node has GPUs, theirs."""
    node = copy.deepcopy(this_machine)
    node["facts"] |= {"memory_bytes": 10, "gpus": [2**40]}
    with pytest.raises(RefusedError, match="its 0 MB of memory are less than"):
        Preflight([node], asked).require()
    Preflight([{**node, "resources": {"CPU": 0, "GPU": 0}}], asked).require()
    Preflight([{**node, "resources": {"CPU": 2, "GPU": 1}}], asked).require()


def test_room_for_weights_is_wanted_where_they_are_fetched(asked: dict[str, Any], this_machine: dict[str, Any]) -> None:
    """Not on a head without cores; and each of two disks has to hold its own part alone."""
    node = copy.deepcopy(this_machine)
    node["facts"] |= {"free_bytes": 2**30, "cache_free_bytes": 2**30, "backbones": {"b": 2**30}, "one_disk": True}
    with pytest.raises(RefusedError, match=r"the backbone 1\.0 GB more"):
        Preflight([node], asked).require()
    Preflight([{**node, "resources": {"CPU": 0, "GPU": 0}}], asked).require()
    Preflight([{**node, "facts": {**node["facts"], "one_disk": False}}], asked).require()


def test_what_has_to_come_from_the_hub(hub: Hub, tiny_resnet: Path, flat_digits: Path, tmp_path: Path) -> None:
    """A network that is trained from nothing takes the small files alone; what a node has already is not counted."""
    sizes = {file.name: file.stat().st_size for file in tiny_resnet.iterdir()}
    hub.repositories["org/coming"] = Repository({name: (tiny_resnet / name).read_bytes() for name in sizes})

    def wanted_by(method: str) -> dict[str, Any]:
        plan = orchestrator.plan(backbone="org/coming", data=str(flat_digits), method=method)
        (one,) = wanted_of(Sent({}, "run", str(tmp_path), plan), as_wanted([]))["backbones"]
        return dict(one)

    scratch, full, weights = wanted_by("scratch"), wanted_by("full"), sizes["model.safetensors"]
    assert full["files"] == {**scratch["files"], "model.safetensors": weights} == sizes
    assert nodes._backbone(scratch) < weights
    card = orchestrator.check("org/coming", "image")
    fetch(card, with_weights=False)
    assert (nodes._backbone(scratch), nodes._backbone(full)) == (0, weights)
    fetch(card)
    assert nodes._backbone(full) == 0


def test_whether_a_run_and_what_comes_from_the_hub_share_a_disk() -> None:
    assert nodes._is_one_disk(str(nodes._hub_cache() / "not" / "yet"))
    assert not nodes._is_one_disk("/proc")


def test_a_container_has_what_it_may_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = nodes._memory_bytes()
    (tmp_path / "memory.max").write_text("1048576\n")
    monkeypatch.setattr(nodes, "_LIMITS", (str(tmp_path / "none"), str(tmp_path / "memory.max")))
    assert nodes._memory_bytes() == 2**20
    (tmp_path / "memory.max").write_text("max\n")
    assert nodes._memory_bytes() >= whole


def test_a_node_that_does_not_answer_and_one_that_the_head_does_not_read(
    asked: dict[str, Any], this_machine: dict[str, Any]
) -> None:
    silent = {**this_machine, "node": "10.0.0.3", "is_head": False, "facts": error("no answer in 9 s")}
    unread = {**this_machine, "node": "10.0.0.4", "is_head": False, "echo": "FileNotFoundError: there"}
    faults = Preflight([this_machine, silent, unread], asked).faults
    assert [one.node for one in faults] == ["10.0.0.3", "10.0.0.4"]
    assert "it did not answer: no answer in 9 s" in faults[0].lacks
    assert "what the head wrote" in faults[1].lacks
    with pytest.raises(RefusedError, match="has no node that is alive"):
        Preflight([], asked).require()


def test_real_lacks_are_found(asked: dict[str, Any], tmp_path: Path) -> None:
    """A storage that cannot be written, other data, a backbone that is cut, a requirement that nobody meets."""
    backbone = tmp_path / "backbone"
    (there,) = asked["backbones"]
    shutil.copytree(there["path"], backbone)
    (backbone / "model.safetensors").write_bytes(b"cut")
    (tmp_path / "file").write_text("")
    facts = look({
        **asked, "node_id": "n", "storage": str(tmp_path / "file"), "requires": ["no-such-thing>=1", "numpy>=99"],
        "backbones": [there, {**there, "source": "other", "path": str(backbone)}], "data": {str(tmp_path / "none"): ""},
        "modality": "none", "modules": {"no_such_module": ""},
    })  # fmt: skip
    assert facts["lacking"][0] == "no-such-thing>=1"
    assert "numpy>=99 (it has" in facts["lacking"][1]
    for told, words in (
        (facts["storage"], "NotADirectoryError"), (facts["backbones"]["other"], "model.safetensors has 3 bytes, not"),
        (facts["data"][str(tmp_path / "none")], "FileNotFoundError"), (facts["modality"], "no modality 'none'"),
        (facts["code"]["no_such_module"], "no module"),
    ):  # fmt: skip
        assert words in told["error"]


def test_data_is_known_by_names_and_sizes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b.csv").write_text("x")
    before = describe(str(tmp_path))
    assert before == describe(str(tmp_path))
    (tmp_path / "b.csv").write_text("xy")
    assert describe(str(tmp_path)) != before
