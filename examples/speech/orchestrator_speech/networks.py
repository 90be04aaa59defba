"""CREPE and Resemblyzer's voice encoder, each with a classifier on what it hears of a whole recording.

It needs torch alone, and is saved beside every model that is trained with it.

Both take `input_values`, float32 [batch, samples], mono, 16 kHz, in [-1, 1], filled up with zeros at the end, and
`lengths`, int64 [batch], the samples that are sound (all of them, if left out), and give logits, float32
[batch, classes]. What is filled up is never computed, so that a recording in a batch is as it is alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool1d, pad

RATE_HZ = 16_000
_FRAME = 1024  # samples that CREPE sees at once
_QUIETEST = 1e-10
_LOUDNESS = 10 ** (-30 / 20)  # -30 dB of full scale, to which the voice encoder's input is raised
_WINDOW, _HOP, _MELS = 400, 160, 40  # samples, samples, bins: 25 ms, 10 ms


class Crepe(nn.Module):
    """CREPE (Kim et al. 2018, arXiv 1802.06182), a pitch tracker on raw waveforms, up to its last block.

    `config` gives `channels`, the width of the six blocks, and `hop_length`, the samples between frames. Features are
    the last block's output, its mean and its deviation over the frames, float32 [batch, 2 x 4 x channels[-1]]. Each
    frame counts by its loudness: frames are normalised one by one, silence as well, which so becomes noise.
    """

    def __init__(self, config: Mapping[str, Any], num_classes: int) -> None:
        super().__init__()
        self.hop = int(config["hop_length"])
        widths = [1, *config["channels"]]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(widths[i], widths[i + 1], *((512, 4) if i == 0 else (64, 1))) for i in range(6)
        )
        # torchcrepe's momentum of 0 would keep the statistics of random weights for ever.
        self.norms = nn.ModuleList(nn.BatchNorm1d(width, eps=0.0010000000474974513) for width in widths[1:])
        self.classifier = nn.Linear(8 * widths[-1], num_classes)

    def forward(self, input_values: Tensor, lengths: Tensor | None = None) -> Tensor:
        lengths = _lengths(input_values, lengths)
        counts = ((lengths - _FRAME).clamp(min=0) / self.hop).ceil().long() + 1
        needed = int((counts.max() - 1) * self.hop + _FRAME)
        sound = pad(input_values, (0, max(0, needed - input_values.shape[1])))
        frames = sound.unfold(1, _FRAME, self.hop)
        there = _mask(counts, frames.shape[1])
        found = self.blocks(_normalised(frames[there])).flatten(1)
        outputs = found.new_zeros(*there.shape, found.shape[1])
        outputs[there] = found
        return self.classifier(_mean_and_deviation(outputs, frames.std(dim=-1), there))

    def blocks(self, frames: Tensor) -> Tensor:
        """Normalised frames, float32 [frames, 1024], to the last block's output, float32 [frames, channels, 4]."""
        x = frames[:, None]
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = max_pool1d(norm(convolution(pad(x, (254, 254) if i == 0 else (31, 32))).relu()), 2)
        return x


class VoiceEncoder(nn.Module):
    """Resemblyzer's voice encoder, trained to tell speakers apart (Wan et al. 2018, arXiv 1710.10467), without its end.

    Three LSTMs of 256 on 40 mel bins. Features are what each of them gives, its mean over the frames, float32
    [batch, 768]. Each frame counts by its loudness, so that silence does not. The layer behind the LSTMs, which makes
    one vector a speaker, is left out: it is there to forget what is said.
    """

    def __init__(self, config: Mapping[str, Any], num_classes: int) -> None:
        super().__init__()
        width = int(config["hidden_size"])
        self.lstms = nn.ModuleList(
            nn.LSTM(_MELS if i == 0 else width, width, batch_first=True) for i in range(int(config["num_layers"]))
        )
        self.classifier = nn.Linear(len(self.lstms) * width, num_classes)
        self.register_buffer("window", torch.hann_window(_WINDOW), persistent=False)
        self.register_buffer("filters", mel_filters(), persistent=False)

    def forward(self, input_values: Tensor, lengths: Tensor | None = None) -> Tensor:
        lengths = _lengths(input_values, lengths)
        mels = self.mels(raised(input_values, lengths))
        there = _mask(1 + lengths // _HOP, mels.shape[1])
        loudness = mels.sum(dim=-1).sqrt()
        means = []
        outputs = mels
        for lstm in self.lstms:  # it runs forward in time: what is filled up comes after all that counts
            outputs, _ = lstm(outputs)
            means.append(_mean_and_deviation(outputs, loudness, there, deviation=False))
        return self.classifier(torch.cat(means, dim=1))

    def mels(self, sound: Tensor) -> Tensor:
        """float32 [batch, samples] to the power in each mel bin, not its logarithm, float32 [batch, frames, 40]."""
        spectrum = torch.stft(sound, _WINDOW, _HOP, window=self.window, pad_mode="constant", return_complex=True)
        return (self.filters @ spectrum.abs().square()).transpose(1, 2)


def raised(sound: Tensor, lengths: Tensor) -> Tensor:
    """The waveforms, quiet ones made as loud as the voice encoder is used to."""
    level = (sound.square().sum(dim=1) / lengths).sqrt().clamp(min=_QUIETEST)
    return sound * (_LOUDNESS / level).clamp(min=1.0)[:, None]


def mel_filters() -> Tensor:
    """float32 [40 bins, 201 frequencies], librosa's own: Slaney's scale and areas."""
    linear, step = 1000.0, math.log(6.4) / 27  # in Hz; above, the scale is logarithmic
    top = 15 + math.log(RATE_HZ / 2 / linear) / step
    mels = torch.linspace(0, top, _MELS + 2, dtype=torch.float64)
    edges = torch.where(mels < 15, mels * 200 / 3, linear * torch.exp((mels - 15) * step))
    frequencies = torch.linspace(0, RATE_HZ / 2, _WINDOW // 2 + 1, dtype=torch.float64)
    slopes = frequencies[None] - edges[:, None]
    widths = edges.diff()[:, None]
    triangles = torch.minimum(slopes[:-2] / widths[:-1], -slopes[2:] / widths[1:]).clamp(min=0)
    return (triangles * 2 / (edges[2:] - edges[:-2])[:, None]).float()


def _lengths(sound: Tensor, lengths: Tensor | None) -> Tensor:
    return torch.full((len(sound),), sound.shape[1], device=sound.device) if lengths is None else lengths


def _mask(counts: Tensor, most: int) -> Tensor:
    """bool [batch, most]: the first of each row, so many as `counts` says."""
    return torch.arange(most, device=counts.device)[None] < counts[:, None]


def _normalised(frames: Tensor) -> Tensor:
    """Frames with mean 0 and deviation 1, as torchcrepe gives them."""
    return (frames - frames.mean(dim=1, keepdim=True)) / frames.std(dim=1, keepdim=True).clamp(min=_QUIETEST)


def _mean_and_deviation(outputs: Tensor, loudness: Tensor, there: Tensor, deviation: bool = True) -> Tensor:
    """float32 [batch, frames, width] to [batch, width], or twice the width with the deviation, over the frames."""
    # Where all is silence, all frames count the same.
    weights = ((loudness + _QUIETEST) * there)[..., None]
    weights = weights / weights.sum(dim=1, keepdim=True)
    mean = (outputs * weights).sum(dim=1)
    if not deviation:
        return mean
    variance = ((outputs - mean[:, None]).square() * weights).sum(dim=1)
    return torch.cat([mean, (variance + _QUIETEST).sqrt()], dim=1)
