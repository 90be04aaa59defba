"""Following a job whose head is away for a while, and fetching what is here already; the head is a server here."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

import orchestrator
from orchestrator.distributed import following
from orchestrator.distributed.fetching import fetch_through_cluster
from orchestrator.distributed.head import AwayError, Head, wait_until_over
from orchestrator.distributed.request import Sent
from orchestrator.distributed.telling import Ended, Found, Piece, as_line
from orchestrator.errors import InterruptedRunError, OrchestratorError, RefusedError, TrainingError
from orchestrator.gate import drafted
from orchestrator.job import EpochEnded, Event, Noted, open_storage
from orchestrator.remote import RemoteRun
from orchestrator.submission import _gone_on_with, _sent, _Submission
from tests.distributed.test_address import served
from tests.whole.test_train import same, train, weights_of

ID = "orchestrator-a.1"
JOB = {"submission_id": ID, "status": "SUCCEEDED", "message": "", "metadata": {}, "driver_node_id": "n"}
SAID = as_line(Ended(0, results={"accuracy": 1.0}))


Answer = tuple[int, bytes]
NODE_GONE = (500, b"Traceback\naiohttp.client_exceptions.ClientConnectorError: Cannot connect to host 10.0.0.7:52365")


def as_answer(content: object) -> Answer:
    return 200, json.dumps(content).encode()


class _Head(http.server.BaseHTTPRequestHandler):
    """Of one job, which is over unless the server was told otherwise; first it gives the answers that wait there."""

    def do_GET(self) -> None:
        waiting: list[Answer] = self.server.waiting  # type: ignore[attr-defined]
        place = self.path.partition("?")[0].rpartition("/")[2]
        usual: Answer = getattr(self.server, place if place in ("logs", "stream") else "job")
        status, body = waiting.pop(0) if waiting else usual
        self._say(status, body)

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._say(200, b"{}")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._say(*(self.server.stop if self.path.endswith("/stop") else (200, b"{}")))  # type: ignore[attr-defined]

    def _say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    with served(_Head) as one:
        one.waiting, one.job, one.logs = [], as_answer(JOB), as_answer({"logs": SAID})  # type: ignore[attr-defined]
        one.stream, one.stop = (502, b""), (200, b"{}")  # type: ignore[attr-defined]
        yield one


@pytest.fixture
def head(server: http.server.ThreadingHTTPServer) -> Head:
    place = f"http://127.0.0.1:{server.server_port}"
    return Head(place, "2.60.0", httpx2.Client(base_url=place))


def remote(head: Head, storage: Path, name: str = "a") -> RemoteRun:
    return RemoteRun(ID, name, str(storage), 1, "finetune", head)


def test_a_preflight_outlives_an_answer_that_is_lost(
    head: Head, server: http.server.ThreadingHTTPServer, tiny_resnet: Path, flat_digits: Path, tmp_path: Path
) -> None:
    """Its node's agent is asked once more for what it has written."""
    server.logs = as_answer({"logs": as_line(Found([]))})  # type: ignore[attr-defined]
    package_is_there, agent_is_away = (200, b"{}"), (500, b"Traceback\nthe agent is away")
    server.waiting += [package_is_there, as_answer(JOB), agent_is_away]  # type: ignore[attr-defined]
    sent = _sent(drafted(None, {"backbone": str(tiny_resnet), "data": str(flat_digits)}), "finetune", lambda _: None)
    with pytest.raises(RefusedError, match="no node that is alive"):
        _Submission(head, sent, "finetune", False, lambda _: None, None)._preflight([], [], tmp_path)
    assert not server.waiting  # type: ignore[attr-defined]


def test_following_outlives_a_head_that_is_started_again(
    head: Head, server: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A proxy before it answers for it meanwhile, with a page of its own, and so does Ray without its memory."""
    monkeypatch.setattr(following, "_POLL_S", 0.01)
    answers = [(503, b"no healthy upstream"), (502, b""), (500, b"Traceback\nGCS is away"), (200, b"<html>wait</html>")]
    server.waiting += answers  # type: ignore[attr-defined]
    told: list[Event] = []
    assert remote(head, tmp_path).follow(told.append) == {"accuracy": 1.0}
    assert "status 503: no healthy upstream; it is asked again" in str(told)


@pytest.fixture
def node_gone(server: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node where the driver ran is gone: the head knows the job, and has nobody to ask for its output."""
    monkeypatch.setattr(following, "_POLL_S", 0.01)
    monkeypatch.setattr(following, "_LOGS_PATIENCE_S", 0.2)
    monkeypatch.setattr(following, "_PATIENCE_S", 2.0)
    server.logs = NODE_GONE  # type: ignore[attr-defined]


@pytest.mark.usefixtures("node_gone")
def test_a_job_whose_node_is_gone_is_over(head: Head, server: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    message = "Unexpected error occurred: The actor died unexpectedly\nits node has died"
    server.job = as_answer({**JOB, "status": "FAILED", "message": message})  # type: ignore[attr-defined]
    run = remote(head, tmp_path)
    with pytest.raises(TrainingError, match="the driver of a ended without a word: its node has died"):
        run.follow(print)
    known = run.status()
    assert (known["state"], known["phase"], known["epoch"]) == ("failed", None, 0)
    assert run.lines_so_far() == list(run.lines()) == message.split("\n")


@pytest.mark.usefixtures("node_gone")
def test_what_finished_on_a_node_that_is_gone_has_not_failed(head: Head, tmp_path: Path) -> None:
    with pytest.raises(OrchestratorError, match="a has finished, and its last words are lost") as caught:
        remote(head, tmp_path).follow(print)
    assert "orchestrator fetch a" in caught.value.mend


@pytest.mark.usefixtures("node_gone")
def test_output_that_is_away_for_a_moment_is_asked_for_again(
    head: Head, server: http.server.ThreadingHTTPServer, tmp_path: Path
) -> None:
    server.logs = as_answer({"logs": SAID})  # type: ignore[attr-defined]
    job = as_answer(JOB)
    server.waiting += [job, NODE_GONE, job, NODE_GONE]  # type: ignore[attr-defined]
    assert remote(head, tmp_path).follow(print) == {"accuracy": 1.0}
    server.waiting += [job, *[(503, b"no healthy upstream")] * 2]  # type: ignore[attr-defined]
    with pytest.raises(AwayError, match="status 503"):  # not the node alone
        remote(head, tmp_path).lines_so_far()


def test_a_job_is_shown_where_its_stream_is_not_let_through(
    head: Head, server: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its output is asked for whole then, half a line excepted, and as a stream again where that comes."""
    monkeypatch.setattr(following, "_POLL_S", 0.01)
    job = server.job = as_answer({**JOB, "status": "RUNNING"})  # type: ignore[attr-defined]
    server.logs = as_answer({"logs": "one\ntw"})  # type: ignore[attr-defined]
    told: list[Event] = []
    lines = remote(head, tmp_path).lines(told.append)
    assert next(lines) == "one"
    server.logs = as_answer({"logs": "one\ntwo\nbar 1\nbar 2\n"})  # type: ignore[attr-defined]
    assert [next(lines) for _ in range(3)] == ["two", "bar 1", "bar 2"]  # Ray takes a bar's \r for the end of a line
    assert told == []
    server.waiting += [job, (502, b""), job, (502, b""), job, NODE_GONE] * 3  # type: ignore[attr-defined]
    server.stream = (200, b"one\r\ntwo\nbar 1\rbar 2\nlast\n")  # type: ignore[attr-defined]
    assert next(lines) == "last"
    assert len(told) == 1
    assert "status 500" in str(told)
    server.job, server.logs = as_answer(JOB), as_answer({"logs": SAID})  # type: ignore[attr-defined]
    assert list(lines) == []


def test_what_does_not_pass_is_said(head: Head, server: http.server.ThreadingHTTPServer) -> None:
    server.waiting += [(200, b"<html>\nlog in</html>")]  # type: ignore[attr-defined]
    with pytest.raises(AwayError, match="is no Ray cluster: '<html>' is no JSON") as caught:
        head.job(ID)
    assert "proxy" in caught.value.mend


def test_what_has_arrived_is_kept_where_its_sender_cannot_be_told(
    head: Head, server: http.server.ThreadingHTTPServer, tmp_path: Path
) -> None:
    """Nor is what went wrong hidden by that."""
    server.job = as_answer({**JOB, "status": "RUNNING"})  # type: ignore[attr-defined]
    server.stop = (503, b"no healthy upstream")  # type: ignore[attr-defined]
    digest = hashlib.sha256(b"{}").hexdigest()
    sent = [Piece("plan.json", base64.b64encode(b"{}").decode()), Ended(0, results={"files": {"plan.json": digest}})]
    server.stream = (200, "".join(as_line(one) + "\n" for one in sent).encode())  # type: ignore[attr-defined]
    fetch_through_cluster(head, "/runs", "a", tmp_path / "a", "all")
    assert (tmp_path / "a/plan.json").read_bytes() == b"{}"
    server.stream = (200, as_line(Piece("../plan.json", "")).encode() + b"\n")  # type: ignore[attr-defined]
    with pytest.raises(RefusedError, match="the cluster sends a file to"):
        fetch_through_cluster(head, "/runs", "a", tmp_path / "b", "all")


def test_waiting_for_a_job_outlives_a_head_that_is_started_again(
    head: Head, server: http.server.ThreadingHTTPServer
) -> None:
    away = (503, b"no healthy upstream")
    server.waiting += [away] * 3  # type: ignore[attr-defined]
    job = wait_until_over(head, ID, 60, poll_s=0.01)
    assert job is not None
    assert job.state == "finished"
    server.job = away  # type: ignore[attr-defined]
    with pytest.raises(AwayError, match="status 503"):
        wait_until_over(head, ID, 0.1, poll_s=0.01)


@pytest.mark.slow
def test_a_copy_at_the_place_of_the_clusters_storage_is_not_the_run(
    head: Head, server: http.server.ThreadingHTTPServer, tiny_resnet: Path, flat_digits: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By default both are `runs`: what was fetched before the end would be taken for the run ever after."""
    monkeypatch.setenv("ORCHESTRATOR_JOB", ID)
    run = train(tiny_resnet, flat_digits, name="a", method="full", training={"epochs": 1}, storage="runs")
    remote(head, run.path.parent).fetch(tmp_path / "home", "results")
    shutil.rmtree(run.path)
    (tmp_path / "home").rename(run.path)
    job = remote(head, run.path.parent)
    assert not job._sees_storage("a")
    server.waiting += [(200, b"{}"), (503, b"asked through the cluster")]  # type: ignore[attr-defined]
    with pytest.raises(AwayError, match="asked through the cluster"):
        job.fetch(run.path)
    (run.path / ".lease.json").write_text("{")  # somebody has worked on it, whoever it was
    with pytest.raises(RefusedError, match="not empty, and no copy of a"):
        job.fetch(run.path)
    shutil.rmtree(run.path)
    monkeypatch.delenv("ORCHESTRATOR_JOB")  # the same job, begun on this machine, which works on nothing of the cluster
    train(tiny_resnet, flat_digits, name="a", method="full", training={"epochs": 1}, storage="runs")
    assert not job._sees_storage("a")
    with pytest.raises(RefusedError, match="not empty, and no copy of a"):
        job.fetch(run.path)
    monkeypatch.setenv("ORCHESTRATOR_JOB", ID.replace(".1", ".2"))  # another attempt
    train(tiny_resnet, flat_digits, name="a", method="full", training={"epochs": 1}, storage="runs")
    assert job._sees_storage("a")


@pytest.mark.slow
def test_what_has_finished_is_made_whole_by_the_same_job(
    head: Head, server: http.server.ThreadingHTTPServer, tiny_resnet: Path, flat_digits: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Where its last words are lost with a node, or its run has lost a file; else it is the same job."""
    monkeypatch.setenv("ORCHESTRATOR_JOB", ID)
    fields = {"method": "full", "training": {"epochs": 1}, "storage": "runs", "name": "a"}
    run = train(tiny_resnet, flat_digits, **fields)
    sent = _sent(drafted(None, {"backbone": str(tiny_resnet), "data": str(flat_digits), **fields}), "finetune", print)
    told: list[Event] = []
    submission = _Submission(head, sent, "finetune", False, told.append, None)
    metadata = {"orchestrator_run": "a", "orchestrator_storage": sent.storage, "orchestrator_attempt": "1",
                "orchestrator_kind": "finetune", "orchestrator_job": submission._digest,
                "orchestrator_began": run.plan.job.digest()}  # fmt: skip
    server.job = as_answer({**JOB, "metadata": metadata})  # type: ignore[attr-defined]

    def next_attempt() -> str:
        job = head.job(ID)
        assert job is not None
        there = submission._there({1: job})
        text = told[-1].text if isinstance(told[-1], Noted) else ""
        assert (there is None) == ("next attempt" in text), text
        return text

    assert "has finished before" in next_attempt()
    server.logs = as_answer({"logs": "nothing of ours"})  # type: ignore[attr-defined]
    assert "its last words are lost: this is the next attempt" in next_attempt()
    server.logs = as_answer({"logs": SAID})  # type: ignore[attr-defined]
    (run.path / "model/model.safetensors").unlink()
    assert "a is not whole: this is the next attempt" in next_attempt()


@pytest.mark.parametrize("cluster", ["the same", "a new one"])
def test_a_job_without_a_name_goes_on_with_its_run_on_other_workers(
    head: Head, server: http.server.ThreadingHTTPServer, tiny_resnet: Path, flat_digits: Path, bucket: Any, cluster: str
) -> None:
    """The name says the number of workers; `finetune` too finds the run that there is."""
    fields: dict[str, Any] = {"backbone": str(tiny_resnet), "data": str(flat_digits), "method": "full",
                              "training": {"epochs": 1}, "storage": "s3://bucket/runs"}  # fmt: skip

    def sent(num_workers: int, **more: Any) -> Sent:
        asked = drafted(None, {**fields, **more, "scaling": {"num_workers": num_workers}})
        return _gone_on_with(head, _sent(asked, "finetune", print), told.append)

    told: list[Event] = []
    server.job = as_answer([])  # type: ignore[attr-defined]
    one = sent(1)
    assert one.name != sent(2).name
    if cluster == "the same":
        metadata = {"orchestrator_run": one.name, "orchestrator_storage": one.storage, "orchestrator_like": one.like,
                    "orchestrator_began": one.began}  # fmt: skip
        server.job = as_answer([{**JOB, "metadata": metadata}])  # type: ignore[attr-defined]
    else:
        assert bucket
        orchestrator.finetune(fields, report=print)
    assert not told
    two = sent(2)
    assert (two.name, two.tree["name"], two.plan.name, two.began) == (one.name, one.name, one.name, one.began)
    assert f"going on with the run {one.name}, which began on another number" in str(told)
    assert sent(2, name="other").name == "other"
    assert sent(2, **{"training.epochs": 2}).name not in (one.name, "other")


@pytest.mark.slow
def test_the_best_run_of_a_search_is_known_without_its_drivers_last_words(
    head: Head, server: http.server.ThreadingHTTPServer, tmp_path: Path
) -> None:
    server.logs = as_answer({"logs": "nothing of ours"})  # type: ignore[attr-defined]
    job = replace(remote(head, tmp_path / "runs", "s"), kind="search")
    with pytest.raises(RefusedError, match="is a search, and has no run yet") as caught:
        job._run_name()
    assert "submit it again" in caught.value.mend
    (tmp_path / "runs/s").mkdir(parents=True)
    (tmp_path / "runs/s/search.json").write_text('{"best": "s.0003"}')
    assert job._run_name() == "s.0003"


def test_a_search_that_was_removed_from_a_store_is_lost(head: Head, bucket: Any) -> None:
    job = RemoteRun(ID, "s", "s3://bucket/runs", 1, "search", head)
    assert job.lost() == "s3://bucket/runs/s is gone"
    with bucket.open_output_stream("runs/s/search.json") as file:
        file.write(b"{}")
    assert job.lost() == ""
    assert replace(job, name="r", kind="rank").lost() == ""  # it keeps nothing there


def test_commands_are_as_a_shell_takes_them(head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    job = remote(head, tmp_path, "my run")
    assert job.command("attach") == "orchestrator attach 'my run'"
    assert replace(job, called=ID).command("stop") == f"orchestrator stop {ID}"
    with (
        pytest.raises(InterruptedRunError, match="my run may have started") as caught,
        job.left_running("may have started on the cluster"),
    ):
        raise KeyboardInterrupt
    assert "orchestrator stop 'my run' ends it" in caught.value.mend


@pytest.mark.slow
def test_a_run_that_was_brought_home_goes_on_here(
    head: Head, tiny_resnet: Path, flat_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its checkpoint; what it comes to is what it would have come to."""
    monkeypatch.setenv("ORCHESTRATOR_JOB", ID)
    options = {"method": "full", "training": {"epochs": 2, "checkpoint_every_steps": 2}}

    def interrupt(event: Event) -> None:
        if isinstance(event, EpochEnded):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(InterruptedRunError):
        train(tiny_resnet, flat_digits, name="a", storage="cluster", report=interrupt, **options)
    home = remote(head, tmp_path / "cluster").fetch(tmp_path / "runs/a")
    shutil.rmtree(tmp_path / "cluster")
    assert not home.finished
    notes: list[str] = []
    run = train(
        tiny_resnet, flat_digits, name="a", storage="runs",
        report=lambda event: notes.append(getattr(event, "text", "")), **options,
    )  # fmt: skip
    assert any("going on from step" in note for note in notes)
    assert same(weights_of(run), weights_of(train(tiny_resnet, flat_digits, name="whole", **options)))


@pytest.mark.slow
def test_a_run_that_is_here_already_stays_as_it_is(
    head: Head, tiny_resnet: Path, flat_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its storage is a folder of this machine, and so is where `orchestrator fetch` puts a copy by default."""
    monkeypatch.setenv("ORCHESTRATOR_JOB", ID)
    run = train(tiny_resnet, flat_digits, name="a", method="full", training={"epochs": 1}, storage="runs")
    storage = open_storage("runs")
    before = list(storage.commits("a"))
    assert any(name.startswith("a/checkpoints/") for name in before)
    job = remote(head, run.path.parent.absolute())
    for what in ("all", "model", "results"):
        assert job.fetch("runs/a", what).path == run.path.absolute()  # type: ignore[arg-type]
    assert list(storage.commits("a")) == before

    home = tmp_path / "home"
    assert job.fetch(home).results == run.results
    assert job.fetch(home).results == run.results  # an earlier copy is replaced
    assert train(tiny_resnet, flat_digits, name="home", method="full", training={"epochs": 1}, storage=".").finished
    with pytest.raises(RefusedError, match="not empty, and no copy of a"):
        job.fetch(home)  # it has been worked on there
    other = train(tiny_resnet, flat_digits, name="a", method="full", training={"epochs": 1}, storage="other")
    with pytest.raises(RefusedError, match="not empty, and no copy of a"):
        job.fetch(other.path)  # somebody's own run of that name
    assert orchestrator.Run(other.path).finished
