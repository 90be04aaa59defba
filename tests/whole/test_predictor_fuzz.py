"""`predict` and `evaluate` on what is broken: a `problem`, or a refusal with a mend, and never a trace.

FUZZ_NUM=1000 FUZZ_SEED=7 python -m pytest tests/whole/test_predictor_fuzz.py    # more of them, and others
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.errors import DataError, OrchestratorError, RefusedError
from orchestrator.modality import registry
from tests.data.test_fuzz import mutate
from tests.tiny import make_bert, make_wav2vec2
from tests.toys import write_toys
from tests.unlisted import make_unlisted

NUM = int(os.environ.get("FUZZ_NUM", "30"))
SEED = os.environ.get("FUZZ_SEED", "0")
ODD = (None, "", -1, 0, [], {}, 10**30, "x", 1.5, True, ["a"], {"a": 1}, "../../etc/passwd", [None], float("nan"))
KINDS: dict[str, tuple[str, Callable[[Path], Path] | None, dict[str, Any]]] = {
    "image": ("image", None, {}),
    "audio": ("audio", make_wav2vec2, {}),
    "text": ("text", make_bert, {"head": "native"}),
    "text, pooled": ("text", make_bert, {"head": "pooled"}),
}
Finished = Callable[[str], tuple[orchestrator.Run, Path]]


@pytest.fixture(scope="module")
def finished(tiny_vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A kind -> its run, and the table that it learnt from."""
    made: dict[str, tuple[orchestrator.Run, Path]] = {}

    def make(kind: str) -> tuple[orchestrator.Run, Path]:
        if kind not in made:
            modality, backbone, settings = KINDS[kind]
            folder = tmp_path_factory.mktemp("fuzz")
            table = write_toys(folder, modality)
            run = orchestrator.finetune(
                method="head",
                modality=modality, backbone=str(tiny_vit if backbone is None else backbone(folder / "backbone")),
                data=str(table), settings=settings, training={"epochs": 1, "batch_size": 8}, name="run",
                scaling={"threads_per_worker": 1}, storage=str(folder), report=lambda _: None,
            )  # fmt: skip
            made[kind] = run, table
        return made[kind]

    return make


def answered(call: Callable[[], Any], what: object) -> Any:
    """What the call gives, None for a refusal that says what to do; all else fails."""
    try:
        return call()
    except OrchestratorError as error:
        if error.mend:
            return None
        raise AssertionError(f"{what}: without a mend: {error}") from error
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


# --- runs that are damaged ---


def places(tree: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to every value."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*before, key)
        yield from places(value, (*before, key))


def damage(file: Path, chance: random.Random) -> str:
    content = file.read_bytes()
    how = chance.choice(("gone", "folder", "mutated", "value", "value", "value"))
    if how == "value" and file.suffix == ".json":
        tree = at = json.loads(content)
        *path, last = chance.choice(list(places(tree)))
        for key in path:
            at = at[key]
        value = chance.choice((*ODD, "gone"))
        if value == "gone":
            del at[last]
        else:
            at[last] = value
        file.write_text(json.dumps(tree))
        return f"{file}: {'.'.join(map(str, (*path, last)))} = {value!r}"
    if how in ("gone", "folder"):
        file.unlink()
    if how == "folder":
        file.mkdir()
    if how not in ("gone", "folder"):
        file.write_bytes(mutate(content, b"[1, 2]", chance))
    return f"{file}: {how}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_run_that_is_damaged_in_any_file_predicts_or_is_refused(kind: str, finished: Finished) -> None:
    run, table = finished(kind)
    asked = "the rain falls" if kind.startswith("text") else str(next(table.parent.glob("0.*")))
    files = [file.relative_to(run.path) for file in sorted(run.path.rglob("*")) if file.is_file()]
    files = [file for file in files if file.parts[0] not in ("checkpoints", "tensorboard", ".lock")]
    assert {"plan.json", "results.json", "config.json", "model.safetensors"} <= {file.name for file in files}
    chance, refused = random.Random(f"{kind} {SEED}"), 0
    for number in range(NUM):
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(run.path, "run", ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
        what = damage("run" / files[number % len(files)], chance)
        refused += answered(lambda: orchestrator.predict("run", [asked]), what) is None
        answered(lambda: orchestrator.evaluate("run", str(table)), what)
    assert 0 < refused < NUM


def test_a_model_that_nothing_can_be_built_from_is_damaged(finished: Finished) -> None:
    run, _ = finished("image")
    shutil.copytree(run.path, "run")
    config = json.loads(Path("run/model/config.json").read_text())
    Path("run/model/config.json").write_text(json.dumps({**config, "hidden_size": ["a"]}))
    with pytest.raises(RefusedError, match="nothing can be built from") as caught:
        orchestrator.predict("run", [])
    assert caught.value.reason == "damaged"
    assert caught.value.__cause__ is not None


# --- inputs that are broken ---


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "audio"])
@pytest.mark.filterwarnings("ignore")
def test_broken_files_have_a_problem_or_a_prediction(kind: str, finished: Finished, tmp_path: Path) -> None:
    run, table = finished(kind)
    contents = [file.read_bytes() for file in sorted(table.parent.glob(f"*{registry.get(kind).sample[0].suffixes[0]}"))]
    chance, given = random.Random(f"{kind} files {SEED}"), []
    for number in range(3 * NUM):
        file = tmp_path / f"{number}{chance.choice(registry.get(kind).sample[0].suffixes)}"
        file.write_bytes(mutate(chance.choice(contents), chance.choice(contents), chance))
        given.append(file)
    (tmp_path / "a-folder.png").mkdir()
    odd = ["", "gone.png", "a\0b.png", "a" * 5000, "/dev/null", "\udcff.png", tmp_path / "a-folder.png", b""]
    found = answered(lambda: orchestrator.predict(run, [*given, *odd]), kind)
    assert len(found) == len(given) + len(odd)
    assert all(bool(one.problem) != bool(one.top) for one in found)
    assert any(one.problem for one in found[: len(given)])
    rows = [{"path": file.name, "label": run.plan.classes[0]} for file in given]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert answered(lambda: orchestrator.evaluate(run, str(tmp_path / "t.jsonl")), kind) is None
    skip = orchestrator.job.Data(path=str(tmp_path / "t.jsonl"), on_bad_sample="skip")
    figures = answered(lambda: orchestrator.evaluate(run, skip), kind)
    assert figures["num_skipped"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "text, pooled"])
def test_broken_texts_have_a_problem_or_a_prediction(kind: str, finished: Finished) -> None:
    run, _ = finished(kind)
    chance = random.Random(f"{kind} {SEED}")
    marks = [
        "\ud800",
        "\udfff",
        "\0",
        "\ufeff",
        "\u202e",
        "[PAD]",
        "[CLS]",
        "</s>",
        "🌧",
        "rain",
        " ",
        "\n",
        "é",
        "\x1b[31m",
    ]
    given: list[Any] = ["".join(chance.choices(marks, k=chance.choice((0, 1, 5, 500)))) for _ in range(3 * NUM)]
    given += [("rain", "soup"), ("a", "b", "c"), (), b"\xff", b"", "a" * 10**6]
    found = answered(lambda: orchestrator.predict(run, given), kind)
    assert len(found) == len(given)
    assert all(bool(one.problem) != bool(one.top) for one in found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "text"])
@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
@pytest.mark.filterwarnings("ignore")
def test_broken_tables_are_read_or_refused(suffix: str, kind: str, finished: Finished) -> None:
    run, table = finished(kind)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    chance = random.Random(f"{kind} {suffix} {SEED}")
    for number in range(NUM // 2):
        cells = [{key: value if chance.random() < 0.9 else chance.choice(ODD[:9]) for key, value in row.items()}
                 for row in rows]  # fmt: skip
        names = {key: chance.choice((key, key, key, "", "other", "é")) for key in rows[0]}
        place = table.parent / f"odd{suffix}"
        write_cells(place, [{names[key]: value for key, value in row.items()} for row in cells])
        if number % 2:
            place.write_bytes(mutate(place.read_bytes(), b"\xff,\n", chance))
        what = (suffix, number, cells[:1], names)
        found = answered(partial(orchestrator.predict, run, place), what)
        assert found is None or all(bool(one.problem) != bool(one.top) for one in found)
        answered(partial(orchestrator.evaluate, run, str(place)), what)


def write_cells(place: Path, rows: list[dict[str, Any]]) -> None:
    import pandas

    if place.suffix == ".jsonl":
        place.write_text("\n".join(map(json.dumps, rows)))
    elif place.suffix == ".csv":
        pandas.DataFrame(rows).to_csv(place, index=False)
    else:
        pandas.DataFrame(rows).map(lambda value: None if value is None else str(value)).to_parquet(place)


def test_a_sample_that_the_network_cannot_take_is_named_by_evaluate(tmp_path: Path) -> None:
    """Of a plugin that cannot tell beforehand."""
    import numpy as np

    from orchestrator.modality import register, registry as modalities
    from tests.testing.test_check import SENSOR

    register(SENSOR)
    try:
        for i in range(24):
            folder = tmp_path / "data" / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{i}.npy", np.sin(np.arange(90).reshape(3, 30) * (0.2 + i % 2 + i / 1000)))
        (tmp_path / "b").mkdir()
        config = {"model_type": "sensor-cnn", "channels": 3, "width": 4}
        (tmp_path / "b" / "config.json").write_text(json.dumps(config))
        run = orchestrator.pretrain(
            modality="sensor", backbone=str(tmp_path / "b"), data=str(tmp_path / "data"), report=lambda _: None,
            training={"epochs": 1, "batch_size": 8}, scaling={"threads_per_worker": 1},
        )  # fmt: skip
        np.save(tmp_path / "data" / "a" / "odd.npy", np.zeros((2, 30)))
        with pytest.raises(DataError, match=r"odd\.npy: RuntimeError: .*channels") as caught:
            orchestrator.evaluate(run, str(tmp_path / "data"))
        assert "on_bad_sample" in caught.value.mend
        skip = orchestrator.job.Data(path=str(tmp_path / "data"), on_bad_sample="skip")
        assert orchestrator.evaluate(run, skip)["num_skipped"] == 1
    finally:
        modalities.unregister("sensor")


@pytest.mark.slow
@pytest.mark.parametrize(
    "encoding", ["ascii", *(pytest.param(one, marks=pytest.mark.long) for one in ("utf-8:strict", "latin-1"))]
)
def test_an_output_that_cannot_hold_a_text_gets_escapes(encoding: str, finished: Finished) -> None:
    run, _ = finished("text")
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    for more in ((), ("--json",)):
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator.terminal.cli", "predict", str(run.path), "雨 🌧 rain", b"\xff", *more],
            capture_output=True, env=environment, timeout=240, check=False,
        )  # fmt: skip
        assert b"Traceback" not in done.stderr
        assert done.returncode == 1
    told = json.loads(done.stdout.decode(encoding.partition(":")[0]))
    assert [one["input"] for one in told] == ["雨 🌧 rain", "\udcff"]


def test_a_folder_that_cannot_be_listed_is_a_problem(finished: Finished, tmp_path: Path) -> None:
    run, table = finished("image")
    (tmp_path / "photos").mkdir()
    shutil.copy(table.parent / "0.png", tmp_path / "photos" / "0.png")
    make_unlisted(tmp_path / "photos")
    whole, deep = orchestrator.predict(run, tmp_path / "photos")
    assert (whole.input, whole.problem) == (str(tmp_path / "photos" / "0.png"), "")
    assert deep.problem == "its files cannot be listed: File name too long"


def test_data_of_an_empty_name_is_refused_and_not_the_folder_that_one_is_in() -> None:
    with pytest.raises(RefusedError, match=r"data\.path = ''"):
        orchestrator.plan(backbone="x", data="")
