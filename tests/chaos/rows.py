"""The table: each row is how a job runs and what it must survive, so that its weights are those of one left alone."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.local import namespaces_allowed
from tests.chaos import nodes
from tests.chaos.work import GONE_S, NotSurvivedError, Work

SKIPPED = "skipped: "


@dataclass(frozen=True)
class Row:
    """What is tried in a round; `hurt` returns, and the job is then started until it is done."""

    hurt: Callable[[Work], None]
    reference: str = "here"
    """Which run that was left alone it is held against: in this process, or on Ray."""
    arguments: tuple[str, ...] = ()
    on_hub: bool = False
    in_store: bool = False
    on_nodes: int = 0
    """On how many machines of its own, which this one is divided into."""
    check: Callable[[Work], None] = lambda _: None
    """What is to hold of the run beside its weights. Raises `NotSurvivedError`."""
    needs: Callable[[], str] = lambda: ""
    """Why it cannot be tried here, '' where it can."""


def several(work: Work, title: str, kind: str) -> None:
    """Kill a process of the job on Ray at random moments, as often as the job is not done before."""
    while work.is_wanted:
        if not work.wait_for_random_moment():
            return
        if found := work.on_ray(title):
            work.kill(kind, work.random.choice(found))
        else:
            work.moments -= 1  # it is just started again


def again(work: Work, title: str, kind: str) -> None:
    """Kill a process of the job on Ray that ends it at random moments, and start the job again."""
    while work.is_wanted:
        process = work.start()
        if not work.wait_for_random_moment():
            return
        if found := work.on_ray(title):
            work.kill(kind, work.random.choice(found))
            work.wait(lambda process=process: process.poll() is not None)  # type: ignore[misc]
            if process.returncode == 0 and not work.is_done():
                raise NotSurvivedError(f"exit 0 after {kind}: {work.said()[-1500:]}")
        else:
            work.moments -= 1


def _worker(work: Work) -> None:
    work.start()
    several(work, "TrainWorker", "kill -9 of a worker")


def _controller(work: Work) -> None:
    work.start()
    several(work, "TrainController", "kill -9 of the controller")


def _events(work: Work) -> None:
    work.start()
    several(work, "EventQueue", "kill -9 of the event actor")


def _raylet(work: Work) -> None:
    again(work, "raylet/raylet", "kill -9 of the raylet")


def _driver(work: Work) -> None:
    while work.is_wanted:
        process = work.start()
        if not work.wait_for_random_moment():
            return
        work.kill("kill -9 of the driver", process.pid)
        process.wait()


def _extractor(work: Work) -> None:
    """At any moment from its start on: while it loads the network, or runs it."""
    work.start()
    while work.is_wanted:
        if not work.wait(lambda: bool(work.on_ray("Extractor"))):
            return
        time.sleep(work.random.random() * 5)
        if found := work.on_ray("Extractor"):
            work.moments += 1
            killed = work.random.choice(found)
            work.kill("kill -9 of an extractor", killed)
            work.wait(lambda pid=killed: pid not in work.on_ray("Extractor"))  # type: ignore[misc]


def _worker_and_driver(work: Work) -> None:
    while work.is_wanted:
        process = work.start()
        if not work.wait_for_random_moment():
            return
        if found := work.on_ray("TrainWorker"):
            work.kill("kill -9 of a worker", work.random.choice(found))
        if not work.wait_for_random_moment():
            return
        work.kill("kill -9 of the driver", process.pid)
        process.wait()


# --- checkpoints and storage ---


def _damaged(work: Work, kind: str, damage: Callable[[Path], None]) -> None:
    while work.is_wanted:
        process = work.start()
        if not work.wait_for_random_moment(first=10):
            return
        work.kill("kill -9 of the driver", process.pid)
        process.wait()
        newest = work.runs / work.name / "checkpoints" / work.checkpoints()[-1]
        file = work.random.choice([one for one in sorted(newest.iterdir()) if one.suffix == ".safetensors"])
        damage(file)
        work.note(f"{kind} {file.name} of {newest.name}")


def _truncated(work: Work) -> None:
    _damaged(work, "truncated", lambda file: os.truncate(file, work.random.randint(0, file.stat().st_size - 1)))


def _flipped(work: Work) -> None:
    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[work.random.randrange(len(content))] ^= 1 << work.random.randrange(8)
        file.write_bytes(content)

    _damaged(work, "one bit flipped in", flip)


def _can_mount() -> str:
    return "" if os.geteuid() == 0 and shutil.which("mount") else "needs root, to mount a small disk"


def _can_divide() -> str:
    return "" if namespaces_allowed() else "needs root on Linux, for machines with networks of their own"


def _disk_full(work: Work) -> None:
    """A disk of its own for the runs, filled at a random moment."""
    runs = work.runs
    runs.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", runs], capture_output=True, check=False)
    if done.returncode:
        raise NotSurvivedError(f"{SKIPPED}no disk can be mounted here: {done.stderr.decode().strip()}")
    while work.is_wanted:
        process = work.start()
        if not work.wait_for_random_moment():
            return
        _fill(work, process)


def _fill(work: Work, process: subprocess.Popen[str]) -> None:
    """Until nothing has room, and the job has ended; then there is room again."""
    ballast = work.runs / "ballast"
    with ballast.open("wb", buffering=0) as out, contextlib.suppress(OSError):
        while True:
            out.write(b"\0" * 4096)
    before = work.step()
    work.note("the disk is full")
    code = process.wait(60)
    said = work.said()
    if work.is_done():  # before the disk was full
        ballast.unlink()
        return
    if code != 1 or "No space left" not in said or "Traceback" in said:
        raise NotSurvivedError(f"exit {code}: {said[-800:]}")
    if work.step() < before:
        raise NotSurvivedError(f"the checkpoint of step {before} is gone: {work.step()}")
    ballast.unlink()
    work.note("the disk has room again")


def _storage_away(work: Work) -> None:
    """For half a minute, at one of the moments; at each, requests fail, answer late, or are cut."""
    assert work.proxy is not None
    work.start()
    away_at = work.random.randint(1, work.wanted)
    while work.is_wanted:
        if not work.wait_for_random_moment():
            return
        for _ in range(3):
            method, fault = work.random.choice([("PUT", "500"), ("PUT", "cut"), ("GET", "500"), ("PUT", "silent")])
            work.proxy.fail(method, fault)  # type: ignore[arg-type]
            work.num_set += 1
            work.note(f"the storage: {method} {fault}")
        if work.moments == away_at:
            work.proxy.away_until = time.monotonic() + 30
            work.note("the storage is away for 30 s")


def _faults_were_met(work: Work) -> None:
    assert work.proxy is not None
    if work.num_set and len(work.proxy.faults) == work.num_set:
        raise NotSurvivedError("no request met any of the faults, so nothing was tried")


def _driver_in_store(work: Work) -> None:
    """Killed, and gone on with by a machine that has nothing of it."""
    while work.is_wanted:
        work.environment["XDG_CACHE_HOME"] = str(work.folder / f"machine-{work.moments}")
        process = work.start()
        if not work.wait_for_random_moment():
            return
        work.kill("kill -9 of the driver, and another machine", process.pid)
        process.wait()


# --- the Hub ---


def _hub(work: Work) -> None:
    """Everything that a Hub does wrong, some of it a few times, before and while the backbone is fetched.

    What no request met any more did not happen, and is no moment.
    """
    for number in range(work.random.randint(1, 3)):
        fault = work.random.choice(["500", "503", "429", "cut", "slow", "away"])
        work.hub.fail(fault, after=work.random.randint(0, 3) if number else 0, times=work.random.randint(1, 2))
        work.note(f"the Hub: {fault}")
    num = sum(map(bool, work.hub.faults))
    process = work.start()
    work.wait(lambda: False)
    said = work.said()
    if process.returncode not in (0, 1, 2) or "Traceback" in said:
        raise NotSurvivedError(f"exit {process.returncode}: {said[-1500:]}")
    work.moments += num - sum(map(bool, work.hub.faults))
    work.hub.faults.clear()


# --- two at once, and signals ---


def _two_drivers(work: Work) -> None:
    first = work.start()
    while work.is_wanted:
        if not work.wait_for_random_moment():
            return
        second = work.start()
        code = second.wait(120)
        said = work.said()
        work.note("a second driver", second.pid)
        is_refused = code == 2 and "busy" in said
        found_done = code == 0 and "was finished before" in said and work.is_done()
        if first.poll() is None and not is_refused and not found_done:
            raise NotSurvivedError(f"the second driver ended with {code}: {said[-800:]}")
        work.process = first


def _signals(work: Work) -> None:
    while work.is_wanted:
        process = work.start()
        if not work.wait_for_random_moment():
            return
        number, times = (signal.SIGTERM, 1) if work.moments % 2 else (signal.SIGINT, 2)
        for _ in range(times):
            work.kill(f"signal {number.name}", process.pid, number)
            time.sleep(0.05)
        code = process.wait(120)
        if code != 130 and not work.is_done():
            raise NotSurvivedError(f"exit {code} after {number.name}: {work.said()[-800:]}")
        work.leaves_nothing(within_s=5 if times == 1 and "--address" not in work.job else GONE_S)


ON_RAY = ("--address", "local")
NODES = ("--workers", "2", "--set", "training.num_microbatches=2", "--set", "scaling.max_failures=9")
TWO = ("--address", "local", *NODES)
ELASTIC = (*NODES, "--set", "scaling.min_workers=1", "--set", "training.audit=true")
HEAD = ("--method", "head", "--address", "local", "--set", "scaling.num_extractors=1", "--set", "settings.size=384")

ROWS: dict[str, Row] = {
    "driver": Row(_driver),
    "signals": Row(_signals),
    "signals-on-ray": Row(_signals, "here", ON_RAY),
    "truncated": Row(_truncated),
    "flipped": Row(_flipped),
    "two-drivers": Row(_two_drivers),
    "hub": Row(_hub, on_hub=True),
    "disk-full": Row(_disk_full, needs=_can_mount),
    "storage-away": Row(_storage_away, in_store=True, check=_faults_were_met),
    "driver-in-store": Row(_driver_in_store, in_store=True),
    "worker": Row(_worker, "two", TWO),
    "controller": Row(_controller, "here", (*ON_RAY, "--set", "scaling.max_failures=9")),
    "event-actor": Row(_events, "here", ON_RAY),
    "raylet": Row(_raylet, "here", ON_RAY),
    "worker-and-driver": Row(_worker_and_driver, "two", TWO),
    "driver-on-ray": Row(_driver, "here", ON_RAY),
    "extractor": Row(_extractor, "head", HEAD),
    "node-killed": Row(nodes.node_killed, "two", NODES, on_nodes=2, needs=_can_divide),
    "elastic": Row(nodes.elastic, "two", ELASTIC, on_nodes=2, check=nodes.each_sample_once, needs=_can_divide),
    "node-cut": Row(nodes.node_cut, "two", NODES, on_nodes=2, needs=_can_divide),
    "node-drained": Row(nodes.node_drained, "two", NODES, on_nodes=2, needs=_can_divide),
    "head-gone": Row(nodes.head_gone, "two", NODES, on_nodes=2, needs=_can_divide),
}
