"""Jobs whose runs lie in an object store (moto's server), from start to prediction, on machines that share no disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
import torch
from safetensors.torch import load_file

import orchestrator
from orchestrator.errors import InterruptedRunError, JobError, OrchestratorError, RefusedError
from orchestrator.features import sources
from orchestrator.job import (
    Advanced,
    Data,
    EpochEnded,
    Event,
    Noted,
    PhaseBegan,
    asking,
    list_runs,
    object_storage,
    runs,
)
from orchestrator.training import assembly, outbox
from tests import s3_proxy
from tests.conftest import REPOSITORY

STORAGE = "s3://bucket/runs"
SECRET = "aVerySecretKey"

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def _machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: Any) -> None:  # noqa: ARG001
    """A disk of its own, and credentials that are to stand nowhere."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    another_machine(tmp_path, monkeypatch, "first")


def another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str = "another") -> None:
    """An empty disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"disk of {name}"))


@pytest.fixture(scope="module")
def whole(tiny_resnet: Path, flat_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> orchestrator.Run:
    """The job on a directory, left alone."""
    return orchestrator.finetune(job_of(tiny_resnet, flat_digits, storage=str(tmp_path_factory.mktemp("whole"))),
                                 report=silent)  # fmt: skip


def silent(_event: Event) -> None:
    pass


def job_of(backbone: Path | str, data: Path, **fields: Any) -> dict[str, Any]:
    """15 steps an epoch, three of them."""
    training = {"epochs": 3, "batch_size": 16, "checkpoint_every_steps": 4}
    return {
        "backbone": str(backbone), "data": str(data), "method": "full", "name": "digits", "storage": STORAGE,
        "training": training, "scaling": {"threads_per_worker": 1}, **fields,
    }  # fmt: skip


def stopped_after_an_epoch(job: dict[str, Any]) -> None:
    ended: list[Event] = []
    with pytest.raises(InterruptedRunError):
        orchestrator.finetune(
            job, stop=lambda: bool(ended),
            report=lambda event: ended.append(event) if isinstance(event, EpochEnded) else None,
        )  # fmt: skip


def weights_of(run: orchestrator.Run) -> dict[str, torch.Tensor]:
    return load_file(run.model / "model.safetensors")


def same(one: orchestrator.Run, other: orchestrator.Run) -> bool:
    a, b = weights_of(one), weights_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def objects(bucket: Any, folder: str = "") -> dict[str, bytes]:
    infos = bucket.get_file_info(pyarrow.fs.FileSelector(folder, recursive=True, allow_not_found=True))
    return {info.path: bucket.open_input_file(info.path).read() for info in infos if info.is_file}


# --- the whole way ---


def test_a_run_in_a_store_is_the_run_in_a_directory(
    bucket: Any, whole: orchestrator.Run, tiny_resnet: Path, flat_digits: Path, tmp_path: Path, cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = orchestrator.finetune(job_of(tiny_resnet, flat_digits), report=silent)
    assert run.place == f"{STORAGE}/digits"
    assert same(run, whole)
    assert (run.figures, run.state) == (whole.figures, "finished")
    assert [line["epoch"] for line in run.metrics] == [1, 2, 3]
    with pytest.raises(RefusedError, match="lies in an object store, and has no directory"):
        _ = run.path
    another_machine(tmp_path, monkeypatch)  # knows nothing but the place
    assert [(one.name, one.state) for one in list_runs(STORAGE)] == [("digits", "finished")]
    there = orchestrator.open_run(f"{STORAGE}/digits")
    image = next(flat_digits.glob("3/*.png"))
    assert orchestrator.predict(there, [image])[0].label == orchestrator.predict(whole, [image])[0].label
    measured = orchestrator.evaluate(there, flat_digits)
    assert measured["num_seen"] == whole.plan.data.num_samples["train"] + whole.plan.data.num_samples["validation"]
    listed = cli("runs", "--storage", STORAGE)
    assert "digits" in listed.stdout
    assert "accuracy" in listed.stdout
    shown = cli("runs", "show", "digits", "--storage", STORAGE)
    assert f"{STORAGE}/digits" in shown.stdout
    assert cli("predict", f"{STORAGE}/digits", image).returncode == 0
    again = orchestrator.finetune(job_of(tiny_resnet, flat_digits), report=silent)  # it was finished before
    assert again.results == run.results
    stored = objects(bucket)
    assert not any("scratch" in name or ".partial" in name for name in stored)
    assert not any(SECRET.encode() in content for content in stored.values())
    assert not any(SECRET in file.read_text(errors="replace") for file in tmp_path.rglob("*") if file.is_file())
    assert sum(name.endswith("rows.arrow") for name in stored) <= 1


def test_a_run_in_a_store_is_a_backbone(
    tiny_resnet: Path, flat_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: Any
) -> None:
    base = orchestrator.pretrain({**job_of(tiny_resnet, flat_digits, name="base"), "method": "scratch"}, report=silent)
    another_machine(tmp_path, monkeypatch)
    card = orchestrator.check(f"{STORAGE}/base", "image")
    assert (card.kind, card.name, card.path, card.lineage["method"]) == ("run", "base", None, "scratch")  # type: ignore[index]
    fetched = [file.name for file in tmp_path.rglob("disk of another/**/*") if file.is_file()]
    assert "config.json" in fetched
    assert not any("safetensors" in name for name in fetched)  # the gate asks for no weights
    job = {**job_of(f"{STORAGE}/base", flat_digits, name="next"), "method": "head"}
    first = orchestrator.finetune(job, report=silent)
    assert first.lineage["backbone"]["commit"] == card.commit
    body = [name for name in weights_of(first) if not name.startswith("classifier")]
    assert all(torch.equal(weights_of(first)[name], weights_of(base)[name]) for name in body)
    # What a body gave for samples is in the store too: no other machine runs it.
    another_machine(tmp_path, monkeypatch, "third")
    second = orchestrator.finetune({**job, "name": "again"}, report=silent)
    assert (first.lineage["num_computed"], second.lineage["num_computed"]) == (300, 0)
    assert same(first, second)
    tables = {name.split("/")[2] for name in objects(bucket, "runs/.data")}
    assert len(tables) == 1  # three runs, and one table
    orchestrator.pretrain({**job_of(tiny_resnet, flat_digits, name="base", training={"epochs": 1})}, fresh=True,
                          report=silent)  # fmt: skip
    with pytest.raises(RefusedError, match="the backbone of the run"):
        orchestrator.finetune({**job, "name": "next", "training": {**job["training"], "seed": 0}, "method": "head"},
                              report=silent)  # fmt: skip


def test_features_and_tables_are_listed_and_pruned(
    tiny_resnet: Path, flat_digits: Path, cli: Cli, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.data import shared_tables

    assert "no features" in cli("features", "list", "--storage", STORAGE).stdout
    orchestrator.finetune({**job_of(tiny_resnet, flat_digits), "method": "head"}, report=silent)
    assert "tiny-resnet" in cli("features", "list", "--storage", STORAGE).stdout
    monkeypatch.setattr(shared_tables, "_YOUNG_S", 0.0)
    cli("features", "prune", "--max-size", "0", "--storage", STORAGE)
    assert not objects(bucket, "runs/.features")
    assert objects(bucket, "runs/.data")  # a run names its table
    bucket.create_dir("runs/.rank-0")  # a ranking works on it
    bucket.copy_file("runs/digits/samples.json", "runs/.rank-0/samples.json")
    for name in objects(bucket, "runs/digits"):
        bucket.delete_file(name)
    cli("features", "prune", "--max-size", "0", "--storage", STORAGE)
    assert objects(bucket, "runs/.data")
    bucket.delete_file("runs/.rank-0/samples.json")
    cli("features", "prune", "--max-size", "0", "--storage", STORAGE)
    assert not objects(bucket, "runs/.data")


def test_rows_of_a_program_lie_in_the_store(
    tiny_resnet: Path, flat_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: Any
) -> None:
    rows = [{"image": file.read_bytes(), "label": file.parent.name} for file in sorted(flat_digits.rglob("*.png"))[::3]]
    job = job_of(tiny_resnet, flat_digits, training={"epochs": 1})
    run = orchestrator.finetune({**job, "data": rows}, report=silent)
    assert run.plan.job.data.path.startswith(f"{STORAGE}/.data/")
    another_machine(tmp_path, monkeypatch)
    assert orchestrator.finetune({**job, "data": rows}, report=silent).results == run.results
    before = set(objects(bucket))
    with pytest.raises(RefusedError):
        orchestrator.finetune({**job, "data": [*rows, {"image": b"none", "label": "3"}], "name": "bad"}, report=silent)
    assert set(objects(bucket)) == before


# --- on another machine, and by two at once ---


def test_a_run_goes_on_on_another_machine(
    whole: orchestrator.Run, tiny_resnet: Path, flat_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_after_an_epoch(job_of(tiny_resnet, flat_digits))
    assert list_runs(STORAGE)[0].state == "unfinished"
    another_machine(tmp_path, monkeypatch)
    notes: list[Event] = []
    run = orchestrator.finetune(job_of(tiny_resnet, flat_digits), report=notes.append)
    assert any(isinstance(one, Noted) and "going on from step" in one.text for one in notes)
    assert same(run, whole)
    assert [line["epoch"] for line in run.metrics] == [1, 2, 3]


def test_the_second_of_two_drivers_is_refused(tiny_resnet: Path, flat_digits: Path, bucket: Any) -> None:
    storage = orchestrator.job.open_storage(STORAGE, ttl_s=3)
    working = pytest.raises(RefusedError, match="the first driver is working on the run")
    with storage.acquire("digits", "the first driver"), working as caught:
        orchestrator.finetune(job_of(tiny_resnet, flat_digits), report=silent)
    assert caught.value.reason == "busy"
    assert all(".lease" in name for name in objects(bucket, "runs"))


KILLED = """
    import os, sys
    import orchestrator
    from orchestrator.job import object_storage
    object_storage.TTL_S = 2.0
    import json
    orchestrator.finetune(json.loads(sys.argv[1]), report=lambda event: None)
"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("where", ["step-00000008/", "/model/"])
def test_a_driver_that_is_killed_at_an_upload_goes_on_bit_for_bit(
    where: str, proxy: s3_proxy.Proxy, whole: orchestrator.Run, tiny_resnet: Path, flat_digits: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    job = job_of(tiny_resnet, flat_digits)
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), json.dumps(job)], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'plugins'}"},
    )  # fmt: skip

    def kill(method: str, path: str) -> None:
        if method in ("PUT", "POST") and where in path:
            child.send_signal(signal.SIGKILL)

    proxy.on_request = kill
    _, stderr = child.communicate(timeout=200)
    assert child.returncode == -signal.SIGKILL, stderr
    proxy.on_request = None
    another_machine(tmp_path, monkeypatch)
    heard: list[Event] = []
    run = orchestrator.finetune(job, report=heard.append)
    assert any("whether the one that holds this run is alive" in one.text for one in heard
               if isinstance(one, PhaseBegan))  # fmt: skip
    assert same(run, whole)
    assert [line["epoch"] for line in run.metrics] == [1, 2, 3]


# --- a store that fails ---


@pytest.mark.parametrize("what", ["credentials", "bucket", "silence"])
def test_a_store_that_refuses_us_is_said_before_the_start(
    what: str, proxy: s3_proxy.Proxy, bucket: Any, tiny_resnet: Path, flat_digits: Path, cli: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    storage = "s3://nothing/runs" if what == "bucket" else STORAGE
    monkeypatch.setattr(object_storage, "PATIENCE_S", 0.5)
    if what == "silence":
        proxy.away_until = time.monotonic() + 600
    proxy.always = "403" if what == "credentials" else None
    done = cli("finetune", "--backbone", tiny_resnet, "--data", flat_digits, "--storage", storage)
    reason = {"credentials": "unauthorised", "bucket": "not_found", "silence": "offline"}[what]
    assert done.returncode == 2, done.stderr
    assert f"refused ({reason})" in done.stderr
    assert "mend" in done.stderr
    assert cli("runs", "--storage", storage).returncode == 2
    assert cli("predict", f"{storage}/digits", "x.png").returncode == 2
    assert not objects(bucket)
    assert not [file for file in tmp_path.rglob("disk of*/**/*") if file.is_file()]


@pytest.mark.parametrize("place", [f"s3://someone:{SECRET}@bucket/runs", "hf://datasets/a/b", "s3://bucket/runs?a=b"])
def test_a_place_that_no_run_can_lie_at_is_refused_without_its_password(place: str, tiny_resnet: Path) -> None:
    with pytest.raises(JobError) as caught:
        orchestrator.plan(backbone=str(tiny_resnet), data="photos", storage=place)
    assert SECRET not in str(caught.value)
    if SECRET in place:
        for fields in ({"data": f"{place}/photos"}, {"feature_store": place}, {"backbone": place}):
            with pytest.raises(JobError, match="holds a password") as caught:
                orchestrator.plan(**{"backbone": str(tiny_resnet), "data": "photos", **fields})
            assert SECRET not in str(caught.value)
        with pytest.raises(RefusedError, match="holds a password"):
            list_runs(place)


def test_a_store_that_fails_now_and_then_does_no_harm(
    proxy: s3_proxy.Proxy, whole: orchestrator.Run, tiny_resnet: Path, flat_digits: Path
) -> None:
    def fail(event: Event) -> None:
        if isinstance(event, EpochEnded):
            for fault in ("500", "cut"):
                proxy.fail("PUT", fault)
                proxy.fail("GET", fault)

    assert same(orchestrator.finetune(job_of(tiny_resnet, flat_digits), report=fail), whole)


def test_a_store_that_is_away_for_a_while_holds_nothing_up(
    proxy: s3_proxy.Proxy, whole: orchestrator.Run, tiny_resnet: Path, flat_digits: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It comes back once the loop has gone on without it."""
    monkeypatch.setattr(asking, "_SAID_S", 0.2)
    monkeypatch.setattr(asking, "_MOST_WAIT_S", 0.4)
    steps, away_at = [0], [0]
    notes: list[str] = []

    def report(event: Event) -> None:
        if isinstance(event, Noted):
            notes.append(event.text)
        if not isinstance(event, Advanced):
            return
        steps[0] += 1
        if steps[0] == 10:
            away_at[0] = steps[0]
            proxy.away_until = time.monotonic() + 600
        elif steps[0] == 20:  # ten steps without the store; the checkpoint of one of them waits
            threading.Timer(1.0, lambda: setattr(proxy, "away_until", 0.0)).start()

    job = job_of(tiny_resnet, flat_digits)
    job["training"] = {**job["training"], "checkpoint_every_steps": 12}
    assert same(orchestrator.finetune(job, report=report), whole)
    assert any(f"{STORAGE} does not answer, and is asked again" in note for note in notes)
    assert any(f"{STORAGE} answers again" in note for note in notes)


def goes_away(proxy: s3_proxy.Proxy, event: Event) -> None:
    """The store, for good, behind the first epoch."""
    if isinstance(event, EpochEnded) and proxy.away_until == 0:
        proxy.away_until = time.monotonic() + 600


@pytest.mark.long
def test_a_store_that_stays_away_ends_the_job_which_goes_on_later(
    proxy: s3_proxy.Proxy, whole: orchestrator.Run, tiny_resnet: Path, flat_digits: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(runs, "AWAY_S", 0.5)
    monkeypatch.setattr(object_storage, "PATIENCE_S", 0.5)
    monkeypatch.setattr(object_storage, "TTL_S", 2.0)

    def report(event: Event) -> None:
        goes_away(proxy, event)

    with pytest.raises(OrchestratorError, match=r"the storage failed: .* does not answer") as caught:
        orchestrator.finetune(job_of(tiny_resnet, flat_digits), report=report)
    assert not isinstance(caught.value, RefusedError)
    assert (caught.value.exit_code, "the same command goes on" in caught.value.mend) == (1, True)
    proxy.away_until = 0
    another_machine(tmp_path, monkeypatch)
    run = orchestrator.finetune(job_of(tiny_resnet, flat_digits), report=silent)
    assert same(run, whole)


def test_who_stops_waits_a_minute_for_a_store_that_is_away(
    proxy: s3_proxy.Proxy, whole: orchestrator.Run, tiny_resnet: Path, flat_digits: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And not ten; what is not there then is learnt again."""
    monkeypatch.setattr(outbox, "STOP_PATIENCE_S", 1.0)
    monkeypatch.setattr(asking, "_SAID_S", 0.2)
    monkeypatch.setattr(object_storage, "TTL_S", 2.0)
    asked: list[float] = []

    def report(event: Event) -> None:
        goes_away(proxy, event)
        if isinstance(event, Noted) and "is asked again" in event.text and not asked:
            asked.append(time.monotonic())

    with pytest.raises(InterruptedRunError, match="did not answer") as caught:
        orchestrator.finetune(job_of(tiny_resnet, flat_digits), report=report, stop=lambda: bool(asked))
    assert time.monotonic() - asked[0] < 30
    assert "the same command goes on" in caught.value.mend
    proxy.away_until = 0
    another_machine(tmp_path, monkeypatch)
    assert same(orchestrator.finetune(job_of(tiny_resnet, flat_digits), report=silent), whole)


# --- samples in a store ---


@pytest.fixture
def few_digits(flat_digits: Path, tmp_path: Path) -> Path:
    """100 of them: a store of these tests takes its time."""
    for file in sorted(flat_digits.glob("*/*.png"))[::3]:
        (tmp_path / "few" / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "few" / file.parent.name)
    return tmp_path / "few"


@pytest.fixture
def stored_digits(bucket: Any, few_digits: Path) -> str:
    for file in few_digits.glob("*/*.png"):
        with bucket.open_output_stream(f"photos/{file.parent.name}/{file.name}") as out:
            out.write(file.read_bytes())
    return "s3://bucket/photos"


def job_on(backbone: Path, data: str, on_bad_sample: str = "skip", **fields: Any) -> dict[str, Any]:
    """The same job, its run in a directory and its samples in a store."""
    return {**job_of(backbone, Path("-"), storage="runs", **fields), "data": data, "on_bad_sample": on_bad_sample}


@pytest.mark.parametrize(
    ("method", "on_bad_sample"),
    [pytest.param("full", "fail", marks=pytest.mark.long), ("full", "skip"), ("head", "skip")],
)
def test_samples_of_a_store_that_is_away_for_a_while_are_no_bad_ones(
    method: str, on_bad_sample: str, proxy: s3_proxy.Proxy, few_digits: Path, stored_digits: str, tiny_resnet: Path,
) -> None:  # fmt: skip
    """Longer than its own client asks it again."""
    training = {"epochs": 2, "batch_size": 16}
    job, notes = job_on(tiny_resnet, stored_digits, on_bad_sample, method=method, training=training), list[str]()
    plain = orchestrator.finetune({**job, "data": str(few_digits)}, report=silent)

    def report(event: Event) -> None:
        if isinstance(event, Noted):
            notes.append(event.text)
        began = isinstance(event, PhaseBegan) and event.text.startswith("running the frozen body")
        if proxy.away_until == 0 and (began or isinstance(event, EpochEnded)):
            proxy.away_until = time.monotonic() + 8

    run = orchestrator.finetune({**job, "storage": "others"}, report=report)
    assert same(run, plain)
    assert run.figures == plain.figures
    assert not (run.path / "skipped.jsonl").exists()
    assert any(f"{stored_digits} does not answer, and is asked again" in note for note in notes)
    assert any(f"{stored_digits} answers again" in note for note in notes)


@pytest.mark.parametrize("ends", ["by itself", pytest.param("asked to stop", marks=pytest.mark.long)])
def test_a_job_whose_samples_stay_away_ends_and_goes_on_later(
    ends: str, proxy: s3_proxy.Proxy, few_digits: Path, stored_digits: str, tiny_resnet: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stops = ends == "asked to stop"
    if not stops:
        monkeypatch.setattr(assembly, "AWAY_S", 0.5)
    monkeypatch.setattr(asking, "_SAID_S", 0.2)
    asked: list[str] = []

    def report(event: Event) -> None:
        goes_away(proxy, event)
        if isinstance(event, Noted) and "is asked again" in event.text:
            asked.append(event.text)

    job = job_on(tiny_resnet, stored_digits)
    with pytest.raises(OrchestratorError, match=rf"{stored_digits}.* (does|did) not answer") as caught:
        orchestrator.finetune(job, report=report, stop=lambda: stops and bool(asked))
    assert not isinstance(caught.value, RefusedError)
    assert (caught.value.exit_code, "the same command goes on" in caught.value.mend) == (130 if stops else 1, True)
    proxy.away_until = 0
    run = orchestrator.finetune(job, report=silent)
    plain = orchestrator.finetune({**job, "data": str(few_digits), "storage": "others"}, report=silent)
    assert same(run, plain)
    assert not (run.path / "skipped.jsonl").exists()


def test_evaluate_leaves_out_nothing_of_a_store_that_is_away(
    proxy: s3_proxy.Proxy, stored_digits: str, whole: orchestrator.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PATIENCE_S", 0.5)
    read: list[str] = []

    def look(method: str, path: str) -> None:
        read.extend([path] if method == "GET" and path.endswith(".png") else [])
        if len(read) == 120:  # behind the preparation, which reads all 100
            proxy.away_until = time.monotonic() + 600

    proxy.on_request = look
    with pytest.raises(RefusedError, match=f"{stored_digits}.* does not answer") as caught:
        orchestrator.evaluate(whole, Data(path=stored_digits, on_bad_sample="skip"))
    assert caught.value.reason == "offline"


def test_a_checkpoint_that_was_damaged_is_passed_over_and_said(
    bucket: Any, whole: orchestrator.Run, tiny_resnet: Path, flat_digits: Path
) -> None:
    stopped_after_an_epoch(job_of(tiny_resnet, flat_digits))
    stored = {name: content for name, content in objects(bucket).items() if name.endswith("weights.safetensors")}
    assert len(stored) == 2
    newest = max(stored)
    flipped = bytearray(stored[newest])
    flipped[-3] ^= 1
    with bucket.open_output_stream(newest) as out:
        out.write(bytes(flipped))
    notes: list[str] = []
    run = orchestrator.finetune(
        job_of(tiny_resnet, flat_digits), report=lambda event: notes.append(getattr(event, "text", ""))
    )
    assert any("a checkpoint is passed over" in note and "weights.safetensors was changed" in note for note in notes)
    assert same(run, whole)


# --- nodes ---


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_nodes_that_share_no_disk_work_on_one_run(tiny_resnet: Path, flat_digits: Path, tmp_path: Path) -> None:
    """Tables and features reach each node through the store. In a process of its own, since Ray is shut down.

    With fp32 features: which format is the faster one is tried in each storage, and on busy cores answers vary.
    """
    training = {"epochs": 2, "batch_size": 16, "num_microbatches": 2, "precision": "fp32"}
    job = {**job_of(tiny_resnet, flat_digits, training=training), "method": "head"}
    alone = orchestrator.finetune({**job, "storage": "runs"}, report=silent)
    scaling = {"num_workers": 2, "address": "auto"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ON_TWO_NODES), json.dumps({**job, "scaling": scaling}),
         str(tmp_path / "disk of second")],
        capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'plugins'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    run = orchestrator.open_run(f"{STORAGE}/digits")
    assert (run.lineage["num_workers"], run.lineage["num_computed"]) == (2, 300)
    one, other = weights_of(run), weights_of(alone)
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)
    for disk in ("disk of first", "disk of second"):
        assert list((tmp_path / disk).rglob(".features/*/*/*.safetensors")), disk
        assert list((tmp_path / disk).rglob(".copies/.data/*/*/*")), disk


ON_TWO_NODES = """
    import json, sys
    import ray
    from ray.cluster_utils import Cluster
    import orchestrator
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1, env_vars={"XDG_CACHE_HOME": sys.argv[2]})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    orchestrator.finetune(json.loads(sys.argv[1]), report=lambda event: None)
    ray.shutdown()
    cluster.shutdown()
"""
