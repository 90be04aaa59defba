"""The same loop in Ray Train's worker processes: same numbers, same resumption, same errors."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import orchestrator
from orchestrator.data.contents import Ids
from orchestrator.errors import InterruptedRunError, RefusedError, TrainingError
from orchestrator.job import Advanced, EpochEnded, Event, Noted, PhaseBegan
from orchestrator.modality import registry
from orchestrator.store.shards import Shard
from tests.chaos.work import descendants, title_of
from tests.conftest import ALL_CORES
from tests.hub_server import Hub, Repository
from tests.whole.test_train import LONG, Cli, same, silent, start, weights_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

ONE_THREAD = {"threads_per_worker": 1}
# In fp32: what bfloat16 rounds depends on the batch that a sample is in.
SHARDS = {"epochs": 3, "num_microbatches": 2, "batch_size": 40, "learning_rate": 0.003, "precision": "fp32"}


@pytest.fixture(scope="module", autouse=True)
def _cores() -> Iterator[None]:
    """Two workers want two cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, ALL_CORES)
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    """One Ray for the calls of this module; a call that finds one uses it and leaves it."""
    import ray

    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def train(
    backbone: Path, data: Path | dict[str, Any], workers: int, name: str, extractors: int | None = None, **fields: Any
) -> orchestrator.Run:  # fmt: skip
    """In this process, where there are no `workers`."""
    scaling = {"num_workers": workers or 1, "num_extractors": extractors, **ONE_THREAD}
    if workers:
        scaling["address"] = "auto"
    return orchestrator.finetune(
        backbone=str(backbone),
        data=data if isinstance(data, dict) else str(data),
        scaling=scaling,
        name=name,
        report=fields.pop("report", silent),
        method=fields.pop("method", "head"),
        **fields,
    )


@pytest.fixture
def scan() -> Iterator[str]:
    """A modality that is registered in this process alone: images under another name."""
    mine = orchestrator.register(dataclasses.replace(registry.get("image"), name="scan"))
    yield mine.name
    registry.unregister(mine.name)


@pytest.mark.usefixtures("_cluster")
@pytest.mark.parametrize(
    "method", ["auto", *(pytest.param(one, marks=pytest.mark.cluster) for one in ("full", "head"))]
)
def test_two_workers_learn_what_one_does(tiny_resnet: Path, digits: Path, method: str, scan: str) -> None:
    training = {**SHARDS, **({"budget_min": 100} if method == "auto" else {})}  # steps are measured, and taken back
    one = train(tiny_resnet, digits, 0, "one", method=method, training=training)
    modality = scan if method == "full" else "image"  # what no other process could look up reaches the workers
    two = train(tiny_resnet, digits, 2, "two", method=method, training=training, storage="remote", modality=modality)
    for name, tensor in weights_of(one).items():
        if method == "head" and not name.startswith("classifier"):
            assert torch.equal(tensor, weights_of(two)[name]), name
        # A probe is the minimum of a function of features that differ in their last digits.
        assert torch.allclose(tensor, weights_of(two)[name], atol=1e-4 if method == "auto" else 1e-5), name
    assert two.lineage["num_workers"] == 2
    assert two.lineage["features"] == one.lineage["features"]
    assert [line["epoch"] for line in two.metrics] == [1, 2, 3, 4][: 4 if method == "auto" else 3]
    assert two.results.get("chosen") == one.results.get("chosen")
    assert two.results["test"]["num_samples"] == 200


@pytest.mark.usefixtures("_cluster")
def test_extractors_are_killed_and_stopped_and_each_sample_is_computed_once(tiny_resnet: Path, digits: Path) -> None:
    """One worker, and one process beside it that runs the body, over a file that breaks before it is reached."""
    data, here = Path("data").absolute(), os.getpid()
    shutil.copytree(digits, data)
    victim = sorted(data.glob("train/7/*.png"))[0]
    whole = victim.read_bytes()
    rows = {"path": str(data), "on_bad_sample": "skip"}
    # So large that the first of three pieces is seen before the last is done.
    job: dict[str, Any] = {"method": "head", "training": SHARDS, "settings": {"size": 256}}

    def spoil(event: Event) -> None:
        if event in (PhaseBegan("loading the backbone"), PhaseBegan("starting workers")):
            victim.write_bytes(b"nothing")

    one = train(tiny_resnet, rows, 0, "one", **job, report=spoil)
    killed: list[int] = []

    def kill_and_stop() -> None:
        killed.extend(kill_after_first_shard(Path("remote/.features")))
        os.kill(here, signal.SIGINT)

    for stopped in (True, False):
        victim.write_bytes(whole)
        if not stopped:
            run = train(tiny_resnet, rows, 1, "other", 1, storage="remote", **job, report=spoil)
            continue
        watching = threading.Thread(target=kill_and_stop)
        watching.start()
        with pytest.raises(InterruptedRunError, match="the features that it gave are kept"):
            train(tiny_resnet, rows, 1, "other", 1, storage="remote", **job, report=spoil)
        watching.join()
        kept = sum(map(len, stored(Path("remote"))))
        assert 0 < kept < 400
    assert len(killed) == 1
    assert run.lineage["num_computed"] == 599 - kept
    assert run.plan.num_extractors == 1
    assert run.results["num_skipped"] == one.results["num_skipped"] == 1
    for name, tensor in weights_of(one).items():
        assert torch.allclose(tensor, weights_of(run)[name], atol=1e-5), name
    ids = np.concatenate(stored(Path("remote")))
    assert len(np.unique(ids, axis=0)) == len(ids) == 599


def stored(storage: Path) -> list[Ids]:
    """The contents in each shard of features."""
    shards = [Shard.from_manifest(file.stem, file.read_bytes()) for file in storage.rglob("float32/*.json")]
    return [shard.ids for shard in shards if shard is not None]


def kill_after_first_shard(features: Path) -> list[int]:
    """Kill -9 all processes that extract, once there is one shard; which they were."""
    while not list(features.rglob("float32/*.json")):
        time.sleep(0.01)
    found = processes("Extractor")
    for process in found:
        os.kill(process, signal.SIGKILL)
    return found


@pytest.mark.cluster
@pytest.mark.usefixtures("_cluster")
def test_a_worker_that_dies_when_all_are_to_stop_leaves_what_a_stop_leaves(tiny_resnet: Path, digits: Path) -> None:
    """And not Ray's word for workers that it would start again."""
    killed: list[int] = []

    def kill(event: Event) -> None:
        if event == Noted("stopping after this step"):
            killed.extend(processes("TrainWorker"))
            for process in killed:
                os.kill(process, signal.SIGKILL)

    long = {"epochs": 200, "batch_size": 16, "checkpoint_every_steps": 5}
    with pytest.raises(InterruptedRunError) as caught:
        train(
            tiny_resnet, digits, 1, "dies", method="full", training=long, report=kill,
            stop=lambda: bool(list(Path("runs/dies").glob("checkpoints/*/.manifest.json"))),
        )  # fmt: skip
    assert len(killed) == 1
    assert "the same command goes on" in caught.value.mend


@pytest.mark.cluster
@pytest.mark.usefixtures("_cluster")
def test_an_extractor_whose_node_does_not_see_the_run_says_so(tiny_resnet: Path, flat_digits: Path) -> None:
    """As on a node that has joined later: the directory is another one there."""

    def hide(event: Event) -> None:
        if isinstance(event, PhaseBegan) and event.text == "running the frozen body once":
            Path("runs/apart/.lease.json").unlink()

    with pytest.raises(RefusedError, match=r"the node [\d.]+ does not see the run in \S+runs"):
        train(tiny_resnet, flat_digits, 1, "apart", 1, report=hide)


@pytest.mark.usefixtures("_cluster")
def test_an_error_on_a_worker_is_the_drivers_error_at_once(tiny_resnet: Path, flat_digits: Path) -> None:
    data = Path("data").absolute()
    shutil.copytree(flat_digits, data)
    victim = sorted(data.glob("7/*.png"))[0]

    def spoil(event: Event) -> None:
        if event == PhaseBegan("starting workers"):
            victim.write_bytes(b"no image")

    started = time.monotonic()
    with pytest.raises(TrainingError, match="is no image") as caught:
        train(tiny_resnet, data, 2, "spoilt", training={"epochs": 2}, report=spoil)
    assert str(victim) in caught.value.message
    assert time.monotonic() - started < 90  # no second and third try


@pytest.mark.usefixtures("_cluster")
def test_a_job_that_ends_while_it_waits_leaves_the_callers_ray(
    tiny_resnet: Path, flat_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is connected as before, and keeps nothing of the job."""
    import ray

    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "2")
    of_the_caller = ray.get_runtime_context().get_job_id()
    taken = ray.util.placement_group([{"CPU": 1}])
    ray.get(taken.ready())
    noted: list[float] = []

    def report(event: Event) -> None:
        if isinstance(event, Noted) and "waits for its place" in event.text:
            noted.append(time.monotonic())

    with pytest.raises(InterruptedRunError, match="stopped while no worker ran"):
        train(
            tiny_resnet, flat_digits, 2, "waits", method="full", training={"epochs": 1}, report=report,
            stop=lambda: bool(noted) and bool(processes("TrainController")) and time.monotonic() > noted[0] + 5,
        )  # fmt: skip
    assert ray.is_initialized()
    assert ray.get_runtime_context().get_job_id() == of_the_caller
    ray.util.remove_placement_group(taken)
    until = time.monotonic() + 30
    while (
        ray.available_resources().get("CPU") != 2
        or processes("TrainController")
        or {one["state"] for one in ray.util.placement_group_table().values()} != {"REMOVED"}
    ):
        assert time.monotonic() < until, (ray.available_resources(), ray.util.placement_group_table())
        time.sleep(0.1)


@pytest.mark.usefixtures("_cluster")
def test_more_than_the_cluster_has_is_refused(tiny_resnet: Path, flat_digits: Path) -> None:
    with pytest.raises(RefusedError, match=r"3 workers need 3 CPUs .* and the cluster has 2"):
        train(tiny_resnet, flat_digits, 3, "many", training={"epochs": 1})


@pytest.mark.usefixtures("_cluster")
def test_a_worker_that_dies_is_replaced(uninterrupted: orchestrator.Run, tiny_resnet: Path, digits: Path) -> None:
    long = {"epochs": 15, "batch_size": 16, "checkpoint_every_steps": 5}
    killed: list[int] = []

    def kill(event: Event) -> None:
        if isinstance(event, Advanced) and not killed and list(Path("runs/hurt").glob("checkpoints/*/.manifest.json")):
            killed.extend((*processes("TrainWorker"), *processes("EventQueue")))
            for process in killed:  # the queue too: some events are lost with it, and no work
                os.kill(process, signal.SIGKILL)

    hurt = train(tiny_resnet, digits, 1, "hurt", method="full", training=long, report=kill)
    assert len(killed) == 2
    assert same(weights_of(uninterrupted), weights_of(hurt))
    assert [line["epoch"] for line in hurt.metrics] == list(range(1, 16))


@pytest.mark.cluster
@pytest.mark.usefixtures("_cluster")
def test_a_job_cut_off_in_this_process_goes_on_with_two_workers_one_of_which_dies(
    tiny_resnet: Path, digits: Path
) -> None:
    """Over files that break on the way, in three microbatches: the same is learnt as by one process left alone."""
    data = Path("data").absolute()
    shutil.copytree(digits, data)
    victims = sorted(data.glob("train/*/*.png"))[:60:20]
    training = {
        "epochs": 3, "batch_size": 24, "num_microbatches": 3, "precision": "fp32", "checkpoint_every_steps": 5,
        "learning_rate": 3e-4,
    }  # fmt: skip
    job: dict[str, Any] = {"method": "full", "training": training}
    rows = {"path": str(data), "on_bad_sample": "skip"}

    def spoil(event: Event) -> None:
        if event == PhaseBegan("loading the backbone"):
            for victim in victims:
                victim.write_bytes(b"nothing")

    def mend() -> None:
        for victim in victims:
            shutil.copy(digits / victim.relative_to(data), victim)

    whole = train(tiny_resnet, rows, 0, "whole", **job, report=spoil)
    mend()
    asked: list[int] = []
    with pytest.raises(InterruptedRunError):
        train(
            tiny_resnet,
            rows,
            0,
            "cut",
            **job,
            report=spoil,
            stop=lambda: len(asked) > 12 or asked.append(1) is not None,
        )
    mend()
    killed: list[int] = []

    def kill(event: Event) -> None:
        spoil(event)
        if isinstance(event, EpochEnded) and event.figures["epoch"] == 2 and not killed:
            killed.extend(processes("TrainWorker"))
            os.kill(killed[-1], signal.SIGKILL)

    notes: list[Event] = []
    run = train(tiny_resnet, rows, 2, "cut", **job, report=lambda event: (notes.append(event), kill(event))[0])
    assert len(killed) == 2
    assert sum("going on from step" in event.text for event in notes if isinstance(event, Noted)) >= 2
    (death,) = [event.text for event in notes if isinstance(event, Noted) and event.text.startswith("worker ")]
    assert re.fullmatch(
        r"worker [01] \(process \d+ on [\d.]+\): its process died; restart 1 of 2, from the last checkpoint", death
    )
    assert run.lineage["num_workers"] == 2
    assert run.results["num_skipped"] == whole.results["num_skipped"] == 3
    skipped = [
        [json.loads(line)["place"] for line in (one.path / "skipped.jsonl").read_text().splitlines()]
        for one in (whole, run)
    ]
    assert skipped[0] == skipped[1] == [str(victim) for victim in victims]
    for name, tensor in weights_of(whole).items():
        assert torch.allclose(tensor, weights_of(run)[name], atol=1e-4), name


@pytest.mark.cluster
@pytest.mark.usefixtures("_cluster")
def test_a_run_without_a_checkpoint_has_a_part_for_each_worker_of_today(tiny_resnet: Path, digits: Path) -> None:
    """Killed on one worker before a checkpoint was written, it does not leave the second of two idle."""
    job: dict[str, Any] = {"method": "full", "training": {"epochs": 1, "batch_size": 40}}
    with pytest.raises(InterruptedRunError):
        train(tiny_resnet, digits, 0, "cut", **job, stop=lambda: True)
    shutil.rmtree("runs/cut/checkpoints")  # which a stop writes, and a kill does not
    notes: list[Event] = []
    run = train(tiny_resnet, digits, 2, "cut", **job, report=notes.append)
    assert run.plan.recipe.num_microbatches == run.lineage["num_workers"] == 2
    assert not [event for event in notes if isinstance(event, Noted) and "have none in a step" in event.text]


@pytest.mark.cluster
def test_two_workers_of_a_node_download_the_backbone_once(
    hub: Hub, tiny_resnet: Path, flat_digits: Path, tmp_path: Path, cli_process: Cli
) -> None:
    hub.repositories["org/tiny"] = Repository({file.name: file.read_bytes() for file in tiny_resnet.iterdir()})
    done = cli_process(
        "finetune", "--backbone", "org/tiny", "--data", flat_digits, "--method", "full", "--epochs", 1, "--workers", 2,
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    whole = [
        one for one in hub.asked_for("model.safetensors") if one[0] == "GET" and "/large/" in one[1] and not one[2]
    ]
    assert len(whole) == 1, hub.requests  # a part of it, its header, the plan has read


def processes(name: str) -> list[int]:
    """Ids of the processes of that name of this process's Ray; what else runs on this machine is not ours to kill."""
    titles = {pid: title_of(pid) for pid in descendants(os.getpid())}
    return [pid for pid, title in titles.items() if title.startswith("ray::") and name in title]


@pytest.mark.cluster
def test_one_ray_worker_is_this_process_bit_for_bit_interrupted_and_killed(
    uninterrupted: orchestrator.Run, tiny_resnet: Path, digits: Path, cli_process: Cli
) -> None:
    command = ["finetune", "--backbone", tiny_resnet, "--data", digits, *LONG]
    for how in (signal.SIGINT, signal.SIGKILL):
        before = checkpoints()
        process = start(*command, "--name", "ray", "--address", "local")
        for _ in range(18000):
            if new := checkpoints() - before:
                assert not before or min(new) > max(before)  # it has gone on, and not begun again
                break
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(how)
        _, stderr = process.communicate(timeout=90)
        assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), stderr
        assert not Path("runs/ray/results.json").exists()
    done = cli_process(*command, "--name", "ray", "--address", "local")
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stderr
    assert same(weights_of(uninterrupted), weights_of(orchestrator.open_run("runs/ray")))


def checkpoints() -> set[str]:
    """Those of the run that are whole."""
    return {file.parent.name for file in Path("runs/ray").glob("checkpoints/step-*/.manifest.json")}


@pytest.mark.cluster
def test_one_start_of_ray_serves_all_calls_of_a_process(tiny_resnet: Path, flat_digits: Path) -> None:
    """As far as its cores suffice; in a process of its own, since this one has a Ray."""
    script = """
import sys, ray, orchestrator
from orchestrator.distributed import cluster
nodes = []
for num_workers in (1, 1, 2):
    plan = orchestrator.plan(
        backbone=sys.argv[1], data=sys.argv[2],
        scaling={"num_workers": num_workers, "address": "local", "threads_per_worker": 1},
    )
    with cluster.joined(plan, print):
        nodes.append(ray.nodes()[0]["NodeID"])
        assert ray.cluster_resources()["CPU"] == num_workers
        assert ray.get(ray.remote(lambda: 3).remote()) == 3
print(nodes[0] == nodes[1], nodes[1] == nodes[2])
ray.shutdown()
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)  # the caller's own, which stays as it is
own = ray.nodes()[0]["NodeID"]
for address in ("auto", "local"):
    plan = orchestrator.plan(
        backbone=sys.argv[1], data=sys.argv[2],
        scaling={"num_workers": 2, "address": address, "threads_per_worker": 1},
    )
    with cluster.joined(plan, print):
        print(ray.nodes()[0]["NodeID"] == own)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_resnet), str(flat_digits)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["True", "False", "True", "True"]
