"""The loop: phases one after the other, stopped anywhere, and what it leaves of the process that called it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import orchestrator
from orchestrator.errors import InterruptedRunError
from orchestrator.gate import recipes
from orchestrator.job import Event, Noted, PhaseBegan
from tests.conftest import REPOSITORY
from tests.devices import both
from tests.whole.test_train import same, silent, weights_of

TWO_PHASES = recipes._MethodRow(
    "pretrained", (recipes._PhaseRow("head", 3, 3e-3), recipes._PhaseRow("everything", 2, 1e-3))
)
JOB: dict[str, Any] = {
    "method": "full", "training": {"batch_size": 40, "checkpoint_every_steps": 7},
    "scaling": {"threads_per_worker": 1}, "data.num_train": 160,
}  # fmt: skip


def train(backbone: Path, data: Path, **more: Any) -> orchestrator.Run:
    return orchestrator.finetune(backbone=str(backbone), data=str(data), **{"report": silent, **JOB, **more})


def at_call(number: int) -> Callable[[], bool]:
    """A `stop` that says yes from its so-manieth call on."""
    calls = iter(range(10**9))
    return lambda: next(calls) >= number


@pytest.fixture
def two_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Method `full` as the head first, from stored features, and then everything."""
    monkeypatch.setitem(recipes._METHODS, "full", TWO_PHASES)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.usefixtures("two_phases")
@both
def test_a_recipe_of_two_phases_goes_on_wherever_it_was_stopped(tiny_resnet: Path, digits: Path, device: str) -> None:
    more: dict[str, Any] = {"scaling": {"threads_per_worker": 1, "device": device}}
    if device == "gpu":
        more["training"] = {**JOB["training"], "deterministic": True}
    whole = train(tiny_resnet, digits, name="whole", **more)
    assert [line["epoch"] for line in whole.metrics] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in whole.metrics] == [4, 8, 12, 16, 20]
    phases = []
    for number in (0, 9, 22):  # in the pass over the body, in the one phase, in the other
        notes: list[Event] = []
        for stop in (at_call(number), None):
            try:
                run = train(tiny_resnet, digits, name=f"stopped-{number}", stop=stop, report=notes.append, **more)
            except InterruptedRunError:
                assert stop is not None
        assert same(weights_of(whole), weights_of(run)), number
        assert [{**line, "seconds": 0, "samples_per_s": 0} for line in run.metrics] == [
            {**line, "seconds": 0, "samples_per_s": 0} for line in whole.metrics
        ]
        assert run.results["test"] == whole.results["test"]
        gone_on = [event.text for event in notes if isinstance(event, Noted) and "going on from" in event.text]
        phases.append([event.text for event in notes if isinstance(event, PhaseBegan) and "training" in event.text])
        assert gone_on or number == 0, number
    assert any(texts.count("training the head") == 2 for texts in phases)  # stopped in the one phase
    assert any(texts.count("training everything") == 2 for texts in phases)  # and in the other


@pytest.mark.usefixtures("two_phases")
def test_a_phase_begins_with_the_best_weights_of_the_one_before(tiny_resnet: Path, digits: Path) -> None:
    rates = {"training.learning_rate": 1e-12, "training.clip_norm": 1e-12}
    run = train(tiny_resnet, digits, **rates)
    head = train(tiny_resnet, digits, method="head", training={**JOB["training"], "epochs": 3}, **rates)
    weights = weights_of(head)
    for name, tensor in weights_of(run).items():
        if "running" not in name and "num_batches" not in name:
            assert torch.allclose(tensor, weights[name], atol=1e-6), name


def test_a_validation_that_takes_long_is_stopped_and_made_again(
    tiny_resnet: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.training import evaluate

    job = {"training": {"batch_size": 40, "epochs": 2}, "data.num_train": 160}
    whole = train(tiny_resnet, digits, name="whole", **job)
    evaluating: list[str] = []
    split = evaluate.predict_split

    def noting(session: Any, name: str) -> Any:
        evaluating.append(name)
        return split(session, name)

    for module in ("phase", "finish"):
        monkeypatch.setattr(f"orchestrator.training.{module}.predict_split", noting)
    for most in (0, 3):  # in the first epoch's validation; in the final figures
        evaluating.clear()
        with pytest.raises(InterruptedRunError):
            train(tiny_resnet, digits, name="cut", stop=lambda: len(evaluating) > most, **job)  # noqa: B023
    states = [json.loads(file.read_text()) for file in Path("runs/cut").glob("checkpoints/*/state.json")]
    assert {(state["step"], state["epochs_ended"]) for state in states} == {(4, 0), (8, 2)}
    run = train(tiny_resnet, digits, name="cut", **job)
    assert same(weights_of(whole), weights_of(run))
    assert [line["validation_loss"] for line in run.metrics] == [line["validation_loss"] for line in whole.metrics]


def test_a_start_over_that_was_cut_off_takes_nothing_over(tiny_resnet: Path, digits: Path) -> None:
    """Killed after the plan was removed and before the checkpoints were: the next job begins with nothing of them."""
    with pytest.raises(InterruptedRunError):
        train(tiny_resnet, digits, name="over", stop=at_call(12))
    assert list(Path("runs/over/checkpoints").iterdir())
    Path("runs/over/plan.json").unlink()
    job = {"training": {**JOB["training"], "seed": 1, "epochs": 2}}
    notes: list[Event] = []
    over = train(tiny_resnet, digits, name="over", report=notes.append, **job)
    assert not any("going on" in event.text for event in notes if isinstance(event, Noted))
    assert same(weights_of(over), weights_of(train(tiny_resnet, digits, name="clean", **job)))


def test_a_job_that_is_finished_is_so_on_any_number_of_workers(tiny_resnet: Path, flat_digits: Path) -> None:
    job: dict[str, Any] = {"training": {"epochs": 1}, "data.num_train": 40}
    run = train(tiny_resnet, flat_digits, **job)
    there: dict[str, Any] = {"num_workers": 2, "address": "auto"}  # no cluster is there, and none is asked for
    assert train(tiny_resnet, flat_digits, **job, scaling=there).path == run.path
    assert [one.name for one in Path("runs").iterdir() if not one.name.startswith(".")] == [run.name]


def test_validation_sees_the_precision_of_training(
    tiny_resnet: Path, flat_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.network import Network

    seen: set[tuple[bool, bool]] = set()
    logits = Network.logits

    def noting(network: Network, inputs: Any) -> torch.Tensor:
        seen.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return logits(network, inputs)

    monkeypatch.setattr(Network, "logits", noting)
    train(tiny_resnet, flat_digits, training={"epochs": 1, "precision": "bf16"}, **{"data.num_train": 40})
    assert seen == {(True, True), (False, True)}


@pytest.mark.parametrize(
    "allowed",
    [
        "an old flag",
        *(pytest.param(one, marks=pytest.mark.long) for one in ("as it is", "a new flag", "bf16 on the CPU")),
    ],
)
def test_the_process_that_called_is_as_it_was(tiny_resnet: Path, flat_digits: Path, allowed: str) -> None:
    """fp32 is fp32 while a job works, whatever the caller allows, and the caller allows it again afterwards."""
    script = f"""
import json, sys, torch, orchestrator
from tests.training.process_settings import process_settings
allow = {allowed!r}
if allow == "an old flag":
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
elif allow == "a new flag":
    torch.backends.cuda.matmul.fp32_precision = "tf32"
elif allow == "bf16 on the CPU":
    torch.set_float32_matmul_precision("medium")
before, seen = process_settings(), []
for deterministic in (False, True):
    run = orchestrator.finetune(
        backbone=sys.argv[1], data=sys.argv[2], report=lambda _: seen.append(process_settings()), name="run",
        fresh=True, training={{"epochs": 1, "deterministic": deterministic}}, **{{"data.num_train": 40}},
    )
    assert (["ieee"] * 6, deterministic, False, deterministic) in [(a, b, c, e) for a, b, c, _, e, _ in seen], seen
    assert process_settings() == before
orchestrator.predict(run, sys.argv[3])
assert process_settings() == before
if allow == "bf16 on the CPU":
    assert torch.get_float32_matmul_precision() == "medium"
"""
    sample = next(flat_digits.glob("3/*.png"))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_resnet), str(flat_digits), str(sample)],
        capture_output=True, text=True, check=False, timeout=200,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_one_process_needs_nothing_of_ray(tiny_resnet: Path, flat_digits: Path) -> None:
    program = (
        "import sys, orchestrator\n"
        "orchestrator.finetune(backbone=sys.argv[1], data=sys.argv[2], training={'epochs': 1}, report=lambda _: None)\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'ray'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny_resnet), str(flat_digits)],
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.stdout == "[]\n", done.stderr


def test_of_epochs_that_few_samples_cannot_tell_apart_the_last_is_kept(tiny_resnet: Path, digits: Path) -> None:
    """The one that they like best is the luckiest of many; the last one has the lowest learning rate."""
    job = {"method": "head", "data.validation_fraction": 0.2, "learning_rate": 3e-2, "epochs": 16}
    run = train(tiny_resnet, digits, **job)
    scores = [line["validation_accuracy"] for line in run.metrics]
    kept = run.results["best_epoch"]
    noise = (max(scores) * (1 - max(scores)) / 80) ** 0.5
    assert 0.3 < max(scores) < 0.9
    assert scores.index(max(scores)) + 1 < kept
    assert scores[kept - 1] >= max(scores) - noise
    assert max(scores[kept:], default=0) < max(scores) - noise
    assert run.results["validation"]["accuracy"] == pytest.approx(scores[kept - 1])
