"""The audio plugin: what is read, what the data is held against, every type, and the pipeline's own scores."""

from __future__ import annotations

import contextlib
import io
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers

import orchestrator
from orchestrator.errors import BadSampleError, DataError, RefusedError
from orchestrator.gate import planning
from orchestrator.modality import registry
from orchestrator_audio import MAX_SECONDS_READ, decode
from tests.conftest import save_backbone

RATE = 8000


def tone(pitch_hz: float, seconds: float, rate_hz: int = RATE, channels: int = 1) -> np.ndarray:
    wave = 0.4 * np.sin(2 * np.pi * pitch_hz * np.arange(round(seconds * rate_hz)) / rate_hz)
    return np.repeat(wave.astype(np.float32)[:, None], channels, axis=1)


def encoded(samples: np.ndarray, rate_hz: int = RATE, form: str = "WAV", subtype: str | None = None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate_hz, format=form, subtype=subtype)
    return out.getvalue()


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 tones of two classes, of three lengths, at 8 kHz: each new length costs oneDNN a new kernel."""
    root, chance = tmp_path_factory.mktemp("tones"), random.Random(0)
    for i in range(40):
        label, pitch = ("high", 1500) if i % 2 else ("low", 250)
        (root / label).mkdir(exist_ok=True)
        samples = tone(pitch * chance.uniform(0.9, 1.1), chance.choice((0.2, 0.3, 0.35)))
        (root / label / f"{i:02}.wav").write_bytes(encoded(samples))
    return root


WAVE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "conv_dim": [16, 16],
    "conv_kernel": [10, 8], "conv_stride": [5, 4], "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16, "num_labels": 3,
}  # fmt: skip
CODES = {"num_codevectors_per_group": 4, "codevector_dim": 8, "proj_codevector_dim": 8, "num_negatives": 2}
MELS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "num_labels": 3}


def of_waves(config: type, **more: Any) -> Callable[[], tuple[Any, Any]]:
    def make() -> tuple[Any, Any]:
        return config(**{**WAVE, **more}), transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE)

    return make


def of_ast() -> tuple[Any, Any]:
    config = transformers.ASTConfig(**MELS, max_length=64, num_mel_bins=32)
    return config, transformers.ASTFeatureExtractor(sampling_rate=RATE, max_length=64, num_mel_bins=32)


def of_whisper() -> tuple[Any, Any]:
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=48, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=48, num_mel_bins=16, max_source_positions=50, vocab_size=60,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, classifier_proj_size=16, num_labels=3,
    )  # fmt: skip
    return config, transformers.WhisperFeatureExtractor(
        feature_size=16, sampling_rate=RATE, chunk_length=1, hop_length=80, n_fft=200
    )


def of_bert() -> tuple[Any, Any]:
    config = transformers.Wav2Vec2BertConfig(**MELS, feature_projection_input_dim=160, conv_depthwise_kernel_size=3)
    return config, transformers.SeamlessM4TFeatureExtractor(sampling_rate=RATE)


TYPES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "audio-spectrogram-transformer": of_ast,
    "data2vec-audio": of_waves(transformers.Data2VecAudioConfig, conv_pos_kernel_size=3, num_conv_pos_embeddings=2),
    "hubert": of_waves(transformers.HubertConfig),
    "sew": of_waves(transformers.SEWConfig),
    "sew-d": of_waves(transformers.SEWDConfig),
    "unispeech": of_waves(transformers.UniSpeechConfig, **CODES),
    "unispeech-sat": of_waves(transformers.UniSpeechSatConfig, **CODES),
    "wav2vec2": of_waves(transformers.Wav2Vec2Config),
    "wav2vec2-bert": of_bert,
    "wav2vec2-conformer": of_waves(transformers.Wav2Vec2ConformerConfig, conv_depthwise_kernel_size=3),
    "wavlm": of_waves(transformers.WavLMConfig),
    "whisper": of_whisper,
}


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            config, extractor = TYPES[name]()
            row = registry.get("audio").rules.accepts[name]
            folder = tmp_path_factory.mktemp(name)
            made[name] = save_backbone(folder, config, extractor, row.architecture)
        return made[name]

    return make


def train(backbone: Path, data: Path, **more: Any) -> orchestrator.Run:
    fields = {"method": "head", "training": {"epochs": 1, "batch_size": 8}, **more}
    return orchestrator.finetune(
        modality="audio", backbone=str(backbone), data=str(data), report=lambda _: None, **fields
    )


def plan(backbone: Path, data: Path, **more: Any) -> Any:
    fields = {"method": "head", **more}
    return orchestrator.plan(modality="audio", backbone=str(backbone), data=str(data), **fields)


def test_the_types_here_are_those_that_are_accepted() -> None:
    assert set(TYPES) == {name for name, row in registry.get("audio").rules.accepts.items() if not row.pool}


@pytest.mark.parametrize("name", TYPES)
def test_every_type_trains_and_a_batch_is_as_its_samples_alone(
    name: str, backbones: Callable[[str], Path], tones: Path
) -> None:
    run = train(backbones(name), tones)
    assert run.lineage["features"] == "once"
    full = train(backbones(name), tones, method="full")
    files = sorted(tones.glob("*/*.wav"))[:4]
    together = orchestrator.predict(full, files)
    classify = transformers.pipeline("audio-classification", model=str(full.model), top_k=None)
    for file, one in zip(files, together, strict=True):
        (alone,) = orchestrator.predict(full, file)
        assert alone.score == pytest.approx(one.score, abs=1e-5)
        theirs = {found["label"]: found["score"] for found in classify(soundfile.read(file, dtype="float32")[0])}
        assert theirs[one.label] == pytest.approx(one.score, abs=1e-4)


@pytest.mark.parametrize("whole", ["WhisperModel", "WhisperForConditionalGeneration"])
def test_a_whisper_as_it_is_published(whole: str, tones: Path, tmp_path: Path) -> None:
    """With its decoder, and without a projector: that one is new, and so part of the head."""
    config, extractor = of_whisper()
    run = train(save_backbone(tmp_path / "whisper", config, extractor, whole), tones)
    assert any(name.startswith("projector.") for name in run.lineage["new_tensors"])


def test_longer_than_the_one_length_is_cropped_as_the_extractor_does(
    backbones: Callable[[str], Path], tmp_path: Path
) -> None:
    for i in range(8):
        file = tmp_path / "data" / "ab"[i % 2] / f"{i}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(tone(300 + 40 * i, 2.5)))
    run = train(backbones("audio-spectrogram-transformer"), tmp_path / "data", **{"data.test_fraction": 0})
    classify = transformers.pipeline("audio-classification", model=str(run.model), top_k=None)
    theirs = {one["label"]: one["score"] for one in classify(soundfile.read(file, dtype="float32")[0])}
    (ours,) = orchestrator.predict(run, file)
    assert theirs[ours.label] == pytest.approx(ours.score, abs=1e-6)


def test_it_learns_and_is_the_same_in_every_step(backbones: Callable[[str], Path], tones: Path) -> None:
    run = train(
        backbones("wav2vec2"), tones, method="full", settings={"augment": "light"},
        training={"epochs": 12, "batch_size": 8, "learning_rate": 1e-3}, **{"data.test_fraction": 0.2},
    )  # fmt: skip
    assert run.accuracy > 0.8
    assert run.lineage["features"] == "every step"
    before = transformers.AutoModel.from_pretrained(backbones("wav2vec2")).state_dict()
    after = transformers.AutoModel.from_pretrained(train(backbones("wav2vec2"), tones).model).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_data_is_held_against_the_backbone(backbones: Callable[[str], Path], tmp_path: Path) -> None:
    for i, (rate, channels, seconds) in enumerate(
        [(4000, 1, 0.3), (RATE, 2, 3.0), (16000, 1, 0.3), (RATE, 1, 0.002)] * 6
    ):
        file = tmp_path / "data" / "ab"[i // 4 % 2] / f"{i}.flac"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(tone(300 + i, seconds, rate, channels), rate, "FLAC"))
    made = plan(backbones("wav2vec2"), tmp_path / "data", settings={"max_seconds": 2})
    found = {one.what: one for one in made.adaptations}
    assert found["resample"].share == found["mono"].share * 2 == 0.5
    assert found["resample"].used == "8000 Hz"
    assert found["crop"].share == 0.25
    warnings = " / ".join(made.warnings)
    assert "at 4000 Hz they hold nothing above 2000 Hz" in warnings
    assert "25% of the recordings are longer than 2 s" in warnings
    assert "filled up with silence" in warnings
    whisper = plan(backbones("whisper"), tmp_path / "data")
    assert whisper.input["max_seconds"] == 1
    assert {one.what for one in whisper.adaptations} == {"resample", "mono", "crop", "pad"}
    train(backbones("hubert"), tmp_path / "data")  # and it can be done


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        (None, "no_processor", "no preprocessor_config.json"),
        ({}, "bad_config", "sampling_rate in preprocessor_config.json is None"),
        ({"sampling_rate": "16k"}, "bad_config", "is '16k'"),
        ({"sampling_rate": 8000, "feature_size": 80}, "bad_config", "16 mel bins"),
        ({"sampling_rate": 8000, "feature_size": 16, "chunk_length": 30}, "bad_config", "100 frames"),
    ],
)
def test_what_the_feature_extractor_says_must_be_right(
    backbones: Callable[[str], Path], tmp_path: Path, change: dict[str, Any] | None, reason: str, words: str
) -> None:
    backbone = tmp_path / "backbone"
    backbone.mkdir()
    for file in backbones("whisper").iterdir():
        if file.name != "preprocessor_config.json":
            (backbone / file.name).symlink_to(file)
    if change is not None:
        from json import dumps

        (backbone / "preprocessor_config.json").write_text(dumps({"hop_length": 80, "chunk_length": 1, **change}))
    with pytest.raises(RefusedError, match=words) as caught:
        orchestrator.check(str(backbone), "audio")
    assert caught.value.reason == reason


def test_a_longer_time_than_the_backbone_takes(backbones: Callable[[str], Path], tones: Path) -> None:
    with pytest.raises(RefusedError, match="takes 1 s only") as caught:
        plan(backbones("whisper"), tones, settings={"max_seconds": 4})
    assert caught.value.reason == "fixed_size"


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3", "AIFF"])
def test_what_is_read(form: str) -> None:
    found = decode({"audio": encoded(tone(440, 0.5, channels=2), form=form)})
    assert found.samples.dtype == np.float32
    assert (found.rate_hz, found.channels, found.samples.ndim) == (RATE, 2, 1)
    assert found.encoding.startswith(form)
    assert found.seconds == pytest.approx(0.5, abs=0.15)
    assert np.abs(found.samples).max() == pytest.approx(0.4, abs=0.1)


@pytest.mark.parametrize(
    ("form", "subtype", "expected"),
    [("WAV", "PCM_24", "WAV PCM_24"), ("FLAC", "PCM_16", "FLAC PCM_16"), ("OGG", "OPUS", "OGG OPUS")],
)
def test_how_it_is_encoded_is_measured(
    form: str, subtype: str, expected: str, backbones: Callable[[str], Path], tmp_path: Path
) -> None:
    for i in range(12):
        file = tmp_path / "data" / "ab"[i % 2] / f"{i}.flac"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(tone(300 + i, 0.3), form=form, subtype=subtype))
    found = planning.inspect(str(backbones("wav2vec2")), "audio", str(tmp_path / "data")).profile
    assert found is not None
    assert found.counts["encoding"] == {expected: 12}


def test_two_channels_never_take_the_memory_of_two() -> None:
    left, right = (np.full(60 * 48_000, level, np.float32) for level in (0.5, 0.25))
    content = encoded(np.stack([left, right], axis=1), 48_000, subtype="FLOAT")
    tracemalloc.start()
    try:
        found = decode({"audio": content})
        peak = tracemalloc.get_traced_memory()[1] - len(content)  # which libsndfile reads from a copy
    finally:
        tracemalloc.stop()
    assert np.array_equal(found.samples, np.full(60 * 48_000, 0.375, np.float32))
    assert found.channels == 2
    assert peak < 1.6 * found.samples.nbytes


def test_of_three_hours_the_beginning_is_read() -> None:
    found = decode({"audio": encoded(np.zeros((3 * 3600 * 1000, 1), np.int16), 1000, "FLAC")})
    assert found.seconds == 3 * 3600
    assert len(found.samples) == MAX_SECONDS_READ * 1000


WAV = encoded(tone(440, 0.5))
FLAC = encoded(tone(440, 0.5), form="FLAC")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "the file is empty"),
        (b"no sound at all", "no audio that libsndfile can read"),
        (WAV[:30], "is cut off"),
        (WAV[:-2000], "is cut off: 6000 of the 8000 bytes of sound that its header tells"),
        (FLAC[: len(FLAC) // 2], "cut off|no audio"),
        (encoded(np.zeros((0, 1), np.float32)), "0 samples"),
        (encoded(np.array([[0.1], [np.nan], [0.2]], np.float32), subtype="FLOAT"), "not finite"),
        (encoded(np.array([[0.1], [3e38], [0.2]], np.float32), subtype="FLOAT"), "a sample of 3e\\+38"),
        (encoded(tone(440, 0.1), 2_000_000), "claims a sample rate of 2000000 Hz"),
        (encoded(np.array([[0.1], [np.inf], [0.2]], np.float32), subtype="FLOAT"), "not finite"),
    ],
    ids=[
        "empty",
        "text",
        "header",
        "cut",
        "cut FLAC",
        "no sample",
        "NaN",
        "loud",
        "rate",
        "infinite",
    ],  # libsndfile writes the time
)
def test_what_cannot_be_read_says_why(content: bytes, problem: str) -> None:
    with pytest.raises(BadSampleError, match=problem):
        decode({"audio": content})


def test_a_wrong_suffix_is_no_matter(tones: Path, backbones: Callable[[str], Path], tmp_path: Path) -> None:
    for i, file in enumerate(sorted(tones.glob("*/*.wav"))):
        target = tmp_path / "data" / file.parent.name / f"{i}.mp3"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    assert plan(backbones("hubert"), tmp_path / "data", method="head").data.num_samples["train"] == 32
    (tmp_path / "data" / "low" / "photo.wav").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"photo\.wav: is no audio"):
        plan(backbones("hubert"), tmp_path / "data")


def test_the_other_kinds_of_files_name_their_modality(tones: Path, tiny_resnet: Path) -> None:
    with pytest.raises(DataError) as caught:
        orchestrator.plan(backbone=str(tiny_resnet), data=str(tones))
    assert caught.value.mend == "say what they are: --modality audio"


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3"])
def test_fuzzed_files_give_a_recording_or_a_reason(form: str) -> None:
    chance, whole = random.Random(form), encoded(tone(440, 0.3), form=form)
    for _ in range(100):
        content = bytearray(whole)
        for _ in range(chance.choice((1, 3, 20))):
            content[chance.randrange(len(content))] = chance.randrange(256)
        content = content[: chance.choice((len(content), chance.randrange(len(content)) + 1))]
        with contextlib.suppress(BadSampleError):
            found = decode({"audio": bytes(content)})
            assert found.samples.ndim == 1
            assert np.isfinite(found.samples).all()
