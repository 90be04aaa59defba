"""A repository's config.json -> the configuration that a network of transformers or timm is built from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers

from orchestrator.job import Plan

_PROBLEM_TYPES = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}


def make_config(plan: Plan, changes: Mapping[str, Any]) -> Any:
    """The backbone's config with the plan's classes, for transformers."""
    whole = plan.backbone.config.get(plan.row.part) if plan.row.part in plan.backbone.config else plan.backbone.config
    raw = {key: value for key, value in dict(whole or {}).items() if key not in ("label_names", "num_classes")}
    if raw.get("model_args"):  # timm's save_for_hf puts num_classes in here, which the wrapper gives a second time
        raw["model_args"] = {key: value for key, value in raw["model_args"].items() if key != "num_classes"}
    model_type = "timm_wrapper" if plan.backbone.library == "timm" else plan.backbone.model_type
    config_class = transformers.CONFIG_MAPPING[model_type]
    if plan.row.pool:  # the body's own class: of a tower it is another than the repository's
        config_class = getattr(transformers, plan.row.architecture).config_class
    names = dict(enumerate(plan.classes))
    for key in ("id2label", "label2id", "num_labels", "model_type"):
        raw.pop(key, None)
    return config_class.from_dict(
        {**raw, **changes},
        id2label=names,
        label2id={name: i for i, name in names.items()},
        num_labels=len(names),
        problem_type=_PROBLEM_TYPES[plan.job.task],
    )
