"""Images: photographs, scans, drawings; any size, any mode that Pillow reads."""

from __future__ import annotations

import functools
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.errors import RefusedError
from orchestrator.modality import (
    Adaptation,
    BackboneCard,
    BackboneRow,
    BackboneRules,
    Facts,
    Fit,
    Modality,
    Plan,
    Profile,
    Sample,
    SampleField,
    Task,
)
from orchestrator_image.appearance import losses, measure as facts_of
from orchestrator_image.channels import channels_of, require_channels
from orchestrator_image.reading import LargeImage, decode

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from orchestrator.modality import Collate
    from orchestrator.network import Network

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_ENLARGED_TOO_FAR = 3.0
_MANY = 0.1  # of the images enlarged: a smaller size is worth a word
_FEW = 0.01  # of the images: what happens to fewer is not worth a warning
_TIMM_SIZE = (3, 224, 224)
_LARGEST = 4096


class Settings(BaseModel):
    """The image plugin's own settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int | None = Field(None, ge=8, le=_LARGEST, description="pixels a side; default: the backbone's own")
    augment: Literal["none", "light", "flip"] | None = Field(
        None,
        description="light: small rotations, shifts, scales and colours; flip: the same with mirroring; default: light "
        "where everything is trained to tell classes, else none",
    )
    background: Literal["white", "grey", "black", "none"] = Field(
        "white",
        description="what transparent images are laid over; none: their transparency is dropped, so that the colours "
        "behind it show",
    )
    white_level: int | None = Field(
        None, ge=1, lt=2**31,
        description="the value that is white in images of 16 bits a channel; default: 65535, of which the upper 8 bits "
        "are taken",
    )  # fmt: skip


def measure(image: Image | LargeImage, card: BackboneCard) -> Facts:
    """Width and height in pixels, Pillow's mode, and which ways to give it the backbone's channels hide its drawing."""
    return facts_of(image.opened() if isinstance(image, LargeImage) else image, channels_of(card))


def fit(card: BackboneCard, row: BackboneRow, settings: Settings, profile: Profile | None) -> Fit:
    """The input's size and channels; resizing and conversion as adaptations."""
    height, width = _own_size(card)
    fixed = _is_fixed(card, row)
    built_for = _image_size(card) if card.library == "transformers" and fixed else None
    if built_for is not None and built_for != (height, width):
        raise RefusedError(
            "bad_config",
            f"{card.source}: config.json is of a network for {built_for[0]} x {built_for[1]}, and "
            f"preprocessor_config.json gives {height} x {width}",
            mend="put the size of config.json into preprocessor_config.json",
        )
    if settings.size is not None and (settings.size, settings.size) != (height, width):
        if fixed:
            raise RefusedError(
                "fixed_size",
                f"{card.source} ({card.model_type}) takes images of {height} x {width} only, and settings.size = "
                f"{settings.size}",
                expected=f"{height} x {width}",
                mend="leave settings.size out; every image is resized to what the backbone takes",
            )
        if row.size == "larger" and settings.size < min(height, width):
            raise RefusedError(
                "fixed_size",
                f"{card.source} ({card.model_type}) takes images of {height} x {width} or larger, and settings.size = "
                f"{settings.size}",
                expected=f"{height} or more",
                mend="leave settings.size out; every image is resized to what the backbone takes",
            )
        _require_whole_patches(card, row, settings.size)
        height = width = settings.size
    channels = channels_of(card)
    if channels not in (1, 3):
        raise RefusedError(
            "channels",
            f"{card.source} takes images of {channels} channels, and an image file has 1, 3 or 4",
            expected="a backbone of 1 or 3 channels",
            mend="choose another backbone, or write a plugin for such images (docs/plugins.md)",
        )
    require_channels(card, {} if card.library == "timm" else _settings(card))
    adaptations, notes = [], []
    if profile is not None and profile.num_measured:
        adaptations, notes = _hold_against(profile, height, width, "RGB" if channels == 3 else "L", settings)
        notes += _cropped(profile, card)
    return Fit(
        input={
            "size": [height, width],
            "channels": channels,
            "augment": settings.augment or "none",
            "background": settings.background,
            **({} if settings.white_level is None else {"white_level": settings.white_level}),
        },
        adaptations=adaptations,
        warnings=notes,
        augmented=settings.augment not in (None, "none"),
        augmentation=("augment",),
    )


def _require_whole_patches(card: BackboneCard, row: BackboneRow, size: int) -> None:
    patch = int(card.config.get("patch_size") or 16)
    if row.size == "patches" and size % patch:
        raise RefusedError(
            "fixed_size",
            f"{card.source} ({card.model_type}) cuts images into patches of {patch} pixels, and settings.size = {size}",
            expected=f"a multiple of {patch}",
            mend=f"settings.size = {max(1, round(size / patch)) * patch}",
        )


def _hold_against(
    profile: Profile, height: int, width: int, mode: str, settings: Settings
) -> tuple[list[Adaptation], list[str]]:  # fmt: skip
    adaptations, notes = losses(profile, mode, settings.background, settings.white_level)
    share = profile.share(lambda one: (one["height"], one["width"]) != (height, width))
    if share:
        received = f"{profile.ranges['width']} x {profile.ranges['height']}"
        adaptations.append(Adaptation(what="resize", received=received, used=f"{width} x {height}", share=share))
    small = profile.share(lambda one: min(height, width) > _ENLARGED_TOO_FAR * max(1, min(one["height"], one["width"])))
    if small >= _MANY:
        notes.append(
            f"{small:.0%} of the images are enlarged more than {_ENLARGED_TOO_FAR:g} times, to {width} x {height}: "
            "a smaller settings.size is faster, and often as good, if the backbone takes it"
        )
    return adaptations, notes


def _cropped(profile: Profile, card: BackboneCard) -> list[str]:
    """A warning where images lose more than half to the processor, which resizes by the shorter edge and crops."""
    if card.library == "timm":
        crops = (card.config.get("pretrained_cfg") or {}).get("crop_mode") != "squash"
    else:
        crops = "shortest_edge" in str(_settings(card).get("size"))
    share = profile.share(lambda one: max(one["width"], one["height"]) > 2 * min(one["width"], one["height"]))
    if not crops or share < _FEW:
        return []
    return [
        f"{share:.0%} of the images are more than twice as long as wide, and the backbone's processor crops their "
        "centre: more than half of each is not seen; cut them up, or fill them up to squares, beforehand"
    ]


def _own_size(card: BackboneCard) -> tuple[int, int]:
    """Height and width of what the backbone's own processor gives it."""
    if card.library == "timm":
        size = (card.config.get("pretrained_cfg") or {}).get("input_size") or _TIMM_SIZE
        if not (isinstance(size, (list, tuple)) and len(size) == 3 and all(isinstance(n, int) for n in size)):
            raise RefusedError(
                "bad_config",
                f"{card.source}: input_size in config.json is {size!r}, not [3, h, w]",
                mend="save the network again with timm",
            )
        if min(size) < 1 or max(size) > _LARGEST:
            raise RefusedError(
                "bad_config",
                f"{card.source}: input_size in config.json is {size!r}",
                expected=f"numbers from 1 to {_LARGEST}",
                mend="save the network again with timm",
            )
        return int(size[1]), int(size[2])
    if card.preprocessor is None:
        raise RefusedError(
            "no_processor",
            f"{card.source} has no preprocessor_config.json, so nobody can know how its images were prepared",
            expected="size, mean and standard deviation of its training images",
            mend="save the image processor beside the model: AutoImageProcessor...save_pretrained()",
        )
    settings = _settings(card)
    cropped = settings.get("crop_size") if settings.get("do_center_crop") else None
    size = _height_width(cropped) or _height_width(settings.get("size")) or _image_size(card)
    if size is None or min(size) < 1 or max(size) > _LARGEST:
        what = "no size" if size is None else f"the size {size[0]} x {size[1]}"
        raise RefusedError(
            "bad_config",
            f"{card.source}: preprocessor_config.json gives {what}",
            expected=f"1 to {_LARGEST} pixels a side",
            mend="save the image processor beside the model: AutoImageProcessor...save_pretrained()",
        )
    return size


def _settings(card: BackboneCard) -> dict[str, Any]:
    """What the image processor does: as the file says, else as the class that it names."""
    defaults = _processors()["defaults"].get(processor_of(card), {})
    return {**defaults, **{key: value for key, value in (card.preprocessor or {}).items() if value is not None}}


def processor_of(card: BackboneCard) -> str:
    """The class that the repository names, else the one that goes with its type, '' if none does."""
    known = _processors()["by_type"]
    named = named_processor(card)
    if named is None:
        return str(known.get(card.model_type, ""))
    name = re.sub(r"(FeatureExtractor|ImageProcessor)(Fast|Pil)?$", "ImageProcessor", str(named))
    if name not in known.values():
        raise RefusedError(
            "bad_config",
            f"{card.source}: preprocessor_config.json names {named!r}, which prepares no images that we know",
            expected="an image processor of transformers",
            mend="save the right image processor beside the model",
        )
    return name


def named_processor(card: BackboneCard) -> Any:
    """What preprocessor_config.json calls its class, None where it does not."""
    settings = card.preprocessor or {}
    return settings.get("image_processor_type") or settings.get("feature_extractor_type")


@functools.cache
def _processors() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("processors.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _image_size(card: BackboneCard) -> tuple[int, int] | None:
    nested = card.config.get("vision_config")
    return _height_width(card.config.get("image_size")) or _height_width((nested or {}).get("image_size"))


def _height_width(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    if isinstance(size, Mapping):
        if "height" in size and "width" in size:
            return int(size["height"]), int(size["width"])
        edge = size.get("shortest_edge")
        if edge:
            return int(edge), int(edge)
    return None


def _is_fixed(card: BackboneCard, row: BackboneRow) -> bool:
    if card.library == "timm":
        return bool((card.config.get("pretrained_cfg") or {}).get("fixed_input_size"))
    return row.size == "fixed"


def build(plan: Plan, directory: Path) -> Network:
    """The backbone with its new head, through transformers."""
    from orchestrator_image.network import build_network

    return build_network(plan, directory)


def batch(plan: Plan, directory: Path) -> Collate:
    """Pillow images -> {"pixel_values": float32 [batch, channels, height, width], normalised}."""
    from orchestrator_image.network import make_collate

    return make_collate(plan, directory)


def mix(kind: str, inputs: Mapping[str, Tensor], targets: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Images of a batch, each with another one: laid over it (mixup), or with a rectangle of it (cutmix)."""
    from orchestrator_image.network import mix_images

    return mix_images(kind, inputs, targets)


def toy(n: int) -> Sequence[tuple[Sample, str]]:
    """Dark squares and bright ones, 16 x 16 pixels, as PNG."""
    from PIL import Image

    samples = []
    for i in range(n):
        out = io.BytesIO()
        Image.new("RGB", (16, 16), (40 + i % 20,) * 3 if i % 2 else (200 + i % 20,) * 3).save(out, "PNG")
        samples.append(({"image": out.getvalue()}, "dark" if i % 2 else "bright"))
    return samples


modality = Modality(
    name="image",
    title="images",
    sample=(
        SampleField(
            name="image",
            kind="file",
            dtype="float32",
            shape=(3, "height", "width"),
            unit="RGB, normalised by the backbone's own mean and standard deviation",
            suffixes=SUFFIXES,
        ),
    ),
    settings=Settings,
    rules=BackboneRules.from_json(Path(__file__).with_name("rows.json")),
    tasks=(
        Task(name="single-label", title="one class an image"),
        Task(name="multi-label", title="any number of classes an image"),
        Task(name="regression", title="one or several numbers an image"),
    ),
    length_bucketing=False,
    extra="image",
    decode=decode,
    measure=measure,
    fit=fit,
    build=build,
    batch=batch,
    toy=toy,
    mixes={kind: functools.partial(mix, kind) for kind in ("mixup", "cutmix", "both")},
    augments={"augment": "light"},
)
