"""Keys of a repository's config.json that no network is built with, and why."""

from __future__ import annotations

from collections.abc import Mapping

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
