"""Trials that are runs of Ray Tune: side by side without waiting for one another, stopped, killed, gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

import orchestrator
from orchestrator.distributed.joining import shut_down
from orchestrator.errors import InterruptedRunError, RefusedError, TrainingError
from orchestrator.job import Event, Noted, TrialsAdvanced
from orchestrator.tuning import SearchResult

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(600)]
SPACE: dict[str, Any] = {"learning_rate": tune.loguniform(1e-4, 1e-2), "batch_size": tune.choice([32, 64])}


def silent(_event: Event) -> None:
    pass


@pytest.fixture
def base(tiny_resnet: Path, digits: Path) -> dict[str, Any]:
    return {
        "backbone": str(tiny_resnet),
        "data": {"path": str(digits), "num_train": 100},
        "method": "full",
        "epochs": 2,
    }


def table_of(result: SearchResult) -> list[Any]:
    return [(one.number, one.state, one.config, one.score, one.lines) for one in result.trials]


def test_more_trials_than_cores_and_the_best_is_a_run(base: dict[str, Any]) -> None:
    told: list[TrialsAdvanced] = []

    def hear(event: Event) -> None:
        if isinstance(event, TrialsAdvanced):
            told.append(event)

    result = orchestrator.search(base, SPACE, num_trials=5, report=hear)
    assert [one.state for one in result.trials] == ["finished"] * 5
    assert max(event.num_running for event in told) <= len(os.sched_getaffinity(0))
    assert type(result.ray).__name__ == "ResultGrid"
    assert len(result.ray) == 5
    best = result.best_run
    assert best is not None
    assert best.finished
    assert best.results["validation"]["accuracy"] == pytest.approx(result.best.score)  # type: ignore[union-attr]
    with_figures = [one for one in Path("runs").iterdir() if (one / "results.json").exists()]
    assert [one.name for one in with_figures] == [best.name]  # nobody else has read the test split
    assert len(list(Path("runs/.data").glob("[0-9a-f]*"))) == 1
    alone = orchestrator.finetune(base, **result.trials[1].config, storage="alone", threads_per_worker=1, report=silent)
    assert [line["validation_loss"] for line in alone.metrics] == pytest.approx(
        [line["validation_loss"] for line in result.trials[1].lines], abs=1e-4
    )


def test_asha_stops_trials_and_their_places_are_free(base: dict[str, Any]) -> None:
    scheduler = ASHAScheduler(max_t=6, grace_period=1, reduction_factor=2)
    result = orchestrator.search(base, SPACE, epochs=6, num_trials=6, scheduler=scheduler, report=silent)
    assert len(result.trials) == 6
    assert "stopped" in {one.state for one in result.trials}
    assert result.best_run is not None
    assert len(result.best_run.metrics) == 6


def test_all_methods_in_one_search(base: dict[str, Any]) -> None:
    space = {"method": {"grid": ["head", "lp-ft", "full"]}, "learning_rate": {"grid": [1e-3, 1e-2]}}
    result = orchestrator.search(base, space, report=silent)
    assert [one.state for one in result.trials] == ["finished"] * 6
    heads = [one for one in result.trials if one.config["method"] == "head"]
    assert {one.together for one in heads} == {2}
    assert len(result.ray) == 4


def test_two_workers_a_trial_on_two_cores(base: dict[str, Any]) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    result = orchestrator.search(
        base, {"learning_rate": [1e-3, 1e-2]}, num_trials=2, num_workers=2, threads_per_worker=1, report=silent
    )
    assert [one.state for one in result.trials] == ["finished"] * 2
    assert result.best_run is not None
    assert result.best_run.lineage["num_workers"] == 2


def test_a_trial_waits_for_workers_as_long_as_another_one_works(base: dict[str, Any]) -> None:
    """There would be room for two trials, were it not for somebody else on the cluster; `wait_s` is of the idle."""
    shut_down()  # what a search before this one has started for itself
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        busy = ray.remote(num_cpus=2)(threading.Event).remote()
        ray.get(busy.is_set.remote())
        address = ray.get_runtime_context().gcs_address
        result = orchestrator.search(
            {**base, "epochs": 300, "scaling": {
                "num_workers": 2, "threads_per_worker": 1, "address": address, "wait_s": 45,
            }},
            SPACE, num_trials=2, max_concurrent=2, report=silent,
        )  # fmt: skip
        assert [one.state for one in result.trials] == ["finished"] * 2
        first, second = sorted(result.trials, key=lambda one: one.seconds)
        assert second.seconds - first.seconds > 20  # which it waited for the first one
    finally:
        ray.shutdown()


def test_what_has_no_room_is_refused(base: dict[str, Any]) -> None:
    cores = len(os.sched_getaffinity(0))
    with pytest.raises(RefusedError, match=r"more than the|a trial needs") as refused:
        orchestrator.search(base, SPACE, num_trials=2, threads_per_worker=cores + 1, report=silent)
    assert refused.value.reason == "resources"


@pytest.mark.parametrize("max_failures", [2, 0])
def test_a_trial_that_is_killed_goes_on_or_is_a_row(base: dict[str, Any], max_failures: int) -> None:
    """From its last checkpoint, as often as `scaling.max_failures` allows; the others go on whatever becomes of it."""
    killed: list[int] = []
    told: list[Event] = []

    def kill(event: Event) -> None:
        """The process of the first trial that has an epoch."""
        told.append(event)
        if not killed and isinstance(event, TrialsAdvanced):
            threading.Thread(target=kill_when_it_trains, daemon=True).start()
            killed.append(0)

    def kill_when_it_trains() -> None:
        run = Path("runs/one.0001")
        while not list(run.glob("checkpoints/step-*/state.json")):
            time.sleep(0.01)
        owner = json.loads((run / ".lease.json").read_text())["owner"]
        killed.append(int(owner.split()[1]))
        os.kill(killed[-1], signal.SIGKILL)

    more = {"training.checkpoint_every_steps": 5, "scaling.max_failures": max_failures, "name": "one"}
    result = orchestrator.search(base, SPACE, epochs=30, num_trials=2, report=kill, **more)
    assert len(killed) == 2
    assert result.trials[1].state == "finished"
    if max_failures:
        assert any("trial 1: its process died; restart 1 of 2" in one.text for one in told if isinstance(one, Noted))
        assert [line["epoch"] for line in result.trials[0].lines] == list(range(1, 31))
    else:
        assert result.trials[0].state == "failed"
        assert "its process died" in result.trials[0].error


def test_trials_that_only_fail_end_the_search(base: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    notes: list[Event] = []
    with pytest.raises(TrainingError, match=r"all 2 trials have failed, the last one with: .*the loss is nan at step"):
        orchestrator.search(
            base, {"learning_rate": {"uniform": [1e37, 1e38]}}, optimizer="sgd", clip_norm=None, num_trials=6,
            max_failed=2, max_concurrent=1, report=notes.append,
        )  # fmt: skip
    assert sum(isinstance(event, Noted) and "failed" in event.text for event in notes) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_optuna_proposes_runs_and_heads(base: dict[str, Any]) -> None:
    pytest.importorskip("optuna")
    result = orchestrator.search(
        base, {**SPACE, "method": ["head", "full"]}, num_trials=4, search_alg="optuna", report=silent
    )
    assert [one.state for one in result.trials] == ["finished"] * 4
    more = orchestrator.search(
        base, {**SPACE, "method": ["head", "full"]}, num_trials=6, search_alg="optuna", report=silent
    )
    assert table_of(more)[:4] == table_of(result)


def test_killed_at_five_moments_it_ends_with_the_same_table(base: dict[str, Any], tmp_path: Path) -> None:
    """kill -9 of the whole search, as soon as so much of it is there."""
    job = tmp_path / "job.yaml"
    space = {"learning_rate": {"loguniform": [1e-3, 1e-2]}, "method": {"grid": ["head", "full"]}, "num_trials": 6}
    more = {"epochs": 3, "checkpoint_every_steps": 2, "batch_size": 32}
    job.write_text(json.dumps({**base, **more, "search": space, "name": "one"}))
    whole = orchestrator.search(job, storage="whole", report=silent)
    ray.shutdown()
    command = [sys.executable, "-m", "orchestrator.terminal.cli", "search", str(job)]
    moments = ("one/search.json", "one/trials.jsonl", "one.000*/checkpoints/*/state.json", "one.0004/metrics.jsonl",
               "one.0006/plan.json")  # fmt: skip
    for moment in moments:
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while running.poll() is None and not list(Path("runs").glob(moment)):
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        running.wait()
    result = orchestrator.search(job, report=silent)
    assert [(row[0], row[1], row[2]) for row in table_of(result)] == [row[:3] for row in table_of(whole)]
    for one, other in zip(result.trials, whole.trials, strict=True):
        assert [line["epoch"] for line in one.lines] == [1, 2, 3]
        assert one.score == pytest.approx(other.score, abs=1e-6), one.number


def test_stopped_it_goes_on_from_the_step_it_was_at(base: dict[str, Any]) -> None:
    """A trial writes a checkpoint when it is asked to stop; no other one is due."""
    more: dict[str, Any] = {"epochs": 30, "training.checkpoint_every_s": 600, "num_trials": 2, "max_concurrent": 1}
    metrics = Path("runs/one.0001/metrics.jsonl")
    told: list[Event] = []

    def has_learnt() -> bool:
        return metrics.exists() and len(metrics.read_text().splitlines()) >= 3

    with pytest.raises(InterruptedRunError):
        orchestrator.search(base, SPACE, name="one", stop=has_learnt, report=told.append, **more)
    assert any(isinstance(event, Noted) and "each trial writes a checkpoint" in event.text for event in told)
    assert not Path("runs/one/trials.jsonl").exists()
    assert not Path("runs/one.0002").exists(), "it was begun after the stop"
    run = orchestrator.open_run("runs/one.0001")
    (checkpoint,) = (run.path / "checkpoints").glob("step-*")
    assert int(checkpoint.name.removeprefix("step-")) >= len(run.metrics) * run.plan.recipe.steps_per_epoch
    result = orchestrator.search(base, SPACE, name="one", report=silent, **more)
    assert [[line["epoch"] for line in trial.lines] for trial in result.trials] == [list(range(1, 31))] * 2


def test_the_example_of_rays_documentation(base: dict[str, Any]) -> None:
    """Of "Getting Started with Ray Tune"; what differs is in docs/search.md."""
    import numpy as np

    search_space = {
        "learning_rate": tune.sample_from(lambda spec: 10 ** (-10 * np.random.rand())),  # noqa: ARG005  # as it is there
        "momentum": tune.uniform(0.1, 0.9),
    }
    results = orchestrator.search(
        base, search_space, optimizer="sgd", num_trials=3, report=silent,
        scheduler=ASHAScheduler(metric="validation_accuracy", mode="max"),
    ).ray  # fmt: skip
    dfs = {result.path: result.metrics_dataframe for result in results}
    assert len(dfs) == 3
    assert all(len(df.validation_accuracy) >= 1 for df in dfs.values())
    best = results.get_best_result("validation_accuracy", mode="max")
    assert best.config["training.momentum"] < 0.9
    assert best.path in dfs


@pytest.mark.parametrize(
    "more",
    [
        {"method": "auto"},
        {"training": {"epochs": 8, "ema": 0.9, "schedule": "constant", "optimizer": "sgd", "batch_size": 16}},
    ],
)
def test_trials_are_ranked_by_what_their_runs_keep(base: dict[str, Any], more: dict[str, Any]) -> None:
    """What `auto` decides in each, on the same samples that rank the trials; of weights and their average one."""
    del base["epochs"]
    job = {"training": {"epochs": 2}, **base, **more}
    result = orchestrator.search(job, {"learning_rate": {"grid": [1e-3, 1e-1]}}, report=silent)
    assert [one.state for one in result.trials] == ["finished"] * 2
    assert result.best_run is not None
    assert result.best_run.finished
    assert result.best_run.results["validation"]["accuracy"] == pytest.approx(result.best.score)  # type: ignore[union-attr]
