"""Damage that decoders pass over in silence, and checksums show: pages of OGG, chunks of PNG."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from orchestrator.errors import BadSampleError
from tests.data.test_bad_data import bad, decode

RATE_HZ = 8000
SECONDS = 20
NUM = SECONDS * RATE_HZ


def flipped(content: bytes, at: int, bits: int = 0x10) -> bytes:
    return content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :]


# --- OGG ---


def ogg(codec: str, seconds: float = SECONDS, seed: int = 0) -> bytes:
    num = round(seconds * RATE_HZ)
    samples = 0.3 * np.sin(np.arange(num) / 4) + np.random.default_rng(seed).normal(scale=0.05, size=num)
    out = io.BytesIO()
    soundfile.write(out, samples, RATE_HZ, format="OGG", subtype=codec)
    return out.getvalue()


def pages(content: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(content):
        end = at + 27 + content[at + 26] + sum(content[at + 27 : at + 27 + content[at + 26]])
        found.append(content[at:end])
        at = end
    return found


def sealed(page: bytes, granule: int | None = None, number: int | None = None, serial: int | None = None) -> bytes:
    """The page with other fields, and their checksum: CRC-32, polynomial 0x04c11db7, from 0, highest bit first."""
    changed = bytearray(page)
    for at, form, value in ((6, "<q", granule), (14, "<I", serial), (18, "<I", number), (22, "<I", 0)):
        if value is not None:
            struct.pack_into(form, changed, at, value)
    crc = 0
    for byte in changed:
        crc = (crc << 8 & 0xFFFFFFFF) ^ CRC_OF[crc >> 24 ^ byte]
    struct.pack_into("<I", changed, 22, crc)
    return bytes(changed)


def _crc_of(byte: int) -> int:
    crc = byte << 24
    for _ in range(8):
        crc = ((crc << 1) ^ 0x04C11DB7 if crc & 0x80000000 else crc << 1) & 0xFFFFFFFF
    return crc


CRC_OF = [_crc_of(byte) for byte in range(256)]


def granule_of(page: bytes) -> int:
    return int(struct.unpack_from("<q", page, 6)[0])


@pytest.fixture(scope="module", params=["VORBIS", "OPUS"])
def codec(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(codec: str) -> bytes:
    return ogg(codec)


def test_one_flipped_byte_of_an_ogg_file(codec: str) -> None:
    """libogg drops the page: of a file of one page of sound hardly anything was left."""
    short = ogg(codec, 2)
    middle = len(short) - len(pages(short)[-1]) // 2
    at = len(short) - len(pages(short)[-1])
    assert bad("audio", flipped(short, middle)) == f"is damaged: the checksum of its page at byte {at} is wrong"
    for place in range(0, len(short), 37):
        bad("audio", flipped(short, place))


def test_one_flipped_byte_in_any_part_of_a_page(whole: bytes) -> None:
    parts = pages(whole)
    for number in (0, 1, 2, len(parts) // 2, len(parts) - 1):
        start = sum(map(len, parts[:number]))
        for place in (0, 3, 4, 5, 6, 13, 14, 18, 22, 26, 27, 28, len(parts[number]) - 1):
            assert bad("audio", flipped(whole, start + place, 1))


def test_pages_that_are_missing_or_there_twice(whole: bytes) -> None:
    parts = pages(whole)
    for number in range(3, len(parts) - 1):
        message = bad("audio", b"".join(parts[:number] + parts[number + 1 :]))
        assert message.startswith(f"is damaged: page {number + 1} of a stream follows page {number - 1}, at byte ")
    assert "page 5 of a stream follows page 5" in bad("audio", b"".join(parts[:6] + parts[5:]))
    for lost in (b"".join(parts[1:]), whole + sealed(parts[4], serial=99, number=0)):
        assert bad("audio", lost).startswith("is damaged: the first page of a stream is missing before byte ")


def test_sound_that_is_missing_between_pages_that_are_numbered_anew(whole: bytes) -> None:
    """One page of about a second, of more than two minutes: the granule position of the last one shows it."""
    codec = "OPUS" if b"OpusHead" in whole[:64] else "VORBIS"
    parts = pages(ogg(codec, 150))
    left = parts[:40] + [sealed(page, number=40 + i) for i, page in enumerate(parts[41:])]
    assert bad("audio", b"".join(left)).startswith("is cut off: ")


def test_whole_ogg_files_of_every_kind_are_read(whole: bytes) -> None:
    parts = pages(whole)
    shifted = [sealed(page, granule=granule_of(page) + 480_000) if granule_of(page) > 0 else page for page in parts]
    other = ogg("OPUS" if b"OpusHead" in whole[:64] else "VORBIS", 3, seed=1)
    for content in (
        whole,
        b"".join(shifted),
        whole + other,
        whole + b"".join(sealed(page, serial=7) for page in pages(other)),
        whole + bytes(3000),
        whole + b"TAG" + bytes(125),
        whole + bytes(20) + other,
        whole + b"APETAGEX" + bytes(60),
    ):
        assert len(decode("audio", content).samples) == NUM


def test_an_ogg_file_recorded_from_a_stream_begins_in_its_middle(whole: bytes) -> None:
    """The headers, and the pages from when the listener came: a gap, of which nothing was lost."""
    parts = pages(whole)
    joined = decode("audio", b"".join(parts[:2] + parts[6:]))
    assert joined.seconds == pytest.approx(SECONDS - granule_of(parts[5]) / granule_of(parts[-1]) * SECONDS, abs=0.2)


def test_bytes_of_an_ogg_file_that_are_no_page(whole: bytes) -> None:
    parts = pages(whole)
    last = len(whole) - len(parts[-1])
    for content in (flipped(whole, last), whole[: last + 3], whole[:last] + b"\1" * 50):
        assert bad("audio", content) == f"is damaged: what follows byte {last} is no page"
    assert "is no page" in bad("audio", whole + flipped(ogg("VORBIS", 1), 1))
    inside = flipped(whole, sum(map(len, parts[:4])) + 26, 0xFF)  # the number of segments
    assert bad("audio", inside).startswith("is damaged: ")


# --- PNG ---


def drawing(mode: str) -> Image.Image:
    """Smooth, with a little noise: what deflate compresses, so that one bit changes much behind it."""
    slope = np.add.outer(3 * np.arange(24), 2 * np.arange(24))[..., None]
    values = (slope + np.random.default_rng(0).integers(0, 3, (24, 24, 4))).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(values[..., 0].astype(np.uint16) * 250)
    return Image.fromarray(values).convert("RGB").quantize(16) if mode == "P" else Image.fromarray(values).convert(mode)


def png(mode: str, **more: Any) -> bytes:
    out = io.BytesIO()
    drawing(mode).save(out, "PNG", **more)
    return out.getvalue()


def chunks(content: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """(where it begins, its name, what it holds)."""
    at = 8
    while at < len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        yield at, content[at + 4 : at + 8], content[at + 8 : at + 8 + size]
        at += 12 + size


def built(parts: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


def in_pieces(content: bytes, size: int = 100) -> bytes:
    """The same image in several IDAT chunks."""
    parts: list[tuple[bytes, bytes]] = []
    for _, name, body in chunks(content):
        cut = range(0, len(body), size) if name == b"IDAT" else [0]
        parts += [(name, body[at : at + size] if name == b"IDAT" else body) for at in cut]
    return built(parts)


PNGS = {
    "RGB": lambda: png("RGB"),
    "grey": lambda: png("L", compress_level=0),
    "16 bits": lambda: png("I;16"),
    "palette, transparent": lambda: png("P", transparency=bytes(range(0, 160, 10))),
    "pieces": lambda: in_pieces(png("RGBA")),
    "APNG": lambda: png("RGB", save_all=True, append_images=[drawing("RGB").rotate(90)]),
}


@pytest.mark.parametrize("name", PNGS)
def test_one_flipped_byte_of_a_png_gives_no_other_pixels(name: str) -> None:
    content = PNGS[name]()
    right, num_bad, places = decode("image", content), 0, range(0, len(content), 1 + len(content) // 600)
    for place in places:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = decode("image", flipped(content, place))
        except BadSampleError:
            num_bad += 1
        else:
            assert found.mode == right.mode
            assert found.tobytes() == right.tobytes()
    assert num_bad > len(places) * (0.4 if name == "APNG" else 0.9)


def test_a_damaged_png_is_said_to_be_so() -> None:
    content = in_pieces(png("RGB"))
    at = [start for start, name, _ in chunks(content) if name == b"IDAT"][3]
    message = f"is damaged: the checksum of its IDAT chunk at byte {at} is wrong"
    for place in (at + 9, at + 107, at + 111):
        assert bad("image", flipped(content, place)) == message
    assert bad("image", flipped(content, at + 4, 0x20)) == message.replace("IDAT", "iDAT")
    assert bad("image", flipped(content, at)) == f"is cut off: its IDAT chunk at byte {at} is not whole"
    assert bad("image", flipped(content, 20)) == "is damaged: the checksum of its IHDR chunk at byte 8 is wrong"


def test_an_orientation_behind_the_pixels_counts_and_later_frames_do_not() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    parts = [(name, body) for _, name, body in chunks(png("RGB"))]
    content = built([*parts[:-1], (b"eXIf", exif.tobytes()[6:]), parts[-1]])
    at = next(start for start, name, _ in chunks(content) if name == b"eXIf")
    assert decode("image", content).tobytes() == drawing("RGB").rotate(-90).tobytes()
    assert "its eXIf chunk" in bad("image", flipped(content, at + 20, 1))
    animated = PNGS["APNG"]()
    for start, name, _ in chunks(animated):
        if name == b"fdAT":
            assert decode("image", flipped(animated, start + 40)).tobytes() == drawing("RGB").tobytes()


def test_what_stands_behind_the_end_of_a_png_is_nothing_of_it() -> None:
    content = png("RGB")
    for whole in (content + b"\0\0\0\5more", content[:-1], content[:-12]):
        assert decode("image", whole).tobytes() == drawing("RGB").tobytes()
