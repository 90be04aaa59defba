"""What an image looks like once it has a backbone's channels: backgrounds, bit depths, and what is lost by them.

Needs no torch. `measure` sees images as they are decoded, before anybody knows the settings: it tells of each way to
convert an image whether the drawing would be gone, and `losses` reads of it what the plan's way does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from orchestrator.modality import Adaptation, Facts, Plan, Profile

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image

BACKGROUNDS = {"white": 255, "grey": 128, "black": 0}
"""What transparent images may be laid over."""
DEEP = "16 bits a channel"
"""What the adaptation of such images is called."""
FILE_MODE = "mode of the file"
"""Where a decoded image keeps that, among what Pillow knows of it."""
_HIDDEN = "drawing hidden on"
_HIDDEN_WORDS = {"none": "no background"}
_EMPTY = "transparent throughout"
_TRANSPARENT_VALUE = "transparent value"
_WHITE = 0xFFFF  # of 16 bits
_VISIBLE = 4.0  # of 255, the deviation of an image on which one sees anything
_MOST = 0.1  # of the variance is left: the image has lost most of it
_SAMPLED = 256  # pixels a side that are looked at
_FEW = 0.01  # of the images: what fewer lose is not worth a warning


def is_deep(mode: str) -> bool:
    """Whether the mode is one of more than 8 bits a channel: I, I;16, I;16B."""
    return mode.startswith("I")


def with_alpha(image: Image) -> Image:
    """The image; one with transparency of whatever form (a palette's, one colour) in the mode RGBA.

    Not one of 16 bits, which Pillow would clip to 255: its transparent value is dropped.
    """
    return image.convert("RGBA") if image.has_transparency_data and not is_deep(image.mode) else image


def convert(image: Image, mode: str, background: str = "none", white_level: int | None = None) -> Image:
    """The image in the mode that the backbone takes, RGB or L.

    Transparent images are laid over the background; with "none" their colours show, whatever lies behind. Of 16 bits
    the upper 8 are taken; with a `white_level` the values from 0 to it are spread over 0 to 255.
    """
    from PIL import Image as images

    if is_deep(image.mode):
        image = images.fromarray(_in_8_bits(image, white_level))
    if image.mode == "RGBA" and background != "none":
        whole = images.new("RGBA", image.size, (BACKGROUNDS[background],) * 3 + (255,))
        image = images.alpha_composite(whole, image)
    if image.mode == mode:
        return image
    return (image.convert("RGB") if image.mode == "LAB" else image).convert(mode)  # Pillow knows no other way from LAB


def _in_8_bits(image: Image, white_level: int | None) -> npt.NDArray[np.uint8]:
    import numpy as np

    values = np.asarray(image)
    if white_level is None:
        return (values.clip(0, _WHITE) >> 8).astype(np.uint8)
    return (values.clip(0, white_level) * (255.0 / white_level) + 0.5).astype(np.uint8)


def code_of_reading(plan: Plan) -> str:
    """Python for the model card: `image`, out of "a file", as `convert` makes it; with 16 bits where the data has."""
    mode, background = "RGB" if plan.input["channels"] == 3 else "L", plan.input.get("background", "none")
    lines = ['image = ImageOps.exif_transpose(Image.open("a file"))']
    if any(one.what == DEEP for one in plan.adaptations):
        level = plan.input.get("white_level")
        shown = "v * (1 / 256)" if level is None else f"v * (255 / {level}) + 0.5"
        lines += ['if image.mode.startswith("I"):  # 16 bits a channel',
                  '    image.info.pop("transparency", None)',
                  f'    image = image.convert("I").point(lambda v: {shown}).convert("L")']  # fmt: skip
    if background == "none":
        lines.append(f'image = image.convert("{mode}")')
    else:
        colour = (BACKGROUNDS[background],) * 3
        lines += [
            'image = image.convert("RGBA")  # what is transparent shows the background',
            f'image = Image.alpha_composite(Image.new("RGBA", image.size, {colour}), image).convert("{mode}")',
        ]
    return "\n".join(lines)


def measure(image: Image, channels: int) -> Facts:
    """Width and height in pixels, Pillow's mode, the largest value of 16 bits, and what would hide the drawing."""
    facts: dict[str, int | float | str] = {"width": image.width, "height": image.height}
    facts["mode"] = str(image.info.get(FILE_MODE, image.mode))
    if is_deep(image.mode):
        facts["largest value"] = int(image.getextrema()[1])  # type: ignore[arg-type]
        if _has_transparent_value(image):
            facts[_TRANSPARENT_VALUE] = "yes"
    if _is_transparent(image):
        facts["transparent"] = "yes"
        if image.getextrema()[3][1] == 0:  # type: ignore[index]
            facts[_EMPTY] = "yes"
    flat = [] if image.mode in ("1", "L") or is_deep(image.mode) else [*_flat_on(image, channels)]
    if flat:
        facts[_HIDDEN] = " or ".join(_HIDDEN_WORDS.get(name, name) for name in flat)
    return facts


def _has_transparent_value(image: Image) -> bool:
    """Whether pixels of an image of 16 bits have the grey value that its file calls transparent."""
    import numpy as np

    value = image.info.get("transparency")
    return isinstance(value, int) and bool((np.asarray(image) == value).any())


def _is_transparent(image: Image) -> bool:
    """Whether any pixel is; an alpha channel may be opaque throughout."""
    return image.mode == "RGBA" and image.getextrema()[3][0] < 255  # type: ignore[index]


def _flat_on(image: Image, channels: int) -> Iterator[str]:
    """Names of BACKGROUNDS, "none", and "grey values": conversions after which an image has lost most of its variance.

    What it had is what the best of them shows.
    """
    import numpy as np

    if _is_transparent(image):
        steps = tuple(max(1, size // _SAMPLED) for size in (image.height, image.width))
        pixels = np.asarray(image)[:: steps[0], :: steps[1]].astype(np.float32)
        alpha = pixels[..., 3:] / np.float32(255)
        seen = {"none": _variance(pixels[..., :3])}
        seen |= {
            name: _variance(pixels[..., :3] * alpha + np.float32(level) * (1 - alpha))
            for name, level in BACKGROUNDS.items()
        }
        yield from _lost(seen)
    elif channels == 1:
        rgb = convert(image, "RGB").resize((64, 64))
        seen = {"colours": _variance(np.asarray(rgb, np.float32)),
                "grey values": _variance(np.asarray(rgb.convert("L"), np.float32)[..., None])}  # fmt: skip
        yield from _lost(seen)


def _variance(pixels: npt.NDArray[np.float32]) -> float:
    """The largest of the channels'; pixels: [height, width, channels]."""
    return float(pixels.reshape(-1, pixels.shape[-1]).var(axis=0).max())


def _lost(seen: dict[str, float]) -> list[str]:
    most = max(seen.values())
    return [name for name, value in seen.items() if value < _MOST * most] if most > _VISIBLE**2 else []


def losses(
    profile: Profile, mode: str, background: str, white_level: int | None
) -> tuple[list[Adaptation], list[str]]:  # fmt: skip
    """How images come to have the backbone's channels; and what images lose by that, each with what to do about it."""
    adaptations: list[Adaptation] = []
    notes: list[str] = []
    others = {name: n for name, n in profile.counts["mode"].items() if name != mode}
    if others:
        adaptations.append(_adapted("channels", ", ".join(others), mode, profile, lambda one: one["mode"] != mode))
    if "transparent" in profile.counts:
        used = "dropped" if background == "none" else f"laid over {background}"
        modes = sorted({str(one["mode"]) for one in profile.facts if "transparent" in one})
        adaptations.append(_adapted("transparency", ", ".join(modes), used, profile, lambda one: "transparent" in one))
        notes += _empty(profile, background)
        notes += _flattened(profile, background)
    deep = [name for name in others if is_deep(name)]
    if deep:
        used = "the upper 8" if white_level is None else f"0 to {white_level} as 0 to 255"
        adaptations.append(_adapted(DEEP, ", ".join(deep), used, profile, lambda one: is_deep(one["mode"])))
        if _TRANSPARENT_VALUE in profile.counts:
            adaptations.append(
                _adapted(
                    "transparency of 16 bits", "one value", "dropped", profile, lambda one: _TRANSPARENT_VALUE in one
                )
            )
        notes += _outside_the_range(profile, white_level)
    share = profile.share(lambda one: "grey values" in str(one.get(_HIDDEN, "")))
    if mode == "L" and share >= _FEW:
        notes.append(
            f"{share:.0%} of the images lose most of their variance as grey values (channels: {', '.join(others)} -> "
            "L): what is drawn in colours of one brightness is gone; choose a backbone of 3 channels"
        )
    return adaptations, notes


def _adapted(what: str, received: str, used: str, profile: Profile, test: Any) -> Adaptation:
    return Adaptation(what=what, received=received, used=used, share=profile.share(test))


def _empty(profile: Profile, background: str) -> list[str]:
    """A warning where images have not one pixel that is seen."""
    num = profile.counts.get(_EMPTY, {}).get("yes", 0)
    if not num or background == "none":
        return []
    return [
        f"{num} of the {profile.num_measured} images that were looked at are transparent throughout: nothing of them "
        f"is seen but the background, {background}; mend or remove them, or show the colours behind it: "
        "--set settings.background=none"
    ]


def _flattened(profile: Profile, background: str) -> list[str]:
    """A warning where the background hides the drawing of some images, with the one that hides the fewest."""

    def share(name: str) -> float:
        return profile.share(lambda one: _HIDDEN_WORDS.get(name, name) in str(one.get(_HIDDEN, "")).split(" or "))

    lost = share(background)
    if lost < _FEW:
        return []
    best = min(("white", "black", "grey", "none"), key=share)
    how = "without their transparency" if background == "none" else f"laid over {background}"
    left = f" ({share(best):.0%})" if share(best) else ""
    mend = f"--set settings.background={best}{left}" if share(best) < lost else "lay them over a background beforehand"
    return [f"{lost:.0%} of the images lose most of their variance {how} (transparency): they become alike; {mend}"]


def _outside_the_range(profile: Profile, white_level: int | None) -> list[str]:
    """A warning where images of 16 bits use a small part of the range, or go beyond it."""
    white = white_level or _WHITE
    largest = max(one["largest value"] for one in profile.facts if "largest value" in one)
    dark = profile.share(lambda one: one.get("largest value", white) * 16 < white)
    beyond = profile.share(lambda one: one.get("largest value", 0) > white)
    notes = []
    if dark >= _FEW:
        notes.append(
            f"{dark:.0%} of the images hold 16 bits a channel and no value above a sixteenth of {white}: nearly black, "
            f"they lose most of their variance; the largest value of all is {largest}: choose settings.white_level"
        )
    if beyond >= _FEW:
        notes.append(
            f"{beyond:.0%} of the images have values above {white}, which become white (16 bits a channel); the "
            f"largest value of all is {largest}: choose settings.white_level"
        )
    return notes
