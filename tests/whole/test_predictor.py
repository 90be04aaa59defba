"""Inputs of any size and kind for a finished run: how many are in memory, which one is wrong, in which order."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import orchestrator
from orchestrator.errors import DataError
from orchestrator.job import Data
from orchestrator.modality import Modality, registry
from orchestrator.predictor.inputs import Columns, asked_about
from tests.conftest import REPOSITORY, save_backbone
from tests.plugins.test_audio import encoded, of_ast, tone

MB = 2**20


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> orchestrator.Run:
    """Trained on tones; takes the first half second of a recording, whatever its length."""
    root = tmp_path_factory.mktemp("listener")
    for i in range(16):
        file = root / "tones" / "ab"[i % 2] / f"{i}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(tone(300 + 900 * (i % 2) + 10 * i, 0.5)))
    config, extractor = of_ast()
    return orchestrator.finetune(
        method="head",
        modality="audio", backbone=str(save_backbone(root / "ast", config, extractor, "ASTForAudioClassification")),
        data=str(root / "tones"), training={"epochs": 1}, storage=str(root / "runs"), report=lambda _: None,
        scaling={"threads_per_worker": 1},
    )  # fmt: skip


def peak(function: Callable[[], Any]) -> float:
    """The most memory of numpy and Python in use at once, in MB."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1] / MB
    finally:
        tracemalloc.stop()


def test_long_recordings_are_not_all_in_memory_at_once(listener: orchestrator.Run) -> None:
    """24 of eight minutes are 370 MB decoded, and 64 MB of files at a time are 128 MB."""
    Path("long.wav").write_bytes(encoded(np.tile(tone(440, 10), (48, 1))))
    assert 7 < Path("long.wav").stat().st_size / MB < 8
    one = peak(lambda: orchestrator.predict(listener, "long.wav"))
    found: list[orchestrator.Prediction] = []
    many = peak(lambda: found.extend(orchestrator.predict(listener, ["long.wav"] * 24)))
    assert len({prediction.label for prediction in found}) == 1
    assert [prediction.problem for prediction in found] == [""] * 24
    assert many < one + 150
    content = Path("long.wav").read_bytes()
    assert peak(lambda: orchestrator.predict(listener, [content] * 24)) < one + 150


def test_predictions_come_in_the_order_of_the_inputs(listener: orchestrator.Run) -> None:
    """However long they are, more than are decoded at once, and with some that cannot be read among them."""
    random, inputs = np.random.default_rng(0), []
    for i in range(70):
        file = Path(f"{i}.wav")
        file.write_bytes(encoded(tone(random.uniform(200, 2000), random.uniform(0.1, 1.0))))
        inputs.append(file.read_bytes() if i % 5 == 0 else file)
    Path("none.wav").write_bytes(b"RIFF")
    inputs[3], inputs[66] = Path("none.wav"), Path("gone.wav")
    found = orchestrator.predict(listener, inputs)
    names = ["none.wav" if i == 3 else "gone.wav" if i == 66 else f"{i}.wav" for i in range(70)]
    assert [one.input for one in found] == [f"input {i + 1}" if i % 5 == 0 else names[i] for i in range(70)]
    assert [i for i, one in enumerate(found) if one.problem] == [3, 66]
    for i in (0, 1, 40, 69):
        (alone,) = orchestrator.predict(listener, inputs[i])
        assert alone.score == pytest.approx(found[i].score, abs=1e-5)
        assert alone.label == found[i].label
    assert len({one.score for one in found}) > 60


@pytest.fixture(scope="module")
def sensor_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[orchestrator.Run]:
    """Of the example's plugin, which looks at the number of channels nowhere but in the network."""
    sys.path.insert(0, str(REPOSITORY / "examples" / "third_party"))
    try:
        import orchestrator_sensor
    finally:
        sys.path.pop(0)
    root = tmp_path_factory.mktemp("sensor")
    (root / "backbone").mkdir()
    (root / "backbone" / "config.json").write_text(json.dumps({"model_type": "sensor-cnn", "channels": 3, "width": 4}))
    for i, (sample, label) in enumerate(orchestrator_sensor.toy(24)):
        file = root / "data" / label / f"{i}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(sample["sensor"])
    registry.register(orchestrator_sensor.modality)
    try:
        yield orchestrator.pretrain(
            modality="sensor", backbone=str(root / "backbone"), data=str(root / "data"), report=lambda _: None,
            storage=str(root / "runs"), training={"epochs": 1, "batch_size": 8}, scaling={"threads_per_worker": 1},
        )  # fmt: skip
    finally:
        registry.unregister("sensor")


def signal(channels: int) -> bytes:
    out = io.BytesIO()
    np.save(out, np.ones((channels, 100), np.float32))
    return out.getvalue()


def test_a_sample_that_the_network_cannot_take_does_not_lose_the_others(sensor_run: orchestrator.Run) -> None:
    """Two channels are no batch with three, and nothing that the network knows."""
    good, odd, second = orchestrator.predict(sensor_run, [signal(3), signal(2), signal(3)])
    assert good.label == second.label in sensor_run.plan.classes
    assert (odd.label, odd.top) == ("", ())
    assert odd.problem.startswith("RuntimeError: ")
    assert "channels" in odd.problem
    (alone,) = orchestrator.predict(sensor_run, signal(2))
    assert alone.problem == odd.problem


def test_evaluating_a_sample_that_the_network_cannot_take_names_it(
    sensor_run: orchestrator.Run, tmp_path: Path
) -> None:
    """It ended with a trace."""
    for i in range(6):
        file = tmp_path / "data" / sensor_run.plan.classes[i % 2] / f"{i}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(signal(2 if i == 4 else 3) + bytes(i))  # no two are the same
    with pytest.raises(DataError, match=r"4\.npy: RuntimeError: .*channels") as refused:
        orchestrator.evaluate(sensor_run, tmp_path / "data")
    assert "on_bad_sample skip" in refused.value.mend
    figures = orchestrator.evaluate(sensor_run, Data(path=str(tmp_path / "data"), on_bad_sample="skip"))
    assert (figures["num_samples"], figures["num_skipped"]) == (5, 1)


def test_what_no_sample_is_at_fault_for_is_raised(sensor_run: orchestrator.Run) -> None:
    def batch(*_: Any) -> Any:
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    sensor: Modality = registry.get("sensor")
    registry.unregister("sensor")
    registry.register(dataclasses.replace(sensor, batch=lambda *_: batch))
    try:
        with pytest.raises(ModuleNotFoundError, match="scipy"):
            orchestrator.predict(sensor_run, [signal(3)])
    finally:
        registry.unregister("sensor")
        registry.register(sensor)


def test_texts_are_taken_by_their_length_and_come_back_in_order(tmp_path: Path) -> None:
    from tests.tiny import make_bert

    rows = [{"text": f"{'rain' if i % 2 else 'bread'} {i}", "label": "ab"[i % 2]} for i in range(20)]
    Path("t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = orchestrator.finetune(
        method="head",
        modality="text", backbone=str(make_bert(tmp_path / "bert")), data="t.jsonl", training={"epochs": 1},
        scaling={"threads_per_worker": 1}, report=lambda _: None,
    )  # fmt: skip
    texts = [("rain " * (i * 7 % 23 + 1)).strip() for i in range(80)]
    found = orchestrator.predict(run, texts)
    assert [one.input for one in found] == texts
    for i in (0, 1, 79):
        assert orchestrator.predict(run, texts[i])[0].score == pytest.approx(found[i].score, abs=1e-5)


@pytest.mark.parametrize("given", [(), ("file",)])
def test_a_table_is_one_sample_where_the_modality_says_so(given: tuple[str, ...], tmp_path: Path) -> None:
    """Recordings of a sensor as .csv files: `predict` read each as a table of paths."""
    image = registry.get("image")
    modality = dataclasses.replace(image, sample=(dataclasses.replace(image.sample[0], suffixes=(".csv",)),))
    file = tmp_path / "recording.csv"
    file.write_text("file,y\na.csv,2\nb.csv,3\n")
    asked = list(asked_about([str(file)], modality, Columns(Data(path="-"), print, given)))
    assert [(one.path, one.table) for one in asked] == (
        [(str(tmp_path / name), str(file)) for name in ("a.csv", "b.csv")] if given else [(str(file), "")]
    )
