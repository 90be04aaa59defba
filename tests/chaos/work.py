"""One job as a user starts it: its process, how far it is, the processes it has on Ray, the hash of its weights."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.local import LocalCluster
from orchestrator.job import Storage, run_in
from tests.hub_server import Hub
from tests.s3_proxy import Proxy
from tests.tiny import REPOSITORY

TIMEOUT_S = 240.0
STEPS_AN_EPOCH = 23
"""Of the job of all rows: 360 digits in batches of 16."""
LOOK_EVERY_S = 0.5
GONE_S = 60.0
"""So long Ray's own processes may stay after a driver that was killed."""


class NotSurvivedError(Exception):
    """What was to hold does not."""


@dataclass
class Work:
    """A job in a folder of its own."""

    folder: Path
    job: tuple[str, ...]
    """Arguments of `orchestrator finetune`."""
    environment: dict[str, str]
    random: random.Random
    hub: Hub
    storage: Storage
    """Where its run lies, as this process finds it."""
    proxy: Proxy | None = None
    """In front of the object store, where it lies in one."""
    cluster: LocalCluster | None = None
    """Machines of its own, where it has some: it is started on the first one."""
    num_steps: int = 15 * STEPS_AN_EPOCH
    name: str = "run"
    faults: list[dict[str, Any]] = field(default_factory=list)
    """Each with its kind, when it came, to which process."""
    wanted: int = 5
    """Random moments at which something is to be done to it."""
    is_first: bool = True
    """Whether it is the first job of its row."""
    moments: int = 0
    """So many there were."""
    num_set: int = 0
    """Faults that its storage was told, whether a request has met them or not."""
    num_starts: int = 0
    process: subprocess.Popen[str] | None = None
    pids: set[int] = field(default_factory=set)
    """Of every process that was started for it."""

    @property
    def runs(self) -> Path:
        """The directory of its runs, where it has one."""
        return self.folder / "runs"

    def start(self, *more: str) -> subprocess.Popen[str]:
        """The same command again."""
        self.num_starts += 1
        words = [sys.executable, "-m", "orchestrator.terminal.cli", "finetune", *self.job, "--name", self.name, *more]
        environment = self.environment
        if self.cluster is not None:
            words = self.cluster.command("node0", [*words, "--address", self.cluster.address])
            environment = {**environment, **self.cluster.node_environment("node0")}
        log = self.folder / f"start-{self.num_starts}.log"
        with log.open("w") as out:
            self.process = subprocess.Popen(
                words, cwd=self.folder, env=environment, stdout=out, stderr=subprocess.STDOUT, text=True
            )
        self.pids.add(self.process.pid)
        return self.process

    def said(self) -> str:
        """What the newest process printed."""
        return (self.folder / f"start-{self.num_starts}.log").read_text(errors="replace")

    # --- how far it is ---

    def checkpoints(self) -> list[str]:
        """Names of those that are whole, oldest first."""
        return sorted(name.rpartition("/")[2] for name in self.storage.commits(f"{self.name}/checkpoints"))

    def step(self) -> int:
        """Of its newest checkpoint; -1 before the first."""
        found = self.checkpoints()
        return int(found[-1].removeprefix("step-")) if found else -1

    def is_done(self) -> bool:
        """Whether the run is finished."""
        return run_in(self.storage, self.name).finished

    def wait(self, what: Callable[[], bool]) -> bool:
        """Until `what` holds: whether it does; not, where the process ended before. Raises `NotSurvivedError`."""
        assert self.process is not None
        until, looked = time.monotonic() + TIMEOUT_S, 0.0
        while time.monotonic() < until:
            if time.monotonic() - looked > LOOK_EVERY_S:
                self._remember_children()
                looked = time.monotonic()
            if what():
                return True
            if self.process.poll() is not None:
                return what()
            time.sleep(0.005 if self.proxy is None else 0.1)
        raise NotSurvivedError(f"nothing happened for {TIMEOUT_S:.0f} s: {self.said()[-1500:]}")

    @property
    def is_wanted(self) -> bool:
        """Whether there are to be more of these moments."""
        return self.moments < self.wanted

    def wait_for_random_moment(self, first: int = 0) -> bool:
        """Until a checkpoint of a random later step, and then up to a tenth of a second; whether it still runs.

        The moments that are left lie as far apart, on average, as the steps that are left allow.
        """
        begin = max(self.step(), first)
        num_left = max(1, self.wanted - self.moments)
        target = begin + self.random.randint(1, max(1, 2 * (self.num_steps - 15 - begin) // (num_left + 1)))
        arrived = self.wait(lambda: self.step() >= target)
        time.sleep(self.random.random() * 0.1)
        still_runs = arrived and self.process is not None and self.process.poll() is None
        self.moments += still_runs
        return still_runs

    # --- what is done to it ---

    def note(self, kind: str, pid: int | None = None, **more: Any) -> None:
        """A fault happened."""
        at = {"time": round(time.time(), 3), "step": self.step()}
        self.faults.append({"kind": kind, **at, **({"pid": pid} if pid else {}), **more})

    def kill(self, kind: str, pid: int, number: int = signal.SIGKILL) -> None:
        """A signal to one process."""
        self.note(kind, pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def _remember_children(self) -> None:
        if self.process is not None:
            self.pids |= set(descendants(self.process.pid))

    def on_ray(self, title: str) -> list[int]:
        """The job's processes on Ray whose title has this word."""
        assert self.process is not None
        return [pid for pid in descendants(self.process.pid) if title in title_of(pid)]

    # --- the end ---

    def finish(self, attempts: int = 5) -> str:
        """Start the same command until the run is done; the hash of its weights. Raises `NotSurvivedError`."""
        for _ in range(attempts):
            if self.process is None or self.process.poll() is not None:
                if self.is_done():
                    break
                self.start()
            self.wait(lambda: False)
        if not self.is_done():
            raise NotSurvivedError(f"not done after {attempts} more starts: {self.said()[-1500:]}")
        for log in sorted(self.folder.glob("start-*.log")):  # of those too that a fault has ended
            if "Traceback" in (said := log.read_text(errors="replace")):
                raise NotSurvivedError(f"a trace in {log.name}: {said[-1500:]}")
        weights = run_in(self.storage, self.name).model / "model.safetensors"
        return hashlib.sha256(weights.read_bytes()).hexdigest()

    def leaves_nothing(self, within_s: float = GONE_S) -> None:
        """Wait until no process is left that was started for it. Raises `NotSurvivedError`."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            left = [pid for pid in self.pids if title_of(pid)]
            if not left:
                return
            time.sleep(0.2)
        raise NotSurvivedError(f"processes are left: {[(pid, title_of(pid)[:80]) for pid in left]}")


def title_of(pid: int) -> str:
    """The command line of a process; '' where there is none, or it has ended and nobody asked."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return "" if state == "Z" else Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def descendants(pid: int) -> list[int]:
    """All processes below one."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = entry.read_text()
            children.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(entry.parent.name))
    found, open_ones = [], [pid]
    while open_ones:
        below = children.get(open_ones.pop(), [])
        found += below
        open_ones += below
    return found


def environment(folder: Path, **more: str) -> dict[str, str]:
    """What every process gets: a home, a cache and a Ray of its own, and one core's worth of threads."""
    own = {
        "HF_HOME": str(folder / "hf"), "RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "COLUMNS": "200",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "plugins")]),
    }  # fmt: skip
    return {**os.environ, **own, **more}
