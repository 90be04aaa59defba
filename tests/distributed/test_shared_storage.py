"""A run's directory on two nodes, one of which has another file system at its place."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import RefusedError
from tests.held import held

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(300)]


@contextlib.contextmanager
def two_nodes(hidden: Path) -> Iterator[None]:
    """A node that sees all that is here, and one that sees an empty folder in the place of `hidden`."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    start = f"{sys.executable} -m ray.scripts.scripts start --address={cluster.address} --num-cpus=1 --block"
    node = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs none {hidden} && exec {start}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        while sum(one["Alive"] for one in ray.nodes()) < 2:
            assert node.poll() is None
            time.sleep(0.2)
        yield
    finally:
        ray.shutdown()
        node.terminate()
        node.wait(60)
        cluster.shutdown()


@pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0,
    reason="no file system may be mounted for one process alone here (needs root)",
)
def test_a_directory_that_is_another_one_on_some_node_is_refused(tmp_path: Path) -> None:
    from orchestrator.distributed.shared_storage import refuse_apart

    apart, common = tmp_path / "apart", tmp_path / "common"
    apart.mkdir()
    with two_nodes(apart), held(common / "run") as run, held(apart / "run") as other:
        refuse_apart(run)
        with pytest.raises(RefusedError, match=r"apart is not the same directory on all 2 nodes .*: not on ") as caught:
            refuse_apart(other)
        assert "--storage" in caught.value.mend
        assert not list(tmp_path.rglob("token"))
