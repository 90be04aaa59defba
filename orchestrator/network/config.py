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


_CODE = "code that comes with a repository is never run"
_DEVICES = "how to place it on many devices, which the job says"
_FORMAT = "the number format, which the job says: weights are loaded in float32"
_KERNELS = "replaces parts of the network by kernels of the Hub"
_NOTE = "a note of transformers to itself"
_WHERE_IT_LAY = "where it lay when it was saved"

DROPPED: Mapping[str, str] = {
    # key, anywhere in config.json -> why no constructor gets it; published repositories have all of these
    "_attn_implementation_autoset": _NOTE,
    "_attn_implementation_internal": _NOTE,
    "_commit_hash": _WHERE_IT_LAY,
    "_experts_implementation": _KERNELS,
    "_experts_implementation_internal": _NOTE,
    "_name_or_path": _WHERE_IT_LAY,
    "auto_map": _CODE,
    "backbone": "the name of another network; none of the types that are trained has one inside",
    "base_model_tp_plan": _DEVICES,
    "custom_pipelines": _CODE,
    "device_map": _DEVICES,
    "distributed_config": _DEVICES,
    "dtype": _FORMAT,
    "experts_implementation": _KERNELS,
    "fusion_config": "replaces modules of the network by others",
    "kernel_config": _KERNELS,
    "name_or_path": _WHERE_IT_LAY,
    "quantization_config": "empty, or it was refused",
    "torch_dtype": _FORMAT,
    "trust_remote_code": _CODE,
    "use_kernels": _KERNELS,
    "use_pretrained_backbone": "loads another repository",
    "use_timm_backbone": "loads another repository",
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
