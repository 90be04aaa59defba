"""A run that is half deleted: what is gone is named, and the command that made the run makes it again."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import orchestrator
from orchestrator.errors import RefusedError

Cli = Callable[..., subprocess.CompletedProcess[str]]
WEIGHTS = "model/model.safetensors"


@pytest.fixture(scope="module")
def whole(tiny_resnet: Path, flat_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> orchestrator.Run:
    return orchestrator.finetune(
        backbone=str(tiny_resnet), data=str(flat_digits), name="one", method="head", training={"epochs": 1},
        storage=str(tmp_path_factory.mktemp("whole") / "runs"), scaling={"threads_per_worker": 1},
        report=lambda _: None,
    )  # fmt: skip


@pytest.fixture
def run(whole: orchestrator.Run) -> orchestrator.Run:
    """A copy of it, with its samples, in runs/one below the current directory, whose job.yaml makes that one."""
    shutil.copytree(whole.path.parent, "runs")
    copy = orchestrator.open_run("runs/one")
    job = copy.path / "job.yaml"
    job.write_text(job.read_text().replace(str(whole.path.parent), str(copy.path.parent)))
    return copy


def spoil(file: Path, how: str) -> None:
    if how == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("file", "how"),
    [(WEIGHTS, "gone"), (WEIGHTS, "cut"), ("model/config.json", "gone"), ("model/preprocessor_config.json", "gone")],
)
def test_a_model_that_has_lost_a_file_is_named_and_written_again(
    run: orchestrator.Run, whole: orchestrator.Run, flat_digits: Path, cli: Cli, file: str, how: str
) -> None:
    spoil(run.path / file, how)
    image = next(flat_digits.glob("*/*.png"))
    for reads in (lambda: orchestrator.predict("runs/one", image), lambda: orchestrator.evaluate("runs/one", "x.csv")):
        with pytest.raises(RefusedError, match=file) as refused:
            reads()
        assert refused.value.reason == "damaged"
        assert "IndexError" not in refused.value.message
        assert refused.value.mend == (
            f"the command that made the run writes it again: orchestrator finetune {run.path}/job.yaml"
        )
    assert json.loads(cli("runs", "--json").stdout)[0]["state"] == "damaged"
    done = cli("finetune", "runs/one/job.yaml")
    assert done.returncode == 0, done.stderr
    told = flat(done.stdout + done.stderr)
    assert f"{file} {'has' if how == 'cut' else 'is not there'}" in told
    assert "written again, from the last checkpoint" in told
    assert "nothing was trained" not in told
    one, other = (load_file(each.path / WEIGHTS) for each in (run, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert orchestrator.predict("runs/one", image)[0].label
    assert "nothing was trained" in flat(cli("finetune", "runs/one/job.yaml").stderr)


@pytest.mark.parametrize("file", ["model/README.md", "lineage.json"])
def test_what_no_prediction_needs_is_not_asked_for_and_written_again(
    run: orchestrator.Run, flat_digits: Path, cli: Cli, file: str
) -> None:
    before = (run.path / file).stat().st_size
    (run.path / file).unlink()
    assert orchestrator.predict("runs/one", next(flat_digits.glob("*/*.png")))[0].label
    assert json.loads(cli("runs", "--json").stdout)[0]["state"] == "finished"
    done = cli("finetune", "runs/one/job.yaml")
    assert f"{file} is not there" in flat(done.stderr)
    assert abs((run.path / file).stat().st_size - before) < 100


def test_a_card_that_was_edited_stays_as_it_is(run: orchestrator.Run, cli: Cli) -> None:
    (run.path / "model" / "README.md").write_text("mine")
    assert "nothing was trained" in flat(cli("finetune", "runs/one/job.yaml").stderr)
    assert (run.path / "model" / "README.md").read_text() == "mine"


def test_a_run_without_its_lineage_is_no_backbone_until_it_is_written_again(run: orchestrator.Run) -> None:
    (run.path / "lineage.json").unlink()
    with pytest.raises(RefusedError, match=r"lineage\.json is not there") as refused:
        orchestrator.check("runs/one", "image")
    assert refused.value.mend.endswith("writes it again: orchestrator finetune runs/one/job.yaml")


def test_without_a_checkpoint_only_what_is_of_no_use_is_trained_again(run: orchestrator.Run, cli: Cli) -> None:
    shutil.rmtree(run.path / "checkpoints")
    (run.path / "lineage.json").unlink()
    told = flat(cli("finetune", "runs/one/job.yaml").stderr)
    assert "there is no checkpoint to make it from, --fresh trains again" in told
    assert not (run.path / "lineage.json").exists()
    (run.path / WEIGHTS).unlink()
    assert "so that it is trained again" in flat(cli("finetune", "runs/one/job.yaml").stderr)
    assert orchestrator.open_run("runs/one").finished


def test_settings_that_are_cut_are_named(run: orchestrator.Run, flat_digits: Path) -> None:
    spoil(run.path / "model" / "config.json", "cut")
    with pytest.raises(RefusedError, match=r"config\.json is not JSON.*model/config\.json has \d+ bytes") as refused:
        orchestrator.predict("runs/one", next(flat_digits.glob("*/*.png")))
    assert (refused.value.reason, "orchestrator finetune" in refused.value.mend) == ("damaged", True)


@pytest.mark.parametrize("file", [WEIGHTS, "model/config.json"])
def test_a_model_whose_manifest_is_gone_too_is_damaged(run: orchestrator.Run, file: str) -> None:
    (run.path / "model" / ".manifest.json").unlink()
    (run.path / file).unlink()
    with pytest.raises(RefusedError, match=f"{file} is not there"):
        orchestrator.predict("runs/one", [])


def test_a_run_without_its_plan_is_a_damaged_run(run: orchestrator.Run, cli: Cli) -> None:
    (run.path / "plan.json").unlink()
    for place in ("runs/one", "one"):
        with pytest.raises(RefusedError, match=r"runs/one is damaged: plan\.json is not there") as refused:
            orchestrator.predict(place, [])
        assert refused.value.reason == "damaged"
        assert refused.value.mend == (
            f"the command that made the run starts it over: orchestrator finetune {run.path}/job.yaml"
        )
    for asked in (["show", "one"], ["show", "runs/one"], ["compare", "one", "one"]):
        done = cli("runs", *asked)
        assert (done.returncode, "plan.json is not there" in flat(done.stderr)) == (2, True)
    assert "its plan cannot be read" in cli("runs").stdout
    with pytest.raises(RefusedError, match=r"plan\.json is not there"):
        orchestrator.check("runs/one", "image")
    done = cli("finetune", "runs/one/job.yaml")
    assert "has lost its plan.json: it is trained again" in flat(done.stderr)
    assert orchestrator.open_run("runs/one").finished


def test_a_run_without_its_job_and_its_plan_is_told_no_command_that_fails(run: orchestrator.Run) -> None:
    (run.path / "plan.json").unlink()
    (run.path / "job.yaml").unlink()
    with pytest.raises(RefusedError, match=r"plan\.json is not there") as refused:
        orchestrator.open_run("runs/one")
    assert refused.value.mend == "the command that made the run starts it over"


def test_a_folder_of_somebody_elses_is_no_damaged_run(cli: Cli) -> None:
    for name, files in {"mine": ["job.yaml"], "hub": ["model", "config.json", "results.json"]}.items():
        for file in files:
            Path("runs", name).mkdir(parents=True, exist_ok=True)
            Path("runs", name, file).write_text("{}")
        with pytest.raises(RefusedError, match="there is no run"):
            orchestrator.open_run(f"runs/{name}")
    assert "there are no runs in runs" in cli("runs").stdout


@pytest.mark.usefixtures("run")
def test_samples_without_a_label_are_left_out_as_they_cannot_be_used(flat_digits: Path, cli: Cli) -> None:
    shutil.copytree(flat_digits, "digits")
    images = sorted(Path("digits").glob("*/*.png"))[:6]
    rows = [f"{image},{image.parent.name if i > 1 else ''}" for i, image in enumerate(images)]
    Path("t.csv").write_text("\n".join(["path,label", *rows]))
    done = cli("evaluate", "runs/one", "--data", "t.csv", "--on-bad-sample", "skip")
    assert "left out, as they cannot be used: 2 samples" in flat(done.stdout), done.stderr
