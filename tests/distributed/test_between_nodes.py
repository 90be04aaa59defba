"""Two nodes with a cache each, and a Hub that fails: the one has the files of the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import RefusedError
from orchestrator.job import BackboneCard
from tests.hub_server import Hub, Repository

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def cluster(tmp_path: Path, hub: Hub) -> Iterator[Any]:
    """Nodes `a` and `b`, by a resource of that name; the head has no core."""
    import ray
    from ray.cluster_utils import Cluster

    assert hub.url
    one = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for name in ("a", "b"):
        one.add_node(num_cpus=1, resources={name: 1}, env_vars={"HF_HOME": str(tmp_path / name)})
    ray.init(address=one.address, log_to_driver=False, logging_level="ERROR")
    yield one
    ray.shutdown()
    one.shutdown()


def required(card: BackboneCard) -> tuple[str, dict[str, bytes]]:
    """(what was refused, '' if nothing was; {file: its content}), on the node where this runs."""
    import time
    from types import SimpleNamespace

    from orchestrator.backbone import fetch
    from orchestrator.distributed.between_nodes import require_backbone

    time.sleep = lambda _: None  # the client's waits between its tries
    try:
        require_backbone(SimpleNamespace(backbone=card, weights="pretrained"))  # type: ignore[arg-type]
    except RefusedError as error:
        return error.reason, {}
    return "", {name: (fetch(card) / name).read_bytes() for name in ("config.json", "model.safetensors")}


def test_files_of_a_backbone_come_from_a_node_that_has_them(
    cluster: Any, hub: Hub, tiny_resnet: Path, tmp_path: Path
) -> None:
    import ray

    from orchestrator.backbone import read_card

    assert cluster.address
    files = {file.name: file.read_bytes() for file in tiny_resnet.iterdir() if file.is_file()}
    hub.repositories["org/tiny"] = Repository(files)
    card = read_card("org/tiny")
    on = {name: ray.remote(num_cpus=1, resources={name: 1}, max_retries=0)(required) for name in ("a", "b")}
    hub.failures = 10_000
    assert ray.get(on["b"].remote(card)) == ("offline", {})  # nobody has them
    small = tmp_path / "b/hub/models--org--tiny/snapshots" / str(card.commit) / "config.json"
    small.parent.mkdir(parents=True)  # of which the Hub's client says that it is all
    small.write_bytes(files["config.json"])
    assert ray.get(on["b"].remote(card)) == ("offline", {})
    hub.failures = 0
    whole = ("", {name: files[name] for name in ("config.json", "model.safetensors")})
    assert ray.get(on["a"].remote(card)) == whole
    hub.failures = 10_000
    assert ray.get(on["b"].remote(card)) == whole
    asked = len(hub.requests)
    assert ray.get(on["b"].remote(card)) == whole
    assert len(hub.requests) == asked
