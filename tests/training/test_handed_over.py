"""One download a node: two processes with a cache each, as two nodes have, and a Hub that fails for one of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.hub_server import Hub, Repository

WORKER = """
import json, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from orchestrator.backbone import fetch, read_card
from orchestrator.errors import RefusedError
from orchestrator.job import Plan, BackboneCard
from orchestrator.network import start_worker
from orchestrator.training.handed_over import backbone_files
from types import SimpleNamespace
card, rank, has = BackboneCard.model_validate_json(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "has"
if has:
    fetch(card)
time.sleep = lambda _: None  # the client's waits between its tries
dist.init_process_group("gloo", init_method=f"file://{Path('meeting').absolute()}", rank=rank, world_size=2)
dist.barrier()
if rank == 0:
    print("ready", flush=True)
    sys.stdin.readline()
with start_worker(1, torch.device("cpu"), local_rank=0) as worker:
    worker.barrier()
    try:
        folder = backbone_files(SimpleNamespace(backbone=card, weights="pretrained"), worker)
        names = ("config.json", "model.safetensors")
        print("got", json.dumps({name: (folder / name).stat().st_size for name in names}))
    except RefusedError as error:
        print("refused", error.reason)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("one_has", [True, False])
def test_a_hub_that_dies_ends_no_job_whose_files_are_on_some_node(
    one_has: bool, hub: Hub, tiny_resnet: Path, tmp_path: Path
) -> None:
    from orchestrator.backbone import read_card

    files = {file.name: file.read_bytes() for file in tiny_resnet.iterdir() if file.is_file()}
    hub.repositories["org/tiny"] = Repository(files)
    card = read_card("org/tiny").model_dump_json()
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, card, str(rank), "has" if one_has and rank == 1 else "lacks"], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'plugins'}",
                 "HF_HOME": str(tmp_path / f"node-{rank}")},
        )
        for rank in range(2)
    ]  # fmt: skip
    assert workers[0].stdout is not None
    assert workers[0].stdout.readline() == "ready\n"
    downloads = len(hub.asked_for("model.safetensors"))
    hub.failures = 1_000_000
    outs = [worker.communicate("\n", timeout=200) for worker in workers]
    hub.failures = 0
    assert [worker.returncode for worker in workers] == [0, 0], outs
    said = [out.strip().split(" ", 1) for out, _ in outs]
    if one_has:
        whole = {name: len(files[name]) for name in ("config.json", "model.safetensors")}
        assert [(what, json.loads(got)) for what, got in said] == [("got", whole)] * 2
        cached = list((tmp_path / "node-0").rglob("model.safetensors"))
        assert [file.read_bytes() for file in cached] == [files["model.safetensors"]]
        assert len(hub.asked_for("model.safetensors")) == downloads
        assert not list(tmp_path.rglob("*.partial"))
    else:
        assert said == [["refused", "offline"]] * 2
