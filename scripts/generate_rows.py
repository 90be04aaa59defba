"""Write each plugin's rows.json from the installed transformers and timm, and what else is read from them.

    python scripts/generate_rows.py            # writes plugins/orchestrator_*/rows.json, two more tables
    python scripts/generate_rows.py --check    # exit 1 if they would change

A row says which class a model type is loaded with, what its forward takes, and which modules depend on the
number of classes. The last is found, not written by hand: each class is built twice without memory (torch's
meta device), for 2 and for 3 classes, and the parameters whose shape differs are the head.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
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
# What they write into tensors, or fill them with, is float32, or too large for bfloat16, whatever the others are.
FP32_ONLY = {"deberta", "xmod"}
# Their windows do not fit into feature maps smaller than those of their own size.
NOT_SMALLER = {"swin", "donut-swin"}

_CLIP = {"pool": "pooler", "size": "fixed"}
_TOWER = {"part": "vision_config", "prefix": "vision_model."}
# Types for which transformers has no classification head, and whose output makes one vector of an image or sound:
# they get the package's own head. Each with the class of the body and where its head stands.
POOLED: dict[str, dict[str, dict[str, str]]] = {
    "image": {
        # Encoders by themselves. The vector is the one that each was trained to make.
        "dinov3_convnext": {"architecture": "DINOv3ConvNextModel", "pool": "pooler"},
        "dinov3_vit": {"architecture": "DINOv3ViTModel", "pool": "pooler"},
        "mlcd": {"architecture": "MLCDVisionModel", **_CLIP},
        "mlcd_vision_model": {"architecture": "MLCDVisionModel", **_CLIP},
        "pixio": {"architecture": "PixioModel", "pool": "pooler"},
        "radio": {"architecture": "RadioModel", "pool": "summary", "size": "patches"},
        # Masked autoencoders are probed on their class token.
        "vit_mae": {"architecture": "ViTMAEModel", "pool": "first", "size": "fixed"},
        # Image towers that were trained together with a text tower, saved alone or with it. aimv2 may lack the
        # attention that pools, and siglip has transformers' own head where it is saved whole: on the mean of patches.
        "aimv2": {"architecture": "Aimv2VisionModel", "pool": "mean", "size": "fixed", **_TOWER},
        "aimv2_vision_model": {"architecture": "Aimv2VisionModel", "pool": "mean", "size": "fixed"},
        "align": {"architecture": "AlignVisionModel", "pool": "pooler", **_TOWER},
        "align_vision_model": {"architecture": "AlignVisionModel", "pool": "pooler"},
        "chinese_clip": {"architecture": "ChineseCLIPVisionModel", **_CLIP, **_TOWER},
        "chinese_clip_vision_model": {"architecture": "ChineseCLIPVisionModel", **_CLIP},
        "clip_vision_model": {"architecture": "CLIPVisionModel", **_CLIP},
        "metaclip_2_vision_model": {"architecture": "MetaClip2VisionModel", **_CLIP},
        "siglip_vision_model": {"architecture": "SiglipVisionModel", "pool": "mean", "size": "fixed"},
        "tipsv2": {"architecture": "Tipsv2VisionModel", "pool": "pooler", "part": "vision_config",
                   "prefix": "vision_encoder."},
        "tipsv2_vision_model": {"architecture": "Tipsv2VisionModel", "pool": "pooler"},
    },
    "audio": {
        "clap": {"architecture": "ClapAudioModel", "pool": "pooler", "part": "audio_config",
                 "prefix": "audio_model."},
        "clap_audio_model": {"architecture": "ClapAudioModel", "pool": "pooler"},
    },
}  # fmt: skip
# Their own head stands on the image tower: what else is in the checkpoint is not loaded.
PREFIX = dict.fromkeys(("clip", "metaclip_2", "siglip"), "vision_model.")
# The text beside an image or sound. Their text towers have no head in transformers, and get none of ours: they were
# trained on captions, 77 tokens or fewer, to say what is to be seen.
CAPTIONS = ("aimv2", "align", "chinese_clip", "clap", "clip", "metaclip_2", "siglip", "tipsv2")
# The other types without a head in transformers, and why they get none of ours. A type in none of these tables
# stops this script.
NOT_POOLED: dict[str, dict[str, str]] = {
    "no_head": {
        "it finds objects, and its output is boxes":
            "conditional_detr d_fine dab-detr deformable_detr deimv2 detr lw_detr omdet-turbo pp_doclayout_v3 "
            "pp_doclayout_v4 pp_ocrv6_medium_det pp_ocrv6_small_det rf_detr rt_detr rt_detr_v2 table-transformer yolos",
        "it draws masks, and its output is a map":
            "edgetam mask2former maskformer oneformer sam sam2 sam3_tracker sam_hq seggpt",
        "it is the encoder of a network that draws masks or finds objects, made for maps of large images":
            "edgetam_vision_model maskformer-swin sam2_hiera_det_model sam2_vision_model sam3_vision_model "
            "sam3_vit_model sam_hq_vision_model sam_vision_model sapiens2 vitdet",
        "it measures depth": "depth_pro dpt glpn",
        "it matches two images": "efficientloftr lightglue",
        "it reads lines of letters": "mgp-str pp_ocrv5_mobile_rec pp_ocrv5_server_rec pp_ocrv6_small_rec "
                                     "pp_ocrv6_tiny_rec",
        "it gives images back": "swin2sr uvdoc",
        "it is the eye of a language model, and its output is tokens for that model":
            "cosmos3_edge_vision gemma3n_vision gemma4_vision glm_image_vision granite_docling_vision "
            "hunyuan_vl_vision idefics3_vision inkling2_vision internvl_vision kimi_k25_vision lfm3_vl_vision "
            "minicpm_ocr_vision minicpmv4_7_vision muse_glimmer_vision muse_spark_vision pixtral qianfan_ocr_vision "
            "smolvlm_vision video_llama_3_vision",
        "it is a shell around another library's network: use that network's own repository":
            "timm_backbone timm_wrapper",
        "it takes a varying number of patches": "siglip2_vision_model",
        "it is the ear of a language model, and its output is tokens for that model":
            "audioflamingo3_encoder fun_asr_nano_encoder gemma4_audio glmasr_encoder moss_transcribe_diarize_audio "
            "muse_spark_audio qwen2_audio_encoder qwen3_asr_encoder voxtral_encoder voxtral_realtime_encoder",
        "it writes down speech, and no class of transformers is its encoder alone":
            "canary cohere_asr moonshine moonshine_streaming nemotron3_5_asr nemotron_asr_streaming parakeet_rnnt "
            "parakeet_tdt speech_to_text speecht5",
        "it writes down speech frame by frame, and this version does not average over frames of a masked batch":
            "granite_speech5_ctc granite_speech5_encoder lasr_ctc lasr_encoder nemotron3_5_transcribe_asr_audio "
            "nemotron3_5_transcribe_audio nemotron_asr_streaming_encoder parakeet_ctc parakeet_encoder",
        "it tells speakers apart in time": "nemotron3_diarization nemotron3_diarization_audio",
        "it packs sound so that it can be unpacked, and does not tell one sound from another":
            "dac encodec mimi mimi_encoder neucodec pocket_tts_audio_tokenizer pocket_tts_audio_tokenizer_encoder "
            "vibevoice_acoustic_tokenizer xcodec xcodec2",
        "it makes sound": "univnet",
        "it was trained on sound together with video": "pe_audio_encoder",
    },
    "unsupported": {"it takes videos, not single images": "timesformer videomae vivit"},
}  # fmt: skip
WHY = {
    model_type: (reason, why)
    for reason, groups in NOT_POOLED.items()
    for why, names in groups.items()
    for model_type in names.split()
}


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
        assert model_type not in POOLED.get(modality, {}), f"{model_type} has a head in transformers now"
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
            **({"fp32_only": True} if model_type in FP32_ONLY else {}),
            **({"prefix": PREFIX[model_type]} if modality == "image" and model_type in PREFIX else {}),
        }
    pooled = {}
    for model_type, row in POOLED.get(modality, {}).items():
        inputs = kinds(getattr(transformers, row["architecture"]))
        assert set(inputs.values()) == {modality}, f"{model_type} takes {inputs}"
        pooled[model_type] = {"inputs": sorted(inputs), "head": ["classifier"], **row}
    if modality == "text":
        for model_type in CAPTIONS:
            refuses[model_type] = {
                "reason": "two_modalities",
                "message": "it was trained on images or sounds together with their captions, and its text tower has "
                "no classification head",
            }
    return {"accepts": accepts, "refuses": refuses, **({"pooled": pooled} if pooled else {})}


def without_head(plugins: dict[str, Any]) -> None:
    """Types with a base model and no classification head in transformers' tables: known, and refused by name."""
    placed = {
        model_type
        for rows in plugins.values()
        for model_type in (*rows["accepts"], *rows["refuses"], *rows.get("pooled", {}))
    }
    undecided = []
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
            if owner != "text":
                if model_type not in WHY:
                    undecided.append(model_type)
                    continue
                reason, why = WHY[model_type]
                rule = {"reason": reason, "message": why if reason != "no_head" else f"{rule['message']}, and "
                        f"this version has none of its own: {why}"}  # fmt: skip
        plugins[owner]["refuses"][model_type] = rule
    assert not undecided, f"neither in POOLED nor in NOT_POOLED: {undecided}"


# timm's settings name one of their two heads; tests/test_survey.py found the other.
TIMM_HEADS = dict.fromkeys(("levit_384_s8", "levit_conv_384_s8"), ("head.linear", "head_dist.linear"))


def timm_heads() -> tuple[dict[str, list[str]], dict[str, Any]]:
    """The classifiers by architecture, and the refusals of networks that have none (encoders of larger models).

    timm names a classifier for some of those too, so each without `get_classifier` is found by building it.
    """
    heads: dict[str, list[str]] = {}
    refuses = {}
    for architecture in timm.list_models():
        classifier = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
        names = TIMM_HEADS.get(architecture, classifier.classifier if classifier else None)
        if not names or architecture.endswith("_enc"):
            with torch.device("meta"):
                model = timm.create_model(architecture, num_classes=7)
            if not hasattr(model, "get_classifier"):
                refuses[architecture] = {
                    "reason": "no_head",
                    "message": "timm has no classifier for it: it is the encoder of a larger model",
                    "mend": f"use {near}, which has one"
                    if (near := architecture.removesuffix("_enc")) in heads
                    else "",
                }
                continue
        heads[architecture] = [names] if isinstance(names, str) else list(names)
    return heads, refuses


# What reaches `timm.create_model` and is no setting of an architecture; why each is no repository's to say.
NOT_TIMM_ARGS = {
    "it names weights that lie elsewhere, in any file or at any address":
        "cache_dir checkpoint_path pretrained pretrained_cfg pretrained_cfg_overlay pretrained_filter_fn "
        "pretrained_model_args pretrained_strict",
    "it sets what is the process's, for all networks after it": "exportable no_jit scriptable",
    "it says where the network is and in which number format, which the job says": "device dtype",
    "it makes a network without a classifier": "feature_cfg feature_cls features_only out_indices",
    "it reads a file of timm's that goes with another architecture": "pruned",
    "it is no setting, but how settings are handed on": "args cfg kwargs kwargs_filter model_cfg self",
}  # fmt: skip


def timm_args() -> list[str]:
    """The settings that timm's architectures take: of their constructors, and what these take out of `kwargs`."""
    from timm.models import naflexvit

    names = {field.name for field in dataclasses.fields(naflexvit.NaFlexVitCfg)}
    for module in pkgutil.iter_modules(timm.models.__path__):
        loaded = importlib.import_module(f"timm.models.{module.name}")
        names |= set(re.findall(r"kwargs\.(?:pop|get|setdefault)\([\"'](\w+)", inspect.getsource(loaded)))
        for cls in vars(loaded).values():
            if inspect.isclass(cls) and cls.__module__ == loaded.__name__ and hasattr(cls, "get_classifier"):
                names |= set(inspect.signature(cls).parameters)
    return sorted(names - set(" ".join(NOT_TIMM_ARGS.values()).split()))


# Bodies that transformers names no image processor for: those of the models or families that they belong to.
TOWERS = {
    "align": ("align_vision_model",),
    "chinese_clip": ("chinese_clip_vision_model",),
    "clip": ("clip_vision_model",),
    "dinov3_vit": ("dinov3_convnext",),
    "metaclip_2": ("metaclip_2_vision_model",),
    "mlcd": ("mlcd_vision_model",),
    "siglip": ("siglip_vision_model",),
    "tipsv2": ("tipsv2_vision_model",),
}


# What the image plugin reads of a processor's settings.
PREPARES = ("size", "crop_size", "do_center_crop", "do_convert_rgb", "do_normalize", "image_mean", "image_std")


def processors() -> dict[str, Any]:
    """What the image processors do where a repository's file does not say, and which one goes with which type."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    by_type, defaults = {}, {}
    for model_type, names in sorted(IMAGE_PROCESSOR_MAPPING_NAMES.items()):
        name = names.get("torchvision") or names.get("pil")
        if not name:
            continue
        by_type |= dict.fromkeys((model_type, *TOWERS.get(model_type, ())), name)
        try:
            made = getattr(transformers, name)()
        except Exception:
            continue
        plain = {key: getattr(made, key, None) for key in PREPARES}
        for key in ("size", "crop_size"):
            if plain[key] is not None:
                plain[key] = {k: v for k, v in dict(plain[key]).items() if v is not None}
        defaults[name] = {key: value for key, value in plain.items() if value is not None}
    return {"by_type": by_type, "defaults": defaults}


# How the code of a type reads a key: an attribute of a config; one that it asks for by its name; or out of `kwargs`.
READS = (
    re.compile(r"config\.([a-z]\w*)\b(?!\()"),
    re.compile(r"(?:get|has)attr\(\s*(?:\w+\.)*\w*config\w*,\s*[\"'](\w+)[\"']"),
    re.compile(r"kwargs\.(?:pop|get|setdefault)\(\s*[\"'](\w+)[\"']"),
)


def keys_read(cls: type) -> set[str]:
    """The keys that the code of a config's package reads, whether its class declares them or not."""
    found: set[str] = set()
    folder = Path(inspect.getfile(cls)).parent
    for file in (*folder.glob("configuration_*.py"), *folder.glob("modeling_*.py")):
        source = file.read_text(encoding="utf-8")
        patterns = READS if file.name.startswith("configuration_") else READS[:2]
        found |= {name for pattern in patterns for name in pattern.findall(source)}
    return {name for name in found if not name.startswith("_") and not callable(getattr(cls, name, None))}


def config_keys(types: list[str]) -> dict[str, Any]:
    """The keys of config.json that each type's class or its network reads, besides those that every class does.

    Those of generation stood in config.json for years, and say nothing of a network.
    """
    general = set(transformers.PreTrainedConfig().to_dict()) | set(
        inspect.signature(transformers.PreTrainedConfig).parameters
    )
    general |= {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    found = {}
    for model_type in sorted(types):
        cls = transformers.CONFIG_MAPPING[model_type]
        known = set(inspect.signature(cls).parameters) | set(getattr(cls, "attribute_map", {})) | keys_read(cls)
        try:
            known |= set(cls().to_dict())
        except Exception as error:  # a part that only a whole model has
            print(f"{model_type}: {type(error).__name__}: {str(error)[:80]}", file=sys.stderr)
        found[model_type] = " ".join(sorted(known - general - {"kwargs", "self"}))
    return {"general": " ".join(sorted(general - {"kwargs", "self"})), "types": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    plugins = {modality: rows_of(modality) for modality in TABLES}
    without_head(plugins)
    plugins["image"]["timm"], plugins["image"]["timm_refuses"] = timm_heads()
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
        print(f"{modality}: {len(rows['accepts'])} accepted, {len(rows.get('pooled', {}))} with a head of ours, "
              f"{len(rows['refuses'])} refused by name, "
              f"{len(rows.get('timm', {}))} timm")  # fmt: skip
    types = [name for rows in plugins.values() for name in (*rows["accepts"], *rows.get("pooled", {}))]
    not_args = {name: why for why, names in NOT_TIMM_ARGS.items() for name in names.split() if len(name) > 4}
    for file, content in (
        (PLUGINS / "orchestrator_image" / "processors.json", processors()),
        (PLUGINS.parent / "orchestrator" / "backbone" / "timm_args.json", {"allowed": timm_args(), "not": not_args}),
        (PLUGINS.parent / "orchestrator" / "gate" / "config_keys.json", config_keys(types)),
    ):
        lines = json.dumps(content, indent=1, sort_keys=True) + "\n"
        if not file.is_file() or file.read_text() != lines:
            changed += 1
            if not check:
                file.write_text(lines)
    return 1 if check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
