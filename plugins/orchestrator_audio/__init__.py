"""Audio: speech, sounds, music; what libsndfile reads, at any rate, mono or with more channels."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.errors import RefusedError
from orchestrator.modality import (
    Adaptation,
    BackboneCard,
    BackboneRow,
    BackboneRules,
    Facts,
    Fit,
    Modality,
    Plan,
    Profile,
    Sample,
    SampleField,
    Task,
)
from orchestrator_audio.recordings import MAX_SECONDS_READ as MAX_SECONDS_READ, Recording as Recording, decode as decode

if TYPE_CHECKING:
    from orchestrator.modality import Collate
    from orchestrator.network import Network

_DEFAULT_SECONDS = 30.0
_OFTEN = 0.1  # of the recordings cropped: more is worth a warning
_MIN_FRAMES = 4  # of the convolutions: some families halve their number again
CLAP = ("clap", "clap_audio_model")
SPECTROGRAM = ("audio-spectrogram-transformer", "whisper", *CLAP)
"""Types that take spectrograms of one length."""


class Settings(BaseModel):
    """The audio plugin's own settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_seconds: float | None = Field(
        None, gt=0, le=MAX_SECONDS_READ, description="of a longer recording the beginning is used; default: 30, "
        "or what the backbone is fixed to"
    )  # fmt: skip
    augment: Literal["none", "light"] = Field(
        "none", description="light: gain, noise, shift in time; on spectrograms masks in time and frequency"
    )


def measure(recording: Recording, card: BackboneCard) -> Facts:  # noqa: ARG001  # measured without the backbone
    """Rate in Hz, channels, seconds, and how it is encoded; `end` where nothing marks it."""
    facts: dict[str, int | float | str] = {
        "rate_hz": recording.rate_hz,
        "channels": recording.channels,
        "encoding": recording.encoding,
        "seconds": round(recording.seconds, 3),
    }
    return facts if recording.end_marked else {**facts, "end": "not marked"}


def fit(card: BackboneCard, row: BackboneRow, settings: Settings, profile: Profile | None) -> Fit:  # noqa: ARG001
    """The backbone's rate and length; resampling, mixing down, cropping and padding as adaptations."""
    rate = _rate(card)
    fixed = _fixed_seconds(card, rate)
    if fixed is not None and settings.max_seconds is not None and settings.max_seconds > fixed:
        raise RefusedError(
            "fixed_size",
            f"{card.source} ({card.model_type}) takes {fixed:g} s only, and settings.max_seconds = "
            f"{settings.max_seconds:g}",
            expected=f"{fixed:g} or less",
            mend="leave settings.max_seconds out; longer recordings are cropped to what the backbone takes",
        )
    if fixed is not None and not 0 < fixed <= MAX_SECONDS_READ:
        raise RefusedError(
            "bad_config",
            f"{card.source}: preprocessor_config.json makes every recording {fixed:g} s long",
            expected=f"more than 0, and at most {MAX_SECONDS_READ} s",
            mend="save the right feature extractor beside the model",
        )
    seconds = settings.max_seconds or fixed or _DEFAULT_SECONDS
    shortest = _shortest(card, rate)
    adaptations: list[Adaptation] = []
    notes: list[str] = []
    if profile is not None and profile.num_measured:
        filling = "repeated" if card.model_type in CLAP and (card.preprocessor or {}).get(
            "padding", "repeatpad") in ("repeat", "repeatpad") else "silence"  # fmt: skip
        adaptations, notes = _hold_against(profile, rate, seconds, fixed, shortest, filling)
    return Fit(
        input={
            "sample_rate_hz": rate,
            "max_seconds": seconds,
            "min_samples": shortest,
            "augment": settings.augment,
        },
        adaptations=adaptations,
        warnings=notes,
        augmented=settings.augment != "none",
        augmentation=("augment",),
    )


def _hold_against(
    profile: Profile, rate: int, seconds: float, fixed: float | None, shortest: int, filling: str
) -> tuple[list[Adaptation], list[str]]:
    adaptations, notes = [], []
    other_rate = profile.share(lambda one: one["rate_hz"] != rate)
    if other_rate:
        adaptations.append(
            Adaptation(what="resample", received=f"{profile.ranges['rate_hz']} Hz", used=f"{rate} Hz", share=other_rate)
        )
    lower = profile.share(lambda one: one["rate_hz"] < rate)
    if lower:
        least = profile.ranges["rate_hz"].min
        notes.append(
            f"{lower:.0%} of the recordings have a lower rate than the backbone's {rate} Hz: at {least:g} Hz they hold "
            f"nothing above {least / 2:g} Hz, which the backbone has learnt to listen to"
        )
    mixed = profile.share(lambda one: one["channels"] > 1)
    if mixed:
        adaptations.append(
            Adaptation(what="mono", received=f"{profile.ranges['channels']} channels", used="their mean", share=mixed)
        )
    long = profile.share(lambda one: one["seconds"] > seconds)
    received = f"{profile.ranges['seconds']} s"
    if long:
        adaptations.append(Adaptation(what="crop", received=received, used=f"the first {seconds:g} s", share=long))
    if long > _OFTEN:
        notes.append(
            f"{long:.0%} of the recordings are longer than {seconds:g} s, and what comes later is not used"
            + ("" if fixed is not None else ": raise settings.max_seconds, or cut them into pieces")
        )
    if fixed is not None:
        short = profile.share(lambda one: one["seconds"] < fixed)
        if short:
            adaptations.append(Adaptation(what="pad", received=received, used=f"{fixed:g} s, {filling}", share=short))
    open_ended = profile.share(lambda one: "end" in one)
    if open_ended:
        notes.append(
            f"{open_ended:.0%} of the recordings carry no mark of their end (OGG without a last page, MP3 without a "
            "length): if one of them was cut off, it is used as a shorter one"
        )
    tiny = profile.share(lambda one: one["seconds"] * rate < shortest)
    if tiny:
        notes.append(
            f"{tiny:.0%} of the recordings are shorter than {1000 * shortest / rate:.0f} ms, the least that the "
            "backbone hears, and are filled up with silence"
        )
    return adaptations, notes


def _rate(card: BackboneCard) -> int:
    if card.preprocessor is None:
        raise RefusedError(
            "no_processor",
            f"{card.source} has no preprocessor_config.json, so nobody can know at which sample rate it listens",
            expected="the feature extractor's settings, sampling_rate among them",
            mend="save the feature extractor beside the model: AutoFeatureExtractor...save_pretrained()",
        )
    rate = card.preprocessor.get("sampling_rate")
    if not isinstance(rate, int) or isinstance(rate, bool) or not 1_000 <= rate <= 384_000:
        raise RefusedError(
            "bad_config",
            f"{card.source}: sampling_rate in preprocessor_config.json is {rate!r}",
            expected="a number of samples a second, such as 16000",
            mend="save the right feature extractor beside the model",
        )
    return rate


def _fixed_seconds(card: BackboneCard, rate: int) -> float | None:
    """The one length that the backbone takes, in seconds; None where it takes any."""
    config, settings = card.config, card.preprocessor or {}
    if card.model_type == "whisper":
        hop = int(settings.get("hop_length", 160))
        frames = 2 * int(config.get("max_source_positions", 1500))
        seconds = float(settings.get("chunk_length", 30))
        _require_equal(card, "frames", round(seconds * rate / hop), frames)
        _require_equal(card, "mel bins", settings.get("feature_size", 80), config.get("num_mel_bins", 80))
        return seconds
    if card.model_type == "audio-spectrogram-transformer":
        frames = int(config.get("max_length", 1024))
        _require_equal(card, "frames", settings.get("max_length", 1024), frames)
        _require_equal(card, "mel bins", settings.get("num_mel_bins", 128), config.get("num_mel_bins", 128))
        return ((frames - 1) * 160 + 400) / rate  # the extractor's window and hop, in samples at any rate
    if card.model_type in CLAP:
        tower = config.get("audio_config", config)
        _require_equal(card, "mel bins", settings.get("feature_size", 64), tower.get("num_mel_bins", 64))
        return float(settings.get("max_length_s", 10))
    if card.model_type == "wav2vec2-bert":
        width = int(settings.get("num_mel_bins", settings.get("feature_size", 80))) * int(settings.get("stride", 2))
        _require_equal(card, "numbers a frame", width, config.get("feature_projection_input_dim", 160))
    return None


def _require_equal(card: BackboneCard, what: str, theirs: object, wanted: object) -> None:
    if theirs != wanted:
        raise RefusedError(
            "bad_config",
            f"{card.source}: config.json is of a network for {wanted} {what}, and "
            f"preprocessor_config.json gives {theirs}",
            mend="save the right feature extractor beside the model",
        )


def _shortest(card: BackboneCard, rate: int) -> int:
    """The least number of samples that give the network something to listen to."""
    kernels, strides = card.config.get("conv_kernel"), card.config.get("conv_stride")
    if not (isinstance(kernels, Sequence) and isinstance(strides, Sequence)):
        return math.ceil(0.1 * rate)
    field, step = 1, 1
    for kernel, stride in zip(kernels, strides, strict=True):
        field += (int(kernel) - 1) * step
        step *= int(stride)
    return field + (_MIN_FRAMES - 1) * step


def build(plan: Plan, directory: Path) -> Network:
    """The backbone with its new head, through transformers."""
    from orchestrator_audio.network import build_network

    return build_network(plan, directory)


def batch(plan: Plan, directory: Path) -> Collate:
    """Recordings -> what the backbone's feature extractor gives."""
    from orchestrator_audio.network import make_collate

    return make_collate(plan, directory)


def toy(n: int) -> Sequence[tuple[Sample, str]]:
    """Low tones and high ones of a quarter of a second, 8 kHz, as WAV."""
    import numpy as np
    import soundfile

    samples = []
    for i in range(n):
        pitch_hz = (1200 if i % 2 else 300) + 7 * (i % 10)
        out = io.BytesIO()
        tone = 0.5 * np.sin(2 * np.pi * pitch_hz * np.arange(2000) / 8000)
        soundfile.write(out, tone.astype(np.float32), 8000, format="WAV")
        samples.append(({"audio": out.getvalue()}, "high" if i % 2 else "low"))
    return samples


modality = Modality(
    name="audio",
    title="audio",
    sample=(
        SampleField(
            name="audio",
            kind="file",
            dtype="float32",
            shape=("samples",),
            unit="mono, in [-1, 1], at the backbone's own sample rate",
            suffixes=(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au"),
        ),
    ),
    settings=Settings,
    rules=BackboneRules.from_json(Path(__file__).with_name("rows.json")),
    tasks=(
        Task(name="single-label", title="one class a recording"),
        Task(name="multi-label", title="any number of classes a recording"),
        Task(name="regression", title="one or several numbers a recording"),
    ),
    length_bucketing=True,
    extra="audio",
    decode=decode,
    measure=measure,
    fit=fit,
    build=build,
    batch=batch,
    toy=toy,
)
