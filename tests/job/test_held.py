"""A run that somebody works on, in a directory and in an object store."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data import table_of
from orchestrator.errors import CheckpointError, OrchestratorError, RefusedError
from orchestrator.job import DirectoryStorage, HeldRun, Run, Storage, hold, open_storage
from orchestrator.job.object_storage import ObjectStorage
from orchestrator.training import checkpoint as ckpt
from orchestrator.training.record import Record
from tests.held import held
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
        assert run.commits("") == []
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


def test_what_an_audit_wrote_is_the_runs_own(storage: Storage) -> None:
    """Killed once what says that the run is there was removed, and before it was written anew."""
    with hold(storage, "run") as run:
        run.write("audit/epoch-00001.parquet", "x")
    with hold(storage, "run") as run:
        run.clear()
        assert run.children("") == []


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
    assert run.lease.owner in caught.value.message


def test_a_run_travels_to_the_workers(storage: Storage) -> None:
    """By the place and the lease alone."""
    with hold(storage, "run") as run:
        theirs: Any = HeldRun(open_storage(storage.place), run.lease)
        theirs.write("lineage.json", "{}")
        assert run.read("lineage.json") == "{}"


def test_a_run_reads_its_own_table_wherever_its_storage_is(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / "rows.arrow").write_text("rows")
    with hold(storage, "run") as run:
        run.write("samples.json", '{"table": "%s"}' % ("0" * 32))
        assert table_of(run) is None
        if isinstance(storage, ObjectStorage):
            put = storage.share(made, f".data/{'0' * 32}")
            assert table_of(run) == put
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
        else:
            (run.folder.parent / ".data").mkdir()
            made.rename(run.folder.parent / ".data" / ("0" * 32))
        table = table_of(run)
        assert table is not None
        assert (table / "rows.arrow").read_text() == "rows"


# --- in a directory ---


@pytest.fixture
def held_run(tmp_path: Path) -> Iterator[HeldRun]:
    with held(tmp_path / "runs" / "run") as run:
        yield run


def test_a_file_in_the_place_of_a_run_is_said(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(RefusedError, match=r"run is a file") as caught:
        held(tmp_path / "run").__enter__()
    assert "--name" in caught.value.mend


def test_starting_over_mends_a_plan_that_cannot_be_read(held_run: HeldRun) -> None:
    (held_run.folder / "plan.json").mkdir()
    with pytest.raises(RefusedError, match="cannot be read: Is a directory") as caught:
        held_run.read("plan.json")
    assert "--fresh" in caught.value.mend
    held_run.clear()
    held_run.write("plan.json", "{}")
    assert held_run.read("plan.json") == "{}"


def test_leftovers_of_an_earlier_version_and_of_ray_go_with_the_run(held_run: HeldRun) -> None:
    for name in ("samples.partial", ".ray", "checkpoints/step-00000100"):
        (held_run.folder / name).mkdir(parents=True)
    (held_run.folder / "checkpoints/step-00000100/COMMITTED").touch()
    with pytest.raises(CheckpointError, match="are of an earlier version") as caught:
        ckpt.newest_step(held_run)
    assert "--fresh" in caught.value.mend
    held_run.clear()
    assert sorted(child.name for child in held_run.folder.iterdir()) == [".lease.json", ".lock"]


def test_a_checkpoint_that_the_disk_cannot_read_is_passed_over(
    held_run: HeldRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.job import manifests as module

    ckpt.save(held_run, made(1))
    ckpt.save(held_run, made(2))
    digest = module.file_sha256

    def broken(file: Path) -> str:
        if "step-00000002" in str(file):
            raise OSError(errno.EIO, "Input/output error", str(file))
        return digest(file)

    monkeypatch.setattr(module, "file_sha256", broken)
    assert ckpt.newest_step(held_run) == 1


def test_what_a_file_system_keeps_does_not_end_the_run(held_run: HeldRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS keeps a file that is open under another name, and its folder cannot be removed then."""
    ckpt.save(held_run, made(1))
    real = os.rmdir

    def kept(path: Any, **more: Any) -> None:
        if "step-" in str(path):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        real(path, **more)

    monkeypatch.setattr(os, "rmdir", kept)
    for step in (2, 3, 4):
        ckpt.save(held_run, made(step))
    held_run.collect_orphans(older_s=0)
    assert ckpt.newest_step(held_run) == 4


def test_a_file_system_without_locks_can_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(tmp_path / "run") as run:
        run.write("plan.json", "{}")
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, "no locks")))
        assert Run(tmp_path / "run").state == "unfinished"


def test_a_lease_that_is_gone_is_not_another_process(held_run: HeldRun) -> None:
    (held_run.folder / ".lease.json").unlink()
    with pytest.raises(OrchestratorError, match="it is not known who works on the run") as caught:
        held_run.write("plan.json", "{}")
    assert "another process" not in caught.value.message
    (held_run.folder / ".lease.json").write_text(json.dumps(vars(held_run.lease)))


def test_a_disk_without_room_for_a_scratch_folder_is_said(held_run: HeldRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OrchestratorError, match="No space left") as caught, held_run.scratch():
        pass
    assert "make room" in caught.value.mend


def test_epochs_stand_once_whatever_fails(held_run: HeldRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.training import record

    monkeypatch.setattr(record, "_PUBLISHED_EVERY_S", 1e9)
    epochs = Record(held_run, 0)
    monkeypatch.setattr(record, "_show_in_tensorboard", lambda *_: (_ for _ in ()).throw(OrchestratorError("full")))
    epochs._pending.append({"epoch": 1, "step": 1})
    with pytest.raises(OrchestratorError):
        epochs.settle()
    epochs.settle()
    assert [line["epoch"] for line in Run(held_run.folder).metrics] == [1]


def test_the_first_folders_entry_is_on_the_disk(held_run: HeldRun, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(number: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{number}"))
        fsync(number)

    monkeypatch.setattr(os, "fsync", noted)
    ckpt.save(held_run, made(1))
    assert str(held_run.folder) in synced
