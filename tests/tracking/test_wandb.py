"""`--log wandb` in its offline mode: what its own reader finds in the files that it writes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.errors import InterruptedRunError
from orchestrator.job import Event, Noted
from tests.tracking.test_mlflow import as_written, job_of
from tests.training.test_loop import at_call

wandb = pytest.importorskip("wandb")


def records(file: Path) -> list[Any]:
    """What a .wandb file holds: the library's records in the log format of LevelDB, behind a head of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, found, whole = file.read_bytes(), 7, [], b""
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part of it
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def told(run: orchestrator.Run) -> tuple[list[tuple[int, float]], dict[str, Any], dict[str, Any]]:
    """(epochs with their losses, the settings, the summary), of all processes that worked on the run."""
    epochs: list[tuple[int, float]] = []
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for file in sorted((run.path / "wandb").glob("offline-run-*/*.wandb")):
        for record in records(file):
            if record.HasField("history"):
                items = {one.key or one.nested_key[0]: json.loads(one.value_json) for one in record.history.item}
                epochs.append((record.history.step.num, items["train_loss"]))
            for one in record.run.config.update:
                config[one.key or one.nested_key[0]] = json.loads(one.value_json)
            for one in record.summary.update:
                summary[one.key or one.nested_key[0]] = json.loads(one.value_json)
    return epochs, config, summary


@pytest.mark.slow
def test_a_run_in_two_parts_is_one_run(tiny_resnet: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    job = job_of(tiny_resnet, digits, log="wandb", method="full")
    with pytest.raises(InterruptedRunError):
        orchestrator.finetune(**job, stop=at_call(9))
    heard: list[Event] = []
    run = orchestrator.finetune(**{**job, "report": heard.append})
    epochs, config, summary = told(run)
    assert epochs == as_written(run)
    assert config["training.epochs"] == 4
    assert summary["test_accuracy"] == run.accuracy
    known = json.loads((run.path / "tracking.json").read_text())["wandb"]
    assert known["epoch"] == 4
    # Two of one second end in -1.
    names = [file.name.split("-")[3] for file in (run.path / "wandb").glob("offline-run-*")]
    assert set(names) == {known["run"]}
    assert not any("wandb" in event.text for event in heard if isinstance(event, Noted))
    assert not Path("wandb").exists()


@pytest.mark.slow
def test_without_a_key_it_is_written_to_files_and_said_how_to_send_them(
    tiny_resnet: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # whose .netrc would have one
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    heard: list[Event] = []
    run = orchestrator.finetune(**job_of(tiny_resnet, digits, log="wandb", report=heard.append))
    (warning,) = [event.text for event in heard if isinstance(event, Noted) and event.text.startswith("wandb: ")]
    assert "the run goes on" in warning
    place = warning.split("wandb sync ")[1]
    assert next(Path(place).glob("*.wandb"))
    assert told(run)[0] == as_written(run)
