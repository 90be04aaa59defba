"""`orchestrator rank`: the table at 80 columns, as JSON, and what is refused or stopped."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from orchestrator.tuning import race
from tests.terminal.screen import Screen
from tests.tiny import make_bert


@pytest.fixture(scope="module")
def random_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("random-bert"))


def test_the_table_on_a_screen(
    screen: Screen, efficientnet: Path, tiny_resnet: Path, random_bert: Path, flat_digits: Path
) -> None:
    code, out, _ = screen("rank", tiny_resnet, efficientnet, random_bert, "--data", flat_digits, "--size", 32)
    assert code == 0
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.strip().startswith("1 "))
    assert "efficientnet" in lines[first]
    assert "full" in lines[first + 1]
    flat = " ".join(out.split())
    assert "(wrong_modality)" in flat
    assert f"{efficientnet.name}, which is the best" in flat
    code, as_json, _ = screen(
        "rank", tiny_resnet, efficientnet, random_bert, "--data", flat_digits, "--size", 32, "--json"
    )  # fmt: skip
    told = json.loads(as_json)
    assert (code, told["best"]) == (0, str(efficientnet))
    assert [row["state"] for row in told["rows"]] == ["ranked", "ranked", "refused"]
    assert f"orchestrator finetune --backbone {efficientnet} --data {flat_digits} --size 32".replace(
        " ", ""
    ) in "".join(out.split())  # fmt: skip


def test_the_command_exits_with_130(
    screen: Screen, tiny_resnet: Path, flat_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = race.compute_features

    def interrupted(*arguments: Any, **more: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return compute(*arguments, **more)

    monkeypatch.setattr(race, "compute_features", interrupted)
    code, _, err = screen("rank", tiny_resnet, "--data", flat_digits)
    assert code == 130
    assert "the same command goes on" in err


def test_where_all_are_refused_nothing_is_ranked(screen: Screen, random_bert: Path, flat_digits: Path) -> None:
    code, out, err = screen("rank", random_bert, "./nowhere", "--data", flat_digits)
    assert (code, out) == (2, "")
    assert "none of 2 backbones can be used" in err
    assert "wrong_modality" in err
    assert "not_found" in err
    assert not Path("runs").exists()
