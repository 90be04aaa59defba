"""A run that somebody works on, in a directory and in an object store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.data import open_storage
from orchestrator.errors import CheckpointError, RefusedError
from orchestrator.job import DirectoryStorage, HeldRun, Storage, hold
from orchestrator.training import checkpoint as ckpt
from orchestrator.training.record import Record
from tests.training.checkpoints import made, same


@pytest.fixture(params=["directory", "store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A directory, and an S3 store (moto's server)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "store":
        request.getfixturevalue("bucket")
    return open_storage("s3://bucket/runs" if request.param == "store" else str(tmp_path / "runs"), ttl_s=3.0)


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_run_is_written_and_goes_on_from_its_newest_whole_checkpoint(storage: Storage, tmp_path: Path) -> None:
    with hold(storage, "run") as run:
        run.write("plan.json", "{}")
        for step in (1, 2, 3):
            ckpt.save(run, made(step))
        record = Record(run, 0)
        record.add({"epoch": 1, "step": 3, "train_loss": 0.5})
        assert run.children("") == ["checkpoints", "metrics.jsonl", "plan.json", "tensorboard"]
        assert run.commits("checkpoints") == ["checkpoints/step-00000002", "checkpoints/step-00000003"]
    with hold(storage, "run") as run:  # as another process would
        assert ckpt.newest_step(run) == 3
        assert same(ckpt.load(run, 3).weights, made(3).weights)
        ckpt.forget_after(run, 2)
        assert ckpt.newest_step(run) == 2
        with pytest.raises(CheckpointError, match="step 3 cannot be read"):
            ckpt.load(run, 3)
        assert [line["epoch"] for line in Record(run, 1)._lines] == [1]
    if not isinstance(storage, DirectoryStorage):
        assert not files_below(tmp_path)  # nothing of it is left on this machine


def test_a_folder_is_committed_whole_or_not_at_all(storage: Storage) -> None:
    with hold(storage, "run") as run:
        with pytest.raises(FileNotFoundError), run.committing("model") as folder:
            (folder / "missing" / "weights").touch()
        assert run.find("model") is None
        with run.committing("model") as folder:
            (folder / "weights").write_text("1")
        with run.opened("model") as folder:
            assert (folder / "weights").read_text() == "1"
        assert run.children("") == ["model"]
        assert not any("scratch" in path.name for path in run.folder.rglob("*"))


def test_starting_over_removes_what_a_run_writes_and_nothing_else(storage: Storage) -> None:
    with hold(storage, "run") as run:
        for name in ("plan.json", "results.json", "error.txt", "notes.md"):
            run.write(name, "{}")
        ckpt.save(run, made(1))
        run.clear()
        assert run.children("") == ["notes.md"]
        assert run.read("plan.json") is None


def test_what_is_no_run_is_left_alone(storage: Storage) -> None:
    with hold(storage, "photos") as run:
        run.write("cat.jpg", b"x")
    with pytest.raises(RefusedError, match=r"photos is no run of ours, and not empty: it holds cat\.jpg") as caught:
        hold(storage, "photos").__enter__()
    assert "--name" in caught.value.mend


def test_a_run_that_never_began_leaves_no_directory(tmp_path: Path) -> None:
    storage = DirectoryStorage(tmp_path / "runs")
    with pytest.raises(ZeroDivisionError), hold(storage, "run"):
        raise ZeroDivisionError
    assert not (tmp_path / "runs").exists()
    with hold(storage, "other") as other:
        other.write("plan.json", "{}")
        with hold(storage, "run"):
            pass
        assert storage.children() == ["other"]


def test_only_one_holds_a_run(storage: Storage) -> None:
    with hold(storage, "run") as run, pytest.raises(RefusedError, match=r"process \d+ on .* is working on") as caught:
        hold(storage, "run").__enter__()
    assert caught.value.reason == "busy"
    assert isinstance(run, HeldRun)


def test_a_run_travels_to_the_workers(storage: Storage) -> None:
    """By the place and the lease alone."""
    with hold(storage, "run") as run:
        theirs: Any = HeldRun(open_storage(storage.place), run.lease)
        theirs.write("lineage.json", "{}")
        assert run.read("lineage.json") == "{}"
