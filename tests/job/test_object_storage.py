"""One suite for both storages: a directory, and an object store (moto's server, in front of it a proxy that fails)."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest

from orchestrator.errors import OrchestratorError, RefusedError
from orchestrator.job import Lease, Storage, object_storage, open_storage
from tests import s3_proxy
from tests.conftest import REPOSITORY
from tests.job.storage_process import folder_of

LONG_S = 20.0
"""A lease that nobody loses because the machine is busy."""


@dataclass
class Place:
    """A storage to be tested, and what lies there."""

    kind: str
    text: str
    fs: Any
    root: str

    def storage(self, ttl_s: float = LONG_S, patience_s: float = 20.0) -> Storage:
        """As another process would open it."""
        return open_storage(self.text, ttl_s, patience_s)

    def files(self) -> list[str]:
        """All that lies there, but who works on it."""
        infos = self.fs.get_file_info(pyarrow.fs.FileSelector(self.root, recursive=True))
        names = (info.path.strip("/").removeprefix(self.root.strip("/") + "/") for info in infos if info.is_file)
        return sorted(name for name in names if ".lease" not in name and ".lock" not in name)

    def file(self, end: str) -> str:
        """The one whose name ends so."""
        (name,) = (name for name in self.files() if name.endswith(end))
        return name

    def read(self, name: str) -> bytes:
        with self.fs.open_input_file(f"{self.root}/{name}") as source:
            return source.read()  # type: ignore[no-any-return]

    def put(self, name: str, content: bytes) -> None:
        with self.fs.open_output_stream(f"{self.root}/{name}", compression=None) as out:
            out.write(content)

    def manifest(self) -> str:
        """The file that says what the only commit holds."""
        return next(name for name in self.files() if name.endswith(".json") and "plan" not in name)


@pytest.fixture(params=["directory", "store", "memory"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A directory, an S3 store, and what fsspec opens."""
    if request.param == "memory":
        import fsspec

        memory = fsspec.filesystem("memory")
        yield Place("memory", "memory://runs", pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(memory)), "/runs")
        memory.rm("/runs", recursive=True)
    else:
        yield _place(request.param, request, tmp_path)


@pytest.fixture(params=["directory", "store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """What other processes reach too."""
    return _place(request.param, request, tmp_path)


def _place(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if kind == "directory":
        return Place(kind, str(tmp_path / "runs"), pyarrow.fs.LocalFileSystem(), str(tmp_path / "runs"))
    return Place(kind, "s3://bucket/runs", request.getfixturevalue("bucket"), "runs")


def tree(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


@contextlib.contextmanager
def refused(reason: str, *texts: str) -> Iterator[None]:
    with pytest.raises(RefusedError) as caught:
        yield
    assert caught.value.reason == reason
    assert caught.value.mend or reason == "not_found"
    for text in texts:
        assert text in caught.value.message


# --- what is committed comes back ---


def test_a_folder_comes_back_as_it_was(anywhere: Place, tmp_path: Path) -> None:
    work = folder_of(tmp_path, 1)
    (work / "empty").touch()
    (work / "more" / "ä b.json.gz").write_bytes(b"no gzip")
    (work / ".hidden").write_text("too")
    (work / ".manifest.json").write_text("of another time")
    before = tree(work)
    del before[".manifest.json"]
    storage = anywhere.storage()
    with storage.acquire("run", "me") as lease:
        assert storage.find("run/model") is None
        assert storage.commits("run") == []
        manifest = storage.commit(work, "run/model", lease)
    assert not work.exists()
    other = anywhere.storage()
    assert other.find("run/model") == manifest
    assert manifest.number == 1
    assert other.commits("run") == ["run/model"]
    assert other.children() == ["run"]
    assert other.children("run") == ["model"]
    assert other.fetch("run/model", tmp_path / "here") == manifest
    here = tree(tmp_path / "here")
    assert here == before
    assert [name for name in os.listdir(tmp_path) if "partial" in name] == []
    with refused("not_found", "run/nothing"):
        other.fetch("run/nothing", tmp_path / "here")


def test_small_files(anywhere: Place) -> None:
    storage = anywhere.storage()
    assert storage.children() == storage.children("run") == []
    assert storage.read("run/plan.json") is None
    with storage.acquire("run", "me") as lease:
        for content in (b"first, and longer", b"second", b""):
            storage.write("run/plan.json", content, lease)
            assert anywhere.storage().read("run/plan.json") == content
        storage.write("run/tensorboard/events", b"x", lease)
        assert storage.children("run") == ["plan.json", "tensorboard"]
        storage.delete("run/plan.json", lease)
        storage.delete("run/plan.json", lease)  # there is none: nothing to do
        assert storage.read("run/plan.json") is None
    assert anywhere.files() == ["run/tensorboard/events"]


def test_a_commit_replaces_the_one_of_its_name(anywhere: Place, tmp_path: Path) -> None:
    storage = anywhere.storage()
    with storage.acquire("run", "me") as lease:
        versions = []
        for number in range(3):
            versions.append(storage.commit(folder_of(tmp_path, number, 3 - number), "run/model", lease).version)
        assert versions == sorted(versions)
        assert len(anywhere.files()) == 2  # one file, and what says that it is whole
    with storage.acquire("run", "me again") as lease:
        assert storage.commit(folder_of(tmp_path, 3), "run/model", lease).number == 2
    storage.fetch("run/model", tmp_path / "here")
    assert {content[:1] for content in tree(tmp_path / "here").values()} == {b"3"}
    assert storage.commits("run") == ["run/model"]


def test_what_is_deleted_is_gone(anywhere: Place, tmp_path: Path) -> None:
    storage = anywhere.storage()
    with storage.acquire("run", "me") as lease:
        storage.write("run/plan.json", b"{}", lease)
        for step in range(3):
            storage.commit(folder_of(tmp_path, step), f"run/checkpoints/step-{step:08d}", lease)
        names = [f"run/checkpoints/step-{step:08d}" for step in range(3)]
        assert storage.commits("run") == storage.commits("run/checkpoints") == names
        storage.delete(names[1], lease)
        assert storage.commits("run/checkpoints") == [names[0], names[2]]
        assert storage.find(names[1]) is None
        assert not any(names[1] in name for name in anywhere.files())
        storage.delete("run", lease)
        assert anywhere.files() == []
        assert storage.children("run") == []
        storage.check(lease)
        storage.write("run/plan.json", b"{}", lease)  # it starts over


# --- what was not committed whole is not there, or said to be damaged ---


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content[:-1], "1.bin has 99 bytes, not 100"),
        (lambda content: bytes([content[0] ^ 1]) + content[1:], "1.bin was changed"),
        (None, "1.bin is not there"),
    ],
)
def test_a_damaged_file_is_said(
    anywhere: Place, tmp_path: Path, change: Callable[[bytes], bytes] | None, said: str
) -> None:
    storage = anywhere.storage()
    with storage.acquire("run", "me") as lease:
        storage.commit(folder_of(tmp_path, 1), "run/model", lease)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "before").touch()
    name = anywhere.file("1.bin")
    if change is None:
        anywhere.fs.delete_file(f"{anywhere.root}/{name}")
    else:
        anywhere.put(name, change(anywhere.read(name)))
    with refused("damaged", anywhere.text, "run/model", said):
        storage.fetch("run/model", tmp_path / "here")
    assert os.listdir(tmp_path / "here") == ["before"]
    with storage.acquire("run", "me") as lease:  # it can be replaced
        storage.commit(folder_of(tmp_path, 2), "run/model", lease)
    storage.fetch("run/model", tmp_path / "here")


@pytest.mark.parametrize("harm", ["cut", "empty", "no object", "a path that leads out", "an absolute path"])
def test_a_manifest_that_cannot_be_understood_is_said(anywhere: Place, tmp_path: Path, harm: str) -> None:
    storage = anywhere.storage()
    with storage.acquire("run", "me") as lease:
        storage.commit(folder_of(tmp_path, 1), "run/model", lease)
    name = anywhere.manifest()
    text = anywhere.read(name)
    told = json.loads(text)
    file = next(iter(told["files"].values()))
    told["files"] = {"/etc/x" if "absolute" in harm else "more/../../x": file}
    broken = {"cut": text[:60], "empty": b"", "no object": b"[]"}.get(harm) or json.dumps(told).encode() * (
        harm != "empty"
    )
    anywhere.put(name, broken)
    with refused("damaged", "manifest cannot be understood"):
        storage.fetch("run/model", tmp_path / "here")
    with storage.acquire("run", "me") as lease:
        storage.commit(folder_of(tmp_path, 2), "run/model", lease)
    storage.fetch("run/model", tmp_path / "here")


def test_links_are_not_committed(anywhere: Place, tmp_path: Path) -> None:
    work = folder_of(tmp_path, 1)
    (work / "link").symlink_to("/etc/passwd")
    storage = anywhere.storage()
    with storage.acquire("run", "me") as lease, refused_usage(work):
        storage.commit(work, "run/model", lease)
    assert anywhere.files() == []


@contextlib.contextmanager
def refused_usage(work: Path) -> Iterator[None]:
    with pytest.raises(RefusedError, match="is a link"):
        yield
    assert work.exists()


def test_a_reader_beside_a_writer_gets_one_commit_or_the_other(anywhere: Place, tmp_path: Path) -> None:
    storage = anywhere.storage()
    over = threading.Event()

    def write() -> None:
        with storage.acquire("run", "me") as lease:
            for number in range(1, 16):
                storage.commit(folder_of(tmp_path, number), "run/model", lease)
        over.set()

    writer = threading.Thread(target=write)
    writer.start()
    reader, seen = anywhere.storage(), set()
    while not over.is_set() or not seen:
        try:
            manifest = reader.fetch("run/model", tmp_path / "here")
        except RefusedError as error:
            if error.reason != "not_found":  # before the first; and a directory has none for an instant
                raise
            continue
        contents = set(tree(tmp_path / "here").values())
        assert len(contents) == 1
        assert len(manifest.files) == 3
        seen.add(contents.pop()[:2])
    writer.join()
    assert reader.fetch("run/model", tmp_path / "here").version.startswith("00000001-000015-")


# --- other processes ---


@contextlib.contextmanager
def process(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.job.storage_process", *map(str, arguments)], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'plugins'}"},
    )  # fmt: skip
    with child:
        try:
            yield child
        finally:
            child.kill()


def said(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def test_a_commit_that_is_cut_off_is_not_there(place: Place, tmp_path: Path) -> None:
    # 3 files and their manifest; for a directory 2 folders and a rename, before the fsync of the parent, too.
    num_cut, num = (8, 10) if place.kind == "directory" else (4, 6)
    with process("cut", place.text, 0.2, num) as child:
        output, _ = child.communicate()
    whole = {int(line.split()[1]) for line in output.splitlines()}
    assert whole == set(range(num_cut, num))
    storage = place.storage(0.2)
    there = [int(name.removeprefix("run/cut-")) for name in storage.commits("run")]
    # What a directory has renamed is there, whether or not its parent's fsync was reached.
    assert set(there) - whole <= ({7} if place.kind == "directory" else set())
    for number in range(num):
        if number in there:
            storage.fetch(f"run/cut-{number}", tmp_path / "here")
            assert len(tree(tmp_path / "here")) == 3
        else:
            with refused("not_found"):
                storage.fetch(f"run/cut-{number}", tmp_path / "here")
    commits = storage.commits("run")
    with storage.acquire("run", "me") as lease:
        num_files = len(place.files())
        assert storage.collect_orphans(lease, older_s=3600) == []
        assert len(place.files()) == num_files
        time.sleep(1.1)  # the store tells times in seconds
        orphans = storage.collect_orphans(lease, older_s=1)
        assert len(orphans) == (0 if place.kind == "directory" else 3)  # none of the one that died at the first
        assert storage.collect_orphans(lease, older_s=1) == []
    assert storage.commits("run") == commits
    assert len(place.files()) == len(commits) * 4


def test_of_two_processes_one_has_the_lease(place: Place, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    with process("race", place.text, LONG_S, 4, counter) as one, process("race", place.text, LONG_S, 4, counter) as two:
        numbers = [int(line) for child in (one, two) for line in child.communicate()[0].split()]
    assert counter.read_text() == "8"
    assert sorted(numbers) == list(range(1, 9))


def test_who_comes_second_is_refused_and_gets_a_higher_number_later(anywhere: Place) -> None:
    storage = anywhere.storage(3)
    assert storage.holder("run") == ""
    with storage.acquire("run", "the first"):
        assert anywhere.storage().holder("run") == "the first"
        with (
            refused("busy", "the first is working on", anywhere.text),
            anywhere.storage(3).acquire("run", "the second"),
        ):
            pass
        with anywhere.storage().acquire("another", "the second") as other:
            assert other.number == 1
    assert storage.holder("run") == ""
    with anywhere.storage().acquire("run", "the second") as second:
        assert second.number == 2
    with anywhere.storage().acquire("run", "the third") as third:
        assert third.number == 3
        with refused("busy", "the third has taken over the run", "from the second"):
            storage.write("run/plan.json", b"", second)
    assert storage.read("run/plan.json") is None


def test_a_lease_goes_with_a_process_that_is_killed(place: Place) -> None:
    with process("hold", place.text, 1) as child:
        assert said(child) == "held 1"
        child.kill()
        child.wait()
        began = time.monotonic()
        with place.storage().acquire("run", "me") as lease:
            assert lease.number == 2
        assert time.monotonic() - began < (0.5 if place.kind == "directory" else 10)
        assert place.storage().find("run/model") is None


def test_who_wakes_up_after_the_lease_was_taken_commits_nothing(place: Place, tmp_path: Path) -> None:
    with process("hold", place.text, 1) as child:
        assert said(child) == "held 1"
        child.send_signal(signal.SIGSTOP)
        if place.kind == "directory":  # it does not expire: somebody has to say so
            (Path(place.text) / "run" / ".lock").unlink()
        storage = place.storage()
        with storage.acquire("run", "the newer one") as lease:
            manifest = storage.commit(folder_of(tmp_path, 1), "run/model", lease)
            child.send_signal(signal.SIGCONT)
            output, _ = child.communicate("\n")
            assert output.startswith("refused busy the newer one has taken over the run ")
            assert "from the other process" in output
            assert "mend:" in output
            storage.check(lease)
            assert storage.find("run/model") == manifest
            time.sleep(0.3)
            storage.check(lease)  # nor does what it wrote when it ended take the lease away


def test_what_a_process_writes_that_was_away_is_passed_over(bucket: Any, tmp_path: Path) -> None:
    """Even the marker that it was just about to write when it was stopped."""
    place = Place("store", "s3://bucket/runs", bucket, "runs")
    storage = place.storage()
    with storage.acquire("run", "the older one") as lease:
        storage.commit(folder_of(tmp_path, 1), "run/model", lease)
        older = {name: place.read(name) for name in place.files()}
    with storage.acquire("run", "the newer one") as newer:
        manifest = storage.commit(folder_of(tmp_path, 2), "run/model", newer)
        assert not older.keys() & set(place.files())
        for name, content in older.items():
            place.put(name, content)
        assert storage.find("run/model") == manifest
        storage.fetch("run/model", tmp_path / "here")
        assert {content[:1] for content in tree(tmp_path / "here").values()} == {b"2"}
        with refused("busy"):
            storage.commit(folder_of(tmp_path, 3), "run/model", lease)
        assert len(storage.collect_orphans(newer, 0)) == 1
        assert storage.find("run/model") == manifest
        assert len(place.files()) == 4


# --- a store that fails ---


@pytest.fixture
def proxy(proxy: s3_proxy.Proxy, monkeypatch: pytest.MonkeyPatch) -> s3_proxy.Proxy:
    """One that is soon given up."""
    monkeypatch.setattr(object_storage, "REQUEST_TIMEOUT_S", 1.0)
    return proxy


def round_trip(storage: Storage, lease: Lease, tmp_path: Path) -> None:
    work = folder_of(tmp_path, time.monotonic_ns())
    before = tree(work)
    storage.commit(work, "run/model", lease)
    storage.write("run/plan.json", b"{}", lease)
    assert storage.read("run/plan.json") == b"{}"
    storage.fetch("run/model", tmp_path / "here")
    assert tree(tmp_path / "here") == before


@pytest.mark.parametrize(
    ("method", "fault", "times"),
    [
        ("PUT", "500", 3),
        ("GET", "500", 3),
        ("PUT", "cut", 2),
        ("GET", "cut", 3),
        ("PUT", "silent", 1),
        ("GET", "silent", 1),
    ],
)
def test_a_store_that_fails_is_asked_again(
    proxy: s3_proxy.Proxy, tmp_path: Path, method: str, fault: s3_proxy.Fault, times: int
) -> None:
    storage = open_storage("s3://bucket/runs", LONG_S)
    with storage.acquire("run", "me") as lease:
        proxy.fail(method, fault, times)
        round_trip(storage, lease, tmp_path)
        assert proxy.faults == []


@pytest.mark.parametrize("fault", ["500", "cut"])
@pytest.mark.parametrize(
    ("method", "of"), [("POST", r"\?uploads"), ("PUT", "partNumber=2"), ("POST", r"\?uploadId"), ("GET", "safetensors")]
)
def test_a_large_file_goes_in_parts_and_one_that_fails_does_no_harm(
    proxy: s3_proxy.Proxy, tmp_path: Path, method: str, of: str, fault: s3_proxy.Fault
) -> None:
    """Of 40 MB of weights: the beginning of the upload, a part, its end, or the download."""
    failed: list[str] = []

    def fail(sent: str, path: str) -> None:
        if sent == method and re.search(of, path) and not failed:
            failed.append(path)
            proxy.fail(method, fault)

    storage = open_storage("s3://bucket/runs", LONG_S)
    content = random.Random(1).randbytes(40 * 2**20)
    with storage.acquire("run", "me") as lease:
        work = tmp_path / "work"
        work.mkdir()
        (work / "model.safetensors").write_bytes(content)
        proxy.on_request = fail
        storage.commit(work, "run/model", lease)
        storage.fetch("run/model", tmp_path / "here")
    assert (len(failed), proxy.faults) == (1, [])
    assert (tmp_path / "here" / "model.safetensors").read_bytes() == content


def test_a_store_that_is_away_for_a_while(proxy: s3_proxy.Proxy, tmp_path: Path) -> None:
    """The lease outlives it too, as nobody else could take it."""
    storage = open_storage("s3://bucket/runs", 1.0)
    with storage.acquire("run", "me") as lease:
        proxy.away_until = time.monotonic() + 2
        round_trip(storage, lease, tmp_path)
        assert time.monotonic() > proxy.away_until
        storage.check(lease)


def test_a_store_that_stays_away_is_said(proxy: s3_proxy.Proxy, tmp_path: Path) -> None:
    storage = open_storage("s3://bucket/runs", LONG_S, patience_s=0.5)
    with storage.acquire("run", "me") as lease:
        storage.commit(folder_of(tmp_path, 1), "run/model", lease)
        proxy.away_until = time.monotonic() + 60
        work = folder_of(tmp_path, 2)
        with refused("offline", "s3://bucket/runs/run", "does not answer"):
            storage.commit(work, "run/model", lease)
        assert len(tree(work)) == 3  # it can be committed later
        proxy.away_until = 0
        assert storage.find("run/model") is not None
        storage.commit(work, "run/model", lease)


def test_what_waiting_does_not_mend_is_said_at_once(proxy: s3_proxy.Proxy) -> None:
    storage = open_storage("s3://bucket/runs", LONG_S, patience_s=60)
    with storage.acquire("run", "me") as lease:
        began = time.monotonic()
        proxy.fail("PUT", "403", 5)
        with refused("unauthorised", "s3://bucket/runs/run/plan.json", "ACCESS_DENIED"):
            storage.write("run/plan.json", b"{}", lease)
        proxy.faults.clear()
        with refused("not_found", "NO_SUCH_BUCKET"), open_storage("s3://nothing/runs").acquire("run", "me"):
            pass
        assert time.monotonic() - began < 10


def test_an_upload_that_arrives_short_is_not_committed(proxy: s3_proxy.Proxy, tmp_path: Path) -> None:
    storage = open_storage("s3://bucket/runs", LONG_S)
    with storage.acquire("run", "me") as lease:
        proxy.fail("PUT", "short")
        with pytest.raises(OrchestratorError, match=r"is not what was sent: .* bytes, not 100"):
            storage.commit(folder_of(tmp_path, 1), "run/model", lease)
        assert storage.find("run/model") is None
