"""The real client against a Hub on 127.0.0.1 that records every request."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import orchestrator
from orchestrator.backbone import hub as hub_module
from orchestrator.backbone.weights import fetch
from orchestrator.errors import RefusedError
from tests.hub_server import Hub, Repository


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


def refusal(backbone: str, modality: str = "image") -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        orchestrator.check(backbone, modality)
    return caught.value


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "_RETRIES_S", (0.01, 0.01))


def test_a_repository_is_pinned_to_its_commit(hub: Hub, tiny_resnet: Path) -> None:
    hub.repositories["org/pinned"] = Repository(files_of(tiny_resnet))
    card = orchestrator.check("org/pinned", "image")
    assert card.kind == "hub"
    assert card.commit == hub.repositories["org/pinned"].sha
    assert orchestrator.check(f"org/pinned@{card.commit}", "image").commit == card.commit
    assert not hub.asked_for(".safetensors")


def test_a_refusal_asks_for_no_weight_byte(hub: Hub, tiny_resnet: Path, flat_digits: Path) -> None:
    hub.repositories["org/foreign"] = Repository(files_of(tiny_resnet))
    assert refusal("org/foreign", "audio").reason == "wrong_modality"
    assert refusal("org/foreign", "text").reason == "wrong_modality"
    with pytest.raises(RefusedError):
        orchestrator.finetune(method="head", modality="audio", backbone="org/foreign", data=str(flat_digits))
    assert hub.requests
    assert not hub.asked_for(".safetensors")
    assert not [path for _, path, _ in hub.requests if path.startswith("/large")]


def test_a_plan_reads_the_header_by_range_and_no_more(hub: Hub, flat_digits: Path, efficientnet: Path) -> None:
    hub.repositories["org/planned"] = Repository(files_of(efficientnet))
    plan = orchestrator.plan(backbone="org/planned", data=str(flat_digits), settings={"size": 32}, method="head")
    assert plan.parameters is not None
    assert plan.parameters.frozen > 3_000_000
    asked = [one for one in hub.requests if one[1].startswith("/large")]
    assert asked
    assert all(wanted.startswith("bytes=0-") for method, _, wanted in asked if method == "GET")
    assert all(int(wanted.rpartition("-")[2]) <= 200_000 for method, _, wanted in asked if method == "GET")


def test_training_downloads_the_pinned_commit_once(hub: Hub, tiny_resnet: Path, flat_digits: Path) -> None:
    hub.repositories["org/trained"] = Repository(files_of(tiny_resnet))
    run = orchestrator.finetune(
        method="head", backbone="org/trained", data=str(flat_digits), training={"epochs": 1}, report=lambda _: None
    )
    sha = hub.repositories["org/trained"].sha
    assert run.lineage["backbone"]["commit"] == sha
    assert run.lineage["features"] == "once"
    downloads = [one for one in hub.requests if one[0] == "GET" and one[1].startswith("/large") and not one[2]]
    assert len(downloads) == 1
    assert "base_model: org/trained" in (run.model / "README.md").read_text()


@pytest.mark.parametrize(
    ("source", "reason", "mend"),
    [
        ("org/none", "not_found", "hf auth login"),
        ("org/there@no-such-branch", "bad_revision", "leave the @revision out"),
        ("org/gated", "gated", "accept it"),
        ("org/files-gated", "gated", "accept it"),
        ("org/pickle", "pickle_only", "convert it once"),
        ("org/adapter", "adapter_only", "org/base"),
        ("org/broken", "bad_config", ""),
    ],
)
def test_what_the_hub_may_answer(hub: Hub, source: str, reason: str, mend: str) -> None:
    config = json.dumps({"model_type": "resnet"}).encode()
    hub.repositories |= {
        "org/there": Repository({"config.json": config}),
        "org/gated": Repository({"config.json": config}, gated=True),
        "org/files-gated": Repository({"config.json": config, "x": b"1"}, files_gated=True),
        "org/pickle": Repository({"config.json": config, "pytorch_model.bin": b"x"}),
        "org/adapter": Repository({"adapter_config.json": b'{"base_model_name_or_path": "org/base"}'}),
        "org/broken": Repository({"config.json": b"<html>"}),
    }
    error = refusal(source)
    assert error.reason == reason
    assert mend in error.mend


def test_a_hub_that_stumbles_is_asked_again(hub: Hub, tiny_resnet: Path) -> None:
    hub.repositories["org/shaky"] = Repository(files_of(tiny_resnet))
    hub.failures = 2
    assert orchestrator.check("org/shaky", "image").model_type == "resnet"


def test_without_a_connection_the_cache_serves(
    hub: Hub, tiny_resnet: Path, cli_process: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    hub.repositories["org/cached"] = Repository({**files_of(tiny_resnet), "y.json": b"{}"})
    card = orchestrator.check("org/cached", "image")
    fetch(card)
    down = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}
    found = cli_process("check", "org/cached", "--json", env=down)
    assert json.loads(found.stdout)["commit"] == card.commit
    unknown = cli_process("check", "org/never-seen", "--json", env=down)
    assert (unknown.returncode, json.loads(unknown.stdout)["reason"]) == (2, "offline")
