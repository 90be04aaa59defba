"""A Ray cluster of several nodes on this machine, as a context manager."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from cluster.machine import (
    MARK,
    NAMESPACES,
    ClusterError,
    answers,
    began,
    free_port,
    ip,
    is_first,
    is_up,
    links,
    make_bridge,
    namespaces_allowed,
    plug,
    processes,
    remove_links,
    wait_until,
)
from cluster.node import IN_A_NAMESPACE, PROBE, Node, ray_start

HERE = Path("/tmp")  # sockets of Ray allow a path of 107 characters in all
PORT, DASHBOARD_PORT = 6379, 8265
HOST = "host"
READY_S = 180.0
GONE_S = 60.0


@dataclasses.dataclass
class LocalCluster:
    """A cluster as a context manager: `with LocalCluster(num_nodes=2) as cluster: ...`.

    `python` runs the nodes: another virtual environment than this one, say, that has Ray and not this package. `env` is
    added to their environment; of this process's own they get PATH and LANG alone, and PYTHONPATH where `python` is
    this one. `private`: directories of this machine in whose place each node has an empty one of its own; they want
    namespaces. `namespaces`: None is by what is allowed here.
    """

    num_nodes: int = 2
    cpus: int = 2
    gpus: int = 0
    name: str = ""
    python: str = sys.executable
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    private: Sequence[str] = ()
    namespaces: bool | None = None
    subnet: str = ""
    port: int = PORT
    dashboard_port: int = DASHBOARD_PORT
    nodes: dict[str, Node] = dataclasses.field(default_factory=dict)
    ready_word: ClassVar[str] = "Ray runtime started"
    """In a node's log, once it is part of the cluster."""

    def __post_init__(self) -> None:
        self.name = self.name or f"{os.getpid():x}{secrets.token_hex(1)}"
        if not re.fullmatch("[a-z0-9]{1,10}", self.name):
            raise ClusterError(f"{self.name!r} is no name of a cluster: up to ten of a-z and 0-9")
        if absent := [place for place in self.private if not Path(place).is_dir()]:
            raise ClusterError(f"a directory of which each node has its own is to be there: {absent[0]}")
        if self.namespaces is None:
            self.namespaces = namespaces_allowed()
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    # --- what others need of it ---

    @property
    def folder(self) -> Path:
        """All of its files."""
        return HERE / f"cluster-{self.name}"

    @property
    def address(self) -> str:
        """HOST:PORT, as `ray.init(address=...)` on one of the nodes takes it."""
        return f"{self.nodes['node0'].address}:{self.port}"

    @property
    def dashboard(self) -> str:
        """http://HOST:PORT, as jobs are submitted to; reached from this machine."""
        return f"http://{self.nodes['node0'].address}:{self.dashboard_port}"

    @property
    def host_address(self) -> str:
        """What listens here on this machine is reached by the nodes; with namespaces they know it as `host`, too."""
        return f"{self.subnet}.1"

    @property
    def token_file(self) -> Path:
        """Mode 0600."""
        return self.folder / "token"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that a driver, or who submits a job, has to have."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file)}

    def node_environment(self, node: str) -> dict[str, str]:
        """The environment of what runs on a node."""
        passed = {name: os.environ[name] for name in ("LANG", "LC_ALL") if name in os.environ}
        if self.python == sys.executable and "PYTHONPATH" in os.environ:
            passed["PYTHONPATH"] = os.environ["PYTHONPATH"]
        interface = "eth0" if self.namespaces else "lo"
        return {
            **passed,
            "PATH": os.pathsep.join([str(Path(self.python).parent), os.environ.get("PATH", os.defpath)]),
            "HOME": str(self.folder / node / "home"),
            "GLOO_SOCKET_IFNAME": interface,  # else gloo takes 127.0.0.1, and no other node reaches it
            "NCCL_SOCKET_IFNAME": interface,
            "RAY_health_check_timeout_ms": "3000",  # of Ray's 10 s; a node here answers at once, or is gone
            "RAY_worker_niceness": "0",  # a node stands for a machine of its own, on which nothing else waits
            **self.environment,
            **self.env,
            MARK: f"{self.folder}/{node}",
        }

    def command(self, node: str, words: Sequence[str]) -> list[str]:
        """`words` as they run on that node, with `node_environment` around them."""
        self._known(node)
        if not self.namespaces:
            return list(words)
        first = [pid for pid in self.processes(node) if is_first(pid)]
        if not first:
            raise ClusterError(f"{node} is not running")
        return ["nsenter", "--target", str(first[0]), "--all", f"--wd={os.getcwd()}", "--", *words]

    def run(self, node: str, *words: str, timeout_s: float | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command on a node, and return what it said."""
        return subprocess.run(
            self.command(node, words), env=self.node_environment(node), capture_output=True, text=True, check=False,
            timeout=timeout_s,
        )  # fmt: skip

    def processes(self, node: str) -> dict[int, str]:
        """{process id on this machine: command line} of all that runs on a node."""
        return dict(processes(f"{self.folder}/{node}"))

    def status(self) -> dict[str, dict[str, object]]:
        """{node: its address, its size, whether it runs, is cut off, and is alive to Ray under which id}."""
        known: dict[str, tuple[str, bool]] = {}
        if self.processes("node0"):
            done = self.run("node0", self.python, "-c", PROBE, self.address, timeout_s=60)
            known = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
        return {
            name: {
                "address": node.address, "cpus": node.cpus, "gpus": node.gpus, "running": bool(self.processes(name)),
                "cut": bool(self.namespaces) and not is_up(self._link(name)),
                "alive": known.get(name, ("", False))[1], "id": known.get(name, ("", False))[0],
            }
            for name, node in self.nodes.items()
        }  # fmt: skip

    # --- what is done to it ---

    def __enter__(self) -> LocalCluster:
        return self.up()

    def __exit__(self, *_: object) -> None:
        self.down()

    def up(self) -> LocalCluster:
        """Start all nodes. Whatever goes wrong, or whoever interrupts it: nothing is left of it."""
        try:
            self.folder.mkdir(mode=0o700)
        except FileExistsError:
            raise ClusterError(f"there is a cluster {self.name}: `status` shows it, `down` ends it") from None
        try:
            self.token_file.touch(mode=0o600)
            self.token_file.write_text(secrets.token_hex(32))
            self._make_network()
            self.add_node(gpus=self.gpus)
            for name in [self._start(self.cpus, self.gpus, ()) for _ in range(self.num_nodes - 1)]:
                self._wait_for(name)
            self._wait_for_dashboard()
        except BaseException:
            self.down()
            raise
        return self

    def add_node(self, cpus: int | None = None, gpus: int = 0, more: Sequence[str] = ()) -> Node:
        """Start one more node, and return once it is part of the cluster. `more`: options of `ray start`."""
        name = self._start(self.cpus if cpus is None else cpus, gpus, more)
        self._wait_for(name)
        return self.nodes[name]

    def kill_node(self, node: str) -> None:
        """End all that runs on a node with SIGKILL, its connections with it; `cut` does so in silence."""
        self._known(node)
        self._kill(node)

    def cut(self, node: str, seconds: float | None = None) -> None:
        """Let nothing reach a node or leave it: for so long, waiting, or until `mend`. What runs on it runs on."""
        ip("link", "set", self._link(node), "down")
        if seconds is not None:
            try:
                time.sleep(seconds)
            finally:
                self.mend(node)

    def mend(self, node: str) -> None:
        """The end of a cut."""
        if links(self._link(node)):  # it is gone where its node has ended meanwhile
            ip("link", "set", self._link(node), "up")

    def drain(self, node: str, seconds: int) -> None:
        """What a cloud says before it takes a spot machine away, so many seconds ahead; `kill_node` takes it."""
        self._known(node)
        done = self.run(
            "node0", self.python, "-m", "ray.scripts.scripts", "drain-node", "--address", self.address,
            "--node-id", str(self.status()[node]["id"]), "--reason", "DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message", "a spot machine is taken away", "--deadline-remaining-seconds", str(seconds),
        )  # fmt: skip
        if done.returncode:
            raise ClusterError(f"Ray does not drain {node}: {(done.stderr or done.stdout).strip()}")

    def down(self) -> None:
        """End every process of it, and remove its network and its files: whatever is left of them."""
        self._kill("")
        remove_links(rf"(v\d+|br)-{self.name}")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.nodes.clear()

    # --- how ---

    def _known(self, node: str) -> None:
        if node not in self.nodes:
            raise ClusterError(f"there is no node {node!r}; there are {', '.join(self.nodes)}")

    def _link(self, node: str) -> str:
        """This machine's end of a node's cable."""
        self._known(node)
        if not self.namespaces:
            raise ClusterError("the nodes share this machine, and have no network that can be cut: that wants root")
        return f"v{node.removeprefix('node')}-{self.name}"

    def _make_network(self) -> None:
        if not self.namespaces:
            self.subnet, self.port, self.dashboard_port = "127.0.0", free_port(), free_port()
            return
        self.subnet = make_bridge(f"br-{self.name}", HERE)
        names = [f"{self.subnet}.{10 + k} node{k}\n" for k in range(100)]
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{self.host_address} {HOST}\n" + "".join(names))
        (self.folder / "resolv.conf").write_text("options timeout:1 attempts:1\n")  # no name server: an answer at once

    def _start(self, cpus: int, gpus: int, more: Sequence[str]) -> str:
        """Start a node's processes; its name."""
        name = f"node{len(self.nodes)}"
        node = self.nodes[name] = Node(name, f"{self.subnet}.{10 + len(self.nodes)}", cpus, gpus)
        own = self.folder / name
        (own / "home").mkdir(parents=True)
        words, environment = [*self._command_of(node), *more], self.node_environment(name)
        if self.namespaces:
            words = ["unshare", *NAMESPACES, "sh", "-euc", IN_A_NAMESPACE, "sh", *words]
            environment |= {
                "FOLDER": str(self.folder), "OWN": str(own), "NODE": name, "ADDRESS": node.address,
                "PRIVATE": " ".join(self.private),
            }  # fmt: skip
        with self._log(name).open("wb") as log:
            process = self._started[name] = subprocess.Popen(
                words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, cwd="/",
            )  # fmt: skip
        node.pid, node.began = process.pid, began(process.pid)
        if self.namespaces:
            plug(process.pid, self._link(name), f"br-{self.name}")
        self._write()
        return name

    def _command_of(self, node: Node) -> list[str]:
        """What runs on a node for as long as it lives."""
        at_head = self.nodes["node0"].address
        head = [f"--address={self.address}"] if node.name != "node0" else [
            "--head", f"--port={self.port}", f"--dashboard-host={at_head}", f"--dashboard-port={self.dashboard_port}",
        ]  # fmt: skip
        # One machine has one of each port.
        shared = [] if self.namespaces else [
            f"--dashboard-agent-listen-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0",
        ]  # fmt: skip
        return ray_start(node, self.python, self.folder / node.name / "ray", [*head, *shared])

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _last_words(self, name: str) -> str:
        return "\n".join(self._log(name).read_text(errors="replace").splitlines()[-15:])

    def _wait_for(self, name: str) -> None:
        """Return once `ray start` says that the node is part of the cluster."""

        def ready() -> bool:
            if self.ready_word in self._log(name).read_text(errors="replace"):
                return True
            if not self.processes(name):
                raise ClusterError(f"{name} has ended:\n{self._last_words(name)}")
            return False

        wait_until(ready, READY_S, lambda: f"{name} is not ready after {READY_S:g} s:\n{self._last_words(name)}")

    def _wait_for_dashboard(self) -> None:
        """Return once jobs can be submitted; at once where the nodes' Ray lacks what that needs (`ray[default]`)."""
        if self.run("node0", self.python, "-c", "import ray.dashboard.optional_deps").returncode:
            return
        host = self.nodes["node0"].address
        wait_until(lambda: answers(host, self.dashboard_port), READY_S, lambda: f"nothing answers at {self.dashboard}")

    def _write(self) -> None:
        """What other processes know of the cluster."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "nodes"}
        nodes = {name: dataclasses.asdict(node) for name, node in self.nodes.items()}
        new = self.folder / "cluster.new"
        new.write_text(json.dumps({**fields, "nodes": nodes}, indent=1))
        new.replace(self.folder / "cluster.json")

    def _kill(self, name: str) -> None:
        """Return once nothing runs on the node any more; '': on any."""
        # After a restart of this machine its id may be another session's.
        ours = [node for node in self.nodes.values() if name in ("", node.name) and node.pid]
        sessions = {node.pid for node in ours if began(node.pid) == node.began}

        def gone() -> bool:
            pids = [pid for pid, _ in processes(f"{self.folder}/{name}", sessions)]
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not pids

        wait_until(gone, GONE_S, lambda: "some processes do not end")
        for one in [name] if name else list(self._started):
            if one in self._started:
                self._started.pop(one).wait()
