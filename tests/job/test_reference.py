"""The reference of the settings is the models': the page, the command and the flags' help say the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from subprocess import CompletedProcess
from typing import get_args

import pytest

from orchestrator.gate import recipes
from orchestrator.job import Job, Method, TaskName, job_reference, setting_of, settings_of
from orchestrator.job.keys import all_keys
from orchestrator.modality import registry
from tests.conftest import REPOSITORY

Cli = Callable[..., CompletedProcess[str]]


def test_the_page_is_written_from_the_models() -> None:
    program = REPOSITORY / "scripts" / "write_settings.py"
    done = subprocess.run([sys.executable, program, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (REPOSITORY / "docs" / "settings.md").read_text(encoding="utf-8")
    assert all(f"| `{key}` |" in page for key in all_keys())


@pytest.mark.parametrize("name", ["image", "audio", "text"])
def test_every_setting_of_a_modality_says_what_it_is_for(name: str) -> None:
    for one in settings_of(registry.get(name).settings):
        assert one.meaning, one.key
        assert one.takes, one.key


def test_every_setting_of_a_job_says_what_it_is_for() -> None:
    found = [one for several in job_reference().values() for one in several]
    assert sorted(one.key for one in found) == sorted(all_keys())
    for one in found:
        assert len(one.meaning) > 5 or one.key in ("training.seed",), one.key
    assert not [one.key for one in found if one.default == "()"]  # of Python, and says nothing to a reader
    epochs, rate, task = (setting_of(key) for key in ("training.epochs", "training.learning_rate", "task"))
    assert epochs is not None
    assert rate is not None
    assert task is not None
    assert (task.takes, task.default) == ("single-label | multi-label | regression", "single-label")
    assert epochs.takes == "whole number, 1 or more, at most 100000"
    # What the method decides stands in the words: held against the recipes.
    for method, row in recipes._METHODS.items():
        assert f"{method} {row.phases[-1].epochs}" in epochs.meaning
        assert f"{method} {row.phases[-1].rate:g}" in rate.meaning
    few = (
        f"a transformer: {recipes._LEAST_STEPS_OF_TRANSFORMERS}, {recipes._MOST_EPOCHS_OF_TRANSFORMERS} epochs at most"
    )
    assert f"what {recipes._LEAST_STEPS} steps take ({few})" in epochs.meaning
    batch = setting_of("training.batch_size")
    assert batch is not None
    assert f"default: {recipes._BATCH_SIZE}, or {recipes._BATCH_SIZE_OF_FEW} " in batch.meaning
    assert f"fewer than {recipes._FEW_FOR_A_BATCH} samples" in batch.meaning


def test_the_command_lists_a_group_or_a_modality(cli: Cli) -> None:
    every = json.loads(cli("settings", "--json").stdout)
    assert list(every) == ["job", "data", "training", "scaling"]
    told = {one["key"]: one for several in every.values() for one in several}
    defaults = [told[f"training.{key}"]["default"] for key in ("warmup_fraction", "refit", "mix", "patience")]
    assert defaults == [0.1, False, "none", None]  # as JSON has them
    assert told["training.mix"]["takes"] == "none | mixup | cutmix | both"
    shown = cli("settings", "training")
    assert shown.returncode == 0
    assert "epochs" in shown.stdout
    assert "adamw | sgd: AdamW, or SGD" in shown.stdout
    assert "on_bad_sample" not in shown.stdout
    image = json.loads(cli("settings", "image", "--json").stdout)["image"]
    assert {one["key"] for one in image} == {f"settings.{name}" for name in registry.get("image").settings.model_fields}
    wrong = cli("settings", "trainin", "--json")
    assert wrong.returncode == 2
    assert json.loads(wrong.stdout)["mend"] == "did you mean training?"


def test_the_help_of_a_flag_shows_choices_and_defaults(cli: Cli) -> None:
    shown = " ".join(cli("finetune", "--help").stdout.replace("│", " ").split())
    assert "fail|skip" in shown
    for method in (
        *get_args(Method),
        *get_args(TaskName),
    ):  # each with a word of what it is, which has more room than a list of choices
        assert f"{method}: " in shown
    for default in ("[default: auto]", "[default: fail]", "[default: runs]", "[default: 1]", "[default: label]"):
        assert default in shown
    assert Job.model_fields["method"].default == "auto"
