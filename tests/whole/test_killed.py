"""Each recipe is killed with -9 in each of its phases, and ends with the weights of a run that was left alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.job import Advanced, Event, PhaseBegan
from tests.tiny import make_bert
from tests.toys import write_toys
from tests.whole.test_train import same, silent, weights_of

# Children of a process that has imported all of it and has no threads: each would take seconds to import it itself.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["orchestrator.train", "transformers", "torchvision", "timm", "peft", "tests.whole.test_killed"]
)
RECIPES: dict[str, dict[str, Any]] = {
    "auto": {"loss": "task"},
    "auto, with all samples in the end": {"refit": True},
    "head": {"method": "head", "epochs": 8},
    "full": {"method": "full"},
    "full, with an average": {"method": "full", "ema": 0.9},
    "lp-ft": {"method": "lp-ft"},
    "auto, by what is alike": {"modality": "text", "loss": "contrastive"},
    "lora": {"method": "lora", "modality": "text"},
    "scratch": {"method": "scratch"},
}


def train_and_die(job: dict[str, Any], where: str, phase: str, steps: int) -> None:
    """Run the job in `where`, and kill this process `steps` events of progress into that phase."""
    os.chdir(where)
    left = -1

    def report(event: Event) -> None:
        nonlocal left
        if isinstance(event, PhaseBegan):
            left = steps if event.text == phase else -1
        elif isinstance(event, Advanced) and left > 0:
            left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    orchestrator.finetune(job, report=report)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_in_each_phase_it_ends_with_the_same_weights(
    recipe: str, tiny_resnet: Path, digits: Path, tmp_path: Path
) -> None:
    if RECIPES[recipe].get("modality") == "text":
        if RECIPES[recipe].get("method") == "lora":
            pytest.importorskip("peft")
        backbone: Path = make_bert(tmp_path / "bert")
        data: dict[str, Any] = {"path": str(write_toys(tmp_path, "text"))}
    else:
        backbone, data = tiny_resnet, {"path": str(digits), "num_train": 100}
    job = {
        "backbone": str(backbone), "data": data, "name": "run", "epochs": 3, "batch_size": 8,
        "checkpoint_every_steps": 3, "threads_per_worker": 1,
        "precision": "fp32",  # which format the features have is measured anew in another storage
        **RECIPES[recipe],
    }  # fmt: skip
    events: list[Event] = []
    whole = orchestrator.finetune(job, storage="whole", report=events.append)
    steps_of: dict[str, int] = {}  # of each phase
    for event in events:
        if isinstance(event, PhaseBegan):
            phase = event.text
            steps_of.setdefault(phase, 0)
        elif isinstance(event, Advanced):
            steps_of[phase] += 1
    assert list(steps_of)[-2:] == ["final figures", "writing the model"]
    killed = []
    for phase, num_steps in steps_of.items():
        for steps in (0, num_steps // 3)[: 2 if num_steps > 5 else 1]:
            child = PROCESSES.Process(target=train_and_die, args=(job, str(tmp_path), phase, steps))
            child.start()
            child.join(120)
            assert child.exitcode == -signal.SIGKILL, (phase, steps)
            killed.append((phase, steps))
    assert len(killed) > len(steps_of)
    run = orchestrator.finetune(job, report=silent)
    assert same(weights_of(whole), weights_of(run))
    assert (
        run.results["validation" if "validation" in run.results else "test"]
        == (whole.results["validation" if "validation" in whole.results else "test"])
    )
    assert [line["train_loss"] for line in run.metrics] == [line["train_loss"] for line in whole.metrics]
