"""A run's directory that nodes see otherwise than the driver does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import orchestrator
from orchestrator.errors import RefusedError
from tests.held import held

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture
def _two_nodes(request: pytest.FixtureRequest) -> Iterator[None]:
    """A head with so many cores as the test says, one by default, and a node with one."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": getattr(request, "param", 1), "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.usefixtures("_two_nodes")
@pytest.mark.parametrize("_two_nodes", [0], indirect=True)
def test_what_the_driver_sees_alone_is_refused_where_its_node_has_no_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.distributed.shared_storage import refuse_apart

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # the nodes' processes work in another folder
    with (
        held(Path("/proc/self/cwd/apart/run")) as run,
        pytest.raises(RefusedError, match=r"not the same directory on all 2 nodes"),
    ):
        refuse_apart(run)


@pytest.mark.usefixtures("_two_nodes")
def test_a_directory_that_is_another_one_on_some_node_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One below the folder that a process works in: the nodes' processes work in another one."""
    from orchestrator.distributed.shared_storage import refuse_apart

    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with held(tmp_path / "common" / "run") as run, held(Path("/proc/self/cwd/apart/run")) as other:
        refuse_apart(run)
        with pytest.raises(RefusedError, match=r"apart is not the same directory on all 2 nodes .*: not on ") as caught:
            refuse_apart(other)
    assert caught.value.reason == "usage"
    assert "--storage" in caught.value.mend
    assert not list(tmp_path.rglob("token"))


@pytest.mark.usefixtures("_two_nodes")
def test_so_is_that_of_a_search(
    tiny_resnet: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose trials on that node would find nothing, and be rows that failed."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    job = {
        "backbone": str(tiny_resnet), "data": str(digits), "method": "full", "epochs": 1, "name": "tried",
        "storage": "/proc/self/cwd/apart", "scaling": {"address": "auto"},
    }  # fmt: skip
    with pytest.raises(RefusedError, match=r"apart is not the same directory on all 2 nodes"):
        orchestrator.search(job, {"learning_rate": {"grid": [0.01, 0.1]}}, report=lambda _event: None)
