"""This machine, as a cluster on it needs it: its network, its processes, its ports."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

MARK = "LOCAL_CLUSTER_NODE"
"""In the environment of all that runs on a node: so it is found whatever became of who started it."""
NETWORK = "10.213"
NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")


class ClusterError(RuntimeError):
    """What a person can mend; its text says how."""


def namespaces_allowed() -> bool:
    """Whether this machine lets us make networks and processes of their own."""
    if os.geteuid() or not all(map(shutil.which, ("ip", "unshare", "nsenter", "mount"))):
        return False
    trial = "ip link add x0 type veth peer name x1 && mount -t tmpfs tmpfs /dev/shm"
    return subprocess.run(["unshare", *NAMESPACES, "sh", "-c", trial], capture_output=True, check=False).returncode == 0


# --- network ---


def ip(*words: str) -> str:
    """What the command `ip` of iproute2 prints. Raises `ClusterError`."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def links(pattern: str) -> list[str]:
    """The network interfaces of such names."""
    return [one.name for one in Path("/sys/class/net").iterdir() if re.fullmatch(pattern, one.name)]


def is_up(link: str) -> bool:
    """Whether an interface is switched on; also where there is none."""
    file = Path("/sys/class/net") / link / "flags"
    return not file.exists() or bool(int(file.read_text(), 16) & 1)


def _has_own_network(pid: int) -> bool:
    """Whether a process has left this process's network for its own."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
    return False


def make_bridge(name: str, folder: Path) -> str:
    """The first three numbers of the addresses on a new bridge, this machine's being 1. `folder`: for a lock."""
    with _locked(folder):  # two that start at once take two networks
        taken = ip("-4", "-o", "addr")
        subnet = next(one for k in range(256) if f" {(one := f'{NETWORK}.{k}')}." not in taken)
        ip("link", "add", name, "type", "bridge")
        ip("addr", "add", f"{subnet}.1/24", "dev", name)
    ip("link", "set", name, "up")
    return subnet


def plug(pid: int, link: str, bridge: str) -> None:
    """A cable from the network of a process, its eth0, to a bridge of this machine."""
    wait_until(lambda: _has_own_network(pid), 10, lambda: f"process {pid} gets no network of its own")
    ip("link", "add", link, "master", bridge, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
    ip("link", "set", link, "up")


def remove_links(pattern: str) -> None:
    """Remove the network interfaces of such names."""
    for link in links(pattern):
        with contextlib.suppress(ClusterError):  # it may go by itself, with its namespace
            ip("link", "del", link)


def is_ours(link: str) -> bool:
    """Whether a bridge is one of these, and not one of docker's, say."""
    return f" {NETWORK}." in ip("-4", "-o", "addr", "show", "dev", link)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def answers(host: str, port: int) -> bool:
    """Whether something listens there."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


# --- processes ---


def processes(mark: str, sessions: set[int] | None = None) -> Iterator[tuple[int, str]]:
    """(id, command line) of the living that bear the mark, NODE or FOLDER/, or whose session is one of these.

    Ray gives its workers titles, and these may overwrite where their environment was: so all are taken that live in
    the same namespace as one that bears it.
    """
    wanted = f"\0{MARK}={mark}".encode() + (b"" if mark.endswith("/") else b"\0")
    marked, spaces = set(), {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            spaces[folder] = os.readlink(folder / "ns" / "pid")
            if wanted in b"\0" + (folder / "environ").read_bytes():
                marked.add(folder)
    own = {spaces[folder] for folder in marked} - {os.readlink("/proc/self/ns/pid")}
    for folder, space in spaces.items():
        with contextlib.suppress(OSError):
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if (folder in marked or space in own or int(session) in (sessions or ())) and state != "Z":
                yield int(folder.name), (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def began(pid: int) -> str:
    """When a process began, and on which start of this machine: no other of its id says so; '' if it has ended."""
    with contextlib.suppress(OSError):
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {ticks}"
    return ""


def is_first(pid: int) -> bool:
    """Whether a process is the first one of processes of their own, which end with it."""
    with contextlib.suppress(OSError):
        ids = re.search(r"^NSpid:\s(.*)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return ids is not None and len(ids[1].split()) > 1 and ids[1].split()[-1] == "1"
    return False


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the lock ends with the process, and is no file of its own."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def wait_until(what: Callable[[], bool], seconds: float, otherwise: Callable[[], str]) -> None:
    """Return once it is so. Raises `ClusterError` with that text after so many seconds."""
    until = time.monotonic() + seconds
    while not what():
        if time.monotonic() > until:
            raise ClusterError(otherwise())
        time.sleep(0.05)
