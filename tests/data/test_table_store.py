"""A sample table is kept once for all runs that use it, whoever dies, and is pruned when none does."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import pytest

from orchestrator.data import (
    Samples,
    TableStore,
    open_storage,
    prepare_data,
    shared_tables,
    table_key,
    table_of,
    tables_in,
)
from orchestrator.data.samples import INDEX_FILE, ROWS_FILE
from orchestrator.errors import RefusedError
from orchestrator.job import SAMPLES, SPLITS, BackboneCard, Data, Run, TaskName, hold
from orchestrator.modality import registry
from tests import s3_proxy
from tests.held import leased

CARD = BackboneCard(source="b", kind="directory", name="b")
TEXTS = [{"text": f"sentence {i}", "label": "odd" if i % 2 else "even"} for i in range(40)]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make_table(folder: Path, rows: list[dict[str, Any]] = TEXTS, task: TaskName = "single-label", **chosen: Any) -> str:
    """Write the sample table of texts, which lie in this directory, into a new folder; the data's fingerprint."""
    folder.mkdir(parents=True)
    file = write_rows(Path("texts.jsonl").absolute(), rows)
    return prepare_data(
        Data(path=str(file), **chosen), registry.get("text"), CARD, task, directory=folder
    ).summary.fingerprint


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def new_run(storage: Path, name: str) -> Path:
    (storage / name).mkdir()
    return storage / name


def put(storage: Path, name: str, **more: Any) -> Path:
    """Have a new run put a table, as a job does: written in the run's own folder first."""
    run = new_run(storage, name)
    make_table(run / "made", **more)
    return TableStore(storage).put(run / "made", leased(run))


def answers(folder: Path) -> object:
    """All that a table says of texts."""
    samples = Samples(folder, ("text", "text_pair"))
    rows = np.arange(len(samples.targets))
    return (
        samples.targets.tolist(), [samples.rows(split).tolist() for split in SPLITS], samples.contents(rows).tolist(),
        [samples.read(row) for row in rows], [samples.place(row) for row in rows], samples.num_bytes.tolist(),
    )  # fmt: skip


def temporaries(storage: Path) -> list[Path]:
    return list((storage / ".data").glob("*.temporary"))


def test_two_runs_of_the_same_data_use_one_table(storage: Path) -> None:
    first, second = put(storage, "one"), put(storage, "two")
    assert first == second == table_of(Run(storage / "one")) == table_of(Run(storage / "two"))
    assert TableStore(storage).in_use() == {first.name: ["one", "two"]}
    assert [path.name for path in (storage / ".data").glob("*/")] == [first.name]
    assert not (storage / "two" / "made").exists()
    make_table(storage / "again")
    assert answers(first) == answers(storage / "again")


def test_a_kept_table_is_read_only(storage: Path) -> None:
    path = put(storage, "one")
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (path, path / ROWS_FILE, path / INDEX_FILE)}
    assert modes == {path.name: 0o755, ROWS_FILE: 0o444, INDEX_FILE: 0o444}


def test_who_may_not_read_the_run_may_not_read_its_table(storage: Path) -> None:
    before = os.umask(0o077)
    try:
        path = put(storage, "one")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (path, *path.iterdir())} == {0o700, 0o400}


def test_a_table_survives_the_clearing_of_its_run(storage: Path) -> None:
    path = put(storage, "one")
    before = answers(path)
    leased(storage / "one").clear()
    assert answers(path) == before
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o444}


# --- the key ---


def keys_and_fingerprints(tmp_path: Path, *variants: dict[str, Any]) -> tuple[set[str], set[str]]:
    fingerprints = {make_table(tmp_path / f"variant-{i}", **one) for i, one in enumerate(variants)}
    return {table_key(tmp_path / f"variant-{i}") for i in range(len(variants))}, fingerprints


def test_tables_that_differ_under_one_fingerprint_have_two_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of rows and of classes, and where the data lies, are nothing that the fingerprint is of."""
    no_split: dict[str, Any] = {"validation_fraction": 0, "test_fraction": 0}
    keys, fingerprints = keys_and_fingerprints(tmp_path / "rows", no_split, {**no_split, "rows": TEXTS[::-1]})
    assert (len(keys), len(fingerprints)) == (2, 1)
    columns = [{"text": f"sentence {i}", "a": i % 2, "b": 1 - i % 2} for i in range(40)]
    labels: dict[str, Any] = {**no_split, "rows": columns, "task": "multi-label"}
    keys, fingerprints = keys_and_fingerprints(
        tmp_path / "classes", {**labels, "label_column": ("a", "b")}, {**labels, "label_column": ("b", "a")}
    )
    assert (len(keys), len(fingerprints)) == (2, 1)
    here = make_table(tmp_path / "here")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert make_table(tmp_path / "there") == here
    assert table_key(tmp_path / "here") != table_key(tmp_path / "there")


def test_all_that_a_table_depends_on_changes_its_key(tmp_path: Path) -> None:
    pairs = [{**row, "text_pair": "and another"} for row in TEXTS]
    others = [{**row, "text": "another"} if i == 3 else row for i, row in enumerate(TEXTS)]
    relabelled = [{**row, "label": "odd"} if i == 2 else row for i, row in enumerate(TEXTS)]
    tags = [*relabelled, {**TEXTS[0], "label": []}]
    variants: list[dict[str, Any]] = [
        {}, {"seed": 1}, {"test_fraction": 0.2}, {"num_train": 8}, {"rows": pairs}, {"rows": others},
        {"rows": relabelled}, {"rows": TEXTS[1:]}, {"task": "multi-label", "rows": tags},
    ]  # fmt: skip
    keys, _ = keys_and_fingerprints(tmp_path / "once", *variants)
    assert len(keys) == len(variants)
    assert keys_and_fingerprints(tmp_path / "again", *variants)[0] == keys


# --- several at once ---


def _put_at_once(storage: Path, name: str, barrier: Any) -> None:
    barrier.wait()
    TableStore(storage).put(storage / name / "made", leased(storage / name))


def test_processes_that_put_one_table_at_once(storage: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    make_table(storage / "table")
    for name in ("one", "two", "three"):
        shutil.copytree(storage / "table", new_run(storage, name) / "made")
    processes = [
        context.Process(target=_put_at_once, args=(storage, name, barrier)) for name in ("one", "two", "three")
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    key = table_key(storage / "table")
    assert TableStore(storage).in_use() == {key: ["one", "three", "two"]}
    assert answers(storage / ".data" / key) == answers(storage / "table")
    assert not temporaries(storage)


def test_pruning_while_tables_come_and_go(storage: Path) -> None:
    """No run ever names a table that is not there, however often others prune."""
    for i in range(3):
        make_table(storage / f"table-{i}", seed=i)
    done, faults = threading.Event(), []

    def work(number: int) -> None:
        run = new_run(storage, f"run-{number}")
        lease = leased(run)
        for turn in range(25):
            folder = run / "made"
            shutil.copytree(storage / f"table-{(number + turn) % 3}", folder)
            path = TableStore(storage).put(folder, lease)
            if table_of(Run(run)) != path or table_key(path) != path.name:
                faults.append((number, turn))
            (run / "samples.json").unlink()

    def prune() -> None:
        while not done.is_set():
            TableStore(storage).prune()

    pruning, *working = [threading.Thread(target=prune)] + [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in (pruning, *working):
        thread.start()
    for thread in working:
        thread.join()
    done.set()
    pruning.join()
    assert not faults
    TableStore(storage).prune()
    assert [child.name for child in (storage / ".data").iterdir()] == [".lock"]


KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
from orchestrator.data import TableStore, table_key
from orchestrator.job import DirectoryStorage, HeldRun, Lease

here = Path(sys.argv[1])
for last in range(1, 500):
    storage = here / f"{last:03}"
    shutil.copytree(here / "before", storage)
    lease = Lease(**json.loads((storage / "run" / ".lease.json").read_text()))
    run = HeldRun(DirectoryStorage(storage), lease)
    child = os.fork()
    if child == 0:
        num_calls = 0
        def count(event, _):
            global num_calls
            if event.split(".")[0] in ("os", "open", "shutil", "fcntl"):
                num_calls += 1
                if num_calls == last:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        TableStore(storage).put(storage / "run" / "made", run)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""
"""Kills a process at each of the calls by which it puts a table, one after the other."""


@pytest.mark.parametrize("damaged", [False, True])
def test_a_job_killed_anywhere_leaves_a_whole_table_or_none(tmp_path: Path, damaged: bool) -> None:
    before = tmp_path / "states" / "before"
    before.mkdir(parents=True)
    make_table(tmp_path / "table")
    key = table_key(tmp_path / "table")
    shutil.copytree(tmp_path / "table", new_run(before, "run") / "made")
    leased(before / "run")
    if damaged:  # one that was cut since is there in its place
        cut = shutil.copytree(tmp_path / "table", before / ".data" / key)
        os.truncate(cut / INDEX_FILE, 100)
    subprocess.run([sys.executable, "-c", KILLED, str(before.parent)], check=True, timeout=120)
    states = sorted(path for path in before.parent.iterdir() if path.name != "before")
    num_moved = 0
    assert len(states) > 10
    for storage in states:
        store, run = TableStore(storage), storage / "run"
        there = store.path_of(key)
        is_whole = there.is_dir() and not (damaged and (there / INDEX_FILE).stat().st_size == 100)
        num_moved += is_whole
        if is_whole:
            assert answers(there) == answers(tmp_path / "table")
        named = table_of(Run(run))
        assert named == (there if (run / "samples.json").exists() else None)
        assert is_whole or named is None
        shutil.copytree(tmp_path / "table", run / f"{SAMPLES}.again")  # the same command again
        assert store.put(run / f"{SAMPLES}.again", leased(run)) == there == table_of(Run(run))
        assert answers(there) == answers(tmp_path / "table")
        assert not any(stat.S_IMODE(file.stat().st_mode) & 0o222 for file in there.iterdir())
        assert store.prune() == []
        assert {path.name for path in (storage / ".data").iterdir()} == {".lock", key}
    assert 0 < num_moved < len(states)  # killed before and after


# --- pruning ---


def test_what_no_run_uses_is_pruned(storage: Path) -> None:
    first, second = put(storage, "one"), put(storage, "two", seed=1)
    (storage / ".data" / "0123456789abcdef.parquet").touch()  # rows of a program, which are no table
    store = TableStore(storage)
    assert store.prune() == []
    shutil.rmtree(storage / "one")
    (table,) = store.prune(dry_run=True)
    assert (table.key, table.num_bytes) == (first.name, sum(file.stat().st_size for file in first.iterdir()))
    assert first.is_dir()
    assert store.prune() == [table]
    assert not first.exists()
    assert table_of(Run(storage / "two")) == second
    assert sorted(path.name for path in (storage / ".data").iterdir()) == sorted(
        [".lock", "0123456789abcdef.parquet", second.name]
    )


def test_a_table_that_is_pruned_while_it_is_read_is_read_to_its_end(storage: Path) -> None:
    path = put(storage, "one")
    samples, before = Samples(path, ("text", "text_pair")), answers(path)
    shutil.rmtree(storage / "one")
    TableStore(storage).prune()
    assert not path.exists()
    assert [samples.read(row) for row in range(len(samples.targets))] == before[3]  # type: ignore[index]


def test_a_storage_without_tables_is_left_as_it_is(tmp_path: Path) -> None:
    store = TableStore(tmp_path / "runs")
    assert store.prune() == []
    assert store.in_use() == {}
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"table": 3}', '{"table": "../../somewhere"}', '{"table": "ABC"}'])
def test_a_run_that_does_not_tell_what_it_uses_stops_the_pruning(storage: Path, text: str) -> None:
    path = put(storage, "one")
    (storage / "one" / "samples.json").write_text(text)
    for ask in (TableStore(storage).prune, TableStore(storage).in_use, lambda: table_of(Run(storage / "one"))):
        with pytest.raises(RefusedError, match=r"one/samples.json cannot be understood") as caught:
            ask()
        assert caught.value.reason == "damaged"
        assert caught.value.mend
    assert path.is_dir()


def damage_index(path: Path) -> None:
    os.truncate(path / INDEX_FILE, 1000)


def damage_rows(path: Path) -> None:
    with (path / ROWS_FILE).open("r+b") as file:
        file.write(b"nothing")


def lose_rows(path: Path) -> None:
    (path / ROWS_FILE).unlink()


def change_index(path: Path) -> None:
    content = bytearray((path / INDEX_FILE).read_bytes())
    content[len(content) // 2] ^= 1
    (path / INDEX_FILE).write_bytes(content)


@pytest.mark.parametrize("damage", [damage_index, damage_rows, lose_rows, change_index])
def test_a_damaged_table_is_replaced_by_the_next_job(storage: Path, damage: Callable[[Path], None]) -> None:
    path = put(storage, "one")
    before = answers(path)
    for file in (path, *path.iterdir()):
        file.chmod(0o755)
    damage(path)
    assert put(storage, "one-more", seed=1) != path
    make_table(storage / "one" / "made")
    assert TableStore(storage).put(storage / "one" / "made", leased(storage / "one")) == path
    assert answers(path) == before
    assert not temporaries(storage)


def test_a_run_of_an_earlier_version_has_its_own_table(storage: Path) -> None:
    run = new_run(storage, "old")
    assert table_of(Run(run)) is None
    make_table(run / SAMPLES)
    assert table_of(Run(run)) == run / SAMPLES
    assert TableStore(storage).in_use() == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_nobody_writes_a_table_by_mistake(storage: Path) -> None:
    path = put(storage, "one")
    for write in (lambda: (path / INDEX_FILE).open("ab"), lambda: (path / "more").touch(), (path / ROWS_FILE).unlink):
        with pytest.raises(PermissionError):
            write()
    assert TableStore(storage).prune() == []


# --- in an object store ---


PUTS = """
import sys
from pathlib import Path
from orchestrator.data import open_storage

open_storage(sys.argv[1]).share(Path(sys.argv[2]), sys.argv[3])
"""


def stored(bucket: Any) -> list[str]:
    infos = bucket.get_file_info(pyarrow.fs.FileSelector("runs/.data", recursive=True, allow_not_found=True))
    return sorted(info.path for info in infos if info.is_file)


def test_what_is_left_of_a_table_that_was_cut_off_or_replaced_is_pruned(
    bucket: Any, proxy: s3_proxy.Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    storage = open_storage("s3://bucket/runs")
    tables = tables_in(storage)
    make_table(tmp_path / "made")
    name = f".data/{table_key(tmp_path / 'made')}"
    child: list[subprocess.Popen[bytes]] = []
    puts: list[str] = []

    def kill(method: str, path: str) -> None:
        puts.extend([path] if method == "PUT" else [])
        if len(puts) == 2 and child[0].poll() is None:
            child[0].kill()

    proxy.on_request = kill
    child.append(subprocess.Popen([sys.executable, "-c", PUTS, storage.place, str(tmp_path / "made"), name]))
    assert child[0].wait() == -signal.SIGKILL
    proxy.on_request = None
    cut_off = stored(bucket)
    assert cut_off
    assert tables.prune() == []
    assert stored(bucket) == cut_off  # whoever writes it may be at it
    with hold(storage, "run") as run:
        tables.put(tmp_path / "made", run)
    whole = sorted(set(stored(bucket)) - set(cut_off))
    rows = next(file for file in whole if file.endswith(ROWS_FILE))
    with bucket.open_output_stream(rows) as out:
        out.write(b"cut")
    make_table(tmp_path / "again")
    with hold(storage, "run") as run:
        tables.put(tmp_path / "again", run)
    new = sorted(set(stored(bucket)) - set(cut_off) - set(whole))
    assert len(new) == len(whole)
    monkeypatch.setattr(shared_tables, "_YOUNG_S", 0.0)
    assert tables.prune(dry_run=True) == []
    assert len(stored(bucket)) == len(cut_off) + 2 * len(whole)
    assert tables.prune() == []  # a run uses it
    assert stored(bucket) == new
    bucket.delete_file("runs/run/samples.json")
    assert [f".data/{one.key}" for one in tables.prune()] == [name]
    assert stored(bucket) == []
