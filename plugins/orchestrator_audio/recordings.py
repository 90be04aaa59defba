"""Bytes of an audio file -> a recording, or what is wrong with them: libsndfile reads cut files in silence."""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.errors import BadSampleError, MissingExtraError
from orchestrator.modality import Sample

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
_XING_WITHIN = 64  # bytes from the start of a frame
_OGG_FLAGS, _OGG_LAST = 5, 4  # RFC 3533: the byte of a page's flags, and the flag of the last page
_STREAMED = (0, 0xFFFFFFFF)  # RIFF sizes that say nothing


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
    cut = _cut_off(content)
    if cut:
        raise BadSampleError(f"is cut off: {cut}")
    try:
        with soundfile.SoundFile(_Content(content)) as file:
            rate, frames, channels = file.samplerate, file.frames, file.channels
            encoding = f"{file.format} {file.subtype}"
            if not 1 <= rate <= _HIGHEST_RATE:
                raise BadSampleError(f"claims a sample rate of {rate} Hz")
            wanted = min(frames, MAX_SECONDS_READ * rate, _MAX_VALUES // file.channels)
            samples = _read_mono(file, wanted)
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:
        reason = str(getattr(error, "error_string", error)).strip().rstrip(".")
        raise BadSampleError(f"is no audio that libsndfile can read: {reason}") from None
    if not len(samples):
        raise BadSampleError("holds no sound: 0 samples")
    if len(samples) < wanted - max(_FRAMES_LOST, wanted // 100):
        raise BadSampleError(f"is cut off: {len(samples)} of {wanted} samples")
    low, high = float(samples.min()), float(samples.max())  # a NaN among the samples is both; no copy is made
    if not (math.isfinite(low) and math.isfinite(high)):
        raise BadSampleError("holds samples that are not finite")
    loudest = max(-low, high)
    if loudest > _LOUDEST:
        raise BadSampleError(f"holds a sample of {loudest:g}, and full scale is 1")
    return Recording(samples, rate, frames / rate, channels, encoding, _marks_its_end(content))


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


def _cut_off(content: bytes) -> str:
    """What says that the end of the file is missing, '' if nothing does: libsndfile reads up to there in silence."""
    if content[:4] in (b"RIFF", b"FORM") and len(content) >= 8:
        (size,) = struct.unpack("<I" if content[:4] == b"RIFF" else ">I", content[4:8])
        missing = size not in _STREAMED and size > len(content) - 7  # a last padding byte is often left out
        return f"{len(content)} of the {size + 8} bytes that its header tells" if missing else ""
    if content[:4] == b"OggS":
        page = content[content.rfind(b"OggS") :]
        if len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
            return "its last page is not whole"
        return ""  # a last page that is not marked as the last says nothing: a third of Debian's klettres are so
    return _cut_off_mp3(content)


def _marks_its_end(content: bytes) -> bool:
    """Whether the last OGG page is marked as the last, or an MP3 file says how long it is; all other formats do."""
    if content[:4] == b"OggS":
        page = content[content.rfind(b"OggS") :]
        return len(page) > _OGG_FLAGS and bool(page[_OGG_FLAGS] & _OGG_LAST)
    start, at = _find_xing(content)
    return start < 0 or at >= 0


def _find_xing(content: bytes) -> tuple[int, int]:
    """(where the frames of an MP3 file start, where its Xing header is); -1 where there is none."""
    start = 0
    if content[:3] == b"ID3" and len(content) >= 10:  # a tag, its size in four times 7 bits
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(content[6:10], (21, 14, 7, 0), strict=True))
    if content[start : start + 1] != b"\xff":
        return -1, -1
    return start, max(content.find(name, start, start + _XING_WITHIN) for name in (b"Xing", b"Info"))


def _cut_off_mp3(content: bytes) -> str:
    """By the Xing header, which most encoders write into the first frame: how many bytes there are from there on."""
    start, at = _find_xing(content)
    if at < 0 or len(content) < at + 16:
        return ""
    (flags,) = struct.unpack(">I", content[at + 4 : at + 8])
    if flags & 2 == 0:
        return ""
    place = at + 8 + (4 if flags & 1 else 0)
    (size,) = struct.unpack(">I", content[place : place + 4])
    return f"{len(content)} of {start + size} bytes" if start + size > len(content) else ""
