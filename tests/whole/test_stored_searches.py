"""Searches and rankings whose storage is an object store (moto's server): all of them lies there, on no disk."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest

import orchestrator
from orchestrator.errors import InterruptedRunError, OrchestratorError, RefusedError
from orchestrator.job import (
    Event,
    Noted,
    PhaseBegan,
    TrialsAdvanced,
    asking,
    object_storage,
    open_storage,
    run_in,
    runs,
)
from orchestrator.tuning import SearchResult, open_search
from tests import s3_proxy
from tests.tiny import make_resnet

STORAGE = "s3://bucket/runs"
SPACE: dict[str, Any] = {"learning_rate": {"loguniform": [1e-3, 1e-1]}, "weight_decay": {"uniform": [0, 0.2]}}
Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def _machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: Any) -> Iterator[None]:  # noqa: ARG001
    another_machine(tmp_path, monkeypatch, "first")
    yield
    if "ray" in sys.modules:  # what it starts has the environment that it began with, and so the place of the store
        sys.modules["ray"].shutdown()


def another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str = "another") -> None:
    """An empty disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"disk of {name}"))
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)


@pytest.fixture
def base(tiny_resnet: Path, digits: Path) -> dict[str, Any]:
    return {
        "backbone": str(tiny_resnet), "data": str(digits), "method": "head", "epochs": 3, "precision": "fp32",
        "storage": STORAGE, "name": "tried",
    }  # fmt: skip


def silent(_event: Event) -> None:
    pass


def objects(bucket: Any) -> list[str]:
    infos = bucket.get_file_info(pyarrow.fs.FileSelector("", recursive=True))
    return sorted(info.path for info in infos if info.is_file)


def rows_of(result: SearchResult) -> list[Any]:
    return [(one.number, one.repeat, one.state, one.config, pytest.approx(one.score)) for one in result.trials]


def test_a_search_of_heads_is_the_one_in_a_directory(
    base: dict[str, Any], bucket: Any, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = orchestrator.search(base, SPACE, num_trials=4, report=silent)
    local = orchestrator.search({**base, "storage": str(tmp_path / "local")}, SPACE, num_trials=4, report=silent)
    assert rows_of(result) == rows_of(local)
    assert result.place == f"{STORAGE}/tried"
    with pytest.raises(RefusedError, match="lies in an object store, and has no directory"):
        _ = result.path
    stored = objects(bucket)
    assert {f"runs/tried/{name}" for name in ("search.json", "trials.jsonl", "search.csv", "search.png")} <= {*stored}
    assert len({name.split("/")[2] for name in stored if name.startswith("runs/.data/")}) == 1
    assert not list(Path.cwd().iterdir())  # no folder `runs`, and none that is called s3:

    another_machine(tmp_path, monkeypatch)  # knows nothing but the place
    assert rows_of(open_search(result.place)) == rows_of(result)
    assert orchestrator.open_run(result.place).place == result.best_run.place  # type: ignore[union-attr]
    listed = cli("runs", "--storage", STORAGE, "--json")
    assert [(row["name"], row["state"]) for row in json.loads(listed.stdout)] == [("tried", "finished")]
    image = next(Path(base["data"]).rglob("3/*.png"))
    assert cli("predict", result.place, image).returncode == 0
    heard: list[Event] = []
    again = orchestrator.search(base, SPACE, num_trials=4, report=heard.append)
    assert rows_of(again) == rows_of(result)
    assert "4 trials ended before, and are not done again" in [one.text for one in heard if isinstance(one, Noted)]
    orchestrator.search(base, SPACE, num_trials=1, fresh=True, report=silent)
    assert len(open_search(result.place).trials) == 1


def test_cut_off_it_goes_on_on_another_machine(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = {**SPACE, "batch_size": [16, 32, 64]}  # three stacks
    began: list[str] = []

    def report(event: Event) -> None:
        if isinstance(event, PhaseBegan) and "side by side" in event.text:
            began.append(event.text)

    with pytest.raises(InterruptedRunError):
        orchestrator.search(base, space, num_trials=6, report=report, stop=lambda: len(began) > 1)
    done = open_search(f"{STORAGE}/tried").trials
    assert 0 < len(done) < 6
    another_machine(tmp_path, monkeypatch)
    result = orchestrator.search(base, space, num_trials=6, report=silent)
    assert len(result.trials) == 6
    assert [one for one in result.trials if one.number in {one.number for one in done}] == done


def test_what_is_no_search_keeps_its_place(base: dict[str, Any]) -> None:
    orchestrator.finetune(base, report=silent)
    with pytest.raises(RefusedError, match=f"{STORAGE}/tried is a run, and no search"):
        orchestrator.search(base, SPACE, num_trials=2, report=silent)


def test_a_backbone_that_is_not_there_is_refused_and_no_failure_of_the_store(base: dict[str, Any]) -> None:
    """It would be a run of the same storage."""
    absent = f"{STORAGE}/absent"
    with pytest.raises(RefusedError, match="absent") as caught:
        orchestrator.search({**base, "backbone": absent}, SPACE, num_trials=2, report=silent)
    assert caught.value.reason == "not_found"
    fields = {"data": base["data"], "storage": STORAGE, "precision": "fp32", "report": silent}
    with pytest.raises(RefusedError, match="absent") as caught:
        orchestrator.rank([absent], **fields)
    assert caught.value.reason == "not_found"
    table = orchestrator.rank([base["backbone"], absent], **fields)
    assert [row.state for row in table.rows] == ["ranked", "refused"]


# --- a store that fails ---


@pytest.mark.parametrize("of", ["heads", "ranking"])
def test_a_store_that_fails_now_and_then_does_no_harm(
    of: str, base: dict[str, Any], proxy: s3_proxy.Proxy, tmp_path: Path
) -> None:
    def fail(event: Event) -> None:
        if isinstance(event, PhaseBegan):
            for fault in ("500", "cut"):
                proxy.fail("PUT", fault)
                proxy.fail("GET", fault)

    fields = {"data": base["data"], "precision": "fp32"}
    for storage, report in ((STORAGE, fail), (str(tmp_path / "local"), silent)):
        if of == "heads":
            orchestrator.search({**base, "storage": storage}, SPACE, num_trials=3, report=report)
        else:
            orchestrator.rank([base["backbone"]], **fields, storage=storage, report=report)
    assert proxy.num_requests > 50
    if of == "heads":
        assert rows_of(open_search(f"{STORAGE}/tried")) == rows_of(open_search(tmp_path / "local" / "tried"))


def test_a_store_that_is_away_is_waited_for_and_said(
    base: dict[str, Any], proxy: s3_proxy.Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "_SAID_S", 0.2)
    monkeypatch.setattr(object_storage, "PATIENCE_S", 0.5)  # before the start; a search that runs waits for longer
    notes: list[str] = []

    def report(event: Event) -> None:
        if isinstance(event, Noted):
            notes.append(event.text)
        if isinstance(event, PhaseBegan) and "side by side" in event.text:
            proxy.away_until = time.monotonic() + 3

    result = orchestrator.search(base, SPACE, num_trials=3, report=report)
    assert [one.state for one in result.trials] == ["finished"] * 3
    assert any(f"{STORAGE} does not answer, and is asked again" in note for note in notes)
    assert any(f"{STORAGE} answers again" in note for note in notes)


@pytest.mark.parametrize(
    "of", ["heads", "ranking", pytest.param("runs", marks=[pytest.mark.slow, pytest.mark.cluster])]
)
def test_a_store_that_stays_away_ends_it_and_it_goes_on_later(
    of: str, base: dict[str, Any], proxy: s3_proxy.Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "AWAY_S", 0.5)
    monkeypatch.setattr(object_storage, "PATIENCE_S", 0.5)
    monkeypatch.setattr(object_storage, "TTL_S", 2.0)
    job, space = base, SPACE
    if of == "runs":
        job = {**base, "method": "full", "epochs": 1, "data": {"path": base["data"], "num_train": 100}}
        space = {"learning_rate": {"grid": [1e-3, 1e-2]}}

    def report(event: Event) -> None:
        began = isinstance(event, PhaseBegan) and ("side by side" in event.text or "a probe" in event.text)
        if began or (isinstance(event, TrialsAdvanced) and event.num_done == 1):
            proxy.away_until = time.monotonic() + 600

    def work(report: Any) -> Any:
        if of == "ranking":
            return orchestrator.rank(
                [base["backbone"]], data=base["data"], storage=STORAGE, precision="fp32", report=report
            )
        return orchestrator.search(job, space, num_trials=2, report=report)

    with pytest.raises(OrchestratorError, match=r"the storage failed: .* does not answer") as caught:
        work(report)
    assert not isinstance(caught.value, RefusedError)
    assert (caught.value.exit_code, "the same command goes on" in caught.value.mend) == (1, True)
    proxy.away_until = 0
    another_machine(tmp_path, monkeypatch)
    done = work(silent)
    assert [one.state for one in (done.rows if of == "ranking" else done.trials)] == (
        ["ranked"] if of == "ranking" else ["finished"] * 2
    )


@pytest.mark.parametrize("of", ["heads", "ranking"])
def test_who_stops_it_does_not_wait_for_a_store_that_is_away(
    of: str, base: dict[str, Any], proxy: s3_proxy.Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "_SAID_S", 0.2)
    away: list[float] = []

    def report(event: Event) -> None:
        if isinstance(event, PhaseBegan) and ("side by side" in event.text or "a probe" in event.text):
            proxy.away_until = time.monotonic() + 600
        if isinstance(event, Noted) and "is asked again" in event.text and not away:
            away.append(time.monotonic())

    work: Callable[..., Any] = partial(orchestrator.search, base, SPACE, num_trials=2)
    if of == "ranking":
        work = partial(orchestrator.rank, [base["backbone"]], data=base["data"], storage=STORAGE, precision="fp32")
    with pytest.raises(InterruptedRunError, match=r"did not answer|stopped") as caught:
        work(report=report, stop=lambda: bool(away))
    assert time.monotonic() - away[0] < 30  # of the ten minutes, and of the one for its lease
    assert "the same command goes on" in caught.value.mend


# --- on Ray ---


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_trials_of_tune_share_a_probe_that_lies_in_the_store(base: dict[str, Any], bucket: Any) -> None:
    job = {**base, "method": "lp-ft", "epochs": 2, "data": {"path": base["data"], "num_train": 100}}
    space = {"learning_rate": {"grid": [1e-3, 1e-2, 3e-2]}}
    result = orchestrator.search(job, space, max_concurrent=1, report=silent)
    assert [one.state for one in result.trials] == ["finished"] * 3
    # The second trial is laid out while the first one still trains; the third one has the first one's first epoch.
    first, third = (run_in(open_storage(STORAGE), f"tried.{number:04}").metrics[0] for number in (1, 3))
    assert first["seconds"] == third["seconds"]
    assert first == third
    best = result.best_run
    assert best is not None
    assert best.results["validation"]["accuracy"] == pytest.approx(result.best.score)  # type: ignore[union-attr]
    assert not any("/probes/" in name for name in objects(bucket))  # they go in the end
    assert not list(Path.cwd().iterdir())


def test_a_ranking_leaves_its_features_where_a_job_finds_them(
    base: dict[str, Any], tmp_path: Path, bucket: Any
) -> None:
    other = make_resnet(tmp_path / "other")
    fields = {"data": base["data"], "storage": STORAGE, "precision": "fp32"}
    table = orchestrator.rank([base["backbone"], str(other)], **fields, report=silent)
    assert [row.state for row in table.rows] == ["ranked"] * 2
    assert not list(Path.cwd().iterdir())
    assert not [name for name in objects(bucket) if "/.rank-" in name]
    run = orchestrator.finetune({**base, "backbone": table.best.backbone}, report=silent)
    assert run.lineage["num_computed"] == 0


def test_rows_of_a_program_are_written_to_the_store(base: dict[str, Any], bucket: Any) -> None:
    files = sorted(Path(base["data"]).rglob("*.png"))[::8]
    rows = [{"image": file.read_bytes(), "label": file.parent.name} for file in files]
    result = orchestrator.search({**base, "data": rows}, SPACE, num_trials=2, report=silent)
    assert [one.state for one in result.trials] == ["finished"] * 2
    assert [name for name in objects(bucket) if name.startswith("runs/.data/") and name.endswith(".parquet")]
    assert result.best_run is not None
    assert result.best_run.plan.job.data.path.startswith(f"{STORAGE}/.data/")  # type: ignore[union-attr]
