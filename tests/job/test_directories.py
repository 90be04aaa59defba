"""What a directory as storage does besides (tests/job/test_object_storage.py is the suite for all storages)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestrator.errors import OrchestratorError
from orchestrator.job import DirectoryStorage, Lease


def folder_of(root: Path, content: str) -> Path:
    folder = root / "work"
    folder.mkdir()
    (folder / "a").write_text(content)
    return folder


def test_a_commit_lies_there_as_plain_files(tmp_path: Path) -> None:
    storage = DirectoryStorage(tmp_path / "runs")
    with storage.acquire("run", "me") as lease:
        storage.commit(folder_of(tmp_path, "x"), "run/model", lease)
    assert (tmp_path / "runs/run/model/a").read_text() == "x"
    assert sorted(os.listdir(tmp_path / "runs/run/model")) == [".manifest.json", "a"]
    assert sorted(os.listdir(tmp_path / "runs/run")) == [".lease.json", ".lock", "model"]


def test_a_folder_on_another_disk_is_copied(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one disk alone")
    root = elsewhere / f"orc-{os.getpid()}"
    root.mkdir()
    work = folder_of(root, "x")
    storage = DirectoryStorage(tmp_path / "runs")
    with storage.acquire("run", "me") as lease:
        storage.commit(work, "run/model", lease)
    root.rmdir()  # nothing is left there
    assert storage.fetch("run/model", tmp_path / "here").number == 1


def test_leftovers_go_once_they_are_old(tmp_path: Path) -> None:
    storage = DirectoryStorage(tmp_path / "runs")
    with storage.acquire("run", "me") as lease:
        storage.commit(folder_of(tmp_path, "x"), "run/model", lease)
        old, new = (tmp_path / f"runs/run/.model.{name}.partial" for name in ("old", "new"))
        for left in (old, new):
            left.mkdir()
            (left / "a").touch()
        for path in (old / "a", old):
            os.utime(path, (time.time() - 100, time.time() - 100))
        assert storage.commits("run") == ["run/model"]
        assert storage.collect_orphans(lease, 50) == ["run/.model.old.partial"]
        assert new.exists()
        assert not old.exists()


def test_what_the_disk_refuses_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OrchestratorError, match="file/run cannot be written: Not a directory") as caught:
        DirectoryStorage(tmp_path / "file").acquire("run", "me").__enter__()
    assert "--storage" in caught.value.mend


def test_a_disk_without_room_leaves_what_was_there(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk."""
    code = f"""
import resource, signal
from pathlib import Path
from orchestrator.errors import OrchestratorError
from orchestrator.job import DirectoryStorage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
storage = DirectoryStorage(Path({str(tmp_path)!r}) / "runs")
with storage.acquire("run", "me") as lease:
    storage.write("run/metrics.jsonl", b"before", lease)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        storage.write("run/metrics.jsonl", b"x" * 5000, lease)
    except OrchestratorError as error:
        print(error)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "run/metrics.jsonl cannot be written: File too large" in told
    assert "mend: make room" in told
    assert sorted(os.listdir(tmp_path / "runs/run")) == [".lease.json", ".lock", "metrics.jsonl"]
    assert (tmp_path / "runs/run/metrics.jsonl").read_text() == "before"


def test_a_lock_of_an_earlier_version_and_a_lost_number_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("12345")
    (tmp_path / "run" / ".lease.json").write_text("{")
    storage = DirectoryStorage(tmp_path)
    with storage.acquire("run", "me") as lease:
        assert lease.number == 1
        assert Lease(**json.loads((tmp_path / "run" / ".lease.json").read_text())) == lease
        (tmp_path / "run" / ".lease.json").unlink()
        with pytest.raises(OrchestratorError, match="it is not known who works on the run"):
            storage.check(lease)


def test_commits_are_listed_while_others_are_removed(tmp_path: Path) -> None:
    """Checkpoints come and go while somebody looks at a run: `orchestrator runs` beside its training."""
    storage = DirectoryStorage(tmp_path / "runs")
    with storage.acquire("run", "me") as lease:
        storage.commit(folder_of(tmp_path, "x"), "run/checkpoints/kept", lease)
        ended = threading.Event()

        def come_and_go() -> None:
            while not ended.is_set():
                for number in range(8):
                    (tmp_path / f"runs/run/checkpoints/step-{number}/inner").mkdir(parents=True)
                for number in range(8):
                    shutil.rmtree(tmp_path / f"runs/run/checkpoints/step-{number}")

        thread = threading.Thread(target=come_and_go)
        thread.start()
        try:
            for _ in range(300):
                assert storage.commits("run") == ["run/checkpoints/kept"]
        finally:
            ended.set()
            thread.join()
