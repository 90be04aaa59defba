"""Bytes of an audio file -> a recording, or what is wrong with them: libsndfile reads cut files in silence."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.errors import BadSampleError, MissingExtraError
from orchestrator.modality import Sample
from orchestrator_audio.containers import length_of, whole

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAX_SECONDS_READ = 600
"""Of a longer recording only the beginning is read, so that one of 3 hours takes no more memory."""
_MAX_VALUES = MAX_SECONDS_READ * 48_000 * 2  # stereo at 48 kHz: 8 channels of silence are a few kB of FLAC
_LOUDEST = 1e6  # full scale is 1; the square of 1e38 is infinite
_HIGHEST_RATE = 1_000_000
_BLOCK = 1 << 18  # samples of each channel read at once
_FRAMES_LOST = 4608  # of the header's, by which lossy formats round: four MP3 frames
_UNKNOWN = 1 << 62  # frames: libsndfile's for a FLAC file that does not say how many


@dataclass(frozen=True)
class Recording:
    """A recording as it was read."""

    samples: npt.NDArray[np.float32]
    """float32 [samples], the mean of the channels"""
    rate_hz: int
    seconds: float
    """Of the whole file, of which `samples` may be the beginning."""
    channels: int = 1
    """Of the file."""
    encoding: str = ""
    """Container and bit depth or codec, in libsndfile's words: "WAV PCM_16", "OGG VORBIS"."""
    end_marked: bool = True
    """Whether the file says where it ends, so that one that was cut off would show."""


def decode(sample: Sample) -> Recording:
    """The recording at its own rate, its first `MAX_SECONDS_READ` seconds."""
    try:
        import soundfile
    except ImportError as error:
        raise MissingExtraError(error.name or "soundfile", "audio") from None
    content = sample["audio"]
    if not content:
        raise BadSampleError("the file is empty")
    length = length_of(content)
    if length.problem:
        raise BadSampleError(length.problem)
    try:
        with soundfile.SoundFile(_Content(whole(content, length))) as file:
            rate, frames, channels = file.samplerate, file.frames, file.channels
            encoding = f"{file.format} {file.subtype}"
            if not 1 <= rate <= _HIGHEST_RATE:
                raise BadSampleError(f"claims a sample rate of {rate} Hz")
            wanted = min(frames, MAX_SECONDS_READ * rate, _MAX_VALUES // file.channels)
            is_ogg = file.format == "OGG"
            if is_ogg or frames >= _UNKNOWN:  # soundfile seeks behind each read, which needs the length, and
                file.seekable = lambda: False  # goes back by granule position, over a gap: samples come twice
            samples = _read_mono(file, wanted)
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:
        reason = str(getattr(error, "error_string", error)).strip().rstrip(".")
        raise BadSampleError(f"is no audio that libsndfile can read: {reason}") from None
    if not len(samples):
        raise BadSampleError("holds no sound: 0 samples")
    if frames >= _UNKNOWN:
        frames = wanted = len(samples)
    rounding = 0 if is_ogg else wanted // 100  # granule positions are exact
    if len(samples) < wanted - max(_FRAMES_LOST, rounding):
        raise BadSampleError(f"is cut off: {len(samples)} of {wanted} samples")
    low, high = float(samples.min()), float(samples.max())  # a NaN among the samples is both; no copy is made
    if not (math.isfinite(low) and math.isfinite(high)):
        raise BadSampleError("holds samples that are not finite")
    loudest = max(-low, high)
    if loudest > _LOUDEST:
        raise BadSampleError(f"holds a sample of {loudest:g}, and full scale is 1")
    return Recording(samples, rate, frames / rate, channels, encoding, length.marked)


def _read_mono(file: Any, wanted: int) -> npt.NDArray[np.float32]:
    """float32 [samples]: the mean of the channels, `wanted` samples of it or what there is.

    Block by block, so that two channels never take the memory of two: ten minutes at 48 kHz are 115 MB.
    """
    import numpy as np

    mono, at = np.empty(wanted, np.float32), 0
    while at < wanted:
        block = file.read(min(_BLOCK, wanted - at), dtype="float32", always_2d=True)
        if not len(block):
            return mono[:at].copy()
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is found, and said, by `decode`
            mono[at : at + len(block)] = block.mean(axis=1)
        at += len(block)
    return mono


class _Content(io.BytesIO):
    """Bytes that stay where they are when a broken header sends libsndfile to before their beginning.

    soundfile calls from C, where an exception cannot be caught: its trace would go to the terminal.
    """

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return self.tell()
