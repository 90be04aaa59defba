"""A run that is brought home: whole, in parts, damaged on its way."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestrator.distributed import fetching
from orchestrator.distributed.fetching import Arrival, copy_run, settle
from orchestrator.distributed.telling import Piece
from orchestrator.errors import OrchestratorError, RefusedError
from orchestrator.job import Advanced, DirectoryStorage, Event, PhaseBegan, beside, file_sha256, hold


@pytest.fixture
def storage(tmp_path: Path) -> DirectoryStorage:
    """A run with small files, a checkpoint and a model."""
    storage = DirectoryStorage(tmp_path / "runs")
    with hold(storage, "a") as run:
        run.write("plan.json", "{}")
        run.write("results.json", '{"test": 1}')
        run.write("tensorboard/events.1", b"\x00")
        for folder in ("checkpoints/step-00000001", "model"):
            with run.committing(folder) as place:
                (place / "weights.safetensors").write_bytes(b"weights of " + folder.encode())
    return storage


def test_all_of_it_its_model_or_its_small_files(storage: DirectoryStorage, tmp_path: Path) -> None:
    def names(what: str) -> list[str]:
        folder = tmp_path / what
        told: list[Event] = []
        copy_run(storage, "a", folder, what, told.append)  # type: ignore[arg-type]
        began, *steps = told
        assert isinstance(began, PhaseBegan)
        assert began.total == sum(one.stat().st_size for one in folder.rglob("weights.safetensors"))
        assert sum(event.num for event in steps if isinstance(event, Advanced)) == began.total
        return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())

    small = ["plan.json", "results.json"]
    assert names("results") == small
    model = ["model/.manifest.json", "model/weights.safetensors"]
    assert names("model") == [*model, *small]
    step = "checkpoints/step-00000001"
    assert names("all") == [
        f"{step}/.manifest.json", f"{step}/weights.safetensors", *model, *small, "tensorboard/events.1",
    ]  # fmt: skip


def test_of_one_large_file_it_is_told_how_much_has_come(
    storage: DirectoryStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.distributed.fetching._LOOK_EVERY_S", 0.005)
    with (
        hold(storage, "a") as run,
        run.committing("model") as place,
        (place / "weights.safetensors").open("wb") as large,
    ):
        large.truncate(100 * 2**20)
    told: list[Event] = []

    def slowly(_self: object, _name: str, _manifest: object, _file: str, to: Path) -> None:
        for size in (40, 80, 100):
            with to.open("ab") as out:
                out.truncate(size * 2**20)
            time.sleep(0.1)

    monkeypatch.setattr(DirectoryStorage, "_copy", slowly)
    copy_run(storage, "a", tmp_path / "copy", "model", told.append)
    began, *steps = told
    assert isinstance(began, PhaseBegan)
    assert began.total == 100 * 2**20
    assert len(steps) > 1
    assert sum(event.num for event in steps if isinstance(event, Advanced)) == began.total


def test_folders_that_are_renamed_while_they_are_counted_are_no_error(tmp_path: Path) -> None:
    """As each is once it has arrived whole."""
    over = threading.Event()

    def rename() -> None:
        while not over.is_set():
            (tmp_path / "partial/inner").mkdir(parents=True)
            (tmp_path / "partial/inner/weights").write_bytes(b"1")
            (tmp_path / "partial").rename(tmp_path / "whole")
            shutil.rmtree(tmp_path / "whole")

    thread = threading.Thread(target=rename)
    thread.start()
    try:
        assert {fetching._bytes_in(tmp_path) for _ in range(1000)} <= {0, 1, 2}
    finally:
        over.set()
        thread.join()


def test_what_is_not_there_or_not_as_it_was_committed(storage: DirectoryStorage, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="there is no run") as caught:
        copy_run(storage, "b", tmp_path / "b", "all")
    assert caught.value.reason == "not_found"
    file = tmp_path / "runs/a/model/weights.safetensors"
    file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(RefusedError, match=r"damaged: weights\.safetensors was changed"):
        copy_run(storage, "a", tmp_path / "a", "model")
    with hold(storage, "a") as run:
        run.delete("model")
    with pytest.raises(RefusedError, match="has no model yet"):
        copy_run(storage, "a", tmp_path / "again", "model")


def test_pieces_are_put_together_and_compared(tmp_path: Path) -> None:
    arrival = Arrival(tmp_path / "home")
    for part in (b"one ", b"two"):
        arrival.take(Piece("model/a", base64.b64encode(part).decode()))
    arrival.take(Piece("empty", ""))
    (tmp_path / "whole").write_bytes(b"one two")
    digests = {"model/a": file_sha256(tmp_path / "whole")}
    arrival.compare(digests)
    with pytest.raises(OrchestratorError, match="model/b has not arrived as it was sent"):
        arrival.compare({**digests, "model/b": "0"})
    with pytest.raises(OrchestratorError, match="empty has not arrived as it was sent"):
        arrival.compare({"empty": "0"})
    for place in ("../outside", "/etc/x", "model/../../x"):
        with pytest.raises(RefusedError, match="the cluster sends a file to"):
            arrival.take(Piece(place, ""))


def test_a_later_copy_replaces_what_it_holds(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for content in ("first", "second"):
        partial = beside(home)
        (partial / "model").mkdir(parents=True)
        (partial / "model" / content).write_text(content)
        (partial / "results.json").write_text(content)
        settle(partial, home)
    assert [file.name for file in (home / "model").iterdir()] == ["second"]
    assert (home / "results.json").read_text() == "second"
    assert [one.name for one in tmp_path.iterdir()] == ["home"]


def test_who_gives_up_leaves_no_copy_in_the_output(tmp_path: Path) -> None:
    """Of a job on the head, which sends a large run; it is asked to stop amid that."""
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/plan.json").write_text("{}")
    with (tmp_path / "runs/a/results.json").open("wb") as large:
        large.truncate(200 * 2**20)
    (tmp_path / "tmp").mkdir()
    (tmp_path / "delivered").mkdir()
    request = {"storage": str(tmp_path / "runs"), "name": "a", "what": "all"}
    (tmp_path / "delivered/orchestrator_request.json").write_text(json.dumps(request))
    code = (
        f"import runpy, sys; sys.path.append({str(tmp_path / 'delivered')!r})\n"
        "runpy.run_module('orchestrator.distributed.fetch_job', run_name='__main__')"
    )
    output = tmp_path / "output"
    with output.open("wb") as out:
        job = subprocess.Popen(
            [sys.executable, "-c", code], stdout=out, env={**os.environ, "TMPDIR": str(tmp_path / "tmp")}
        )
    while not output.stat().st_size:
        assert job.poll() is None
        time.sleep(0.001)
    job.terminate()
    assert job.wait(60) == 0
    assert output.stat().st_size == 0
    assert list((tmp_path / "tmp").iterdir()) == []
