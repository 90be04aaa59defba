"""What a finished run leaves: on the disk before it is said to be there, readable by others, described in its card."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import orchestrator
from orchestrator.training.card import escape, model_card


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, str]]]:
    """The calls ("fsync", the path) and ("named", the new path) of this process, in order.

    What was synced under a temporary name counts by the one that it was given.
    """
    calls: list[tuple[str, str]] = []
    fsync = os.fsync

    def noted_fsync(number: int) -> None:
        fsync(number)
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{number}")))

    def noted(call: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def instead(old: Any, new: Any) -> None:
            call(old, new)
            calls[:] = [(what, path.replace(os.path.abspath(old), os.path.abspath(new))) for what, path in calls]
            calls.append(("named", os.path.abspath(new)))

        return instead

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", noted_fsync)
        patch.setattr(os, "replace", noted(os.replace))
        patch.setattr(os, "rename", noted(os.rename))
        yield calls


@pytest.fixture(scope="module")
def finished(
    tiny_resnet: Path, flat_digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[orchestrator.Run, list[tuple[str, str]]]:
    """A run under the usual umask, and what it did to the storage."""
    umask = os.umask(0o022)
    try:
        with recorded() as calls:
            run = orchestrator.finetune(
                method="head",
                backbone=str(tiny_resnet), data=str(flat_digits), training={"epochs": 1}, report=lambda _: None,
                storage=str(tmp_path_factory.mktemp("runs")), scaling={"threads_per_worker": 1},
            )  # fmt: skip
    finally:
        os.umask(umask)
    return run, calls


def test_results_stand_beside_a_model_that_is_on_the_disk(
    finished: tuple[orchestrator.Run, list[tuple[str, str]]],
) -> None:
    """After a power loss as well: the model before its name, its name before the results."""
    run, calls = finished
    files = [file.relative_to(run.model) for file in run.model.rglob("*")]
    assert {"model.safetensors", "config.json", "README.md", "lineage.json"} <= {str(file) for file in files}
    named = calls.index(("named", str(run.model)))
    for file in (*files, Path()):
        assert ("fsync", str(run.model / file)) in calls[:named]
    results = calls.index(("named", str(run.path / "results.json")))
    assert ("fsync", str(run.path)) in calls[named:results]
    assert ("fsync", str(run.path / "results.json")) in calls[named:results]
    assert calls[results + 1 :] == [("fsync", str(run.path))]


@pytest.mark.parametrize("name", ["plan.json", "job.yaml", "lineage.json"])
def test_a_file_of_a_run_is_on_the_disk_under_its_name(
    name: str, finished: tuple[orchestrator.Run, list[tuple[str, str]]]
) -> None:
    run, calls = finished
    named = calls.index(("named", str(run.path / name)))
    assert calls[named - 1] == ("fsync", str(run.path / name))
    assert calls[named + 1] == ("fsync", str(run.path))


def test_the_model_says_nothing_of_the_machine(finished: tuple[orchestrator.Run, list[tuple[str, str]]]) -> None:
    run, _ = finished
    texts = {file.name: file.read_text() for file in run.model.iterdir() if file.suffix in (".json", ".md")}
    assert {"lineage.json", ".manifest.json", "README.md"} <= texts.keys()
    for name, text in texts.items():
        assert str(run.path.parent) not in text, name
        assert run.plan.job.data.path not in text, name
        assert run.plan.backbone.source not in text, name
    assert run.lineage["data"]["path"] == run.plan.job.data.path  # the run's own says it


def test_every_file_of_the_model_has_the_usual_mode(finished: tuple[orchestrator.Run, list[tuple[str, str]]]) -> None:
    run, _ = finished
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in run.model.rglob("*") if file.is_file()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {"0o644"}, modes


def test_the_card_says_what_the_run_knows(finished: tuple[orchestrator.Run, list[tuple[str, str]]]) -> None:
    run, _ = finished
    card = (run.model / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["pipeline_tag"] == "image-classification"
    (index,) = header["model-index"]
    metrics = {one["type"]: one["value"] for one in index["results"][0]["metrics"]}
    assert metrics["accuracy"] == round(run.figures["accuracy"], 4)
    low, high = run.figures["accuracy_95"]
    assert f"| {run.figures['accuracy']:.3f} | {low:.3f} to {high:.3f} |" in card
    assert "10 classes: 0, 1, 2" in card
    assert "pipeline(" in card


def test_a_figure_that_is_not_defined_is_left_out_of_the_card(
    finished: tuple[orchestrator.Run, list[tuple[str, str]]],
) -> None:
    run, _ = finished
    results = {**run.results, "test": {**run.figures, "auroc": None, "auroc_95": None}}
    card = model_card(run.plan, results, run.lineage)
    assert "AUROC" not in card
    assert "auroc" not in card
    assert "macro F1" in card


def test_names_of_the_user_are_no_markup() -> None:
    assert escape("<b>[x](y)</b> | a_b*\n# c") == r"\<b\>\[x\](y)\</b\> \| a\_b\* \# c"
