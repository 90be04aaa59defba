"""What the header of an audio file says of its length, held against the bytes that there are.

libsndfile reads a file that was cut off as far as it goes, in silence, and sound behind the end that a header names
not at all; of an OGG file it leaves out the pages whose checksum is wrong. A program that writes to a pipe cannot know
the length when it writes the header, and puts a placeholder there: such a file is whole, as far as anybody can tell.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

_XING_WITHIN = 64  # bytes from the start of a frame
_OGG_HEADER, _OGG_FIRST, _OGG_LAST = 27, 2, 4  # RFC 3533: bytes of a page's header, its flags in a stream
_OGG_MIRROR = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))  # each byte, its bits turned round
_SLACK = 8  # bytes: some writers count the header of the file, or leave out the last padding
_MOST_LEFT = 64  # bytes behind the sound that are no chunk, and do not matter
_CHUNK_NAME = re.compile(rb"[\x20-\x7e]{4}")
_CHUNK_NAMES = set(re.findall(rb"....", b"LISTid3 ID3 cue smplbextiXMLfactPEAKJUNKjunkFLLRPAD NAMEAUTHANNOMARKCOMT"))
_FLAC_TOTAL = 21  # bytes from the beginning: 36 bits, how many samples there are; 0: not known


@dataclass(frozen=True)
class Length:
    """What is known of a file's end."""

    problem: str = ""
    """Why it is not whole, '' where nothing says so."""
    marked: bool = True
    """Whether it says where it ends, so that a file that was cut off would show."""
    sound_at: int = 0
    """Where the size of its sound stands, four bytes, if that is a 0 which stands for a length that was not known."""


def length_of(content: bytes) -> Length:
    """What the header says, by the container."""
    start = content[:4]
    if start in (b"RIFF", b"RIFX", b"RF64", b"FORM") and len(content) >= 12:
        return _of_chunks(content)
    if start == b"OggS":
        return _of_ogg(content)
    if start == b".snd" and len(content) >= 12:
        at, size = struct.unpack(">II", content[4:12])
        cut = size != 0xFFFFFFFF and at + size - len(content) >= _SLACK
        return Length(f"is cut off: {len(content)} of {at + size} bytes" if cut else "", size != 0xFFFFFFFF)
    if start == b"fLaC":
        total = content[_FLAC_TOTAL : _FLAC_TOTAL + 5]
        return Length(marked=bool(total[:1] and total[0] & 0x0F) or any(total[1:]))
    return _of_mp3(content)


def whole(content: bytes, length: Length) -> bytes:
    """The file with the size of its sound where a 0 stood; else as it is."""
    if not length.sound_at:
        return content
    order = "<" if content[:4] in (b"RIFF", b"RF64") else ">"
    size = struct.pack(order + "I", len(content) - length.sound_at - 4)
    return content[: length.sound_at] + size + content[length.sound_at + 4 :]


# --- RIFF and AIFF: chunks ---


def _of_chunks(content: bytes) -> Length:
    order = ">" if content[:4] in (b"FORM", b"RIFX") else "<"
    (total,) = struct.unpack(order + "I", content[4:8])
    total_bytes = total + 8
    has_length = not _is_placeholder(total)
    ends_there = has_length and -_SLACK <= total_bytes - len(content) <= 1
    found = _find_sound(content, order)
    if found is None:
        cut = has_length and total_bytes - len(content) > _SLACK
        return Length(f"is cut off: {len(content)} of the {total_bytes} bytes that its header tells" if cut else "")
    at, size, block = found
    there = len(content) - at
    rest = content[at + size :] if not _is_placeholder(size) else b""
    if size == 0 and there and not _is_chunk(content[at:], order):
        return Length(marked=ends_there, sound_at=at - 4)
    if _is_placeholder(size):
        return Length(marked=ends_there or size == 0)
    if size - there >= block and not ends_there:
        return Length(f"is cut off: {there} of the {size} bytes of sound that its header tells")
    if len(rest) > _MOST_LEFT and not _is_chunk(rest, order) and not _is_chunk(rest[1:], order):
        return Length(f"has {len(rest)} bytes behind the {size} of sound that its header tells, which are no chunk")
    return Length()


def _is_placeholder(size: int) -> bool:
    """Whether a size of 32 bits says nothing: 0, or the largest number with a sign or without, or just about it."""
    return size == 0 or 0x7F000000 <= size <= 0x80000100 or size >= 0xFFFFFF00


def _is_chunk(rest: bytes, order: str) -> bool:
    """Whether what follows the sound is something else: a chunk, a tag, or nothing but zeros."""
    if rest[:4] in _CHUNK_NAMES or rest[:3] in (b"TAG", b"ID3") or not any(rest[:4096]):
        return True
    named = _CHUNK_NAME.match(rest) and len(rest) >= 8
    return bool(named) and struct.unpack(order + "I", rest[4:8])[0] <= len(rest)


def _find_sound(content: bytes, order: str) -> tuple[int, int, int] | None:
    """(where the sound begins, its size, that of one sample of all channels), in bytes; None where there is none."""
    at, block, long_size = 12, 1, 0
    while at + 8 <= len(content):
        name, (size,) = content[at : at + 4], struct.unpack(order + "I", content[at + 4 : at + 8])
        at += 8
        if name == b"ds64" and len(content) >= at + 16:  # RF64: sizes of 64 bits
            (long_size,) = struct.unpack("<Q", content[at + 8 : at + 16])
        elif name == b"fmt " and len(content) >= at + 14:
            (block,) = struct.unpack(order + "H", content[at + 12 : at + 14])
        elif name == b"COMM" and len(content) >= at + 8:
            channels, _, bits = struct.unpack(">hIh", content[at : at + 8])
            block = channels * (bits + 7) // 8
        elif name in (b"data", b"SSND"):
            return at, long_size or size, max(1, block)
        at += size + size % 2
    return None


# --- OGG, MP3 ---


def _of_ogg(content: bytes) -> Length:
    """By the pages, one after the other: each has a checksum, and its number in its stream."""
    at, flags = 0, 0
    streams: dict[int, tuple[int, bool]] = {}  # by serial number: the last page, and whether there was sound by then
    while at < len(content):
        if not content.startswith(b"OggS", at):
            following = content.find(b"OggS", at)
            rest = content[at : following if following >= 0 else None]
            is_behind_the_last = following < 0 and flags & _OGG_LAST
            if not (is_behind_the_last or rest[:3] == b"TAG" or not rest.strip(b"\0")):
                return Length(f"is damaged: what follows byte {at} is no page")
            at += len(rest)
            continue
        page = content[at : _end_of_page(content, at)]
        if not page:
            is_last = content.find(b"OggS", at + 4) < 0
            what = "is cut off: its last page" if is_last else f"is damaged: its page at byte {at}"
            return Length(f"{what} is not whole")
        if not _has_its_checksum(page):
            return Length(f"is damaged: the checksum of its page at byte {at} is wrong")
        flags, granule, serial, number = struct.unpack("<BqII", page[5:22])
        if flags & _OGG_FIRST:
            streams[serial] = number - 1, False
        elif serial not in streams:
            return Length(f"is damaged: the first page of a stream is missing before byte {at}")
        last, has_sound = streams[serial]
        # Who listens to a stream late gets its headers, and then the pages from there on.
        if number != last + 1 and (has_sound or number <= last):
            return Length(f"is damaged: page {number} of a stream follows page {last}, at byte {at}")
        streams[serial] = number, has_sound or granule > 0
        at += len(page)
    # A last page that is not marked as the last says nothing: a third of Debian's klettres are so.
    return Length(marked=bool(flags & _OGG_LAST))


def _end_of_page(content: bytes, at: int) -> int:
    """Where the page that begins there ends; `at` itself where the file ends before."""
    body = at + _OGG_HEADER
    if body > len(content):
        return at
    num_segments = content[body - 1]
    end = body + num_segments + sum(content[body : body + num_segments])
    return end if end <= len(content) else at


def _has_its_checksum(page: bytes) -> bool:
    """CRC-32 from 0, highest bit first. zlib's begins with the lowest one, so every byte is turned round."""
    mirrored = page.translate(_OGG_MIRROR)
    crc = zlib.crc32(mirrored[26:], zlib.crc32(bytes(4), zlib.crc32(mirrored[:22], 0xFFFFFFFF))) ^ 0xFFFFFFFF
    return mirrored[22:26] == crc.to_bytes(4, "big")


def _of_mp3(content: bytes) -> Length:
    """By the Xing header, which most encoders write into the first frame: how many bytes there are from there on."""
    start, at = _find_xing(content)
    marked = start < 0 or at >= 0
    if at < 0 or len(content) < at + 16:
        return Length(marked=marked)
    (flags,) = struct.unpack(">I", content[at + 4 : at + 8])
    if flags & 2 == 0:
        return Length(marked=marked)
    place = at + 8 + (4 if flags & 1 else 0)
    (size,) = struct.unpack(">I", content[place : place + 4])
    cut = start + size > len(content)
    return Length(f"is cut off: {len(content)} of {start + size} bytes" if cut else "", marked)


def _find_xing(content: bytes) -> tuple[int, int]:
    """(where the frames of an MP3 file start, where its Xing header is); -1 where there is none."""
    start = 0
    if content[:3] == b"ID3" and len(content) >= 10:  # a tag, its size in four times 7 bits
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(content[6:10], (21, 14, 7, 0), strict=True))
    if content[start : start + 1] != b"\xff":
        return -1, -1
    return start, max(content.find(name, start, start + _XING_WITHIN) for name in (b"Xing", b"Info"))
