"""From this machine to a guarded cluster that has not this package: submit, follow, stop, go on, bring home."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest

import orchestrator
from cluster.local import LocalCluster
from cluster.machine import free_port
from orchestrator.distributed.preflight import Preflight
from orchestrator.errors import InterruptedRunError, OrchestratorError, RefusedError
from orchestrator.job import Advanced, EpochEnded, Event, Noted, PhaseBegan, TrialsAdvanced, locations
from orchestrator.remote import remote_runs
from orchestrator.tuning import RankTable
from tests.conftest import REPOSITORY
from tests.distributed.bare import bare_python
from tests.distributed.wire import Wire
from tests.planted import PLANTED, found_in, seen_at_work, seen_in_files
from tests.whole.test_third_party import SOURCE

pytest.importorskip("aiohttp", reason="the head of a cluster takes jobs with ray[default] alone")
pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1200)]
SMALL: dict[str, Any] = {
    "method": "full", "training": {"epochs": 3, "batch_size": 40}, "scaling": {"threads_per_worker": 1},
}  # fmt: skip
LONG: dict[str, Any] = {**SMALL, "training": {"epochs": 2000, "batch_size": 40, "checkpoint_every_steps": 20}}


class Heard(list[Event]):
    """A `Report` that keeps what it is told."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    @property
    def epochs(self) -> list[int]:
        return [event.figures["epoch"] for event in self if isinstance(event, EpochEnded)]

    def said(self, text: str) -> bool:
        return any(text in event.text for event in self if isinstance(event, Noted | PhaseBegan))


@pytest.fixture(scope="module")
def own_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place in whose stead each node has a disk of its own."""
    return tmp_path_factory.mktemp("own-disk")


_STORE_KEYS = {
    "AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "something", "AWS_DEFAULT_REGION": "us-east-1",
}  # fmt: skip


@pytest.fixture(scope="module")
def store_port() -> int:
    """Of this machine, where the nodes look for an object store."""
    return free_port()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, own_disk: Path, store_port: int) -> Iterator[LocalCluster]:
    python = bare_python(tmp_path_factory.mktemp("bare") / "venv")
    env = {**_STORE_KEYS, "AWS_ENDPOINT_URL": f"http://host:{store_port}"}
    with LocalCluster(num_nodes=1, cpus=1, python=python, private=[str(own_disk)], env=env) as one:
        yield one


@pytest.fixture
def store(cluster: LocalCluster, store_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A storage in an object store, which listens to the nodes of the cluster."""
    from moto.server import ThreadedMotoServer

    if not cluster.namespaces:
        pytest.skip("what listens to nodes alone wants namespaces, and they want root")
    server = ThreadedMotoServer(ip_address=cluster.host_address, port=store_port, verbose=False)
    server.start()
    url = f"http://{cluster.host_address}:{store_port}"
    for name, value in {**_STORE_KEYS, "AWS_ENDPOINT_URL": url, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    locations.cached.cache_clear()
    pyarrow.fs.S3FileSystem(endpoint_override=url, allow_bucket_creation=True).create_dir("bucket")
    yield "s3://bucket/runs"
    server.stop()
    locations.cached.cache_clear()


@pytest.fixture
def storage(own_disk: Path, cluster: LocalCluster) -> str:
    """A storage that the node sees, and this machine does not."""
    if not cluster.namespaces:
        pytest.skip("nodes with disks of their own want root")
    return str(own_disk / "runs")


@pytest.fixture(autouse=True)
def _token(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", cluster.environment["RAY_AUTH_TOKEN_PATH"])


def submit(cluster: LocalCluster, heard: Heard | None = None, **job: Any) -> orchestrator.RemoteRun:
    return orchestrator.submit(address=cluster.dashboard, report=Heard() if heard is None else heard, **job)


def served_alone(model: Path, image: Path) -> str:
    """The label that a pipeline of transformers gives, in a process that has not this package."""
    serve = (
        "import sys, transformers; sys.modules['orchestrator'] = None\n"
        f"print(transformers.pipeline('image-classification', model={str(model)!r})({str(image)!r})[0]['label'])"
    )
    done = subprocess.run([sys.executable, "-c", serve], capture_output=True, text=True, check=False, cwd=model.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextlib.contextmanager
def followed(run: orchestrator.RemoteRun, until: int) -> Iterator[Heard]:
    """What was heard once an epoch has ended; it is listened to in a thread until the run is over."""
    heard, reached = Heard(), threading.Event()

    def hear(event: Event) -> None:
        heard(event)
        if isinstance(event, EpochEnded) and event.figures["epoch"] >= until:
            reached.set()

    def follow() -> None:
        with contextlib.suppress(OrchestratorError):
            run.follow(hear)
        reached.set()

    thread = threading.Thread(target=follow)
    thread.start()
    assert reached.wait(300)
    yield heard
    thread.join(400)
    assert not thread.is_alive()


def test_it_trains_there_and_comes_home(
    cluster: LocalCluster, storage: str, tiny_resnet: Path, digits: Path, tmp_path: Path
) -> None:
    """What comes home through the cluster, whose storage this machine does not see, is a model without this package."""
    heard, told, again = Heard(), Heard(), Heard()
    job = {"backbone": str(tiny_resnet), "data": str(digits), "storage": storage, "name": "digits", **SMALL}
    run = submit(cluster, heard, **job)
    assert heard.said("preflight")
    results = run.follow(told)
    assert told.epochs == [1, 2, 3]
    assert told.said("writing the model")
    assert sum(event.num for event in told if isinstance(event, Advanced)) >= 3 * 9
    same = submit(cluster, again, **job)
    assert (same.id, same.attempt) == (run.id, 1)
    assert again.said("has finished before")
    replayed = Heard()
    assert orchestrator.attach("digits", address=cluster.dashboard, report=Heard()).follow(replayed) == results
    assert replayed.epochs == [1, 2, 3]

    assert not Path(storage).exists()
    coming = Heard()
    home = run.fetch(tmp_path / "home", report=coming)
    assert home.results == results
    assert (home.path / "checkpoints").is_dir()
    (total,) = [event.total for event in coming if isinstance(event, PhaseBegan) and event.unit == "bytes"]
    assert sum(event.num for event in coming if isinstance(event, Advanced)) == total
    assert total == sum(one.stat().st_size for one in home.path.rglob("*") if one.is_file())
    model = run.fetch(tmp_path / "model", "model")
    assert sorted(one.name for one in model.path.iterdir() if one.is_dir()) == ["model"]
    assert served_alone(model.path / "model", next((digits / "test").rglob("*.png"))).isdigit()


def test_following_outlives_the_connection(
    cluster: LocalCluster, tiny_resnet: Path, digits: Path, tmp_path: Path
) -> None:
    """Each event once, in its order, although the wire is cut after the second epoch."""
    job = {"backbone": str(tiny_resnet), "data": str(digits), "storage": str(tmp_path / "runs"), "name": "wire",
           **SMALL, "training": {"epochs": 30, "batch_size": 40}}  # fmt: skip
    host, port = cluster.dashboard.removeprefix("http://").split(":")
    with Wire(host, int(port)) as wire:
        run = orchestrator.submit(address=wire.address, report=Heard(), **job)
        heard = Heard()

        def hear(event: Event) -> None:
            heard(event)
            if isinstance(event, EpochEnded) and event.figures["epoch"] == 2:
                wire.cut()
            if isinstance(event, Noted) and "it is asked again" in event.text:
                wire.mend()

        run.follow(hear)
        assert wire.num_cut
    assert heard.said("does not answer")
    assert heard.epochs == list(range(1, 31))


def test_a_stopped_job_goes_on_as_its_next_attempt(
    cluster: LocalCluster, tiny_resnet: Path, digits: Path, tmp_path: Path
) -> None:
    """And a laptop that goes away ends nothing; all of it by the commands."""
    job = {"backbone": str(tiny_resnet), "data": str(digits), "storage": str(tmp_path / "runs"), "name": "long", **LONG}
    run = submit(cluster, **job)
    with pytest.raises(RefusedError, match="is working on the run long, with other settings") as caught:
        submit(cluster, **{**job, "method": "head"})
    assert caught.value.reason == "busy"
    assert submit(cluster, **job).id == run.id
    with followed(run, until=1):
        assert "running, epoch" in command(cluster, "status", "long")
        listed = json.loads(command(cluster, "list", "--json"))
        assert [(one["state"], one["attempt"]) for one in listed if one["run"] == "long"] == [("running", 1)]
        assert "epoch 1/2000" in command(cluster, "logs", "long")
        for number in (signal.SIGINT, signal.SIGKILL):
            code, said = attached_until_epoch(cluster, "long", number)
            assert code == (130 if number == signal.SIGINT else -number), said
            assert number == signal.SIGKILL or "long goes on, on the cluster" in said
            assert run.state == "running"
        assert "long has stopped" in command(cluster, "stop", "long")
    command(cluster, "fetch", "long", "--what", "results", "--to", tmp_path / "home")
    assert (tmp_path / "home/metrics.jsonl").read_bytes() == (tmp_path / "runs/long/metrics.jsonl").read_bytes()
    with pytest.raises(InterruptedRunError):
        run.follow(Heard())
    stopped = run.status()
    assert stopped["error"]["reason"] == "interrupted"
    assert list((tmp_path / "runs" / "long" / "checkpoints").iterdir())

    heard = Heard()
    second = submit(cluster, heard, **job)
    assert (second.attempt, second.id) == (2, f"{run.id.removesuffix('1')}2")
    assert heard.said("has stopped: this is the next attempt")
    with followed(second, until=stopped["epoch"] + 1) as told:
        assert told.epochs[0] > 1, "it began anew"
        assert second.stop() == "stopped"


def command(cluster: LocalCluster, *words: object) -> str:
    """What a command prints, which succeeds."""
    line = [sys.executable, "-m", "orchestrator.terminal.cli", *map(str, words), "--address", cluster.dashboard]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def attached_until_epoch(cluster: LocalCluster, name: str, number: int) -> tuple[int, str]:
    """Exit code and output of `attach`, which gets a signal once it has shown an epoch."""
    line = [sys.executable, "-m", "orchestrator.terminal.cli", "attach", name, "--address", cluster.dashboard]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = ""
    for text in process.stdout:
        said += text
        if "epoch" in text:
            process.send_signal(number)
            break
    rest, _ = process.communicate(timeout=60)
    return process.returncode, said + rest


@pytest.fixture
def second_node(cluster: LocalCluster) -> Iterator[str]:
    node = cluster.add_node()
    yield node.name
    for name in list(cluster.nodes)[1:]:
        cluster.kill_node(name)
    wait_for_nodes(cluster, 1)


def wait_for_nodes(cluster: LocalCluster, number: int) -> None:
    """Return once Ray knows of so many nodes that are alive, and of no more."""
    until = time.monotonic() + 120
    while sum(bool(one["alive"]) for one in cluster.status().values()) != number:
        assert time.monotonic() < until
        time.sleep(1)


def test_a_storage_that_not_all_nodes_see_is_refused_with_the_node(
    cluster: LocalCluster, second_node: str, storage: str, tiny_resnet: Path, digits: Path, tmp_path: Path
) -> None:
    """And nothing is left there, in the list neither; nor of one for whose workers the nodes have no place."""
    before = [job.id for _, job in remote_runs(address=cluster.dashboard, report=Heard())]
    tables: list[Preflight] = []
    job = {"backbone": str(tiny_resnet), "data": str(digits), "storage": storage, "name": "split", **SMALL}
    with pytest.raises(RefusedError, match=r"does not see in .* what the head wrote there") as caught:
        submit(cluster, **job, found=tables.append)
    assert caught.value.reason == "cluster"
    assert caught.value.message.startswith(f"{cluster.nodes[second_node].address}: ")
    assert "s3://" in caught.value.mend
    assert sorted(row[4] for row in tables[0].rows) == ["no", "seen"]
    many = {**job, "storage": str(tmp_path / "runs"), "scaling": {"num_workers": 9, "threads_per_worker": 1}}
    with pytest.raises(RefusedError, match=r"9 workers need 9 CPUs .* and the cluster has 2"):
        submit(cluster, **many)
    assert [job.id for _, job in remote_runs(address=cluster.dashboard, report=Heard())] == before


def test_a_node_that_joins_and_does_not_see_the_storage_is_named(
    cluster: LocalCluster, storage: str, tiny_resnet: Path, digits: Path
) -> None:
    """An elastic group begins on the one node that there is, and grows onto one with a disk of its own."""
    job = {"backbone": str(tiny_resnet), "data": str(digits), "storage": storage, "name": "grows", **LONG}
    job["scaling"] = {"num_workers": 2, "min_workers": 1, "threads_per_worker": 1}
    run = submit(cluster, **job)
    joined: list[str] = []

    def join(event: Event) -> None:
        if isinstance(event, EpochEnded) and not joined:
            joined.append(cluster.add_node().address)

    try:
        with pytest.raises(OrchestratorError, match="does not see the run in") as caught:
            run.follow(join)
        assert joined[0] in caught.value.message
        assert "--storage" in caught.value.mend
    finally:
        for name in list(cluster.nodes)[1:]:
            cluster.kill_node(name)
        wait_for_nodes(cluster, 1)


def test_a_node_that_is_lost_is_replaced_and_the_job_ends(
    cluster: LocalCluster, second_node: str, tiny_resnet: Path, digits: Path, tmp_path: Path
) -> None:
    """Two workers, of which each node has room for one: the job waits for the new node, and goes on."""
    training = {"epochs": 40, "batch_size": 40, "checkpoint_every_steps": 10}
    job = {"backbone": str(tiny_resnet), "data": str(digits), "storage": str(tmp_path / "runs"), "name": "lost",
           "method": "full", "training": training, "scaling": {"num_workers": 2, "threads_per_worker": 1}}  # fmt: skip
    run = submit(cluster, **job)
    with followed(run, until=2) as heard:
        cluster.kill_node(second_node)
        cluster.add_node()
    assert run.state == "finished", run.lines_so_far()
    assert heard.said("restart 1 of")
    assert heard.epochs[-1] == 40
    assert sorted(set(heard.epochs)) == list(range(1, 41))
    home = run.fetch(tmp_path / "home")
    assert home.finished
    assert served_alone(home.model, next((digits / "test").rglob("*.png"))).isdigit()


def test_a_plugin_that_is_here_alone_trains_there(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sources are on this machine's path; nothing of it was ever installed on the node."""
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--disable-pip-version-check", "--target", site, SOURCE],
        check=True,
    )  # fmt: skip
    path = os.pathsep.join([str(site), str(REPOSITORY), str(REPOSITORY / "plugins")])
    subprocess.run([sys.executable, SOURCE / "make_data.py"], check=True)
    Path("cnn").mkdir()
    Path("cnn/config.json").write_text('{"model_type": "sensor-cnn", "channels": 3, "width": 16}')
    monkeypatch.setenv("PYTHONPATH", path)
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.terminal.cli", "submit", "--kind", "pretrain", "--modality", "sensor",
         "--backbone", "cnn", "--data", "machines", "--epochs", "2", "--address", cluster.dashboard, "--fetch", "home",
         "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout)
    assert json.loads(Path("home/results.json").read_text())["test"] == results["test"]


def test_a_search_is_submitted_and_its_best_run_comes_home(
    cluster: LocalCluster, storage: str, tiny_resnet: Path, digits: Path, tmp_path: Path
) -> None:
    """A head, which its driver trains, and a whole network, in a process of Ray Tune's."""
    told = Heard()
    search = {"space": {"method": {"grid": ["head", "full"]}}}
    job = {**SMALL, "training": {"epochs": 1, "batch_size": 40}, "kind": "search", "search": search, "method": "head"}
    job |= {"backbone": str(tiny_resnet), "data": str(digits), "storage": storage, "name": "tried"}
    run = submit(cluster, **job)
    found = run.follow(told)
    assert [(row["method"], row["state"]) for row in found["trials"]] == [("head", "finished"), ("full", "finished")]
    last = [event for event in told if isinstance(event, TrialsAdvanced)][-1]
    assert (last.num_done, last.num_trials) == (2, 2)
    home = run.fetch(tmp_path / "home")
    assert home.results == found["results"]
    assert home.path.joinpath("model/config.json").is_file()
    assert submit(cluster, **job).id == run.id


def test_a_search_of_eight_trials_of_two_workers_each_outlives_a_node(
    cluster: LocalCluster, second_node: str, tiny_resnet: Path, digits: Path, tmp_path: Path
) -> None:
    """Lost amid the third trial; each has its workers on both nodes, so it waits for the one that comes instead."""
    rates = [0.001 * (k + 1) for k in range(8)]
    search = {"space": {"learning_rate": {"grid": rates}}}
    run = submit(
        cluster, kind="search", search=search, name="eight", backbone=str(tiny_resnet), data=str(digits),
        storage=str(tmp_path / "runs"), method="full", training={"epochs": 2, "batch_size": 40},
        scaling={"num_workers": 2, "threads_per_worker": 1},
    )  # fmt: skip
    lost: list[str] = []

    def hear(event: Event) -> None:
        if isinstance(event, TrialsAdvanced) and event.num_done == 2 and event.num_running and not lost:
            lost.append(second_node)
            cluster.kill_node(second_node)
            cluster.add_node()

    found = run.follow(hear)
    assert lost == [second_node]
    assert [row["training.learning_rate"] for row in found["trials"]] == rates
    assert [row["state"] for row in found["trials"]] == ["finished"] * 8
    assert found["results"]["test"]["num_samples"] == 200


def test_a_search_in_an_object_store_is_on_all_disks(
    cluster: LocalCluster, second_node: str, store: str, tiny_resnet: Path, digits: Path, tmp_path: Path
) -> None:
    """Two nodes that share no disk, with a worker of each trial on each; this machine sees the store too."""
    assert second_node in cluster.nodes
    heard = Heard()
    search = {"space": {"learning_rate": {"grid": [0.003, 0.01]}}}
    run = submit(
        cluster, heard, kind="search", search=search, name="stored", backbone=str(tiny_resnet), data=str(digits),
        storage=store, method="full", training={"epochs": 1, "batch_size": 40},
        scaling={"num_workers": 2, "threads_per_worker": 1},
    )  # fmt: skip
    found = run.follow(heard)
    assert [row["state"] for row in found["trials"]] == ["finished"] * 2
    assert found["search"] == f"{store}/stored"
    best = orchestrator.open_run(f"{store}/stored")
    assert best.place == found["run"]
    assert best.lineage["num_workers"] == 2
    home = run.fetch(tmp_path / "home")
    assert home.results == found["results"]
    assert served_alone(home.path / "model", next((digits / "test").rglob("*.png"))).isdigit()


def test_a_ranking_is_submitted(
    cluster: LocalCluster, storage: str, tiny_resnet: Path, digits: Path, tmp_path: Path
) -> None:
    rank = {"backbones": [str(tiny_resnet), str(tmp_path / "absent")], "num_samples": 128}
    run = submit(cluster, kind="rank", data=str(digits), storage=storage, rank=rank)
    table = RankTable.from_dict(run.follow(Heard()))
    assert [row.state for row in table.rows] == ["ranked", "refused"]
    assert table.best.backbone == str(tiny_resnet)
    with pytest.raises(RefusedError, match="is a ranking, and has no run"):
        run.fetch(tmp_path / "home")


@pytest.mark.parametrize("kind", ["finetune", "search"])
def test_no_secret_is_to_be_found_there(
    kind: str, cluster: LocalCluster, tiny_resnet: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this machine's environment: neither in the run, nor in what the cluster shows, nor in its processes."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    job = {"backbone": str(tiny_resnet), "data": str(digits), "storage": str(tmp_path / "runs"), "name": "quiet"}
    if kind == "finetune":
        run = submit(cluster, **job, **LONG)
        with followed(run, until=1):
            seen = seen_at_work(cluster, run.id)
            run.stop()
    else:  # looked at while its trial runs, in a process of Ray Tune's
        search = {"space": {"learning_rate": {"grid": [0.01]}}}
        run = submit(cluster, **job, **{**SMALL, "kind": "search", "search": search})
        seen = {}

        def hear(event: Event) -> None:
            if isinstance(event, TrialsAdvanced) and event.num_running and not seen:
                seen.update(seen_at_work(cluster, run.id))

        run.follow(hear)
        assert seen
    seen |= seen_in_files(cluster, tmp_path / "runs")
    assert "orchestrator_run" in seen["/api/jobs/"]
    assert any("plan.json" in place for place in seen)
    assert any("job-driver-" in place for place in seen)
    assert "orchestrator.driver" in seen["ps"]
    assert found_in(seen, cluster) == []


def test_who_has_not_the_token_is_told_so_at_once(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = cluster.dashboard
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(wrong))
    with pytest.raises(RefusedError, match=r"can be read by others \(mode 06") as wide:
        orchestrator.attach("x", address=address, report=Heard())
    assert wide.value.mend == f"chmod 600 {wrong}"
    wrong.chmod(0o600)
    with pytest.raises(RefusedError, match="refuses the token") as refused:
        orchestrator.attach("x", address=address, report=Heard())
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RefusedError, match="wants a token, and none is given") as none:
        orchestrator.attach("x", address=address, report=Heard())
    assert {one.value.reason for one in (wide, refused, none)} == {"unauthorised"}
    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token_file.read_text())
    heard = Heard()
    with pytest.raises(RefusedError, match="no job of a run x") as unknown:
        orchestrator.attach("x", address=address, report=heard)
    assert unknown.value.reason == "not_found"
    assert heard.said("unencrypted") == cluster.namespaces
