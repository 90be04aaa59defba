"""cluster/local.py: a real cluster of nodes with addresses of their own, of which nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import ClusterError, LocalCluster, namespaces_allowed
from cluster.machine import links, processes
from tests.conftest import REPOSITORY

PROGRAM = REPOSITORY / "cluster" / "local.py"
needs_namespaces = pytest.mark.skipif(not namespaces_allowed(), reason="namespaces want root, on Linux")
# Stands for Ray where what matters is what is left of the machines: it says what Ray says, and stays.
STAND_IN = "#!/bin/sh\ncase \"$*\" in *' start '*) echo 'Ray runtime started'; exec sleep 600;; esac\nexit 1\n"
NODES = """
import json, ray, socket
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
@ray.remote(num_cpus=1)
def where():
    import time
    time.sleep(1)
    return ray.util.get_node_ip_address(), socket.gethostname()
print(json.dumps(sorted(set(map(tuple, ray.get([where.remote() for _ in range(4)]))))))
"""


def left_of(name: str) -> list[object]:
    """What there is of a cluster of that name."""
    folder = Path(f"/tmp/cluster-{name}")
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]
    return [*processes(f"{folder}/"), *links(rf"(v\d+|br)-{name}"), *([folder] if folder.exists() else []), *mounts]


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, PROGRAM, *map(str, words)], capture_output=True, text=True, check=False, timeout=240
    )


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    file = tmp_path / "python"
    file.write_text(STAND_IN)
    file.chmod(0o755)
    return file


@pytest.fixture
def name() -> Iterator[str]:
    chosen = f"t{os.getpid():x}"
    yield chosen
    command("down", "--name", chosen)


# --- with a stand-in for Ray: what is made of this machine, and what is left of that ---


@pytest.mark.parametrize("loopback", [False, True])
def test_up_and_down_leave_nothing(loopback: bool, name: str, stand_in: Path) -> None:
    given = ["--name", name, "--python", stand_in, *(["--loopback"] if loopback else [])]
    done = command("up", "--nodes", 3, *given)
    assert done.returncode == 0, done.stderr
    assert "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=" in done.stdout
    token = Path(f"/tmp/cluster-{name}/token")
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text()) == 64
    again = command("up", *given)
    assert (again.returncode, "down` ends it" in again.stderr) == (1, True)
    assert command("down", "--name", name).returncode == 0
    assert left_of(name) == []


def test_down_ends_no_stranger_whose_id_a_node_had(name: str, stand_in: Path) -> None:
    """As after a restart of the machine, which leaves the folder and counts processes anew."""
    assert command("up", "--name", name, "--python", stand_in, "--loopback").returncode == 0
    stranger = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        file = Path(f"/tmp/cluster-{name}/cluster.json")
        told = json.loads(file.read_text())
        told["nodes"]["node0"]["pid"] = stranger.pid
        file.write_text(json.dumps(told))
        assert command("down", "--name", name).returncode == 0
        assert left_of(name) == []
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@needs_namespaces
def test_each_node_is_a_machine_of_its_own(name: str, stand_in: Path, tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir()
    (private / "here").touch()
    with LocalCluster(name=name, python=str(stand_in), private=[str(private)]) as cluster:
        script = f"hostname; hostname -I; ps ax | wc -l; ls {private}; touch {private}/$(hostname); ls /dev/shm"
        for node in ("node0", "node1"):
            said = cluster.run(node, "sh", "-c", script).stdout.split()
            assert said[:2] == [node, cluster.nodes[node].address]
            assert int(said[2]) < 10
            assert said[3:] == []
        assert cluster.run("node1", "sh", "-c", f"ls {private}").stdout.split() == ["node1"]
        assert [one.name for one in private.iterdir()] == ["here"]
        reached = ["bash", "-c", f"exec 3<>/dev/tcp/{cluster.nodes['node0'].address}/9"]
        assert "refused" in cluster.run("node1", *reached).stderr
        cluster.cut("node1")
        with pytest.raises(subprocess.TimeoutExpired):  # in silence, as on a network
            cluster.run("node1", *reached, timeout_s=1)
        cluster.mend("node1")
        assert "refused" in cluster.run("node1", *reached).stderr
        cluster.kill_node("node1")
        assert cluster.processes("node1") == {}
        with pytest.raises(ClusterError, match="node1 is not running"):
            cluster.run("node1", "true")
    assert left_of(name) == []
    assert [one.name for one in private.iterdir()] == ["here"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whoever_ends_up_nothing_is_left(sent: signal.Signals, name: str, tmp_path: Path) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nsleep 600\n")
    slow.chmod(0o755)
    started = subprocess.Popen([sys.executable, PROGRAM, "up", "--name", name, "--python", slow])
    while not any("sleep 600" in line for _, line in processes(f"/tmp/cluster-{name}/")):
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(sent)
    started.wait(60)
    if sent == signal.SIGKILL:
        assert left_of(name)
        assert command("down", "--name", name).returncode == 0
    assert left_of(name) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["up", "--nodes", "0"], "there is a head at least"),
        (["up", "--python", "/no/python"], "there is no such program"),
        (["up", "--env", "A"], "NAME=VALUE is expected"),
        (["up", "--name", "A_B"], "no name of a cluster"),
        (["up", "--private", "/no/folder"], "is to be there: /no/folder"),
        (["status", "--name", "nobody"], "there is no cluster 'nobody' here"),
        (["up", "--python", "/bin/false", "--name", "false"], "node0 has ended"),
    ],
)
def test_what_a_person_gets_wrong_is_said(words: list[str], said: str) -> None:
    done = command(*words)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert left_of("false") == []


# --- with Ray ---


def wait_until_gone(cluster: LocalCluster, node: str) -> None:
    """Until a node is no part of the cluster: after a notice at once where nothing runs on it, else at its deadline."""
    until = time.monotonic() + 120
    while cluster.status()[node]["alive"]:
        assert time.monotonic() < until, f"{node} is still alive"
        time.sleep(1)


@pytest.mark.cluster
@pytest.mark.timeout(600)
@needs_namespaces
def test_a_cluster_lives_grows_loses_and_is_told(name: str) -> None:
    with LocalCluster(num_nodes=2, cpus=2, name=name) as cluster:
        assert [one["alive"] for one in cluster.status().values()] == [True, True]
        done = cluster.run("node0", sys.executable, "-c", NODES, timeout_s=120)
        assert [two[1] for two in eval(done.stdout)] == ["node0", "node1"], done.stderr
        words = ["ray", "status", "--address", cluster.address]
        environment = {**cluster.node_environment("node0"), "RAY_AUTH_TOKEN": "f" * 64}
        refused = subprocess.run(
            cluster.command("node0", words), env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert refused.returncode != 0
        assert "nauthenticated" in refused.stdout + refused.stderr

        assert cluster.add_node(cpus=1).name == "node2"
        assert cluster.status()["node2"]["alive"]
        cluster.drain("node2", 30)
        wait_until_gone(cluster, "node2")
        # What a pod's hook and notice.sh run: without an id it is the node that they run on.
        words = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "x"]
        words = ["ray", "drain-node", *words, "--deadline-remaining-seconds", "25"]
        told = cluster.run("node1", "env", f"RAY_ADDRESS={cluster.address}", *words, timeout_s=120)
        assert told.returncode == 0, told.stderr
        wait_until_gone(cluster, "node1")

        assert cluster.add_node(cpus=1).name == "node3"
        cluster.kill_node("node3")
        assert cluster.processes("node3") == {}
        wait_until_gone(cluster, "node3")
        assert cluster.status()["node0"]["alive"]
    assert left_of(name) == []


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_nodes_that_share_this_machine_have_addresses_of_their_own(name: str) -> None:
    with LocalCluster(num_nodes=2, cpus=1, name=name, namespaces=False) as cluster:
        status = cluster.status()
        assert [one["alive"] for one in status.values()] == [True, True]
        assert len({one["address"] for one in status.values()}) == 2
        assert all(str(one["address"]).startswith("127.") for one in status.values())
        with pytest.raises(ClusterError, match="wants root"):
            cluster.cut("node1")
    assert left_of(name) == []
