"""The half of the image plugin that needs torch: the model, the processor, augmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
import transformers
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from orchestrator.errors import TrainingError
from orchestrator.modality import Plan
from orchestrator.network import Network, build_pooled, build_transformers, from_logits, from_pipeline
from orchestrator_image import named_processor, processor_of
from orchestrator_image.appearance import code_of_reading, convert
from orchestrator_image.reading import LargeImage

if TYPE_CHECKING:
    from collections.abc import Callable


_CHANGES: dict[str, dict[str, Any]] = {
    "vit_mae": {"mask_ratio": 0.0},  # it would hide three of four patches at random
    # Ours stands on the mean of the patches, as transformers' own head on siglip does: their attention pooling
    # would never be called.
    "aimv2": {"use_head": False},
    "aimv2_vision_model": {"use_head": False},
    "siglip_vision_model": {"vision_use_head": False},
}
# With the alphas of the papers for fine-tuning and ImageNet.
_MIXES: dict[str, Any] = {"mixup": v2.MixUp(alpha=0.2), "cutmix": v2.CutMix(alpha=1.0)}
_MIXES["both"] = v2.RandomChoice([*_MIXES.values()])
_MAX_RESIZED = 2**24
"""Pixels that an image may have once it is resized by its shorter edge; of more, the middle is resized."""
_TIMES_AS_LARGE = 2
"""What is left of an image that is changed at random, in each direction, against what the network sees."""
_LEAST_LEFT = 16  # pixels of a strip: more than an interpolation looks at
_IMPORTS = "import torch\nfrom PIL import Image, ImageOps\nfrom transformers import AutoImageProcessor"
_PREPARE = """\
{read}
inputs = AutoImageProcessor.from_pretrained(".")(image, return_tensors="pt")"""
_PIPELINE = """\
from PIL import Image, ImageOps
from transformers import pipeline

{read}
{scores}"""
_MODEL = """\
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification

{read}
inputs = AutoImageProcessor.from_pretrained(".")(image, return_tensors="pt")
model = AutoModelForImageClassification.from_pretrained(".").eval()
with torch.no_grad():
    logits = model(**inputs).logits
{scores}"""


def build_network(plan: Plan, directory: Path) -> Network:
    """An AutoModelForImageClassification whose config says the input size that it was trained with."""
    if plan.row.pool:
        height, width = plan.input["size"]
        return build_pooled(
            plan, directory, make_processor(plan, directory), _CHANGES.get(plan.backbone.model_type, {}),
            {"pixel_values": torch.zeros(1, plan.input["channels"], height, width)}, _IMPORTS,
            _PREPARE.format(read=code_of_reading(plan)),
        )  # fmt: skip
    network = _with_its_own_head(plan, directory)
    if plan.input["channels"] == 3:
        scores = from_pipeline(plan.job.task, "image-classification", len(plan.classes), "image")
        network.usage = _PIPELINE.format(read=code_of_reading(plan), scores=scores)
    else:  # the pipeline makes RGB of every image
        scores = from_logits(plan.job.task, "logits[0]", "model.config")
        network.usage = _MODEL.format(read=code_of_reading(plan), scores=scores)
    return network


def _with_its_own_head(plan: Plan, directory: Path) -> Network:
    if plan.backbone.library == "timm":
        return build_transformers(
            plan,
            directory,
            transformers.TimmWrapperForImageClassification,
            {"pretrained_cfg": _timm_settings(plan)},
            processor=None,  # timm's settings stand in config.json
            fresh=_fresh_timm,
        )
    return build_transformers(
        plan, directory, getattr(transformers, plan.row.architecture), {}, make_processor(plan, directory),
        fresh=lambda config: getattr(transformers, plan.row.architecture)(config),
    )  # fmt: skip


def _timm_settings(plan: Plan) -> dict[str, Any]:
    settings = {k: v for k, v in (plan.backbone.config.get("pretrained_cfg") or {}).items() if k != "num_classes"}
    height, width = plan.input["size"]
    return {**settings, "input_size": [plan.input["channels"], height, width]}


def _fresh_timm(config: Any) -> torch.nn.Module:
    """Random weights by timm's own scheme; the wrapper's would be one normal distribution for every layer."""
    wrapped = transformers.AutoModelForImageClassification.from_config(config)
    fresh = timm.create_model(
        config.architecture, pretrained=False, num_classes=config.num_labels, **(config.model_args or {})
    )
    wrapped.timm_model.load_state_dict(fresh.state_dict())
    return wrapped  # type: ignore[no-any-return]


def make_processor(plan: Plan, directory: Path) -> Any:
    """The backbone's own image processor, at the plan's input size."""
    if plan.backbone.library == "timm":
        return TimmWrapperImageProcessor(_timm_settings(plan), architecture=plan.backbone.model_type)
    processor_class = transformers.AutoImageProcessor
    if plan.row.pool and not named_processor(plan.backbone):  # transformers knows no processor of a tower by its type
        processor_class = getattr(transformers, processor_of(plan.backbone))
    load = partial(processor_class.from_pretrained, directory, local_files_only=True, trust_remote_code=False)
    wanted = (plan.input["channels"], *plan.input["size"])
    mode = "RGB" if plan.input["channels"] == 3 else "L"
    processor = load()
    given = _gives(processor, mode)
    if given == {wanted}:
        return processor  # as the backbone was trained
    processor = load(**_at_size(processor, wanted[1:], min(min(shape[1:]) for shape in given)))
    given = _gives(processor, mode)
    if given != {wanted}:
        raise TrainingError(
            f"the image processor of {plan.backbone.source} gives images of {sorted(given)}, the plan says {wanted}",
            mend="leave settings.size out",
        )
    return processor


def _gives(processor: Any, mode: str) -> set[tuple[int, ...]]:
    """The shapes, (channels, height, width), that a tall and a wide image come out with."""
    images = [Image.new(mode, (131, 197)), Image.new(mode, (197, 131))]
    return {tuple(processor([image], return_tensors="pt")["pixel_values"].shape[-3:]) for image in images}


def _at_size(processor: Any, wanted: tuple[int, ...], given: int) -> dict[str, Any]:
    """The processor's sizes in proportion: 256 and a crop of 224 become, for 64, 73 and a crop of 64."""
    factor = wanted[0] / given
    changes: dict[str, Any] = {
        key: {name: round(value * factor) for name, value in dict(getattr(processor, key)).items() if value}
        for key in ("size", "crop_size")
        if getattr(processor, key, None)
    }
    if "shortest_edge" in changes["size"] and not getattr(processor, "do_center_crop", None):
        # Resized by its shorter edge alone, every image has another size, and no two make a batch.
        cropped = {"do_center_crop": True, "crop_size": {"height": wanted[0], "width": wanted[1]}}
        changes |= {} if getattr(processor, "crop_pct", None) else cropped
    return changes


def make_collate(
    plan: Plan, directory: Path
) -> Callable[[Sequence[Image.Image | LargeImage], bool], dict[str, Tensor]]:
    """Pillow images -> the processor's output, in training with augmentation in front of it."""
    processor = make_processor(plan, directory)
    augment = _augmentation(plan.input["augment"])
    mode = "RGB" if plan.input["channels"] == 3 else "L"
    # A run of an earlier version dropped transparency.
    background, white_level = plan.input.get("background", "none"), plan.input.get("white_level")
    edge = _cropped_from(processor)
    enough = _TIMES_AS_LARGE * max(edge, *plan.input["size"])

    def one(image: Image.Image, train: bool) -> Image.Image:
        image = convert(_seen(image, edge), mode, background, white_level)
        return augment(_reduced(image, enough)) if train and augment is not None else image

    def collate(decoded: Sequence[Image.Image | LargeImage], train: bool) -> dict[str, Tensor]:
        if not any(isinstance(image, LargeImage) for image in decoded):
            return dict(processor([one(image, train) for image in decoded], return_tensors="pt"))
        # One after the other, so that one large image is in memory at once.
        each = [
            processor([one(image.opened() if isinstance(image, LargeImage) else image, train)], return_tensors="pt")
            for image in decoded
        ]
        return {key: torch.cat([values[key] for values in each]) for key in each[0]}

    return collate


def mix_images(kind: str, inputs: Mapping[str, Tensor], targets: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A batch by mixup (Zhang et al. 2018, arXiv 1710.09412), CutMix (Yun et al. 2019, arXiv 1905.04899) or either.

    inputs: {"pixel_values": float32 [batch, channels, height, width]}; targets: float32 [batch, classes].
    """
    pixels, mixed = _MIXES[kind](inputs["pixel_values"], targets)
    return {**inputs, "pixel_values": pixels}, mixed


def _cropped_from(processor: Any) -> int:
    """What the shorter edge becomes before the centre is cropped; 0 where images are not cropped."""
    size = getattr(processor, "size", None) or {}
    if isinstance(processor, TimmWrapperImageProcessor):
        settings = processor.data_config
        edge = max(settings["input_size"][1:]) / (settings.get("crop_pct") or 1.0)
        return 0 if settings.get("crop_mode") == "squash" else round(edge)
    edge = int(dict(size).get("shortest_edge") or 0)
    return 0 if _squeezes(processor, edge) else edge


def _squeezes(processor: Any, edge: int) -> bool:
    """Whether it squeezes images into a square of that edge, as ConvNeXt's does from 384 pixels on."""
    return bool(getattr(processor, "crop_pct", None)) and not getattr(processor, "do_center_crop", None) and edge >= 384


def _seen(image: Image.Image, edge: int) -> Image.Image:
    """The image without ends of it that would be cropped off once it is resized, where that would be very large."""
    short, long = sorted(image.size)
    if edge * edge * long <= _MAX_RESIZED * short:
        return image
    left = max(4 * short, _LEAST_LEFT) + long % 2  # whole pixels on both sides
    if long <= left:
        return image
    cut = (long - left) // 2
    box = (cut, 0, cut + left, image.height) if image.width == long else (0, cut, image.width, cut + left)
    return image.crop(box)


def _reduced(image: Image.Image, enough: int) -> Image.Image:
    """The image by a whole factor smaller, its shorter edge no shorter than `enough`: to turn it takes less then."""
    factor = min(image.size) // enough
    return image.reduce(factor) if factor > 1 else image


def _moved(image: Image.Image) -> Image.Image:
    """Turned, shifted and scaled a little; what comes into view has the colour that is most at its border."""
    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colour = np.median(border, axis=0).reshape(-1).tolist()
    return v2.RandomAffine(  # type: ignore[no-any-return]
        degrees=10, translate=(0.08, 0.08), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR, fill=colour
    )(image)


def _augmentation(name: str) -> Callable[[Image.Image], Image.Image] | None:
    if name == "none":
        return None
    steps: list[Any] = [_moved, v2.ColorJitter(brightness=0.2, contrast=0.2)]
    if name == "flip":
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps)  # type: ignore[no-any-return]
