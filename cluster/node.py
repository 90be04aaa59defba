"""One machine of a local cluster: what it is, and what runs on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

OBJECT_STORE_BYTES = 400_000_000
IN_A_NAMESPACE = """
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount --bind "$FOLDER/hosts" /etc/hosts
mount --bind "$FOLDER/resolv.conf" /etc/resolv.conf
for place in $PRIVATE; do mkdir -p "$OWN/private$place"; mount --bind "$OWN/private$place" "$place"; done
echo "$NODE" > /proc/sys/kernel/hostname
ip link set lo up
until ip link set eth0 up 2>/dev/null; do sleep 0.05; done
ip addr add "$ADDRESS/24" dev eth0
"$@" &
wait $!
"""
"""What a machine in namespaces does first: memory, names, places and network of its own."""
PROBE = """
import json, sys
from ray._raylet import GcsClient
nodes = GcsClient(address=sys.argv[1]).get_all_node_info().values()
print(json.dumps({n.node_name: [n.node_id.hex(), n.state == 0] for n in sorted(nodes, key=lambda n: n.start_time_ms)}))
"""
"""Who is in the cluster, {name: [id, whether it is alive]}, the newest of a name last."""


@dataclasses.dataclass
class Node:
    """One machine of the cluster; `pid` of the process whose end ends all of it, and when it `began`."""

    name: str
    address: str
    cpus: int
    gpus: int = 0
    pid: int = 0
    began: str = ""


def ray_start(node: Node, python: str, folder: Path, more: Sequence[str]) -> list[str]:
    """The command that makes a machine part of a Ray cluster, and stays."""
    # Not --block: that ends all of a node where one process of it does, as Ray Client's on a machine that is busy.
    return [
        "sh", "-c", '"$@" && exec sleep infinity', "sh",
        python, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats", f"--temp-dir={folder}",
        f"--node-ip-address={node.address}", f"--node-name={node.name}", f"--num-cpus={node.cpus}",
        f"--num-gpus={node.gpus}", f"--object-store-memory={OBJECT_STORE_BYTES}", *more,
    ]  # fmt: skip
