"""Searches whose trials are heads: their record, what is gone on with, what is chosen, and what is refused."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import ASHAScheduler, HyperBandScheduler, MedianStoppingRule, PopulationBasedTraining

import orchestrator
from orchestrator.errors import ChangedError, InterruptedRunError, RefusedError, TrainingError
from orchestrator.job import Event, PhaseBegan
from orchestrator.tuning import SearchResult
from tests.tiny import make_resnet

Cli = Callable[..., subprocess.CompletedProcess[str]]
SPACE: dict[str, Any] = {"learning_rate": {"loguniform": [1e-3, 1e-1]}, "weight_decay": {"uniform": [0, 0.2]}}


def silent(_event: Event) -> None:
    pass


@pytest.fixture
def base(tiny_resnet: Path, digits: Path) -> dict[str, Any]:
    """With fp32 features: which format is the faster one is tried in each storage, and on busy cores answers vary."""
    return {"backbone": str(tiny_resnet), "data": str(digits), "method": "head", "epochs": 3, "precision": "fp32"}


def table_of(result: SearchResult) -> list[Any]:
    return [(one.number, one.state, one.config, one.score, one.lines) for one in result.trials]


def require_same(one: SearchResult, other: SearchResult) -> None:
    """The same trials with the same scores, but for the rounding of a body that began in another batch."""
    assert [row[:3] for row in table_of(one)] == [row[:3] for row in table_of(other)]
    for mine, its in zip(one.trials, other.trials, strict=True):
        assert mine.score == pytest.approx(its.score, abs=1e-6)
        losses = [[line["validation_loss"] for line in trial.lines] for trial in (mine, its)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_data_is_read_once_and_the_body_runs_once(base: dict[str, Any]) -> None:
    phases: list[str] = []

    def report(event: Event) -> None:
        if isinstance(event, PhaseBegan):
            phases.append(event.text)

    result = orchestrator.search(base, SPACE, num_trials=6, report=report)
    assert len(result.trials) == 6
    assert phases.count("reading the data") == 1
    best = result.best_run
    assert best is not None
    assert best.lineage["num_computed"] == 0  # the features are those of the trials
    assert [one.name for one in Path("runs").iterdir() if (one / "plan.json").exists()] == [best.name]
    assert len(list(Path("runs/.data").glob("[0-9a-f]*"))) == 1
    assert best.results["test"]["num_samples"] == 200


def test_data_is_read_once_for_several_backbones(base: dict[str, Any], tmp_path: Path) -> None:
    phases: list[str] = []

    def report(event: Event) -> None:
        if isinstance(event, PhaseBegan):
            phases.append(event.text)

    space = {"backbone": {"grid": [base["backbone"], str(make_resnet(tmp_path / "other"))]}, **SPACE}
    result = orchestrator.search(base, space, num_trials=4, report=report)
    assert [one.together for one in result.trials] == [2, 2, 2, 2]
    assert phases.count("reading the data") == 1
    assert [one.lineage["num_computed"] for one in [result.best_run] if one is not None] == [0]
    assert len(list(Path("runs/.data").glob("[0-9a-f]*"))) == 1


def test_the_same_search_again_does_nothing_and_more_trials_go_on(base: dict[str, Any]) -> None:
    first = orchestrator.search(base, SPACE, num_trials=4, report=silent)
    phases: list[Event] = []
    again = orchestrator.search(base, SPACE, num_trials=4, report=phases.append)
    assert table_of(again) == table_of(first)
    assert not any("heads side by side" in event.text for event in phases if isinstance(event, PhaseBegan))
    more = orchestrator.search(base, SPACE, num_trials=7, report=silent)
    assert table_of(more)[:4] == table_of(first)
    whole = orchestrator.search(base, SPACE, num_trials=7, storage="whole", report=silent)
    assert [row[:3] for row in table_of(whole)] == [row[:3] for row in table_of(more)]
    assert [one.score for one in whole.trials] == pytest.approx([one.score for one in more.trials], abs=0.026)


def test_stopped_anywhere_it_ends_with_the_same_table(base: dict[str, Any]) -> None:
    space = {**SPACE, "batch_size": [16, 32, 64]}  # three stacks
    whole = orchestrator.search(base, space, num_trials=6, storage="whole", report=silent)
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls in (4, 9, 17, 26, 32)

    for _ in range(7):
        try:
            result = orchestrator.search(base, space, num_trials=6, report=silent, stop=stop)
            break
        except InterruptedRunError:
            pass
    assert calls > 32
    require_same(result, whole)
    assert result.best_run is not None
    assert result.best_run.results["test"] == whole.best_run.results["test"]  # type: ignore[union-attr]


@pytest.mark.long
def test_killed_it_goes_on(base: dict[str, Any], tmp_path: Path) -> None:
    """kill -9 as soon as a given number of files was written, whatever it was at."""
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps({**base, "search": {**SPACE, "batch_size": [16, 32], "num_trials": 6}}))
    whole = orchestrator.search(job, storage="whole", report=silent)
    command = [sys.executable, "-m", "orchestrator.terminal.cli", "search", str(job)]
    for sign in ("search.json", "trials.jsonl", "*.00*/plan.json"):
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while running.poll() is None and not list(Path("runs").glob(f"*/{sign}" if "*" not in sign else sign)):
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        running.wait()
    require_same(orchestrator.search(job, report=silent), whole)


def test_another_space_under_the_same_name_is_refused(base: dict[str, Any]) -> None:
    orchestrator.search(base, SPACE, num_trials=2, name="one", report=silent)
    with pytest.raises(ChangedError, match=r"another space or job: training\.learning_rate"):
        orchestrator.search(base, {**SPACE, "learning_rate": [0.1]}, name="one", report=silent)
    with pytest.raises(ChangedError, match="another space or job"):
        orchestrator.search(base, SPACE, epochs=4, name="one", report=silent)
    fresh = orchestrator.search(
        base, {"learning_rate": [0.1, 0.2]}, num_trials=2, name="one", fresh=True, report=silent
    )
    assert set(fresh.keys) == {"training.learning_rate"}
    with pytest.raises(RefusedError, match="is a run, and no search"):
        orchestrator.search(base, SPACE, name=fresh.best_run.name, report=silent)  # type: ignore[union-attr]
    with pytest.raises(RefusedError, match="no run of ours"):
        orchestrator.finetune(base, name="one", report=silent)


def test_data_that_changed_is_refused(base: dict[str, Any], digits: Path, tmp_path: Path) -> None:
    import shutil

    data = shutil.copytree(digits, tmp_path / "digits")
    orchestrator.search({**base, "data": str(data)}, SPACE, num_trials=2, report=silent)
    next((data / "train" / "3").iterdir()).unlink()
    with pytest.raises(ChangedError, match="data of the search"):
        orchestrator.search({**base, "data": str(data)}, SPACE, num_trials=3, report=silent)


@pytest.mark.parametrize("scheduler", ["asha", "median", "own"])
def test_schedulers_stop_heads(scheduler: str, base: dict[str, Any]) -> None:
    asked: Any = {
        "asha": {"asha": {"grace_period": 1, "reduction_factor": 2}},
        "median": MedianStoppingRule(grace_period=1, min_samples_required=2),
        "own": ASHAScheduler(max_t=6, grace_period=1, reduction_factor=2),
    }[scheduler]
    result = orchestrator.search(base, SPACE, num_trials=10, scheduler=asked, epochs=6, seed=1, report=silent)
    states = [one.state for one in result.trials]
    assert {"finished", "stopped"} == set(states)
    assert all(len(one.lines) == 6 for one in result.trials if one.state == "finished")
    assert all(len(one.lines) < 6 for one in result.trials if one.state == "stopped")
    assert result.best_run is not None
    assert len(result.best_run.metrics) == 6


def test_optuna_is_told_all_that_was(base: dict[str, Any]) -> None:
    pytest.importorskip("optuna")
    first = orchestrator.search(base, SPACE, num_trials=16, search_alg="optuna", report=silent)
    more = orchestrator.search(base, SPACE, num_trials=24, search_alg="optuna", report=silent)
    assert table_of(more)[:16] == table_of(first)
    rates = [one.config["training.learning_rate"] for one in more.trials]
    assert sum(rates[16:]) / 8 > sum(rates[:16]) / 16  # the best of 16 had high rates, and it has learnt that


def test_an_algorithm_of_ray_as_it_is(base: dict[str, Any]) -> None:
    pytest.importorskip("optuna")
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    algorithm = ConcurrencyLimiter(OptunaSearch(metric="validation_accuracy", mode="max", seed=3), max_concurrent=2)
    result = orchestrator.search(base, SPACE, num_trials=5, search_alg=algorithm, report=silent)
    assert [one.together for one in result.trials] == [2, 2, 2, 2, 1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"scheduler": HyperBandScheduler()}, "pause trials"),
        ({"scheduler": PopulationBasedTraining(hyperparam_mutations={"lr": [1]})}, "change a run's settings"),
        ({"scheduler": "hyperband"}, "'hyperband'"),
        ({"scheduler": {"asha": {"grace": 3}}}, "scheduler asha"),
        ({"scheduler": ASHAScheduler(metric="mean_accuracy", mode="max")}, "metric 'mean_accuracy'"),
        ({"scheduler": ASHAScheduler(time_attr="time_total_s")}, "count epochs"),
        ({"search_alg": "bayes"}, "search_alg = 'bayes'"),
        ({"search_alg": "grid"}, "is drawn"),
        ({"metric": "f1"}, "validation_accuracy or validation_loss"),
        ({"num_trials": 0}, "1 or more"),
        ({"time_budget": -1}, "more than 0"),
        ({"nonsense": 1}, "unknown key nonsense"),
        ({"data.validation_fraction": 0}, "chooses by a validation split"),
        ({"batch_norm": "train"}, "would change a frozen body"),
        ({"space": {"backbone": ["nowhere/nothing-at-all", "no/such"]}}, "no"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_starts(
    base: dict[str, Any], given: dict[str, Any], words: str
) -> None:
    phases: list[Event] = []
    with pytest.raises(RefusedError) as refused:
        orchestrator.search(base, **{"space": SPACE, **given}, report=phases.append)
    assert words in str(refused.value)
    assert refused.value.mend
    assert not list(Path("runs").glob("search-*"))
    assert not any("body" in event.text for event in phases if isinstance(event, PhaseBegan))


def test_settings_that_do_not_go_together_are_a_row(base: dict[str, Any]) -> None:
    space = {"views": {"grid": [None, 2]}, "learning_rate": {"grid": [1e-2, 1e-1]}}
    result = orchestrator.search(base, space, report=silent)
    assert sorted(one.state for one in result.trials) == ["finished", "finished", "refused", "refused"]
    assert all("training.views = 2" in one.error for one in result.trials if one.state == "refused")


def test_a_search_that_only_fails_ends(base: dict[str, Any]) -> None:
    space = {"learning_rate": {"uniform": [1e37, 1e38]}, "batch_size": {"grid": [16, 32, 64]}}
    job = {**base, "optimizer": "sgd", "clip_norm": None}
    with pytest.raises(TrainingError, match="all 2 trials have failed, the last one with: the loss at step"):
        orchestrator.search(job, space, num_trials=6, max_failed=2, report=silent)
    assert len((next(Path("runs").glob("search-*")) / "trials.jsonl").read_text().splitlines()) == 2


def test_time_that_is_used_up_ends_it_and_it_goes_on(base: dict[str, Any]) -> None:
    space = {**SPACE, "batch_size": {"grid": [16, 32, 64]}}
    notes: list[Event] = []
    with pytest.raises(InterruptedRunError):  # not even the body's features were there
        orchestrator.search(base, space, stop=lambda: True, report=silent)
    none = orchestrator.search(base, space, time_budget=1e-9, report=notes.append)
    assert none.trials == []
    assert none.best_run is None
    assert any("time budget is used up" in getattr(event, "text", "") for event in notes)
    assert len(orchestrator.search(base, space, report=silent).trials) == 16


def test_the_best_are_trained_with_more_seeds(base: dict[str, Any]) -> None:
    result = orchestrator.search(base, SPACE, num_trials=5, num_seeds=3, report=silent)
    repeated = [one for one in result.trials if one.repeat]
    assert len(repeated) == 6
    assert {one.number for one in repeated} == {one.number for one in result.ranked[:3]}
    assert {one.config["training.seed"] for one in repeated} == {1, 2}
    means = [result.mean_score(one) for one in result.ranked[:3]]
    assert means == sorted(means, reverse=True)  # type: ignore[type-var]
    assert len(orchestrator.search(base, SPACE, num_trials=5, num_seeds=3, report=silent).trials) == 11


def test_the_winners_score_comes_with_a_corrected_interval(base: dict[str, Any]) -> None:
    result = orchestrator.search(base, SPACE, num_trials=9, report=silent)
    assert "the best of 9 on the same 40 validation samples" in result.caveat
    low, high = (float(part) for part in result.caveat.split("interval is ")[1].split(";")[0].split(" to "))
    alone = result.best_run.results["validation"]["accuracy_95"]  # type: ignore[union-attr]
    assert low < alone[0] < alone[1] < high


def test_cells_of_the_table_are_no_formulas(base: dict[str, Any]) -> None:
    evil = Path("=1+1")
    evil.symlink_to(base["backbone"])
    result = orchestrator.search(
        base, {"backbone": {"grid": [str(evil)]}, "learning_rate": {"grid": [0.1]}}, report=silent
    )
    with (result.path / "search.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["backbone"] == f"'{evil}"
    assert float(row["validation_accuracy"]) == result.trials[0].score


# --- the command ---


def test_the_command(cli: Cli, base: dict[str, Any], digits: Path) -> None:
    job = Path("job.yaml")
    job.write_text(
        f"backbone: {base['backbone']}\ndata: {base['data']}\nmethod: head\ntraining: {{epochs: 3}}\nname: rates\n"
        "search:\n  num_trials: 3\n  learning_rate: {loguniform: [1e-3, 1e-1]}\n  weight_decay: [0, 0.1]\n"
    )
    said = cli("search", job)
    assert said.returncode == 0, said.stderr
    assert "orchestrator predict runs/rates FILE" in said.stdout
    assert max(map(len, said.stdout.splitlines())) <= 80
    assert (Path("runs/rates/search.png").read_bytes())[:4] == b"\x89PNG"
    answer = json.loads(cli("search", job, "--json").stdout)
    assert len(answer["trials"]) == 3
    assert Path(answer["run"]).name.startswith("rates.000")
    picture = next((digits / "test" / "3").iterdir())
    assert cli("predict", "runs/rates", picture).returncode == 0
    listed = cli("runs").stdout
    assert "rates" in listed
    assert "3 trials" in listed
    refused = cli("finetune", job)
    assert refused.returncode == 2
    assert "orchestrator search" in refused.stderr


def test_flags_make_a_space(cli: Cli, base: dict[str, Any]) -> None:
    said = cli(
        "search", "--backbone", base["backbone"], "--data", base["data"], "--epochs", 2, "--num-trials", 2,
        "--method", "head", "--space", "learning_rate={loguniform: [1e-3, 1e-1]}", "--space",
        "weight_decay=[0, 0.1]", "--json",
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert set(json.loads(said.stdout)["trials"][0]) >= {"training.learning_rate", "training.weight_decay"}
    said = cli("search", "--backbone", base["backbone"], "--data", base["data"], "--space", "learning_rate=0.1")
    assert said.returncode == 2
    assert "--set learning_rate=0.1" in said.stderr.replace("\n", " ")


def test_a_search_that_has_not_ended_has_no_best_run(cli: Cli, base: dict[str, Any]) -> None:
    with pytest.raises(InterruptedRunError):
        orchestrator.search(base, SPACE, name="cut", stop=lambda: True, report=silent)
    said = cli("predict", "runs/cut", "x.png")
    assert said.returncode == 2
    assert "has not ended" in " ".join(said.stderr.split())  # wherever a line ends


def test_a_record_that_was_damaged_is_said(base: dict[str, Any]) -> None:
    result = orchestrator.search(base, SPACE, num_trials=2, name="one", report=silent)
    record = result.path / "trials.jsonl"
    record.write_text(record.read_text()[:-20])  # cut off in its last line: that trial is done again
    again = orchestrator.search(base, SPACE, num_trials=2, name="one", report=silent)
    assert [row[:4] for row in table_of(again)] == [row[:4] for row in table_of(result)]
    (result.path / "search.json").write_text("{")
    with pytest.raises(RefusedError, match="cannot be understood"):
        orchestrator.search(base, SPACE, num_trials=2, name="one", report=silent)
