"""`--log mlflow` against a real server on 127.0.0.1, its tables in SQLite: there, away, and there again."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.errors import InterruptedRunError, JobError, MissingExtraError
from orchestrator.job import EpochEnded, Event, Job, Noted
from tests.training.test_loop import at_call

mlflow = pytest.importorskip("mlflow")
from mlflow.tracking import MlflowClient  # noqa: E402


class Server:
    """An MLflow server that can be stopped and started again at the same place."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return once it answers, its tables made."""
        program = (
            "import os, sys; from mlflow.server import app\n"
            "from werkzeug.serving import run_simple\n"
            "run_simple('127.0.0.1', int(sys.argv[1]), app)"
        )
        environment = {
            **os.environ, "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{self._folder}/mlflow.db",
            "_MLFLOW_SERVER_ARTIFACT_ROOT": str(self._folder / "artifacts"), "MLFLOW_DISABLE_TELEMETRY": "true",
        }  # fmt: skip
        with (self._folder / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program, str(self.port)], env=environment, cwd=self._folder,
                stdout=log, stderr=log,
            )  # fmt: skip
        while True:
            assert self._process.poll() is None, (self._folder / "log.txt").read_text()[-2000:]
            try:
                with urllib.request.urlopen(f"{self.url}/api/2.0/mlflow/experiments/search?max_results=1"):
                    return
            except OSError:
                time.sleep(0.1)

    def stop(self) -> None:
        """Return once it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("mlflow"))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def client(server: Server, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    return MlflowClient(server.url)


def job_of(backbone: Path, data: Path, **fields: Any) -> dict[str, Any]:
    return {
        "backbone": str(backbone), "data": {"path": str(data), "num_train": 80}, "log": "mlflow",
        "method": "head", "training": {"epochs": 4, "batch_size": 40, "checkpoint_every_steps": 1},
        "scaling": {"threads_per_worker": 1}, "report": lambda _: None, **fields,
    }  # fmt: skip


def noted(run: orchestrator.Run) -> dict[str, Any]:
    return json.loads((run.path / "tracking.json").read_text())["mlflow"]  # type: ignore[no-any-return]


def losses(client: Any, run: orchestrator.Run) -> list[tuple[int, float]]:
    history = client.get_metric_history(noted(run)["run"], "train_loss")
    return sorted((one.step, one.value) for one in history)


def as_written(run: orchestrator.Run) -> list[tuple[int, float]]:
    return [(line["epoch"], line["train_loss"]) for line in run.metrics]


@pytest.mark.slow
def test_epochs_settings_and_figures_are_there(client: Any, tiny_resnet: Path, digits: Path) -> None:
    run = orchestrator.finetune(**job_of(tiny_resnet, digits, name="whole"))
    told = client.get_run(noted(run)["run"])
    assert (told.info.run_name, told.info.status) == ("whole", "FINISHED")
    assert client.get_experiment(told.info.experiment_id).name == "orchestrator"
    assert losses(client, run) == as_written(run)
    assert told.data.params["training.epochs"] == "4"
    assert told.data.params["recipe.head_learning_rate"] == "0.003"
    assert told.data.params["data.num_train"] == "80"
    assert told.data.tags["orchestrator.data"] == run.plan.data.fingerprint
    assert told.data.metrics["final_test_accuracy"] == run.accuracy
    assert told.data.metrics["final_best_epoch"] == run.results["best_epoch"]
    num = len(client.search_runs([told.info.experiment_id]))
    orchestrator.finetune(**job_of(tiny_resnet, digits, name="whole"))  # finished: nothing more is sent
    assert len(client.search_runs([told.info.experiment_id])) == num
    assert losses(client, run) == as_written(run)
    again = orchestrator.finetune(**job_of(tiny_resnet, digits, name="whole", fresh=True))
    assert noted(again)["run"] != told.info.run_id


@pytest.mark.slow
def test_a_run_that_goes_on_goes_on_in_its_own(client: Any, tiny_resnet: Path, digits: Path) -> None:
    job = job_of(tiny_resnet, digits, name="cut", method="full", **{"scaling.max_failures": 1})
    with pytest.raises(InterruptedRunError):
        orchestrator.finetune(**job, stop=at_call(9))
    (first,) = [one for one in orchestrator.job.list_runs("runs") if one.name == "cut"]
    known = noted(first)
    assert client.get_run(known["run"]).info.status == "KILLED"
    assert 0 < known["epoch"] < 4
    run = orchestrator.finetune(**job)
    assert noted(run)["run"] == known["run"]
    assert client.get_run(known["run"]).info.status == "FINISHED"
    assert losses(client, run) == as_written(run)


@pytest.mark.slow
def test_a_server_that_is_away_stops_nothing_and_gets_all_of_it_later(
    client: Any, server: Server, tiny_resnet: Path, digits: Path
) -> None:
    heard: list[Event] = []

    def away(event: Event) -> None:
        heard.append(event)
        if isinstance(event, EpochEnded) and event.figures["epoch"] == 1:
            server.stop()

    run = orchestrator.finetune(**job_of(tiny_resnet, digits, name="away", report=away))
    assert run.finished
    warnings = [event.text for event in heard if isinstance(event, Noted) and event.text.startswith("mlflow: ")]
    assert len(warnings) <= 2  # while it trains, where an epoch is sent then; and at the end
    assert "the same command again sends what is missing of away" in warnings[-1]
    server.start()
    orchestrator.finetune(**job_of(tiny_resnet, digits, name="away"))
    assert losses(client, run) == as_written(run)
    told = client.get_run(noted(run)["run"])
    assert told.info.status == "FINISHED"
    assert told.data.metrics["final_test_accuracy"] == run.accuracy


@pytest.mark.slow
def test_a_server_that_was_never_there_is_said_once_at_each_end(
    tiny_resnet: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        heard: list[Event] = []
        run = orchestrator.finetune(**job_of(tiny_resnet, digits, report=heard.append))
    warnings = [event.text for event in heard if isinstance(event, Noted) and event.text.startswith("mlflow: ")]
    assert len(warnings) == 2
    assert "the run goes on" in warnings[0]
    assert "the same command again sends what is missing" in warnings[1]
    assert run.finished


def test_where_it_is_sent_is_no_part_of_what_is_learnt() -> None:
    plain = {"backbone": "org/name", "data": "photos"}
    one, both = (Job.model_validate({**plain, "log": log}) for log in ("mlflow", ["mlflow", "wandb", "mlflow"]))
    assert (one.log, both.log) == (("mlflow",), ("mlflow", "wandb"))
    assert one.digest() == both.digest() == Job.model_validate(plain).digest()
    with pytest.raises(JobError, match="log"):
        orchestrator.plan(**plain, log="tensorboard")


def test_without_its_library_it_is_refused_before_the_start(
    tiny_resnet: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(MissingExtraError) as caught:
        orchestrator.finetune(**job_of(tiny_resnet, digits, log="wandb"))
    assert "orchestrator[wandb]" in caught.value.mend
    assert not Path("runs").exists()
