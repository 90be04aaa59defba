"""How many channels a backbone takes, and whether what prepares its images gives as many."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from orchestrator.errors import RefusedError
from orchestrator.modality import BackboneCard

_TIMM_CHANNELS = 3  # of `in_chans`, where model_args do not say


def channels_of(card: BackboneCard) -> int:
    """How many channels the network's input has."""
    if card.library == "timm":
        return int((card.config.get("model_args") or {}).get("in_chans") or _timm_input(card))
    nested = card.config.get("vision_config") or {}
    return int(card.config.get("num_channels") or nested.get("num_channels") or 3)


def _timm_input(card: BackboneCard) -> int:
    size = (card.config.get("pretrained_cfg") or {}).get("input_size")
    return int(size[0]) if size else _TIMM_CHANNELS


def require_channels(card: BackboneCard, settings: Mapping[str, Any]) -> None:
    """Raise `RefusedError` where the images that the processor gives have other channels than the network takes.

    `settings`: the processor's, its defaults among them; of timm's networks it is not asked for.
    """
    channels = channels_of(card)
    if card.library == "timm":
        file, means, is_normalised = "pretrained_cfg in config.json", "mean", True
        given = card.config.get("model_args") or {}
        settings = card.config.get("pretrained_cfg") or {}
        built = int(given.get("in_chans") or _TIMM_CHANNELS)
        if _timm_input(card) != built:
            raise RefusedError(
                "bad_config",
                f"{card.source}: input_size in config.json has {_timm_input(card)} channels, and the network is built "
                f"with {built} (in_chans of model_args)",
                mend=f'put "model_args": {{"in_chans": {_timm_input(card)}}} into config.json, if the network was '
                "trained with as many, or save it again with timm's save_for_hf(..., model_args={'in_chans': ...})",
            )
    else:
        file, means = "preprocessor_config.json", "image_mean"
        is_normalised = bool(settings.get("do_normalize"))
        if channels == 1 and settings.get("do_convert_rgb"):
            raise RefusedError(
                "bad_config",
                f"{card.source}: config.json is of a network for 1 channel, and do_convert_rgb in {file} makes 3 of it",
                mend=f'put "do_convert_rgb": false into {file}',
            )
    deviations = means.replace("mean", "std")
    for key in (means, deviations) if is_normalised else ():
        value = settings.get(key)
        if value is None:
            continue
        each = list(value) if isinstance(value, (list, tuple)) else [value]
        wrong = [one for one in each if isinstance(one, bool) or not isinstance(one, (int, float))
                 or not math.isfinite(one) or (key == deviations and not one)]  # fmt: skip
        if wrong:
            raise RefusedError(
                "bad_config", f"{card.source}: {key} in {file} holds {wrong[0]!r}",
                expected="finite numbers, deviations other than 0",
                mend="save the right image processor beside the model",
            )  # fmt: skip
        if isinstance(value, (list, tuple)) and len(each) != channels:
            raise RefusedError(
                "bad_config",
                f"{card.source}: config.json is of a network for {channels} channel{'s' if channels > 1 else ''}, and "
                f"{key} in {file} holds {len(each)} numbers",
                expected="one for each channel",
                mend=f"put {channels} number{'s' if channels > 1 else ''} into {means} and {deviations} of {file}: "
                "those that the network was trained with",
            )
