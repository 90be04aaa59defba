"""Bytes -> an image, or what is wrong with them. Needs Pillow alone."""

from __future__ import annotations

import io
import threading
import warnings
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.errors import BadSampleError, MissingExtraError
from orchestrator.modality import Sample
from orchestrator_image.appearance import FILE_MODE, with_alpha

if TYPE_CHECKING:
    from PIL.Image import Image

_LARGE = 2**24
"""Pixels of an image: 48 MB in RGB, of which up to 64 are in memory at once."""
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_OTHER_FRAMES = (b"fcTL", b"fdAT")  # those before the pixels, which are the first frame's, Pillow checks
_HEADERS = threading.Lock()  # filters of warnings are the whole process's, and decoding runs in threads


@dataclass(frozen=True)
class LargeImage:
    """One that was decoded, and is decoded again when it is used: many at once would take gigabytes."""

    content: bytes

    def opened(self) -> Image:
        """The image as `decode` gives smaller ones."""
        return _decoded(self.content)


def decode(sample: Sample) -> Image | LargeImage:
    """The image in the mode of its file, RGBA where that has transparency; upright by its EXIF orientation, the first
    frame of several.
    """
    content = sample["image"]
    if not content:
        raise BadSampleError("the file is empty")
    if content.startswith(_PNG):
        _check_png(content)
    image = _decoded(content)
    return LargeImage(content) if image.width * image.height > _LARGE else image


def _check_png(content: bytes) -> None:
    """Every chunk's checksum, later frames' aside: from the pixels on Pillow checks none, and shows other ones."""
    at, view = len(_PNG), memoryview(content)
    while at + 8 <= len(content):
        end = at + 12 + int.from_bytes(view[at : at + 4])
        name = bytes(view[at + 4 : at + 8])
        if name == b"IEND":
            return
        if name not in _PNG_OTHER_FRAMES:
            what = f"its {ascii(name)[2:-1]} chunk at byte {at}"
            if end > len(content):
                raise BadSampleError(f"is cut off: {what} is not whole")
            if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
                raise BadSampleError(f"is damaged: the checksum of {what} is wrong")
        at = end


def _decoded(content: bytes) -> Image:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise MissingExtraError("pillow", "image") from None
    try:
        with _HEADERS, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content))
        image.load()
        if image.mode == "F":
            raise BadSampleError(
                "holds floating-point values, and nothing says which of them is white: save it with 8 or 16 bits"
            )
        mode = image.mode
        image = with_alpha(image)
        image.info[FILE_MODE] = mode
        ImageOps.exif_transpose(image, in_place=True)  # a copy of its own, where there is nothing to turn, is as large
        return image
    except BadSampleError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadSampleError(f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise BadSampleError("is no image that Pillow can read") from None
    except Exception as error:  # Pillow's decoders raise what their format's parser happens to raise
        raise BadSampleError(f"cannot be decoded: {str(error) or type(error).__name__}") from None
