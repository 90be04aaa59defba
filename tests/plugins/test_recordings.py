"""What a header says of a recording's length, held against its bytes: written to a pipe, cut off, or wrong."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import orchestrator
from orchestrator.errors import BadSampleError
from orchestrator.modality import registry
from tests.tiny import make_wav2vec2

NUM = 8000
WAVE = 0.3 * np.sin(np.arange(NUM) / 4) + 0.05 * np.random.default_rng(0).standard_normal(NUM)
PCM = (WAVE * 32767).astype("<i2").tobytes()
CHUNK = b"LIST\x04\0\0\0abcd"


def wav(riff: int | None = None, data: int | None = None, pcm: bytes = PCM, behind: bytes = b"") -> bytes:
    """A WAV of 16 bits, one channel, 16 kHz; sizes as given, else the right ones."""
    body = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16) + b"data"
    body += struct.pack("<I", len(pcm) if data is None else data) + pcm + behind
    return b"RIFF" + struct.pack("<I", len(body) if riff is None else riff) + body


def written(form: str, **more: Any) -> bytearray:
    out = io.BytesIO()
    soundfile.write(out, WAVE, 16_000, format=form, **more)
    return bytearray(out.getvalue())


def decode(content: bytes) -> Any:
    function = registry.get("audio").decode
    assert function is not None
    return function({"audio": bytes(content)})


def bad(content: bytes) -> str:
    with pytest.raises(BadSampleError) as caught:
        decode(content)
    return caught.value.message


PIPED = {
    "sox": (0x7FFFF024, 0x7FFFF000), "ffmpeg": (0xFFFFFFFF, 0xFFFFFFFF), "arecord": (0x80000024, 0x80000000),
    "largest": (0x7FFFFFFF, 0x7FFFFFFF - 36), "zeros": (0, 0),
}  # fmt: skip


@pytest.mark.parametrize("program", PIPED)
def test_a_wav_written_to_a_pipe_is_whole(program: str) -> None:
    """It was `cut off`, by sizes that are placeholders; and that it has no mark of its end is said."""
    found = decode(wav(*PIPED[program]))
    assert len(found.samples) == NUM
    assert not found.end_marked
    assert np.allclose(found.samples, WAVE, atol=1e-4)
    behind = decode(wav(PIPED[program][0], None, behind=CHUNK))
    assert len(behind.samples) == NUM


@pytest.mark.parametrize(
    "sizes",
    [(len(PCM) + 44, None), (len(PCM) + 36 - 8, None), (None, len(PCM) + 1), (None, len(PCM) + 36), (0, None),
     (None, 0)],
)  # fmt: skip
def test_a_size_that_is_off_while_the_samples_are_whole_is_no_cut(sizes: tuple[int | None, int | None]) -> None:
    assert len(decode(wav(*sizes)).samples) == NUM


def test_what_stands_behind_the_sound() -> None:
    for behind in (CHUNK * 30, (CHUNK * 30)[:-100], bytes(999), b"TAG" + bytes(125), b"ID3\4" + PCM[:300], b"\1" * 60):
        assert len(decode(wav(behind=behind)).samples) == NUM
    assert len(decode(wav(pcm=PCM[:-1])).samples) == NUM - 1  # half a sample
    assert bad(wav(pcm=b"", behind=CHUNK)) == "holds no sound: 0 samples"


def test_sound_behind_the_end_that_the_header_names_is_not_lost_in_silence() -> None:
    message = "has 8000 bytes behind the 8000 of sound that its header tells, which are no chunk"
    assert bad(wav(data=len(PCM) // 2)) == message


def test_recordings_that_are_cut_off_are_so_whatever_their_header() -> None:
    whole = wav()
    for size in (100, 8000, len(whole) - 2):
        assert bad(whole[:size]).startswith("is cut off: ")
    assert len(decode(whole[:-1]).samples) == NUM - 1  # less than a sample is missing
    for form in ("RF64", "AIFF", "AU"):
        content = written(form)
        assert len(decode(content).samples) == NUM
        assert bad(content[: len(content) // 2]).startswith("is cut off: ")
    with_list = wav(behind=CHUNK * 30)
    assert len(decode(with_list[:-200]).samples) == NUM
    assert not decode(wav(*PIPED["sox"])[:9000]).end_marked  # nobody can tell: counted, and said


def _flac() -> bytearray:
    content = written("FLAC")
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    return content


def _au() -> bytearray:
    content = written("AU")
    content[8:12] = b"\xff" * 4
    return content


def _aiff() -> bytearray:
    content = written("AIFF")
    content[4:8] = struct.pack(">I", 0x7F000046)
    at = content.index(b"SSND") + 4
    content[at : at + 4] = struct.pack(">I", 0x7F000008)
    return content


@pytest.mark.parametrize("make", [_flac, _au, _aiff])
def test_other_containers_written_to_a_pipe(make: Callable[[], bytearray]) -> None:
    found = decode(make())
    assert len(found.samples) == NUM
    assert found.seconds == NUM / 16_000
    assert not found.end_marked


def test_a_job_on_recordings_written_to_a_pipe_is_planned_and_says_so(tmp_path: Path) -> None:
    for i in range(20):
        file = tmp_path / "data" / "ab"[i % 2] / f"{i}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(wav(*PIPED["sox"], pcm=PCM[: 4000 + 200 * i]))
    backbone = make_wav2vec2(tmp_path / "backbone")
    plan = orchestrator.plan(modality="audio", backbone=str(backbone), data=str(tmp_path / "data"))
    assert sum(plan.data.num_samples.values()) == 20
    assert any("100% of the recordings carry no mark of their end" in warning for warning in plan.warnings)
