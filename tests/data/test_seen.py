"""A backbone that was trained on what is held back, or on what it is ranked by: said, with how many."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import orchestrator
from orchestrator.job import Event, Noted
from tests.tiny import make_bert

ONE_THREAD = {"threads_per_worker": 1}


def silent(event: Event) -> None:
    pass


@pytest.fixture(scope="module")
def trained(tiny_resnet: Path, flat_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> orchestrator.Run:
    """A run on digits of one folder, 15 % of them held back for the test."""
    return orchestrator.finetune(
        backbone=str(tiny_resnet), data=str(flat_digits), method="head", training={"epochs": 1}, scaling=ONE_THREAD,
        storage=str(tmp_path_factory.mktemp("seen")), report=silent,
    )  # fmt: skip


def warnings_of(**fields: object) -> list[str]:
    return [one for one in orchestrator.plan(**fields).data.warnings if "too good" in one]


def test_the_same_splits_again_hold_nothing_that_was_seen(trained: orchestrator.Run, flat_digits: Path) -> None:
    assert warnings_of(backbone=str(trained.path), data=str(flat_digits)) == []


def test_other_splits_do(trained: orchestrator.Run, flat_digits: Path) -> None:
    warnings = warnings_of(backbone=str(trained.path), data={"path": str(flat_digits), "seed": 7})
    of_test = next(one for one in warnings if "samples of test" in one)
    num, total = (int(word.replace(",", "")) for word in of_test.split() if word[0].isdigit())
    # By chance as many as were no test samples before.
    assert 0.7 * total < num < total
    assert trained.name in of_test


def test_texts_are_known_by_their_content(tmp_path: Path) -> None:
    rows = [{"text": f"number {number}", "label": "ab"[number % 2]} for number in range(200)]
    run = orchestrator.finetune(
        modality="text", backbone=str(make_bert(tmp_path / "bert")), data=rows, method="head", scaling=ONE_THREAD,
        training={"epochs": 1}, report=silent,
    )  # fmt: skip
    others = [{"text": f"another {number}", "label": "ab"[number % 2]} for number in range(200)]
    assert warnings_of(modality="text", backbone=str(run.path), data=others) == []
    mixed = [*others, *({**row, "label": row["label"]} for row in rows[:100])]
    found = warnings_of(modality="text", backbone=str(run.path), data=mixed)
    assert found
    assert all("are among those that the backbone" in one for one in found)
    for file in Path("runs/.data").glob("*/*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    assert warnings_of(modality="text", backbone=str(run.path), data=mixed) == []  # damaged: nothing to this job
    shutil.rmtree(Path("runs") / ".data")  # the run's table is gone: nothing tells any more, and nothing is in the way
    assert warnings_of(modality="text", backbone=str(run.path), data=mixed) == []


@pytest.mark.slow
def test_a_ranking_says_who_was_trained_on_its_samples(
    trained: orchestrator.Run, tiny_resnet: Path, flat_digits: Path
) -> None:
    told: list[Event] = []
    orchestrator.rank(
        [str(tiny_resnet), str(trained.path)], data=str(flat_digits), report=told.append, scaling=ONE_THREAD
    )
    said = [one.text for one in told if isinstance(one, Noted) and one.is_warning]
    num = trained.plan.data.num_samples["train"] + trained.plan.data.num_samples["validation"]
    assert said == [
        f"{trained.name} was trained on {num:,} of the {num:,} samples that it is ranked by: its figures are too good"
    ]
