"""The half of the audio plugin that needs torch: the model, its feature extractor, resampling, augmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soxr
import torch
import transformers
from torch import Tensor

from orchestrator.modality import Plan
from orchestrator.network import Inputs, Network, build_pooled, build_transformers, from_pipeline
from orchestrator_audio import SPECTROGRAM, Recording

Waveform = npt.NDArray[np.float32]

# Their attention takes a mask, and their convolutions see no padding: a sample in a batch is as it is alone.
MASKED = {"wav2vec2-bert"}
# transformers' own SpecAugment draws from numpy's global generator, which no seed of ours reaches.
_NO_SPEC_AUGMENT = {"apply_spec_augment": False}

_IMPORTS = (
    "import numpy as np\nimport soundfile\nimport soxr\nimport torch\nfrom transformers import AutoFeatureExtractor"
)
_READ = """\
samples, rate = soundfile.read("a file", dtype="float32", always_2d=True)
samples = samples[: -(-{most} * rate // {rate})].mean(axis=1)
sound = soxr.resample(samples, rate, {rate})[:{most}]
sound = np.pad(sound, (0, max(0, {least} - len(sound))))"""
_PREPARE = """\
{read}
inputs = AutoFeatureExtractor.from_pretrained(".")(sound, sampling_rate={rate}, return_tensors="pt")"""
_NATIVE = """\
import numpy as np
import soundfile
import soxr
from transformers import pipeline

{read}
{scores}"""


def build_network(plan: Plan, directory: Path) -> Network:
    """A model for audio classification, exported with its feature extractor."""
    rate = plan.input["sample_rate_hz"]
    read = _READ.format(rate=rate, most=round(plan.input["max_seconds"] * rate), least=plan.input["min_samples"])
    if plan.row.pool:
        extractor = make_extractor(directory)
        example = dict(extractor(np.zeros(rate, np.float32), sampling_rate=rate, return_tensors="pt"))
        prepare = _PREPARE.format(read=read, rate=rate)
        return build_pooled(plan, directory, extractor, {}, example, _IMPORTS, prepare)
    chosen = getattr(transformers, plan.row.architecture)
    network = build_transformers(
        plan, directory, chosen, _NO_SPEC_AUGMENT, make_extractor(directory),
        fresh=lambda config: chosen(config),
    )  # fmt: skip
    given = f'{{"raw": sound, "sampling_rate": {rate}}}'
    scores = from_pipeline(plan.job.task, "audio-classification", len(plan.classes), given)
    network.usage = _NATIVE.format(read=read, scores=scores)
    if plan.backbone.model_type not in (*SPECTROGRAM, *MASKED):
        network.parts = of_equal_length
    return network


def of_equal_length(inputs: Inputs) -> list[tuple[Tensor, Inputs]]:
    """Samples of one length together, without their padding.

    Most of these networks normalise over the whole length, so that padding would change what is heard, and
    the pipeline that serves them pads nothing.
    """
    lengths = inputs["lengths"]
    parts = []
    for length in lengths.unique().tolist():
        index = (lengths == length).nonzero().flatten()
        parts.append((index, {key: value[index, :length] for key, value in inputs.items() if key != "lengths"}))
    return parts


def make_extractor(directory: Path) -> Any:
    """The backbone's own feature extractor."""
    return transformers.AutoFeatureExtractor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def make_collate(plan: Plan, directory: Path) -> Callable[[Sequence[Recording], bool], dict[str, Tensor]]:
    """Recordings -> the feature extractor's output, each sample by itself, as the pipeline does it; then padded."""
    extractor = make_extractor(directory)
    rate = plan.input["sample_rate_hz"]
    augments = plan.input["augment"] == "light"
    fixed = plan.backbone.model_type in SPECTROGRAM
    masked = plan.backbone.model_type in MASKED

    def one(recording: Recording, train: bool) -> dict[str, Tensor]:
        heard = waveform(recording, plan, train)
        given = {key: torch.from_numpy(np.asarray(value[0])) for key, value in
                 extractor(heard, sampling_rate=rate, return_tensors="np").items()}  # fmt: skip
        if train and augments:
            given = {key: _mask_spectrogram(value) if value.ndim > 1 else value for key, value in given.items()}
        return given

    def collate(decoded: Sequence[Recording], train: bool) -> dict[str, Tensor]:
        rows = [one(recording, train) for recording in decoded]
        if fixed:
            name = next(key for key in rows[0] if key.startswith("input_"))
            more = {key: torch.stack([row[key] for row in rows]) for key in rows[0] if key == "is_longer"}
            return {name: torch.stack([row[name].float() for row in rows]), **more}
        kept = [key for key in rows[0] if key.startswith("input_") or (masked and key == "attention_mask")]
        batch = {key: torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True) for key in kept}
        if not masked:
            batch["lengths"] = torch.tensor([len(row[kept[0]]) for row in rows])
        return batch

    return collate


def make_waveform_collate(plan: Plan) -> Callable[[Sequence[Recording], bool], dict[str, Tensor]]:
    """The collate function of a network without a feature extractor, for plugins that bring one.

    It gives `input_values`, float32 [batch, samples], mono, at the plan's rate, filled up with zeros at the end,
    and `lengths`, int64 [batch], the samples that are not filled up.
    """

    def collate(decoded: Sequence[Recording], train: bool) -> dict[str, Tensor]:
        heard = [torch.from_numpy(waveform(recording, plan, train)) for recording in decoded]
        return {
            "input_values": torch.nn.utils.rnn.pad_sequence(heard, batch_first=True),
            "lengths": torch.tensor([len(one) for one in heard]),
        }

    return collate


def waveform(recording: Recording, plan: Plan, train: bool) -> Waveform:
    """float32 [samples]: what the plan's input settings make of a recording, augmented where `train` and they say so.

    Mono at the backbone's rate, no longer than `max_seconds`, filled up with silence to the least that it hears.
    """
    given = plan.input
    rate, augments = given["sample_rate_hz"], train and given["augment"] == "light"
    heard = listen(recording, rate, round(given["max_seconds"] * rate), at_random=augments)
    if augments:
        heard = _augment(heard)
    return np.pad(heard, (0, max(0, given["min_samples"] - len(heard))))


def listen(recording: Recording, rate: int, most: int, at_random: bool = False) -> Waveform:
    """float32 [samples], mono at `rate`: the first `most` samples, or `most` from a random place."""
    mono = recording.samples
    needed = min(len(mono), -(-most * recording.rate_hz // rate))
    start = int(torch.randint(len(mono) - needed + 1, ())) if at_random else 0
    mono = mono[start : start + needed]
    if recording.rate_hz != rate:
        mono = soxr.resample(mono, recording.rate_hz, rate, quality="HQ")
    return np.ascontiguousarray(mono[:most], dtype=np.float32)


def _augment(heard: Waveform) -> Waveform:
    """Gain of 6 dB up or down, a shift by a tenth of the length, and white noise 15 to 35 dB below."""
    gain, shift, below, has_noise = torch.rand(4).tolist()
    heard = np.roll(heard, int((shift - 0.5) * 0.2 * len(heard))) * np.float32(10 ** ((gain - 0.5) * 12 / 20))
    if has_noise < 0.5:
        level = float(np.sqrt(np.mean(heard**2))) * 10 ** (-(15 + 20 * below) / 20)
        heard = heard + level * torch.randn(len(heard)).numpy()
    return heard.astype(np.float32)


def _mask_spectrogram(spectrogram: Tensor) -> Tensor:
    """One band of each axis set to the mean (SpecAugment, Park et al. 2019, arXiv 1904.08779, without warping)."""
    masked = spectrogram.clone()
    for axis in (-2, -1):
        size = spectrogram.shape[axis]
        width = int(torch.randint(max(1, size // 8) + 1, ()))
        start = int(torch.randint(size - width + 1, ()))
        masked.narrow(axis, start, width).fill_(float(spectrogram.float().mean()))
    return masked
