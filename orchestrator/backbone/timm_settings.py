"""What of timm's part of a config.json a network may be made with: a list of settings, no weights from elsewhere."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SOURCES = ("custom_load", "file", "hf_hub_filename", "hf_hub_id", "source", "state_dict", "url")
"""Of `pretrained_cfg`: where the weights were published; these are loaded from the repository itself."""


@functools.cache
def allowed_args() -> tuple[frozenset[str], Mapping[str, str]]:
    """(the keys of `model_args` that timm's architectures take, other keys of `timm.create_model`: what each does).

    Both are generated from timm by scripts/generate_rows.py.
    """
    listed = json.loads(Path(__file__).with_name("timm_args.json").read_text(encoding="utf-8"))
    return frozenset(listed["allowed"]), listed["not"]


def without_sources(config: Mapping[str, Any]) -> dict[str, Any]:
    """A timm repository's config.json with the listed settings alone, and without the places of other weights."""
    kept = dict(config)
    if isinstance(config.get("model_args"), Mapping):
        allowed, _ = allowed_args()
        kept["model_args"] = {
            name: value for name, value in config["model_args"].items() if name in allowed and value is not None
        }
    if isinstance(config.get("pretrained_cfg"), Mapping):
        kept["pretrained_cfg"] = {
            name: value for name, value in config["pretrained_cfg"].items() if name not in _SOURCES
        }
    return kept
