"""What Ray leaves behind where the process that started it is killed: two agents, which go after a minute.

They find their raylet gone and tell that to a GCS that is gone too, for 60 s (ray/_private/utils.py,
publish_error_to_driver). A process of ours, which is this file, waits for the driver's end and ends them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

_GRACE_S = 5.0
"""How long they may take to end by themselves; workers take three."""


def end_with_driver() -> list[subprocess.Popen[bytes]]:
    """Have what the raylet that this process started leaves behind ended soon after this process; [] if not Linux.

    What is returned has to be kept: the end of its pipe is the sign.
    """
    try:  # Ray has no public word for its own processes: where it calls them otherwise, they stay for their minute
        from ray._private.worker import _global_node  # noqa: PLC0415

        raylets = _global_node.all_processes.get("raylet", []) if _global_node is not None else []
    except (ImportError, AttributeError):
        return []
    if sys.platform != "linux" or not raylets:
        return []
    # Named now: with its driver a raylet is gone at once, and then nothing tells whose they were.
    named = [f"{pid}:{began}" for pid, began in _children(raylets[0].process.pid)]
    watch = subprocess.Popen(
        [sys.executable, "-S", "-E", __file__, *named], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True, cwd="/",
    )  # fmt: skip
    return [watch]


def _children(parent: int) -> Iterator[tuple[int, str]]:
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        above, began = _stat(int(pid))
        if above == str(parent):
            yield int(pid), began


def _stat(pid: int) -> tuple[str, str]:
    """(the process id of its parent, when it began, in ticks); empty where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[1], fields[19]


def _there(named: Iterable[str]) -> list[int]:
    """Those of `pid:began` that run."""
    pairs = [one.split(":") for one in named]
    return [int(pid) for pid, began in pairs if _stat(int(pid))[1] == began]


def _watch(named: list[str]) -> None:
    sys.stdin.read()
    until = time.monotonic() + _GRACE_S
    while _there(named) and time.monotonic() < until:
        time.sleep(0.1)
    for pid in _there(named):
        try:
            os.kill(pid, 9)
        except OSError:  # it has just ended
            continue


if __name__ == "__main__":
    _watch(sys.argv[1:])
