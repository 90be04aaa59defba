"""Another process that works with a storage: `python -m tests.job.storage_process WHAT PLACE TTL_S [...]`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.errors import RefusedError
from orchestrator.job import directories, locations, open_storage


def folder_of(root: Path, number: int, num_files: int = 3) -> Path:
    """A folder, all files of which hold this number."""
    folder = root / f"work-{os.getpid()}-{number}"
    (folder / "more").mkdir(parents=True)
    for i in range(num_files):
        (folder / ("more" if i % 2 else ".") / f"{i}.bin").write_text(f"{number}" * 100)
    return folder


def hold(place: str, ttl_s: str) -> None:
    """Say "held" with a lease, commit once a line comes in, and say whether that was refused."""
    storage = open_storage(place, float(ttl_s))
    with storage.acquire("run", "the other process") as lease:
        print("held", lease.number, flush=True)
        sys.stdin.readline()
        try:
            storage.commit(folder_of(Path.cwd(), 9), "run/model", lease)
            print("committed", flush=True)
        except RefusedError as error:
            print("refused", error.reason, error, flush=True)


def race(place: str, ttl_s: str, rounds: str, counter: str) -> None:
    """Add 1 to a number in a file so often, each time under the lease, and say the leases' numbers."""
    storage = open_storage(place, float(ttl_s))
    done = 0
    while done < int(rounds):
        try:
            with storage.acquire("run", f"process {os.getpid()}") as lease:
                before = int(Path(counter).read_text())
                time.sleep(0.05)
                Path(counter).write_text(str(before + 1))
                print(lease.number, flush=True)
                done += 1
        except RefusedError as error:
            if error.reason != "busy":
                raise
        time.sleep(0.02)


def cut(place: str, ttl_s: str, most: str) -> None:
    """Commit `run/cut-N` for N from 0, each in a process that dies before the Nth thing that it writes."""
    for number in range(int(most)):
        child = os.fork()
        if not child:
            storage = open_storage(place, float(ttl_s))
            with storage.acquire("run", "who is cut off") as lease:
                _die_at(number)
                storage.commit(folder_of(Path.cwd(), 1), f"run/cut-{number}", lease)
                print("whole", number, flush=True)
                os._exit(0)
        os.waitpid(child, 0)


def _die_at(number: int) -> None:
    """Die instead of the write of this number from now on, by a thread of renewal or not."""
    left = [number]

    def counted(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if ".lease" not in str(arguments[0]):
                if left[0] == 0:
                    os._exit(9)
                left[0] -= 1
            return write(*arguments)

        return call

    directories.sync = counted(directories.sync)
    Path.rename = counted(Path.rename)  # type: ignore[method-assign]
    for name in ("upload", "write"):
        setattr(locations.Location, name, counted(getattr(locations.Location, name)))


if __name__ == "__main__":
    {"hold": hold, "race": race, "cut": cut}[sys.argv[1]](*sys.argv[2:])
