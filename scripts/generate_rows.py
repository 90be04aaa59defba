"""Write each plugin's rows.json from the installed transformers and timm.

    python scripts/generate_rows.py            # writes plugins/orchestrator_*/rows.json
    python scripts/generate_rows.py --check    # exit 1 if they would change

A row says which class a model type is loaded with, what its forward takes, and which modules depend on the
number of classes. The last is found, not written by hand: each class is built twice without memory (torch's
meta device), for 2 and for 3 classes, and the parameters whose shape differs are the head.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from transformers.models.auto import modeling_auto as auto

PLUGINS = Path(__file__).resolve().parent.parent / "plugins"
TABLES = {
    "image": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "audio": auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "text": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
KIND = {
    "pixel_values": "image", "pixel_values_videos": "video", "flattened_patches": "image",
    "input_values": "audio", "input_features": "audio", "audio_values": "audio", "input_audio_embeds": "audio",
    "input_ids": "text", "bbox": "page layout", "boxes": "page layout", "visual_feats": "image",
    "visual_embeds": "image", "image": "image", "xpath_tags_seq": "markup", "past_values": "time series",
}  # fmt: skip
# What the signature does not show. Each is a fact about the type, with the reason that a user reads.
EXCEPTIONS: dict[str, tuple[str, str, str]] = {
    "imagegpt": ("image", "unsupported", "its input_ids are clusters of colours, which no image processor batches"),
    "perceiver": ("image", "unsupported", "its config.json does not say which of its heads it was trained with: one "
                  "for texts, or one of three for images"),
    "pp_lcnet": ("image", "unsupported", "its classification head returns no logits, so no pipeline can serve it"),
    "siglip2": ("image", "unsupported", "it takes a varying number of patches, which this version does not batch"),
    "dinat": ("image", "unsupported", "it needs the natten library, which has no release for current torch"),
    "tapas": ("text", "unsupported", "it reads tables, not texts"),
    "esmc": ("text", "unsupported", "it was trained on protein sequences, not on language"),
    "esm": ("text", "unsupported", "it was trained on protein sequences, not on language"),
    "layoutlm": ("text", "two_modalities", "it takes text together with its place on the page"),
}  # fmt: skip
# Their classifier does not hold the base model whole, so what stands beside it is not found by comparing children.
MAY_BE_NEW = {"whisper": ["projector", "classifier"]}
# Position tables for one size; their pipelines have no way to ask for interpolation.
FIXED_SIZE = {
    "vit",
    "deit",
    "siglip",
    "hiera",
    "clip",
    "metaclip_2",
    "pvt",
    "levit",
    "ijepa",
    "vit_msn",
    "siglip2",
}
# Their windows do not fit into feature maps smaller than those of their own size.
NOT_SMALLER = {"swin", "donut-swin"}


def kinds(cls: type) -> dict[str, str]:
    names = list(inspect.signature(cls.forward).parameters)
    return {name: KIND[name] for name in names if name in KIND}


def complete(config: Any) -> Any:
    """What some defaults leave open, and every published config.json of the type says."""
    if getattr(config, "num_key_value_heads", 0) is None:
        config.num_key_value_heads = config.num_attention_heads
    if getattr(config, "head_dim", 0) is None and hasattr(config, "num_attention_heads"):
        config.head_dim = config.hidden_size // config.num_attention_heads
    if config.model_type == "cohere_compass_text":
        config.rope_parameters = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in config.layer_types}
    return config


def shrink(config: Any) -> Any:
    """Fewer layers, where that is a plain number: the head does not depend on it, the time does."""
    for part in (config, getattr(config, "text_config", None)):
        if isinstance(getattr(part, "num_hidden_layers", None), int) and not getattr(part, "layer_types", None):
            part.num_hidden_layers = min(2, part.num_hidden_layers)
    return config


def shapes(cls: Any, num_labels: int) -> tuple[Any, dict[str, torch.Size]]:
    config = cls.config_class()
    try:
        config = shrink(complete(config))
        config.num_labels = num_labels
        with torch.device("meta"):
            model = cls(config)
    except Exception:
        config = complete(cls.config_class())
        config.num_labels = num_labels
        with torch.device("meta"):
            model = cls(config)
    return model, {name: tensor.shape for name, tensor in model.named_parameters()}


def head_of(cls: Any) -> tuple[list[str], list[str]]:
    model, two = shapes(cls, 2)
    _, three = shapes(cls, 3)
    head: list[str] = []
    for name in two:
        module = name.rpartition(".")[0]
        if two[name] != three[name] and module not in head:
            head.append(module)
    prefix = cls.base_model_prefix
    may_be_new = []
    if prefix and hasattr(model, prefix):
        for name, child in model.named_children():
            if name != prefix and any(True for _ in child.parameters()):
                may_be_new.append(name)
    return head, may_be_new


def rows_of(modality: str) -> dict[str, Any]:
    accepts: dict[str, Any] = {}
    refuses: dict[str, Any] = {}
    for model_type, names in sorted(TABLES[modality].items()):
        if model_type == "timm_wrapper":  # its rows are those of timm
            continue
        name = names[0] if isinstance(names, (tuple, list)) else names
        if model_type in EXCEPTIONS:
            _, reason, message = EXCEPTIONS[model_type]
            refuses[model_type] = {"reason": reason, "message": message}
            continue
        cls = getattr(transformers, name)
        inputs = kinds(cls)
        others = sorted(set(inputs.values()) - {modality})
        if others:
            refuses[model_type] = {
                "reason": "two_modalities" if modality in inputs.values() else "unsupported",
                "message": f"its head takes {' and '.join(sorted(set(inputs.values())))}",
            }
            continue
        try:
            head, may_be_new = head_of(cls)
        except Exception as error:
            print(f"{modality} {model_type}: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
            head, may_be_new = [], []
        accepts[model_type] = {
            "architecture": name,
            "inputs": sorted(inputs),
            "head": head,
            "may_be_new": MAY_BE_NEW.get(model_type, may_be_new),
            **({"size": "fixed"} if model_type in FIXED_SIZE else {}),
            **({"size": "larger"} if model_type in NOT_SMALLER else {}),
        }
    return {"accepts": accepts, "refuses": refuses}


def without_head(plugins: dict[str, Any]) -> None:
    """Types with a base model and no classification head in transformers' tables: known, and refused by name."""
    placed = {model_type for rows in plugins.values() for model_type in (*rows["accepts"], *rows["refuses"])}
    for model_type, name in sorted(auto.MODEL_MAPPING_NAMES.items()):
        if model_type in placed:
            continue
        try:
            cls = getattr(transformers, name[0] if isinstance(name, (tuple, list)) else name)
            cls.forward  # noqa: B018  # a class whose library is missing raises here
        except (AttributeError, ImportError):
            continue
        taken = sorted(set(kinds(cls).values()))
        owner = next((kind for kind in ("image", "audio", "text") if kind in taken), None)
        if owner is None:
            continue
        if len(taken) > 1:
            rule = {"reason": "two_modalities", "message": f"it takes {' and '.join(taken)} at once"}
        else:
            rule = {"reason": "no_head", "message": "transformers has no classification head for this type"}
        plugins[owner]["refuses"][model_type] = rule


# Found by tests/test_survey.py, which builds every architecture of timm; without a row they are refused.
NO_TIMM_ROW = (
    "gemma4_vit_167m_enc",  # encoders of larger models: timm names a classifier for them, and the network has none
    "gemma4_vit_570m_enc",
    "mobilenetv5_300m_enc",
    "volo_",  # in training it returns three things, the logits of a second, auxiliary head among them
)


def timm_heads() -> dict[str, list[str]]:
    heads = {}
    for architecture in timm.list_models():
        if architecture.startswith(NO_TIMM_ROW):
            continue
        classifier = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
        names = classifier.classifier if classifier else None
        if names:
            heads[architecture] = [names] if isinstance(names, str) else list(names)
    return heads


def processors() -> dict[str, Any]:
    """What the image processors do where a repository's file does not say, and which one goes with which type."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    by_type, defaults = {}, {}
    for model_type, names in sorted(IMAGE_PROCESSOR_MAPPING_NAMES.items()):
        name = names.get("torchvision") or names.get("pil")
        if not name:
            continue
        by_type[model_type] = name
        try:
            made = getattr(transformers, name)()
        except Exception:
            continue
        plain = {key: getattr(made, key, None) for key in ("size", "crop_size", "do_center_crop")}
        for key in ("size", "crop_size"):
            if plain[key] is not None:
                plain[key] = {k: v for k, v in dict(plain[key]).items() if v is not None}
        defaults[name] = {key: value for key, value in plain.items() if value is not None}
    return {"by_type": by_type, "defaults": defaults}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    plugins = {modality: rows_of(modality) for modality in TABLES}
    without_head(plugins)
    plugins["image"]["timm"] = timm_heads()
    changed = 0
    for modality, rows in plugins.items():
        versions = f"transformers {transformers.__version__}"
        if "timm" in rows:
            versions += f", timm {timm.__version__}"
        lines = json.dumps({"generated_from": versions, **rows}, indent=1, sort_keys=True)
        file = PLUGINS / f"orchestrator_{modality}" / "rows.json"
        if not file.is_file() or file.read_text() != lines + "\n":
            changed += 1
            if not check:
                file.write_text(lines + "\n")
        print(f"{modality}: {len(rows['accepts'])} accepted, {len(rows['refuses'])} refused by name, "
              f"{len(rows.get('timm', {}))} timm")  # fmt: skip
    lines = json.dumps(processors(), indent=1, sort_keys=True) + "\n"
    file = PLUGINS / "orchestrator_image" / "processors.json"
    if not file.is_file() or file.read_text() != lines:
        changed += 1
        if not check:
            file.write_text(lines)
    return 1 if check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
