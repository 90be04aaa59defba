"""What the store lacks is computed once, whoever dies while it is, and whichever jobs meet over it."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
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
from tests import s3_proxy
from tests.conftest import REPOSITORY
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
# One of two workers, each on a machine of its own. It looks for features once for each line that it is sent, and waits
# for one more before its body runs for the first time.
APART = """
import sys
from contextlib import ExitStack
from pathlib import Path
import torch, torch.distributed as dist
from orchestrator.errors import OrchestratorError
from orchestrator.features import body_pass, compute_features, loading
from orchestrator.job import HeldRun, Noted, hold, open_storage
from orchestrator.network import start_worker
from orchestrator.store import mirror
from tests.features.test_stage import stage
backbone, data, rank, mirror.PATIENCE_S = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
body_pass.FIRST_FLUSH_S = body_pass.FLUSH_S = 1000.0
compute = loading.compute
def wait():
    print("ready", flush=True)
    return sys.stdin.readline()
def first(*what):
    loading.compute = compute
    wait()
    return compute(*what)
loading.compute = first
dist.init_process_group("gloo", init_method=f"file://{Path('meeting').absolute()}", rank=rank, world_size=2)
with ExitStack() as resources:
    plan, _, network, modality, source, worker = stage(backbone, data, f"work-{rank}", resources)
    storage = open_storage("s3://bucket/runs")
    held = resources.enter_context(hold(storage, "same")) if rank == 0 else None
    run = HeldRun(storage, worker.all_gather(held and held.lease)[0])
    while wait():
        notes = []
        def hear(event):
            if isinstance(event, Noted):
                notes.append(event.text)
        try:
            with ExitStack() as used:
                ref = compute_features(plan, run, network, modality, source, worker, hear, lambda: False, used)
            said = ["computed", ref.lineage["num_computed"]]
        except OrchestratorError as error:
            said = ["failed", error.message, error.mend]
        print([said, notes], flush=True)
dist.destroy_process_group()
"""


class Apart:
    """Two machines that a job has a worker on each."""

    def __init__(self, backbone: Path, data: Path, patience_s: float = 60.0) -> None:
        self._workers = [
            subprocess.Popen(
                [sys.executable, "-c", APART, backbone, data, str(rank), str(patience_s)],
                text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={**os.environ, "XDG_CACHE_HOME": str(Path(f"machine-{rank}").absolute()),
                     "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'plugins'}"},
            )
            for rank in range(2)
        ]  # fmt: skip

    def __enter__(self) -> Apart:
        assert self._said() == ["ready", "ready"]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for worker in self._workers:
            if kind is not None:
                worker.kill()
            worker.communicate(timeout=60)
        assert kind is not None or [worker.returncode for worker in self._workers] == [0, 0]

    def go(self) -> list[str]:
        """What both say next, once they are told to go on."""
        for worker in self._workers:
            assert worker.stdin is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
        return self._said()

    def look(self) -> list[tuple[list[Any], list[str]]]:
        """What came of looking for features on each, and the notes of it."""
        said = [ast.literal_eval(text) for text in self.go()]
        assert self._said() == ["ready", "ready"]
        return said

    def _said(self) -> list[str]:
        return [worker.stdout.readline().strip() for worker in self._workers if worker.stdout is not None]


def shards_of(machine: int) -> dict[str, bytes]:
    """Names of the shards on a machine, and what is in them."""
    return {file.name: file.read_bytes() for file in Path(f"machine-{machine}").rglob("*.safetensors")}


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


# --- machines that have only an object store in common ---


@pytest.mark.slow
def test_a_store_that_is_away_when_machines_need_it_is_waited_for(
    proxy: s3_proxy.Proxy, tiny_resnet: Path, flat_digits: Path
) -> None:
    with Apart(tiny_resnet, flat_digits) as machines:
        assert machines.go() == ["ready", "ready"]  # before the body
        proxy.away_until = time.monotonic() + 16  # the client itself tries for 6 s
        (said, notes), (other, _) = machines.look()
        assert time.monotonic() > proxy.away_until
        assert said == other == ["computed", 300]
        assert sum("does not answer" in note for note in notes) == 1
        assert len(shards_of(0)) == 2
        assert shards_of(0) == shards_of(1)


@pytest.mark.slow
def test_a_store_that_stays_away_is_said_and_gets_later_what_it_lacks(
    proxy: s3_proxy.Proxy, tiny_resnet: Path, flat_digits: Path
) -> None:
    with Apart(tiny_resnet, flat_digits, patience_s=1.0) as machines:
        assert machines.go() == ["ready", "ready"]
        proxy.away_until = time.monotonic() + 600
        for said, _ in machines.look():
            assert said[:1] == ["failed"]
            assert said[1].startswith("the storage failed: s3://bucket/runs/.features/")
            assert "check the connection" in said[2]
        assert [len(shards_of(machine)) for machine in range(2)] == [1, 1]
        proxy.away_until = 0
        assert [said for said, _ in machines.look()] == [["computed", 0]] * 2
        assert len(shards_of(0)) == 2
        assert shards_of(0) == shards_of(1)


@pytest.mark.slow
@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("machine", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_flipped_bit_is_found_on_the_machine_that_has_it(
    machine: int, tiny_resnet: Path, flat_digits: Path
) -> None:  # fmt: skip
    with Apart(tiny_resnet, flat_digits) as machines:
        assert machines.go() == ["ready", "ready"]
        assert [said for said, _ in machines.look()] == [["computed", 300]] * 2
        whole = shards_of(0)
        assert len(whole) == 2
        for file in Path(f"machine-{machine}").rglob("*.safetensors"):
            content = bytearray(file.read_bytes())
            content[-10] ^= 1
            file.write_bytes(content)
        (said, notes), _ = machines.look()
        assert said == ["computed", 0]
        assert "stored features were damaged, and are replaced (2 of 2 shards)" in notes
        assert shards_of(0) == shards_of(1) == whole
