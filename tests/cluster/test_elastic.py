"""An elastic group on machines that come and go: it shrinks, grows, and learns what a fixed one learns."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from cluster.local import LocalCluster, namespaces_allowed
from orchestrator.errors import InterruptedRunError
from orchestrator.job import EpochEnded, Event
from tests.audited import taken_of
from tests.planted import PLANTED, found_in, seen_at_work, seen_in_files
from tests.whole.test_train import silent

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not namespaces_allowed(), reason="machines of their own want root, on Linux"),
]
TRAINING = {
    "epochs": 60, "batch_size": 16, "num_microbatches": 2, "checkpoint_every_s": 600, "precision": "fp32",
    "optimizer": "sgd", "learning_rate": 0.01,
}  # fmt: skip


class Driver:
    """`orchestrator finetune` or `search` on the head, and what it says."""

    def __init__(self, cluster: LocalCluster, folder: Path, job: dict[str, Any], verb: str = "finetune") -> None:
        (folder / "job.yaml").write_text(json.dumps(job))
        self._log = folder / "log"
        self._metrics = folder / "runs/run/metrics.jsonl"
        self._cluster = cluster
        words = [cluster.python, "-m", "orchestrator.terminal.cli", verb, str(folder / "job.yaml")]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                cluster.command("node0", words), env={**cluster.node_environment("node0"), **PLANTED},
                stdout=log, stderr=log,
            )  # fmt: skip

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def epoch(self) -> int:
        """The last one that has ended."""
        lines = self._metrics.read_text().splitlines() if self._metrics.exists() else []
        return int(json.loads(lines[-1])["epoch"]) if lines else 0

    def wait_for(self, words: str) -> str:
        """What it has said, once that is in it."""
        while not re.search(words, self.said):
            assert self.process.poll() is None, self.said
            time.sleep(0.2)
        return self.said

    def stop(self) -> int:
        """Ask it to stop; its exit code. What is started into a node's namespaces is a child of what puts it there."""
        pid = self.process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            os.kill(int(child), signal.SIGTERM)
        return self.process.wait(120)

    def wait_for_epoch(self, epoch: int) -> None:
        while self.epoch() < epoch:
            assert self.process.poll() is None, self.said
            time.sleep(0.2)

    def wait_for_checkpoint(self) -> None:
        """Until there is one that is whole."""
        while not list(self._metrics.parent.glob("checkpoints/step-*/.manifest.json")):
            assert self.process.poll() is None, self.said
            time.sleep(0.2)


def train_workers(cluster: LocalCluster, node: str) -> list[str]:
    """The processes of Ray Train on a node."""
    return [line for line in cluster.processes(node).values() if "RayTrainWorker" in line]


def long_job(backbone: Path, data: Path, storage: Path, address: str) -> dict[str, Any]:
    """An elastic group of one or two workers that trains for longer than anybody watches it, a checkpoint every 5 s."""
    return {
        "backbone": str(backbone), "data": {"path": str(data)}, "method": "full", "name": "run",
        "training": {**TRAINING, "epochs": 2000, "checkpoint_every_s": 5}, "storage": str(storage),
        "scaling": {"num_workers": 2, "min_workers": 1, "threads_per_worker": 1, "address": address},
    }  # fmt: skip


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(num_nodes=2, cpus=1) as started:
        yield started


def test_a_notice_costs_no_step(cluster: LocalCluster, tiny_resnet: Path, digits: Path, tmp_path: Path) -> None:
    """One worker a node, and one node is taken away. No other checkpoint than that of the notice is due."""
    job = {
        "backbone": str(tiny_resnet), "data": {"path": str(digits)}, "method": "full", "training": TRAINING,
    }  # fmt: skip
    one = orchestrator.finetune(**job, storage=str(tmp_path / "one"), scaling={"threads_per_worker": 1}, report=silent)
    scaling = {"num_workers": 2, "min_workers": 1, "threads_per_worker": 1, "address": cluster.address}
    driver = Driver(cluster, tmp_path, {**job, "storage": str(tmp_path / "runs"), "name": "run", "scaling": scaling})
    driver.wait_for_epoch(3)
    seen = seen_at_work(cluster, of=driver.process.pid)
    before = driver.epoch()
    cluster.drain("node1", 30)
    driver.wait_for("its node is taken away; a checkpoint is written")
    while train_workers(cluster, "node1"):  # Ray ends them when the time is over, and so does a cloud
        time.sleep(0.2)
    cluster.kill_node("node1")
    said = driver.wait_for("going on from step")
    (going_on,) = re.findall(r"going on from step (\d+) of", said)
    assert driver.process.wait(600) == 0, driver.said
    assert "restart 1 of" not in driver.said
    run = orchestrator.open_run(tmp_path / "runs/run")
    assert int(going_on) >= before * run.plan.recipe.steps_per_epoch, "no other checkpoint was due"
    assert [line["epoch"] for line in run.metrics] == list(range(1, 61))
    for alone, elastic in zip(one.metrics, run.metrics, strict=True):
        assert abs(alone["train_loss"] - elastic["train_loss"]) < 1e-3
    assert found_in({**seen, **seen_in_files(cluster, tmp_path / "runs"), "its output": driver.said}, cluster) == []


def test_a_trial_goes_on_without_a_step_lost_when_its_node_is_taken_away(
    cluster: LocalCluster, tiny_resnet: Path, digits: Path, tmp_path: Path
) -> None:
    """A trial in one process on each of two nodes: it writes a checkpoint, and begins again where there is room."""
    training = {**TRAINING, "epochs": 120}
    del training["learning_rate"]
    job = {
        "backbone": str(tiny_resnet), "data": {"path": str(digits)}, "method": "full", "training": training,
        "storage": str(tmp_path / "runs"), "name": "run",
        "search": {"space": {"learning_rate": {"grid": [0.01, 0.02]}}},
        "scaling": {"threads_per_worker": 1, "address": cluster.address},
    }  # fmt: skip
    driver = Driver(cluster, tmp_path, job, "search")
    metrics = [tmp_path / f"runs/run.000{number}/metrics.jsonl" for number in (1, 2)]
    while not all(one.exists() and len(one.read_text().splitlines()) >= 3 for one in metrics):
        assert driver.process.poll() is None, driver.said
        time.sleep(0.2)
    before = [len(one.read_text().splitlines()) for one in metrics]
    cluster.drain("node1", 6)
    time.sleep(6)
    cluster.kill_node("node1")
    said = driver.wait_for(r"trial \d: going on from step")
    number, step = map(int, re.findall(r"trial (\d): going on from step (\d+) of", said)[0])
    steps_per_epoch = orchestrator.open_run(tmp_path / "runs/run.0001").plan.recipe.steps_per_epoch
    assert step >= before[number - 1] * steps_per_epoch, "no other checkpoint was due"
    assert driver.process.wait(600) == 0, driver.said
    assert f"trial {number}: its node was taken away; it goes on elsewhere" in driver.said
    assert "restart" not in driver.said, "a notice is no failure"
    for one in metrics:
        assert [json.loads(line)["epoch"] for line in one.read_text().splitlines()] == list(range(1, 121))


def test_a_node_is_lost_and_another_one_joins(
    cluster: LocalCluster, tiny_resnet: Path, digits: Path, tmp_path: Path
) -> None:
    """Without notice: each sample is taken once an epoch, and the losses are those of a run that was left alone."""
    job = long_job(tiny_resnet, digits, tmp_path / "runs", cluster.address)
    job["training"]["audit"] = True
    driver = Driver(cluster, tmp_path, job)
    driver.wait_for_epoch(3)
    driver.wait_for_checkpoint()
    cluster.kill_node("node1")
    driver.wait_for("restart 1 of 2")
    driver.wait_for("going on from step")
    driver.wait_for_epoch(driver.epoch() + 2)
    cluster.add_node()
    driver.wait_for(r"(?s)going on from step.*going on from step")  # it has grown: begun again, with both
    driver.wait_for_epoch(driver.epoch() + 2)
    assert train_workers(cluster, "node2")
    assert driver.stop() == 130, driver.said
    run = orchestrator.open_run(tmp_path / "runs/run")
    workers_of: dict[int, int] = {}
    for one in taken_of(run):
        workers_of[one.step] = max(workers_of.get(one.step, 0), one.worker + 1)
    assert list(workers_of) == list(range(len(workers_of)))
    changes = [number for number, before in zip(workers_of.values(), [0, *workers_of.values()], strict=False)
               if number != before]  # fmt: skip
    assert changes == [2, 1, 2]
    ended: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, EpochEnded):
            ended.append(event.figures["train_loss"])

    with pytest.raises(InterruptedRunError):
        orchestrator.finetune(
            {**job, "storage": str(tmp_path / "alone"), "scaling": {"threads_per_worker": 1}},
            report=listen, stop=lambda: len(ended) >= len(run.metrics),
        )  # fmt: skip
    losses = [line["train_loss"] for line in run.metrics]
    assert losses == pytest.approx(ended[: len(losses)], abs=1e-4)
    assert losses[-1] < losses[0] - 0.1, "nothing was learnt, so nothing was compared"
