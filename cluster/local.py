"""A real Ray cluster of several nodes on this one machine: to try things out, and for tests.

    python cluster/local.py up --nodes 2          # a head and a worker, guarded by a token
    python cluster/local.py down                  # nothing of it is left

As root, on Linux, each node is a small machine: network, processes, host name and /dev/shm of its own (namespaces), and
an address on a bridge that nothing outside of this machine reaches. Otherwise the nodes share this machine, each with a
loopback address. Ray has to be in the Python that runs the nodes (--python); this file needs none. In tests:

    with LocalCluster(num_nodes=2, cpus=1) as cluster:
        submit(job, address=cluster.dashboard)    # with cluster.environment
        cluster.kill_node("node1")
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from cluster.machine import (  # noqa: E402
    ClusterError as ClusterError,
    is_ours,
    links,
    namespaces_allowed as namespaces_allowed,
)
from cluster.node import Node as Node  # noqa: E402
from cluster.nodes import HERE, LocalCluster as LocalCluster  # noqa: E402

EXAMPLES = """\
what to type:
  local.py up --nodes 3 --cpus 2       it ends with the lines that a job needs
  local.py status                      nodes, addresses, and who is alive to Ray
  local.py exec node1 -- ray status    a command, as that machine would run it
  local.py add-node                    the cluster grows by one
  local.py drain node2 30              a spot machine's notice: it has 30 s left
  local.py kill-node node2             its processes are gone, at once
  local.py cut node1 20                nothing reaches it for 20 s, nor leaves it
  local.py cut node1                   the same for ever, or until `mend node1`
  local.py down                        nothing is left behind; also of a cluster
                                       whose start was killed

Several clusters at once: each command takes --name. Logs of the nodes are in
/tmp/cluster-NAME/. They know no name server and no way out of this machine;
what listens on the bridge's address, which `status` shows, they reach.
"""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    options = parser().parse_args(words)
    # So that what is begun is cleaned up, also by a shell's background job, which hears no Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code: int | None = options.command(options)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return code or 0


def parser() -> argparse.ArgumentParser:
    """Of all commands."""
    assert __doc__ is not None
    top = argparse.ArgumentParser(
        prog="cluster/local.py", description=__doc__.split(" In tests:")[0], epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: object, does: str, node: bool = False) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=does, description=does)
        one.set_defaults(command=command)
        one.add_argument("--name", default="local", help="of the cluster, up to ten of a-z and 0-9 (local)")
        if node:
            one.add_argument("node", metavar="NODE", help="node1, for example; `status` lists them")
        return one

    up = add("up", _up, "start a cluster, and return once it is ready")
    up.add_argument("--nodes", type=int, default=2, metavar="N", help="with the head, which is node0 (2)")
    up.add_argument("--python", default=sys.executable, metavar="PATH", help="that runs the nodes; by default this one")
    up.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the nodes; several times")
    up.add_argument(
        "--private", action="append", default=[], metavar="DIR", help="each node has an empty one of its own there"
    )
    up.add_argument("--loopback", action="store_true", help="no namespaces, although they are allowed")
    more = add("add-node", _add_node, "start one more node")
    for one in (up, more):
        one.add_argument("--cpus", type=int, default=2 if one is up else None, metavar="N", help="of each (2)")
        one.add_argument("--gpus", type=int, default=0, metavar="N", help="that Ray is told of; there need be none (0)")
    add("down", _down, "end it, and remove all of it").add_argument("--all", action="store_true", help="of all names")
    add("status", _status, "nodes and their addresses")
    add("kill-node", lambda o: load(o.name).kill_node(o.node), "end all that runs on a node", node=True)
    cut = add("cut", lambda o: load(o.name).cut(o.node, o.seconds), "cut a node's network", node=True)
    cut.add_argument("seconds", type=float, nargs="?", metavar="SECONDS", help="until it is mended; else it stays")
    add("mend", lambda o: load(o.name).mend(o.node), "the end of a cut", node=True)
    drain = add("drain", lambda o: load(o.name).drain(o.node, o.seconds), "give notice of a node's end", node=True)
    drain.add_argument("seconds", type=int, metavar="SECONDS", help="that it has left; nothing ends it but you")
    run = add("exec", _exec, "run a command on a node", node=True)
    run.add_argument("words", nargs="+", metavar="COMMAND", help="after --")
    return top


def load(name: str) -> LocalCluster:
    """A cluster that another process has started. Raises `ClusterError` where there is none."""
    try:
        fields = json.loads((HERE / f"cluster-{name}" / "cluster.json").read_text())
    except FileNotFoundError:
        others = ", ".join(there()) or "none"
        raise ClusterError(f"there is no cluster {name!r} here (there are: {others}); `up` starts one") from None
    nodes = {key: Node(**node) for key, node in fields.pop("nodes").items()}
    return LocalCluster(**fields, nodes=nodes)


def there() -> list[str]:
    """The names of this user's clusters on this machine, and of what is left of some."""
    found = [one for one in HERE.glob("cluster-*") if one.lstat().st_uid == os.geteuid()]
    names = {one.name.removeprefix("cluster-") for one in found if stat.S_ISDIR(one.lstat().st_mode)}
    return sorted(names | {link.removeprefix("br-") for link in links("br-[a-z0-9]{1,10}") if is_ours(link)})


def _up(options: argparse.Namespace) -> int:
    began = time.monotonic()
    if options.nodes < 1:
        raise ClusterError(f"--nodes {options.nodes}: there is a head at least")
    if not os.access(options.python, os.X_OK):
        raise ClusterError(f"--python {options.python}: there is no such program")
    if bad := [one for one in options.env if "=" not in one]:
        raise ClusterError(f"--env {bad[0]}: NAME=VALUE is expected")
    cluster = LocalCluster(
        options.nodes, options.cpus, options.gpus, options.name, os.path.abspath(options.python),
        dict(one.split("=", 1) for one in options.env), tuple(map(os.path.abspath, options.private)),
        False if options.loopback else None,
    )  # fmt: skip
    cluster.up()
    print(f"{options.nodes} {'node' if options.nodes == 1 else 'nodes'} after {time.monotonic() - began:.0f} s")
    _print_nodes(cluster)
    return 0


def _print_nodes(cluster: LocalCluster) -> None:
    for name, node in cluster.status().items():
        state = "alive" if node["alive"] else "not alive to Ray"
        state = "ended" if not node["running"] else f"{state}, cut off" if node["cut"] else state
        size = f"{node['cpus']} CPUs" + (f", {node['gpus']} GPUs" if node["gpus"] else "")
        print(f"  {name:<7} {node['address']:<15} {size:<16} {state}")
    if cluster.namespaces:
        print(f"  {'bridge':<7} {cluster.host_address:<15} this machine, as the nodes reach it")
    print(f"jobs are submitted to {cluster.dashboard}, with")
    print("export", *(f"{name}={value}" for name, value in cluster.environment.items()))


def _status(options: argparse.Namespace) -> int:
    _print_nodes(load(options.name))
    return 0


def _add_node(options: argparse.Namespace) -> int:
    node = load(options.name).add_node(options.cpus, options.gpus)
    print(f"{node.name} {node.address}")
    return 0


def _down(options: argparse.Namespace) -> int:
    names = there() if options.all else [options.name]
    for name in names:
        whole = (HERE / f"cluster-{name}" / "cluster.json").exists()
        (load(name) if whole else LocalCluster(name=name)).down()
    return 0


def _exec(options: argparse.Namespace) -> int:
    cluster = load(options.name)
    command, environment = cluster.command(options.node, options.words), cluster.node_environment(options.node)
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
