"""A job on a cluster that stands at no worker: Ray's own autoscaler adds nodes, or the job ends waiting."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.distributed.offer import NODE_TYPES
from tests.chaos.work import descendants
from tests.whole.test_train import start

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(420)]
HEAD = "f" * 51 + "00000"
"""Ray's provider of nodes on one machine wants this name of the head."""


def config(address: str) -> dict[str, Any]:
    lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
             "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude",
             "rsync_filter")  # fmt: skip
    node = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2}
    return {
        "cluster_name": "one", "max_workers": 2, "upscaling_speed": 1.0, "idle_timeout_minutes": 5.0,
        "provider": {"type": "fake_multinode", "head_node_id": HEAD, "gcs_address": address, "launch_multiple": True,
                     "disable_node_updaters": True},
        "auth": {}, "docker": {}, "file_mounts": {}, "file_mounts_sync_continuously": False,
        **{name: [] for name in lists}, "head_node_type": "head",
        "available_node_types": {"head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}, "one": node},
    }  # fmt: skip


@pytest.fixture(params=[True, False])
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of a head without a core, whose autoscaler adds nodes, or that says so and has none."""
    import ray

    folder = Path(tempfile.mkdtemp(prefix="orc-", dir="/tmp"))
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    where = f"{ray.util.get_node_ip_address()}:{port}"
    words = [
        Path(sys.executable).parent / "ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=0",
        "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}",
    ]  # fmt: skip
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    if request.param:
        (folder / "nodes.json").write_text(json.dumps(config(where)))
        words.append(f"--autoscaling-config={folder / 'nodes.json'}")
        environment |= {"RAY_FAKE_CLUSTER": "1", "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}
    log = folder / "head.log"
    head = subprocess.Popen(words, env=environment, stdout=log.open("wb"), stderr=subprocess.STDOUT)
    until = time.monotonic() + 60
    while "Ray runtime started" not in log.read_text(errors="replace"):
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)
    yield where
    for pid in [*descendants(head.pid), head.pid]:
        os.kill(pid, signal.SIGKILL)
    head.wait(60)
    shutil.rmtree(folder, ignore_errors=True)


def waiting(backbone: Path, data: Path, address: str, name: str, *more: str) -> subprocess.Popen[str]:
    """The job of two workers, which two nodes of one core would have a place for."""
    return start(
        "finetune", "--backbone", backbone, "--data", data, "--method", "full", "--epochs", "2", "--workers", "2",
        "--address", address, "--name", name, *more,
    )  # fmt: skip


@pytest.fixture
def _told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NODE_TYPES, json.dumps([{"resources": {"CPU": 1}, "max": 2}]))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


@pytest.mark.usefixtures("_told")
@pytest.mark.parametrize("address", [True], indirect=True)
def test_a_job_waits_for_the_nodes_that_come(
    address: str, tiny_resnet: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a cluster that has no token; that this process has one, and would ask for it, is no hindrance."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    job = waiting(tiny_resnet, digits, address, "grown")
    out, said = job.communicate(timeout=240)
    assert job.returncode == 0, out + said
    assert "2 CPUs are wanted and 0 are free" in said
    assert f"{address} asks for no token" in said
    assert len(Path("runs/grown/metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.usefixtures("_told")
@pytest.mark.parametrize("address", [False], indirect=True)
def test_waiting_ends_soon_after_it_has_to(address: str, tiny_resnet: Path, digits: Path) -> None:
    """At its deadline, or at a Ctrl-C: no worker runs, so nobody is waited for."""
    job = waiting(tiny_resnet, digits, address, "late", "--set", "scaling.wait_s=5")
    assert job.stderr is not None
    lines = list(iter(job.stderr.readline, ""))
    assert job.wait(60) == 2, "".join(lines)
    assert "no place on the cluster for 5 s: 2 CPUs are wanted and 0" in "".join(lines)
    assert f"{address} asks for no token" in "".join(lines)

    job = waiting(tiny_resnet, digits, address, "stopped")
    assert job.stderr is not None
    for line in job.stderr:
        if "the job waits for its place" in line:
            break
    time.sleep(5)  # it waits
    asked = time.monotonic()
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=60)
    assert (job.returncode, "the same command goes on" in said) == (130, True), said
    assert time.monotonic() - asked < 30  # two minutes, where workers are waited for that there are not
