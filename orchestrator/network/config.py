"""A repository's config.json -> the configuration that a network of transformers or timm is built from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers

from orchestrator.job import DROPPED, Plan

_PROBLEM_TYPES = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}

_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")
_ATTENTIONS = ("eager", "sdpa")
"""What `attn_implementation` may say; others are packages that may not be there, and torch's own does for them."""


def make_config(plan: Plan, changes: Mapping[str, Any]) -> Any:
    """The backbone's config with the plan's classes, for transformers; without what names other files or code."""
    whole = plan.backbone.config.get(plan.row.part) if plan.row.part in plan.backbone.config else plan.backbone.config
    raw = constructor_settings(whole or {})
    if raw.get("model_args"):  # timm's save_for_hf puts num_classes in here, which the wrapper gives a second time
        raw["model_args"].pop("num_classes", None)
    model_type = "timm_wrapper" if plan.backbone.library == "timm" else plan.backbone.model_type
    config_class = transformers.CONFIG_MAPPING[model_type]
    if plan.row.pool:  # the body's own class: of a tower it is another than the repository's
        config_class = getattr(transformers, plan.row.architecture).config_class
    names = dict(enumerate(plan.classes))
    for key in ("id2label", "label2id", "label_names", "model_type", "num_classes", "num_labels"):
        raw.pop(key, None)
    return config_class.from_dict(
        {**raw, **changes},
        id2label=names,
        label2id={name: i for i, name in names.items()},
        num_labels=len(names),
        problem_type=_PROBLEM_TYPES[plan.job.task],
    )


def constructor_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config.json, or of a part of it, without what `DROPPED` names, at any depth."""
    return {
        key: constructor_settings(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in DROPPED and not (key in _ATTENTION_KEYS and value not in _ATTENTIONS)
    }
