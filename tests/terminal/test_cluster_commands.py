"""Commands for jobs on a cluster, as far as no cluster is needed; the rest is in tests/distributed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.distributed.telling import Beat, Ended, as_line
from orchestrator.job import EpochEnded, Noted, PhaseBegan, TrialsAdvanced
from orchestrator.terminal.cluster_commands import _in_words
from tests.terminal.screen import Screen


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "words", [("list",), ("status", "x"), ("logs", "x"), ("stop", "x"), ("fetch", "x"), ("attach", "x"),
              ("submit", "--backbone", "b", "--data", "d")],
)  # fmt: skip
def test_without_a_cluster_each_is_refused_at_once(screen: Screen, words: tuple[str, ...]) -> None:
    code, _, said = screen(*words)
    assert code == 2
    assert "refused (usage) it is not said to which cluster" in said
    assert "--address" in said
    code, _, said = screen(*words, "--address", "http://127.0.0.1:1")
    assert code == 2
    assert "refused (resources) there is no Ray cluster at http://127.0.0.1:1: Connection refused" in said


def test_refusals_as_json(screen: Screen) -> None:
    code, out, _ = screen("list", "--address", "head:6379", "--json")
    assert code == 2
    assert json.loads(out)["message"] == "head:6379 is no address that jobs are submitted to"


def test_the_job_has_all_of_finetunes_flags_but_its_address(screen: Screen) -> None:
    code, out, _ = screen("submit", "--help")
    assert code == 0
    assert out.count("--address") == 2, "the option, and an example"  # not the job's own
    for option in ("--workers", "--set", "--storage", "--detach", "--kind", "--fetch"):
        assert option in out


def test_where_a_copy_is_to_lie_is_looked_at_before_the_job(screen: Screen, tmp_path: Path) -> None:
    """And not after hours of training."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("")
    job = ("submit", "--backbone", "b", "--data", "d", "--address", "http://127.0.0.1:1", "--fetch", tmp_path / "mine")
    code, _, said = screen(*job)
    assert (code, "is not empty, and no copy of a run" in said) == (2, True), said
    code, _, said = screen(*job, "--kind", "rank")
    assert (code, "a ranking has no run that could be fetched" in said) == (2, True), said


def test_lines_of_a_job_in_words() -> None:
    assert _in_words("Runtime env is setting up.") == "Runtime env is setting up."
    assert _in_words(as_line(Beat())) is None
    assert _in_words(as_line(PhaseBegan("writing the model"))) == "writing the model"
    assert _in_words(as_line(Noted("look", is_warning=True))) == "warning: look"
    epoch = {"epoch": 2, "train_loss": 1.0, "validation_accuracy": 0.5}
    assert _in_words(as_line(EpochEnded(epoch, 3, "single-label"))) == "epoch 2/3 val acc 0.500"
    trials = TrialsAdvanced(3, 8, 1, 0, "validation accuracy", ((2, 0.9, {"lr": "0.1"}),))
    assert _in_words(as_line(trials)) == "trial 3/8 best 0.900"
    assert _in_words(as_line(Ended(0))) == "done"
    error = {"reason": "training", "message": "it died"}
    assert _in_words(as_line(Ended(1, error=error))) == "ended: training: it died"
