"""`orchestrator runs`: the list, one run whole, several beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.errors import RefusedError
from tests.terminal.screen import Screen

TWO = {"first": {"method": "head"}, "second": {"method": "full", "training": {"epochs": 3, "learning_rate": 0.01}}}


@pytest.fixture(scope="module")
def storage(tiny_resnet: Path, flat_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, one that was never gone on with, and a damaged one."""
    place = tmp_path_factory.mktemp("storage") / "runs"
    for name, fields in TWO.items():
        orchestrator.finetune(
            backbone=str(tiny_resnet), data=str(flat_digits), name=name, storage=str(place), report=lambda _: None,
            scaling={"threads_per_worker": 1}, **{"method": "head", **fields},
        )  # fmt: skip
    for name, file in (("cut", "results.json"), ("damaged", "model")):
        (place / name).mkdir()
        for part in ("job.yaml", "plan.json", "metrics.jsonl", "results.json"):
            if part != file:
                (place / name / part).write_bytes((place / "second" / part).read_bytes())
    (place / "damaged" / "plan.json").write_text("{")
    return place


def rows(screen: Screen, *arguments: object) -> list[Any]:
    code, out, _ = screen("runs", *arguments, "--json")
    assert code == 0
    return json.loads(out)  # type: ignore[no-any-return]


def test_the_list_says_what_each_run_is(screen: Screen, storage: Path, flat_digits: Path) -> None:
    told = {row["name"]: row for row in rows(screen, "--storage", storage)}
    assert list(told) == ["cut", "damaged", "first", "second"]
    assert (told["cut"]["state"], told["cut"]["epochs"]) == ("unfinished", 3)
    assert (told["damaged"]["state"], told["damaged"]["backbone"]) == ("damaged", None)
    second = told["second"]
    assert second["state"] == "finished"
    assert (second["method"], second["data"]) == ("full", str(flat_digits))
    assert second["value"] == orchestrator.open_run(storage / "second").accuracy
    out = screen("runs", "--storage", storage)[1]
    assert "its plan cannot be read" in out
    assert "unfinished, epoch 3" in " ".join(out.split())
    assert f"accuracy {second['value']:.3f}" in out


def test_the_list_is_filtered_and_sorted(screen: Screen, storage: Path) -> None:
    def names(*arguments: object) -> list[str]:
        return [row["name"] for row in rows(screen, "--storage", storage, *arguments)]

    assert names("--method", "head") == ["first"]
    assert names("--state", "finished", "--data", "no such") == []
    assert names("--state", "unfinished") == ["cut"]
    assert names("--state", "damaged") == ["damaged"]
    finished = [orchestrator.open_run(storage / name) for name in TWO]
    best = max(finished, key=lambda run: run.accuracy).name
    assert names("--state", "finished", "--sort", "result")[0] == best
    assert names("--sort", "result")[2:] == ["cut", "damaged"]  # what has no figure comes last, whatever its task
    assert names("--state", "finished", "--sort", "date") == ["second", "first"]
    code, _, err = screen("runs", "--sort", "size")
    assert code == 2
    assert "Invalid value for '--sort': 'size' is not one of" in err
    assert "date" in err
    code, _, err = screen("runs", "--storage", storage, "--method", "ful")
    assert code == 2
    assert "lp-ft" in err
    assert "none of the 4 runs in" in screen("runs", "--storage", storage, "--method", "lora")[1]
    assert "orchestrator runs show first" in screen("runs", "--storage", storage, "compare", "first")[2]


def test_a_run_is_known_by_its_name_to_all_commands(
    screen: Screen, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`runs show` took it, and predict sent to the list of runs, where it stands."""
    monkeypatch.chdir(storage.parent)
    assert orchestrator.open_run("first").place == str(storage / "first")
    near = "did you mean runs/first?"
    for given, mend in (("frist", near), ("runs/frist", near), ("runs/first/model", near),
                        ("x", "list them: orchestrator runs")):  # fmt: skip
        with pytest.raises(RefusedError, match="there is no run") as refused:
            orchestrator.open_run(given)
        assert refused.value.mend == mend
    code, _, err = screen("predict", "first", "none.png")
    assert (code, "there is no run" in err) == (1, False)


def test_one_run_is_shown_whole(screen: Screen, storage: Path) -> None:
    out = screen("runs", "show", "second", "--storage", storage)[1]
    run = orchestrator.open_run(storage / "second")
    assert "training.epochs 3" in " ".join(out.split())
    assert f"{run.results['best_epoch']} kept" in out
    assert f"{run.accuracy:.3f}" in out
    assert "orchestrator finetune" in screen("runs", "show", storage / "cut")[1]
    told = json.loads(screen("runs", "show", storage / "second", "--json")[1])
    assert [line["epoch"] for line in told["metrics"]] == [1, 2, 3]
    code, _, err = screen("runs", "show", "nothing", "--storage", storage)
    assert (code, "there is no run nothing" in err) == (2, True)
    assert screen("runs", "show", "damaged", "--storage", storage)[0] == 2


def test_runs_are_compared_by_what_differs(screen: Screen, storage: Path) -> None:
    out = screen("runs", "compare", "first", "second", "--storage", storage)[1]
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if len(line.split()) > 2}
    assert lines["method"] == ["head", "full"]
    assert lines["training.epochs"] == ["default", "3"]
    assert "data.path" not in lines
    told = json.loads(screen("runs", "compare", "first", "second", "--storage", storage, "--json")[1])
    assert [one["settings"]["method"] for one in told] == ["head", "full"]
    edges = [one["figures"]["accuracy_95"] for one in told]
    overlap = max(low for low, _ in edges) <= min(high for _, high in edges)
    assert ("may be chance" in out) == overlap
    code, _, err = screen("runs", "compare", "first", "--storage", storage)
    assert (code, "two runs or more" in err) == (2, True)
    out = screen("runs", "compare", "first", "cut", "--storage", storage)[1]
    assert "different samples" not in out
    assert "unfinished" in out


def test_a_folder_whose_name_says_nothing_is_called_by_what_does(tiny_resnet: Path, tmp_path: Path) -> None:
    import shutil

    place = shutil.copytree(tiny_resnet, tmp_path / "flowers" / "backbone")
    assert orchestrator.check(str(place), "image").name == "flowers"
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "_name_or_path": "microsoft/resnet-50"}))
    assert orchestrator.check(str(place), "image").name == "resnet-50"
    (place / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/me/secret"}))
    assert orchestrator.check(str(place), "image").name == "flowers"
    assert orchestrator.check(str(tiny_resnet), "image").name == tiny_resnet.name
