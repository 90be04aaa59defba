"""Mutated files: decode gives a sample or `BadSampleError`, and what it gives can be measured, fitted and collated.

FUZZ_NUM=10000 FUZZ_SEED=7 python -m pytest tests/data/test_fuzz.py    # more of them, and others
"""

from __future__ import annotations

import io
import os
import random
import re
import resource
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

import orchestrator
from orchestrator.errors import BadSampleError
from orchestrator.gate.decide import fit
from orchestrator.job.plans import Plan
from orchestrator.modality import registry
from orchestrator.modality.contract import Facts, Modality, Profile
from tests.tiny import make_bert, make_wav2vec2

NUM = int(os.environ.get("FUZZ_NUM", "500"))
SEED = os.environ.get("FUZZ_SEED", "0")
SLOWEST_S = 5.0
MOST_KIB = 1_500_000
"""More than before: an image of 89 million pixels in RGBA is 360 MB, and once more when it is converted."""
COLLATED = 16

EXTREMES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\1", b"\1\0\0\0")


@cache
def photograph() -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg")).crop((200, 100, 240, 132))


def image(form: str, mode: str = "RGB", **more: Any) -> bytes:
    out = io.BytesIO()
    photograph().convert(mode).save(out, form, **more)
    return out.getvalue()


def animation(form: str) -> bytes:
    frames = [photograph().rotate(angle) for angle in (0, 90, 180)]
    return image(form) if form == "WEBP" else _saved(frames, form)


def _saved(frames: Sequence[Image.Image], form: str) -> bytes:
    out = io.BytesIO()
    frames[0].save(out, form, save_all=True, append_images=frames[1:])
    return out.getvalue()


def sound(form: str, subtype: str | None = None, channels: int = 1) -> bytes:
    random = np.random.default_rng(0)
    time_s = np.arange(2400) / 8000
    wave = 0.3 * np.sin(2 * np.pi * 440 * time_s) + random.normal(scale=0.05, size=2400)
    out = io.BytesIO()
    soundfile.write(out, np.repeat(wave[:, None], channels, axis=1), 8000, format=form, subtype=subtype)
    return out.getvalue()


TEXT = "Der Regen fällt auf die Hügel. 雨が丘に降る 🌧\r\nA bowl of hot soup, with “butter”.\t"

FORMS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "png": ("image", lambda: image("PNG")),
    "png, palette": ("image", lambda: image("PNG", "P")),
    "apng": ("image", lambda: animation("PNG")),
    "jpeg": ("image", lambda: image("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0")),
    "jpeg, progressive CMYK": ("image", lambda: image("JPEG", "CMYK", progressive=True)),
    "gif": ("image", lambda: animation("GIF")),
    "webp": ("image", lambda: image("WEBP")),
    "webp, lossless": ("image", lambda: image("WEBP", "RGBA", lossless=True)),
    "tiff": ("image", lambda: image("TIFF")),
    "tiff, LZW": ("image", lambda: image("TIFF", compression="tiff_lzw")),
    "bmp": ("image", lambda: image("BMP")),
    "ppm": ("image", lambda: image("PPM")),
    "wav": ("audio", lambda: sound("WAV")),
    "wav, float": ("audio", lambda: sound("WAV", "FLOAT", 2)),
    "wav, ADPCM": ("audio", lambda: sound("WAV", "IMA_ADPCM")),
    "flac": ("audio", lambda: sound("FLAC", channels=2)),
    "ogg": ("audio", lambda: sound("OGG")),
    "opus": ("audio", lambda: sound("OGG", "OPUS")),
    "mp3": ("audio", lambda: sound("MP3")),
    "aiff": ("audio", lambda: sound("AIFF")),
    "au": ("audio", lambda: sound("AU")),
    "utf-8": ("text", lambda: TEXT.encode()),
    "utf-8 with a mark": ("text", lambda: TEXT.encode("utf-8-sig")),
    "utf-16": ("text", lambda: TEXT.encode("utf-16")),
}


def mutate(content: bytes, other: bytes, chance: random.Random) -> bytes:
    """One to three of: bits flipped, bytes changed, a field of the header at an extreme, a piece lost, put in twice,
    or ingested from another file, the end cut off.
    """
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 3))):
        size = max(1, len(changed))
        at, length = chance.randrange(size), 1 + chance.randrange(min(64, size))
        kind = chance.randrange(7)
        if kind == 0:
            for _ in range(chance.choice((1, 4, 30))):
                place = chance.randrange(size)
                changed[place : place + 1] = bytes(b ^ (1 << chance.randrange(8)) for b in changed[place : place + 1])
        elif kind == 1:
            place = chance.randrange(min(size, 64))
            changed[place : place + 4] = chance.choice(EXTREMES)
        elif kind == 2:
            changed[at : at + length] = chance.randbytes(length)
        elif kind == 3:
            del changed[at : at + length]
        elif kind == 4:
            changed[at:at] = changed[at : at + length]
        elif kind == 5:
            start = chance.randrange(max(1, len(other)))
            changed[at : at + length] = other[start : start + length]
        else:
            del changed[at:]
    return bytes(changed)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, tiny_resnet: Path) -> Callable[[str], tuple[Modality, Plan, Any]]:
    """The modality, a plan of a job on its toys, and its collate function."""
    made: dict[str, tuple[Modality, Plan, Any]] = {}

    def make(name: str) -> tuple[Modality, Plan, Any]:
        if name not in made:
            folder, plugin = tmp_path_factory.mktemp(name), registry.get(name)
            backbone = {"image": lambda _: tiny_resnet, "audio": make_wav2vec2, "text": make_bert}[name](folder / "b")
            suffix = plugin.sample[0].suffixes[0]
            assert plugin.toy is not None
            assert plugin.batch is not None
            for i, (sample, label) in enumerate(plugin.toy(24)):
                (folder / "data" / label).mkdir(parents=True, exist_ok=True)
                (folder / "data" / label / f"{i}{suffix}").write_bytes(sample[name])
            plan = orchestrator.plan(modality=name, backbone=str(backbone), data=str(folder / "data"))
            made[name] = plugin, plan, plugin.batch(plan, backbone)
        return made[name]

    return make


def use(decoded: list[Any], facts: list[Facts], plugin: Modality, plan: Plan, collate: Any) -> None:
    """What was decoded is held against the backbone, and becomes a finite batch."""
    fit(plan.backbone, plan.row, plugin, {}, Profile.of(facts))
    for start in range(0, len(decoded), COLLATED):
        part = decoded[start : start + COLLATED]
        for train in (False, True):
            for name, value in collate(part, train).items():
                assert len(value) == len(part), name
                assert str(value.dtype) in ("torch.float32", "torch.int64", "torch.int32"), name
                assert bool(value.isfinite().all()), name


def sound_lost(content: bytes, recording: Any) -> int:
    """Bytes behind what was read of PCM in a WAV file, without a part of a sample, and what may be another chunk."""
    width = {"PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}.get(recording.encoding[4:])
    at = content.find(b"data") + 8
    if not recording.encoding.startswith("WAV ") or width is None or at < 8:
        return 0
    end = at + round(recording.seconds * recording.rate_hz) * recording.channels * width
    rest = content[end:]
    is_other = any(re.match(rb"[ -~]{4}", rest[i : i + 4]) for i in (0, 1)) or not any(rest[:4096])
    return 0 if is_other or len(rest) < recording.channels * width else len(rest)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "error::pytest.PytestUnraisableExceptionWarning")
def test_a_mutated_file_is_a_sample_or_a_bad_one(form: str, ready: Callable[[str], tuple[Modality, Plan, Any]]) -> None:
    name, make = FORMS[form]
    plugin, plan, collate = ready(name)
    assert plugin.decode is not None
    assert plugin.measure is not None
    chance, whole = random.Random(f"{form} {SEED}"), make()
    others = [other() for kind, other in FORMS.values() if kind == name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    decoded, facts, num_bad, reasons = [], [], 0, set()
    plugin.decode({name: whole}) if form != "utf-16" else None
    for number in range(NUM):
        content = mutate(whole, chance.choice(others), chance)
        started = time.perf_counter()
        try:
            one = plugin.decode({name: content})
            found = plugin.measure(one, plan.backbone)
        except BadSampleError as error:
            num_bad += 1
            reasons.add(error.message)
            continue
        except BaseException:
            Path(f"find-{form}-{number}").write_bytes(content)  # pytest keeps the folder
            raise
        finally:
            assert time.perf_counter() - started < SLOWEST_S, (form, number)
        assert form not in ("wav", "wav, float") or sound_lost(content, one) < 100, (form, number)
        assert all(isinstance(value, (int, float, str)) and value == value for value in found.values())
        decoded.append(one)
        facts.append(found)
        if len(decoded) == COLLATED:
            use(decoded, facts, plugin, plan, collate)
            decoded, facts = [], []
    if decoded:
        use(decoded, facts, plugin, plan, collate)
    assert num_bad
    assert all(reasons)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KIB
