"""The command line: its flags, what it prints at 80 columns, and the words of its refusals."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import orchestrator
from orchestrator.errors import InterruptedRunError
from orchestrator.job import EpochEnded, PhaseBegan, make_job
from orchestrator.predictor import Prediction
from orchestrator.progress import progress
from orchestrator.terminal.console import cut_middle, show_error, show_plan
from orchestrator.terminal.flags import FLAGS, name_flags
from tests.held import held
from tests.terminal.screen import Screen

# --- flags ---


def test_every_flag_sets_its_setting(screen: Screen) -> None:
    for command in ("finetune", "pretrain", "plan"):
        code, shown, _ = screen(command, "--help")
        assert code == 0
        assert [flag.option for flag in FLAGS if f" {flag.option} " not in shown] == (
            ["--method"] if command == "pretrain" else []
        )
    for flag in FLAGS:
        if flag.setting:
            words: dict[str, Any] = {"--method": "head", "--task": "regression", "--feature-store": "s3://bucket/features",
                     "--separator": ";", "--encoding": "cp1252", "--log": ["mlflow"]}  # fmt: skip
            value: object = {int: 4, float: 0.5, bool: True}.get(flag.kind, words.get(flag.option, "skip"))
            fields: dict[str, Any] = {"backbone": "b", "data": "d", flag.setting: value}
            if flag.option == "--min-workers":  # no more than there are workers
                fields["scaling.num_workers"] = 4
            assert make_job(**fields) != make_job(backbone="b", data="e"), flag  # a setting that the job knows


@pytest.mark.parametrize("command", ["plan", "check"])
def test_labels_with_a_separator(screen: Screen, tiny_resnet: Path, digits: Path, command: str) -> None:
    files = sorted((digits / "test").glob("*/*.png"))[:40]
    rows = [f"{file},{('a;b', 'a', 'b')[i % 3]}" for i, file in enumerate(files)]
    Path("t.csv").write_text("\n".join(["path,what", *rows]))
    backbone = (tiny_resnet,) if command == "check" else ("--backbone", tiny_resnet)
    asked = (command, *backbone, "--data", "t.csv", "--label-column", "what", "--task", "multi-label")
    code, out, err = screen(*asked, "--set", f"data.root={digits}", "--label-separator", ";")
    assert (code, err) == (0, "")
    if command == "plan":
        assert "classes     2: a, b" in out


def test_check_says_how_many_samples_were_left_out(screen: Screen, tiny_resnet: Path, digits: Path) -> None:
    shutil.copytree(digits / "test", "photos")
    next(Path("photos").glob("*/*.png")).write_bytes(b"none")
    asked = ("check", tiny_resnet, "--data", "photos", "--on-bad-sample", "skip")
    assert "left out  1 bad sample\n" in "\n".join(line.rstrip() + "\n" for line in screen(*asked)[1].splitlines())
    assert json.loads(screen(*asked, "--json")[1])["num_skipped"] == 1


@pytest.mark.parametrize("command", ["plan", "check"])
def test_a_way_to_mix_that_there_is_not_is_refused_before_data_is_read(
    screen: Screen, tiny_resnet: Path, command: str
) -> None:
    backbone = (tiny_resnet,) if command == "check" else ("--backbone", tiny_resnet)
    code, _, err = screen(command, *backbone, "--data", "nothing", "--set", "training.mix=foo")
    assert code == 2
    assert "set training.mix to one of both, cutmix, mixup, or leave it out" in " ".join(err.split())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="of a machine without a GPU")
@pytest.mark.parametrize(("more", "says"), [((), True), (("--address", "10.0.0.1:6379"), False)])
def test_a_plan_warns_of_a_gpu_that_is_not_here(
    screen: Screen, tiny_resnet: Path, digits: Path, more: tuple[str, ...], says: bool
) -> None:
    asked = ("plan", "--backbone", tiny_resnet, "--data", digits / "test", "--set", "scaling.device=gpu", *more)
    code, out, _ = screen(*asked)
    assert code == 0
    assert ("torch finds none here: finetune is refused" in " ".join(out.split())) is says


def test_the_version(screen: Screen) -> None:
    assert screen("--version") == (0, "orchestrator 0.1.0\n", "")


def test_a_message_names_the_flag_behind_a_setting() -> None:
    for given, shown in (
        ("name it: data.input_column", "name it: data.input_column (--input-column)"),
        ("t.csv has no column 'x' (data.label_column)", "t.csv has no column 'x' (data.label_column, --label-column)"),
        ("job.yaml:3: task = 'x': no", "job.yaml:3: task (--task) = 'x': no"),
        ("data is missing", "data (--data) is missing"),
        ("the data is missing", "the data is missing"),
        ("lower training.num_microbatches or scaling.num_workers",
         "lower training.num_microbatches or scaling.num_workers (--workers)"),
        ("--set training.epochs=3, or leave training.epochs.x", "--set training.epochs=3, or leave training.epochs.x"),
        ("data.on_bad_sample: --on-bad-sample skip", "data.on_bad_sample: --on-bad-sample skip"),
    ):  # fmt: skip
        assert name_flags(given) == shown


def test_a_refusal_names_flags_on_the_screen_and_settings_in_json(screen: Screen) -> None:
    asked = ("plan", "--backbone", "b", "--data", "d", "--num-train", "1")
    _, out, _ = screen(*asked, "--json")
    assert json.loads(out)["message"].startswith("data.num_train = 1: ")
    assert "data.num_train (--num-train) = 1: " in screen(*asked)[2]


def test_an_interruption_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    for error, shown in (
        (InterruptedRunError("stopped by Ctrl-C", mend="the same command goes on"), "stopped by Ctrl-C"),
        (InterruptedRunError("stopped at step 3 of 9", mend="the same command goes on"), "stopped at step 3 of 9"),
    ):
        show_error(error)
        assert capsys.readouterr().err == f"{shown}\nmend     the same command goes on\n"


def test_the_figure_of_an_epoch_is_the_one_that_chooses() -> None:
    line = {"epoch": 1, "validation_accuracy": 0.1, "train_accuracy": 0.2, "validation_loss": 0.5, "train_loss": 0.6}
    for task, shown in (
        ("single-label", "val acc 0.100"), ("multi-label", "val loss 0.500"), ("regression", "val loss 0.500"),
    ):  # fmt: skip
        with progress() as show, contextlib.redirect_stderr(io.StringIO()) as screen:
            show(PhaseBegan("looking"))
            show(EpochEnded(line, 1, task))
        assert screen.getvalue() == f"looking\nepoch 1/1 {shown}\n"
    with progress() as show, contextlib.redirect_stderr(io.StringIO()) as screen:  # no validation split
        show(PhaseBegan("looking"))
        show(EpochEnded({"epoch": 1, "train_accuracy": 0.2, "train_loss": 1}, 1, "single-label"))
        show(EpochEnded({"epoch": 2, "train_loss": 1}, 2, "single-label"))  # nor a head that is fitted by then
    assert "train acc 0.200" in screen.getvalue()
    assert "epoch 2/2 train loss 1.000" in screen.getvalue()


# --- what is not there ---


@pytest.mark.parametrize("command", [("evaluate", "--data", "."), ("predict", "x.png")])
def test_a_run_that_is_not_there_is_refused_before_torch_is_imported(command: tuple[str, ...]) -> None:
    name, *rest = command
    program = (
        "import sys; from orchestrator.terminal import cli; code = cli.run(sys.argv[1:]); "
        "print({'torch', 'numpy', 'ray'} & set(sys.modules)); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, name, "runs/nothing", *rest], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "set()\n")
    assert "there is no run runs/nothing" in done.stderr


def test_a_storage_that_is_a_file(screen: Screen) -> None:
    Path("file").touch()
    assert screen("runs", "--storage", "file")[2].startswith("refused (usage) file is a file expected the directory")
    assert screen("runs", "--storage", "nowhere")[:2] == (0, "there are no runs in nowhere: it does not exist\n")


# --- plan ---


def test_a_plan_says_what_is_known(tiny_resnet: Path, flat_digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = orchestrator.plan(backbone=str(tiny_resnet), data=str(flat_digits), method="head", settings={"size": 32})
    show_plan(made)
    shown = capsys.readouterr().out
    assert "input       size 32 x 32, channels 3, augment none" in shown
    assert "rate        0.003" in shown
    assert "rates" not in shown
    assert made.parameters is not None
    unknown = made.parameters.model_copy(update={"head_known": False, "trained": 0, "gradients_bytes": 0})
    show_plan(made.model_copy(update={"parameters": unknown}))
    shown = capsys.readouterr().out
    assert f"parameters  a new head trained, {unknown.frozen:,} frozen" in shown
    assert "gradients" not in shown


# --- runs ---


def test_a_run_that_a_process_works_on_is_running(screen: Screen, tmp_path: Path) -> None:
    run = orchestrator.Run(tmp_path / "runs" / "a")
    with held(run.path):
        (run.path / "plan.json").touch()
        assert " running " in screen("runs")[1]
        code, _, err = screen("predict", "runs/a", "x.png")
        assert (code, "has not finished" in err) == (2, True)
    assert [row["state"] for row in json.loads(screen("runs", "--json")[1])] == ["unfinished"]


def test_listing_the_runs_does_not_stop_one_from_starting(tmp_path: Path) -> None:
    """Who looks holds the lock for an instant."""
    run = orchestrator.Run(tmp_path / "a")
    run.path.mkdir()
    with (run.path / ".lock").open("a") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        done = threading.Timer(0.03, fcntl.flock, (looking, fcntl.LOCK_UN))
        done.start()
        with held(run.path):
            assert run.busy
        done.join()
    assert not run.busy


# --- predict ---


def test_long_inputs_are_cut_in_the_middle() -> None:
    path = "recordings/" + "very/" * 20 + "left.wav"
    assert cut_middle(path, 32) == "recordings/very/…y/very/left.wav"
    assert cut_middle("a\n b", 32) == "a b"
    assert cut_middle("雨" * 40, 33).count("雨") == 16


def test_several_targets_are_shown_each_with_its_own_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """Figures that have a unit are never shown as one of all."""
    from orchestrator.terminal.console import show_results

    one = {"mae": 12.5, "rmse": 15.0, "r2": 0.5, "scaled_mae": 0.6}
    both = {"mae": None, "rmse": None, "r2": 0.25, "r2_95": [0.1, 0.4], "scaled_mae": 0.7, "num_samples": 9}
    show_results({"task": "regression", "test": {**both, "per_class": {"weight": one, "way": {**one, "mae": 4000.0}}}})
    shown = capsys.readouterr().out
    words = [line.split() for line in shown.splitlines()]
    assert ["split", "samples", "R2", "95", "%", "interval", "scaled", "MAE"] in words
    assert ["weight", "test", "12.5", "15", "0.500", "0.600"] in words
    assert ["way", "test", "4,000", "15", "0.500", "0.600"] in words
    show_results({"task": "regression", "test": {**one, "num_samples": 9, "per_class": {"weight": one}}})
    shown = capsys.readouterr().out
    assert "MAE" in shown
    assert "weight" not in shown


def test_predictions_of_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    from orchestrator.terminal import answers

    answers.show_predictions(
        [Prediction("x.png", None, None, (("weight", 1234.5), ("height", 0.25)))], "regression", False
    )
    shown = capsys.readouterr().out
    assert "target   value" in shown
    assert "weight   1,234   height 0.250" in shown
    answers.show_predictions(
        [
            Prediction("x.png", "", 0.31, (("cat", 0.31), ("dog", 0.2))),
            Prediction("y.png", "cat + dog", 0.9, (("cat", 0.9), ("dog", 0.6))),
        ],
        "multi-label",
        False,
    )
    shown = capsys.readouterr().out
    assert "none reaches 0.5   cat 0.310, dog 0.200" in shown
    assert "cat + dog          cat 0.900, dog 0.600" in shown


@pytest.mark.parametrize(("backbone", "says"), [("tiny_resnet", "BatchNorm train"), ("tiny_vit", "")])
def test_batch_norm_is_said_of_networks_that_have_it(
    backbone: str, says: str, screen: Screen, flat_digits: Path, request: pytest.FixtureRequest
) -> None:
    place = request.getfixturevalue(backbone)
    out = " ".join(screen("plan", "--backbone", place, "--data", flat_digits, "--method", "full")[1].split())
    assert ("BatchNorm" in out) == bool(says)
    assert says in out
