"""What the store lacks is computed once, whoever dies while it is, and whichever jobs meet over it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import orchestrator
from orchestrator.errors import InterruptedRunError
from orchestrator.features.formats import as_values
from orchestrator.features.sources import as_float32
from orchestrator.store import FOLDER, FeatureSet, inventory
from tests.features.conftest import FORMATS, head
from tests.features.test_stage import computed, same_head
from tests.whole.test_train import train, weights_of

# Each sample takes its time.
SLOW = """
import sys, time
from pathlib import Path
import orchestrator, orchestrator.train, orchestrator.training.loop, orchestrator_image.network, ray.train.torch
from orchestrator.features import body_pass, loading
backbone, data, precision = sys.argv[1:4]
compute = loading.compute
def slowly(body, inputs, *more):
    time.sleep(0.005 * len(next(iter(inputs.values()))))
    return compute(body, inputs, *more)
loading.compute = slowly
def job(name, report):
    return orchestrator.finetune(
        backbone=backbone, data=data, name=name, report=report, method="head", scaling={"threads_per_worker": 1},
        training={"epochs": 3, "learning_rate": 3e-3, "precision": precision},
    )
"""
# Each batch becomes a shard, and the job is killed after 0 to 6 of them, or while one is written.
KILLED = (
    SLOW
    + """
import os, random, signal
body_pass.FLUSH_S = 0.0
chance, random_moments, at_work = random.Random(0), 10, 0
for number in range(random_moments):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        begun = []
        def report(event):
            begun.append("frozen body" in getattr(event, "text", ""))
            if any(begun):
                os.write(writing, b"x")
        job("killed", report)
        os._exit(0)
    os.close(writing)
    for _ in range(2 + chance.randrange(7)):  # the body has begun, and what is stored is counted; or the job has ended
        os.read(reading, 1)
    time.sleep(chance.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    at_work += os.WIFSIGNALED(status)
    os.close(reading)
print("killed", at_work)
run = job("killed", lambda event: None)
print("computed", run.lineage["num_computed"])
"""
)
# Two jobs whose bodies begin at the same moment, whenever their processes did.
MEETING = (
    SLOW
    + """
name, other = sys.argv[4:6]
def together(*what):
    Path(f"{name}-began").touch()
    while not Path(f"{other}-began").exists():
        time.sleep(0.01)
    return slowly(*what)
loading.compute = together
print(job(name, lambda event: None).lineage["num_computed"])
"""
)


def run_script(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.long
@pytest.mark.slow
def test_killed_at_ten_random_moments_it_goes_on_from_its_last_shard(tiny_resnet: Path, digits: Path) -> None:
    whole = train(tiny_resnet, digits, **head(), storage="remote")
    process = run_script(KILLED, tiny_resnet, digits, "fp32")
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    assert int(out.split("killed ")[-1].split()[0]) >= 3, out  # the later ones may find nothing left to do
    assert int(out.split("computed ")[-1]) < 600, out
    run = orchestrator.open_run("runs/killed")
    for name, tensor in weights_of(whole).items():
        assert torch.allclose(tensor, weights_of(run)[name], atol=1e-5), name
    assert run.results["test"]["confusion"] == whole.results["test"]["confusion"]
    (listing,) = inventory.listings(Path("runs") / FOLDER)
    assert listing.num_samples == 600


@pytest.mark.slow
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.long), "auto"])
def test_two_jobs_at_once_share_the_work_and_end_right(precision: str, tiny_resnet: Path, digits: Path) -> None:
    """Each takes 3 s for itself: they share it though no job would write a shard so soon for its own sake."""
    names = ("one", "two")
    both = [run_script(MEETING, tiny_resnet, digits, precision, *pair) for pair in (names, names[::-1])]
    outs = [process.communicate(timeout=280) for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    assert 600 <= sum(int(out) for out, _ in outs) < 2 * 600  # they met in the middle
    one, two = (orchestrator.open_run(f"runs/{name}") for name in names)
    assert one.lineage["format"] == two.lineage["format"]
    same_head(one, two)
    if precision != "auto":
        same_head(one, train(tiny_resnet, digits, **head(precision), storage="remote"))
    assert not list(Path("runs").glob(".features/*/*/*.partial"))


def test_stopped_while_the_body_ran_it_goes_on(
    tiny_resnet: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.features import loading

    asked: list[int] = []
    compute = loading.compute

    def stopping(*what: Any) -> Any:
        asked.append(1)
        if len(asked) == 3:
            signal.raise_signal(signal.SIGINT)
        return compute(*what)

    with monkeypatch.context() as patch:
        patch.setattr(loading, "compute", stopping)
        with pytest.raises(InterruptedRunError):
            train(tiny_resnet, digits, **head(), name="stopped")
    run = train(tiny_resnet, digits, **head(), name="stopped")
    num_kept = 600 - computed(run)
    assert 0 < num_kept < 600
    assert num_kept % 16 == 0  # whole batches, in their order
    whole = train(tiny_resnet, digits, **head(), storage="remote")
    assert all(torch.equal(tensor, weights_of(whole)[name]) for name, tensor in weights_of(run).items())


@pytest.mark.usefixtures("one_shard")
@pytest.mark.parametrize("precision", FORMATS)
def test_a_run_that_goes_on_reads_what_it_began_with(
    precision: str, tiny_resnet: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.store import shards as store
    from orchestrator.training import loop

    def stopped(_session: object) -> None:
        raise InterruptedRunError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", stopped)
        with pytest.raises(InterruptedRunError):
            train(tiny_resnet, digits, **head(precision), name="stopped")
    (folder,) = Path("runs").glob(f".features/*/{FORMATS[precision]}")
    features = FeatureSet(folder)
    features.refresh()
    (shard,) = (store.Shard.from_manifest(file.stem, file.read_bytes()) for file in folder.glob("*.json"))
    assert shard is not None
    others = as_values(as_float32(np.array(features.values(0))) + 1, shard.format)
    with monkeypatch.context() as patch:  # another job's shard, of before, with the same contents
        patch.setattr(store.time, "time_ns", lambda: 1)
        features.add(shard.ids, others, shard.format)
    whole = train(tiny_resnet, digits, **head(precision), storage="remote")
    run = train(tiny_resnet, digits, **head(precision), name="stopped")
    assert computed(run) == 0
    assert all(torch.equal(tensor, weights_of(whole)[name]) for name, tensor in weights_of(run).items())
    other = train(tiny_resnet, digits, **head(precision), name="other")
    assert not all(torch.equal(tensor, weights_of(whole)[name]) for name, tensor in weights_of(other).items())
