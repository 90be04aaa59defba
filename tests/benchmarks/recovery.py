"""How long an elastic group stands still when a machine goes: make bench NAME=recovery, as root on Linux

Two machines, made of this one (cluster/local.py), with a worker each, and a small network that is trained as a whole, a
checkpoint every 5 s. In each repeat the second machine is killed without notice; timed from then until the next epoch
has ended with one worker. Goal: at most 40 s.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from cluster.local import LocalCluster, namespaces_allowed
from tests.benchmarks.harness import middle, options, report
from tests.cluster.test_elastic import Driver, long_job
from tests.tiny import make_digits, make_resnet

GOAL, REPEATS = 40.0, 3


def shrunk(folder: Path) -> dict[str, float]:
    """{what: seconds} of one loss."""
    folder.mkdir()
    with LocalCluster(num_nodes=2, cpus=1) as cluster:
        backbone, digits = make_resnet(folder / "backbone"), make_digits(folder / "digits")
        job = long_job(backbone, digits, folder / "runs", cluster.address)
        driver = Driver(cluster, folder, job)
        driver.wait_for_epoch(3)
        driver.wait_for_checkpoint()
        cluster.kill_node("node1")
        started = time.monotonic()
        driver.wait_for("going on from step")
        going_on = time.monotonic() - started
        driver.wait_for_epoch(driver.epoch() + 1)
        found = {"going_on_s": round(going_on, 1), "next_epoch_s": round(time.monotonic() - started, 1)}
        driver.process.terminate()
        driver.process.wait(120)
    return found


def main() -> None:
    given = options(__doc__, REPEATS).parse_args()
    if not namespaces_allowed():
        sys.exit("machines of their own want root, on Linux")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(given.repeats):
            found.append(shrunk(Path(folder, str(repeat))))
            print(f"{repeat + 1}. {found[-1]}", flush=True)
    seconds = middle([one["next_epoch_s"] for one in found])
    report("recovery", [("seconds from the loss of a machine to the next epoch", seconds, GOAL, False)], losses=found)


if __name__ == "__main__":
    main()
