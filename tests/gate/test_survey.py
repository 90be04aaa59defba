"""The gate over every model type of transformers and every pretrained network of timm.

What is expected comes from no table: every classification class that transformers' source defines is built tiny
from its own config, and toy batches of each modality run through it. A pair (type, modality) is right where the
input of that modality alone gives logits [batch, num_labels].
"""

from __future__ import annotations

import gc
import importlib
import pkgutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.errors import REASONS, RefusedError
from orchestrator.gate.decide import fit, match
from orchestrator.job.plans import BackboneCard
from orchestrator.modality import registry
from orchestrator.network.cut import Cut, find_cut
from orchestrator.network.loading import _head
from orchestrator.network.network import Network

MODALITIES = ("image", "audio", "text")
CUTS: dict[tuple[str, str], Cut | None] = {}
"""(type, kind of checkpoint) -> where it is cut into body and head; filled while the classes run."""
IN_BFLOAT16: dict[str, str] = {}
"""Type -> what its network raises in bfloat16, as a GPU trains by default, or ""; filled with `CUTS`."""
SUFFIXES = ("ForImageClassification", "ForAudioClassification", "ForSequenceClassification")
NUM_LABELS = 5

# Sizes of a tiny network, set where the config has the number and it is larger.
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "num_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_decoder_layers": 2, "moe_intermediate_size": 32, "n_inner": 64, "num_experts_per_tok": 2, "head_dim": 8,
    "vocab_size": 300, "type_vocab_size": 7, "entity_vocab_size": 50, "image_size": 224, "num_conv_pos_embeddings": 16,
}  # fmt: skip
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
}
_LATENT = {**_TEXT, "num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
           "q_lora_rank": 8, "kv_lora_rank": 8}  # fmt: skip
_ROUTED = {**_LATENT, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
           "topk_group": 1}  # fmt: skip
_T5 = {"vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "eos_token_id": 2}
_GEMMA = {**_TEXT, "head_dim": 8, "num_key_value_heads": 4, "query_pre_attn_scalar": 8}
_TOWER = {**_TEXT, "image_size": 64, "patch_size": 16}
_TOWER.pop("vocab_size")
_SCALED = {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320, "image_size": 64}
_SWIN = {"patch_embeds_hidden_size": 16, "depths": [1, 1, 1, 1], "num_attention_heads": [2, 2, 2, 2],
         "hidden_size": 128}  # fmt: skip
# Types whose config derives one number from another when it is made: all that it is made of.
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "mistral4"), _ROUTED),
    "minicpm3": _LATENT,
    "cohere_compass_text": {
        **_TEXT, "num_key_value_heads": 4, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    **{name: {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]} for name in ("convnext", "convnextv2")},
    "deberta": {**_TEXT, "pooler_hidden_size": 32},
    "deberta-v2": {**_TEXT, "pooler_hidden_size": 32},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320, "image_size": 64},
    "esm": {**_TEXT, "max_position_embeddings": 64, "pad_token_id": 1},
    "esmc": _TEXT,
    "funnel": {"vocab_size": 300, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64},
    "gpt_neo": {"vocab_size": 300, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
                "attention_types": [[["global", "local"], 1]]},
    "gptj": {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "hiera": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
    "jamba": {**_TEXT, "num_key_value_heads": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
              "use_mamba_kernels": False},
    "lilt": {**_TEXT, "hidden_size": 48},
    "perceiver": {"num_latents": 4, "d_latents": 32, "d_model": 32, "num_blocks": 1, "num_self_attends_per_block": 1,
                  "num_self_attention_heads": 4, "num_cross_attention_heads": 4, "vocab_size": 300},
    "reformer": {"vocab_size": 300, "is_decoder": False, "axial_pos_shape": [4, 4], "eos_token_id": 2},
    "squeezebert": {**_TEXT, "embedding_size": 32},
    "t5": {**_T5, "decoder_start_token_id": 0},
    "t5gemma": {"encoder": _GEMMA, "decoder": {**_GEMMA, "cross_attention_hidden_size": 32}, "vocab_size": 300},
    **{name: {"vision_config": _TOWER, "text_config": _TEXT} for name in ("aimv2", "chinese_clip", "tipsv2")},
    "align": {"vision_config": _SCALED, "text_config": _TEXT},
    "align_vision_model": _SCALED,
    "bit": {"embedding_size": 32, "hidden_sizes": [128, 128, 128, 128], "depths": [1, 1, 1, 1]},
    "focalnet": {"embed_dim": 12, "depths": [1, 1, 1, 1]},
    "regnet": {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "groups_width": 8},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    **{name: {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
       for name in ("swin", "swinv2", "donut-swin")},
    "clap": {"audio_config": _SWIN, "text_config": _TEXT},
    "clap_audio_model": _SWIN,
    "dinov3_convnext": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "tipsv2_vision_model": _TOWER,
    "xlnet": {"vocab_size": 300, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    "xmod": {**_TEXT, "default_language": "en_XX"},
    "zamba": {**_TEXT, "num_hidden_layers": 6, "num_key_value_heads": 4, "use_mamba_kernels": False,
              "attn_layer_period": 2, "attn_layer_offset": 1, "n_mamba_heads": 2},
    "zamba2": {**_TEXT, "num_hidden_layers": 2, "n_mamba_heads": 2, "mamba_d_state": 8, "chunk_size": 16,
               "layers_block_type": ["linear_attention", "hybrid"], "use_mamba_kernels": False},
}  # fmt: skip
# Classification classes that give logits of no modality alone, and why. The gate takes none of them.
NOT_RUN = {
    "dinat": "needs the natten library",
    "layoutlmv2": "needs the detectron2 library",
    "pp_lcnet": "its head returns no logits",
    "shieldgemma2": "takes an image and a text at once",
    "siglip2": "takes patches that its processor cuts, not pixels [batch, channels, height, width]",
}
# They run on this modality alone; the gate refuses them all the same: (reason, why).
ON_PURPOSE: dict[tuple[str, str], tuple[str, str]] = {
    ("esm", "text"): ("unsupported", "proteins"),
    ("esmc", "text"): ("unsupported", "proteins"),
    ("imagegpt", "text"): ("wrong_modality", "its input_ids are colours"),
    ("layoutlmv3", "image"): ("two_modalities", "a page's text and its image"),
    ("perceiver", "text"): ("unsupported", "its config.json does not name its head"),
    ("tapas", "text"): ("unsupported", "tables"),
    **{
        (model_type, "text"): ("two_modalities", "trained on text with an image, a page's layout or markup")
        for model_type in ("gemma3", "layoutlm", "lilt", "markuplm", "modernvbert", "qwen3_5", "t5gemma2", "ultravbert")
    },
}


# What is looked at by `make test`; `make test-long` looks at all.
SOME = ("albert", "audio_spectrogram_transformer", "bert", "clip", "convnext", "deberta_v2", "distilbert", "gpt2",
        "hubert", "modernbert", "resnet", "roberta", "vit", "wav2vec2", "whisper", "xlnet")  # fmt: skip


def classes(only: tuple[str, ...] | None = None) -> Iterator[Any]:
    """Every classification class that a modeling file of transformers defines, or that of some folders."""
    import transformers.models

    for package in pkgutil.iter_modules(transformers.models.__path__):
        if only is not None and package.name not in only:
            continue
        folder = Path(transformers.models.__path__[0]) / package.name
        for file in sorted(folder.glob("modeling_*.py")):
            if not any(suffix in file.read_text(encoding="utf-8") for suffix in SUFFIXES):
                continue
            module = importlib.import_module(f"transformers.models.{package.name}.{file.stem}")
            for name, cls in vars(module).items():
                if name.endswith(SUFFIXES) and cls.__module__ == module.__name__ and hasattr(cls, "config_class"):
                    yield cls


def tiny(cls: Any) -> Any:
    """The type's default config, as small as it gets."""
    from transformers import PretrainedConfig

    special = SPECIAL.get(cls.config_class.model_type)
    config = cls.config_class(**(special or {}))
    parts = [config, *(part for part in vars(config).values() if isinstance(part, PretrainedConfig))]
    parts += [deep for part in parts[1:] for deep in vars(part).values() if isinstance(deep, PretrainedConfig)]
    for part in parts:
        for key, small in SMALL.items() if special is None else ():
            value = getattr(part, key, 0)
            left_open = value is None and key in ("head_dim", "num_key_value_heads")
            if left_open or (isinstance(value, int) and value > small):
                setattr(part, key, small)
        kinds = getattr(part, "layer_types", None)
        if isinstance(kinds, list) and special is None:
            part.layer_types = [next(iter(kinds)), next((kind for kind in kinds if kind != kinds[0]), kinds[0])]
        if special is None:
            for key in [key for key in vars(part) if key.endswith("_token_id") and isinstance(vars(part)[key], int)]:
                setattr(part, key, 2)
        part.pad_token_id = 1
    config.num_labels = NUM_LABELS
    return config


def toys(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Batches of two, in each form that a processor of the modality gives."""
    import torch

    vision = getattr(config, "vision_config", config)
    named = [getattr(vision, name, None) for name in ("image_size", "input_size")]
    size = next((one for one in named if isinstance(one, (int, list, tuple))), 96)  # where any will do
    size = min(size[0], 224) if isinstance(size, (list, tuple)) else size
    yield "image", {"pixel_values": torch.rand(2, getattr(vision, "num_channels", 3), size, size)}
    mels = getattr(config, "num_mel_bins", 80)
    length = config.max_length if isinstance(getattr(config, "max_length", None), int) else 1024
    yield "audio", {"input_values": torch.rand(2, 4000)}
    yield "audio", {"input_values": torch.rand(2, length, mels)}
    yield "audio", {"input_features": torch.rand(2, mels, 3000)}
    yield "audio", {"input_features": torch.rand(2, 100, 160)}
    yield "audio", {"input_features": torch.rand(2, 1, 1001, 64)}
    ids = torch.randint(3, 100, (2, 16))
    ids[:, -1] = 2  # the end token, which some heads stand on
    yield "text", {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def runs(cls: Any) -> tuple[set[str], str]:
    """The modalities that alone give logits, and the last error of those that did not."""
    import torch

    found, problem = set(), ""
    try:
        config = tiny(cls)
        model = cls(config).eval()
    except (Exception, SystemExit) as error:
        return found, f"{type(error).__name__}: {error}"
    for modality, batch in toys(config):
        if modality in found:
            continue
        try:
            with torch.no_grad():
                logits = getattr(model(**batch), "logits", None)
        except Exception as error:
            home = {"Image": "image", "Audio": "audio"}.get(cls.__name__.split("For")[-1].split("Cl")[0], "text")
            problem = f"{type(error).__name__}: {error}" if home == modality else problem
            continue
        if logits is not None and tuple(logits.shape) == (2, NUM_LABELS):
            found.add(modality)
            look_at_the_cut(model, modality, batch)
    return found, problem


def look_at_the_cut(model: Any, modality: str, batch: dict[str, Any]) -> None:
    """Note for `CUTS` where the network is cut: from a checkpoint with its head, without it, and without a pooler.

    Nothing that such a checkpoint lacks may stand on the frozen side.
    """
    row = registry.get(modality).rules.accepts.get(model.config.model_type)
    if row is None or row.architecture != type(model).__name__:
        return
    for parameter in model.parameters():  # left uninitialised by some classes
        if not parameter.isfinite().all():
            parameter.data.normal_(0, 0.02)
    base, names = f"{model.base_model_prefix}.", list(model.state_dict())
    outside = [n for n in names if not n.startswith(base)] if hasattr(model, model.base_model_prefix) else [
        n for n in names if _within_any(n, (*row.head, *row.may_be_new))]  # fmt: skip
    pooler = [name for name in names if ".pooler." in name]
    lacks: dict[str, set[str]] = {"tuned": set(), "base": set(outside)}
    lacks |= {"base without pooler": {*outside, *pooler}} if pooler else {}
    plan: Any = SimpleNamespace(row=row, weights="pretrained", backbone=SimpleNamespace(source="the checkpoint"))
    for checkpoint, missing in lacks.items():
        head = _head(plan, missing, set())
        frozen = [name for name, _ in model.named_parameters() if name in missing and not _within_any(name, head)]
        assert not frozen, f"{model.config.model_type}, {checkpoint}: {frozen[0]} is random, and frozen"
        cut, _ = find_cut(Network(model, head, (), (), lambda *_: None), of_all_lengths(batch, model.config))
        CUTS[model.config.model_type, checkpoint] = cut
    IN_BFLOAT16[model.config.model_type] = in_bfloat16(lambda: model(**batch))


def in_bfloat16(call: Callable[[], Any]) -> str:
    """What it raises there, or ""."""
    import torch

    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def of_all_lengths(batch: dict[str, Any], config: Any) -> dict[str, Any]:
    """Four other samples of the form; texts of four lengths, padded as the plugin does it."""
    import torch

    if "input_ids" not in batch:
        return {key: torch.rand(4, *value.shape[1:]) for key, value in batch.items()}
    ids = torch.randint(3, 100, (4, 16))
    mask = torch.ones_like(ids)
    for row, length in enumerate((16, 11, 5, 9)):
        ids[row, length - 1] = 2
        ids[row, length:], mask[row, length:] = config.pad_token_id, 0
    return {"input_ids": ids, "attention_mask": mask}


def _within_any(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def pools(model_type: str, wanted: str) -> bool:
    """Whether a type without a classification class makes one vector a sample of the modality, by running it.

    Every model class that transformers' source defines for the type's config is tried; of a model with several
    towers, what it offers for images or sounds alone.
    """
    import torch
    from transformers import CONFIG_MAPPING, PreTrainedModel

    config_class = CONFIG_MAPPING[model_type]
    package = config_class.__module__.rpartition(".")[0]
    for file in sorted(Path(str(importlib.import_module(package).__path__[0])).glob("modeling_*.py")):
        for cls in vars(importlib.import_module(f"{package}.{file.stem}")).values():
            if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
                continue
            if getattr(cls, "config_class", None) is not config_class or cls.__name__.endswith("PreTrainedModel"):
                continue
            try:
                config = tiny(cls)
                model = cls(config).eval()
            except Exception:  # a class that does not build proves nothing
                continue
            for modality, batch in toys(config):
                if modality != wanted:
                    continue
                named = {"image": "get_image_features", "audio": "get_audio_features"}.get(modality, "")
                for call in (model, getattr(model, named, None)):
                    try:
                        with torch.no_grad():
                            vector = _vector(call(**batch)) if call is not None else None
                    except Exception:  # nor does one that this batch is not for
                        continue
                    if (
                        isinstance(vector, torch.Tensor)
                        and vector.ndim == 2
                        and len(vector) == 2
                        and vector.isfinite().all()
                    ):
                        return True
    return False


def _vector(output: Any) -> Any:
    """What of a body's output is one vector a sample, or can be averaged to one."""
    for name in ("pooler_output", "summary"):
        if getattr(output, name, None) is not None:
            return getattr(output, name).flatten(1)
    tokens = getattr(output, "last_hidden_state", output)
    return tokens.mean(dim=1) if getattr(tokens, "ndim", 0) == 3 else tokens


def card(model_type: str) -> BackboneCard:
    return BackboneCard(
        source="org/x", kind="hub", name="x", library="transformers", model_type=model_type,
        config={"model_type": model_type},
    )  # fmt: skip


def answer(one: BackboneCard, modality: str) -> str:
    """ "accepted", or the reason of the refusal; any other exception is a fault of the gate."""
    known = {name: registry.get(name) for name in MODALITIES}
    try:
        match(one, known[modality], known)
    except RefusedError as error:
        return error.reason
    return "accepted"


def model_types() -> list[str]:
    """Every type that transformers knows; timm's networks have a test of their own."""
    import transformers
    from transformers.models.auto import modeling_auto

    tables = [table for name, table in vars(modeling_auto).items() if name.endswith("MAPPING_NAMES")]
    known = set(transformers.CONFIG_MAPPING) | {model_type for table in tables for model_type in table}
    return sorted(known - {"timm_wrapper"})


def run_all(only: tuple[str, ...] | None = None) -> dict[str, set[str]]:
    """Type -> the modalities that give it logits alone, by running it; `CUTS` is filled on the way."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    found: dict[str, set[str]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for cls in classes(only):
            modalities, problem = runs(cls)
            model_type = cls.config_class.model_type
            assert bool(modalities) != (model_type in NOT_RUN), f"{cls.__name__}: {problem or 'it runs'}"
            found.setdefault(model_type, set()).update(modalities)
    found.pop("timm_wrapper", None)
    return found


# Types whose body cannot run once: what the head reads of a sequence is no token of it, and no mean that commutes with
# its layers.
EVERY_STEP = {
    ("swiftformer", "base"),  # a norm, and two layers side by side behind it
    ("eurobert", "base"),  # a layer and its activation on each token, and then the mean
    ("t5gemma", "tuned"), ("t5gemma", "base"),  # a token of the decoder, whose input is made inside
}  # fmt: skip


def test_the_gate_accepts_the_right_pairs_of_some_types() -> None:
    right = run_all(SOME)
    assert len(right) >= len(SOME)
    for model_type, modalities in right.items():
        assert {name for name in MODALITIES if answer(card(model_type), name) == "accepted"} == modalities
        assert any(kind == model_type and cut is not None for (kind, _), cut in CUTS.items())
    those_that_fail_on_bfloat16_say_so()


@pytest.mark.long
@pytest.mark.slow
def test_the_gate_accepts_the_right_pairs_and_no_other_and_every_type_is_cut() -> None:
    """One test, since all types run for it, which takes a minute: nothing random is frozen either."""
    accepts_the_right_pairs(run_all())
    all_are_cut()
    those_that_fail_on_bfloat16_say_so()


def all_are_cut() -> None:
    accepted = {
        model_type: modality
        for modality in MODALITIES
        for model_type, row in registry.get(modality).rules.accepts.items()
        if not row.pool
    }
    seen = {model_type for model_type, _ in CUTS}
    assert len(seen) > 150
    print("not looked at:", sorted(set(accepted) - seen))
    assert {key for key, cut in CUTS.items() if cut is None} == EVERY_STEP


def those_that_fail_on_bfloat16_say_so() -> None:
    rows = {name: row for modality in MODALITIES for name, row in registry.get(modality).rules.accepts.items()}
    say = {name for name in IN_BFLOAT16 if rows[name].fp32_only}
    assert {name: problem for name, problem in IN_BFLOAT16.items() if problem}.keys() == say, IN_BFLOAT16


def accepts_the_right_pairs(right: dict[str, set[str]]) -> None:
    from transformers import CONFIG_MAPPING

    types = model_types()
    assert len(types) > 600
    assert set(right) <= set(types)
    wrong, own = [], set()
    counts: Counter[tuple[str, str]] = Counter()
    for model_type in types:
        for modality in MODALITIES:
            said = answer(card(model_type), modality)
            counts[modality, said] += 1
            assert said == "accepted" or said in REASONS
            config_class = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None  # noqa: SIM401
            name = getattr(config_class, "model_type", model_type)  # gpt-sw3 is a gpt2
            expected = modality in right.get(name, ())
            if said == "accepted" and not expected:  # with a head of ours, on a body that must run
                own.add((model_type, modality))
                expected = model_type not in NOT_RUN and pools(model_type, modality)
            if (model_type, modality) in ON_PURPOSE:
                assert expected, f"{model_type} does not run on {modality} alone"
                if said != ON_PURPOSE[model_type, modality][0]:
                    wrong.append((model_type, modality, said))
            elif (said == "accepted") != expected:
                wrong.append((model_type, modality, said))
    print(len(types), sorted(counts.items()), f"with a head of ours: {sorted(own)}")
    assert not wrong, wrong
    assert len(own) >= 20


def test_every_pretrained_config_of_timm_has_an_answer() -> None:
    import timm

    known = {name: registry.get(name) for name in MODALITIES}
    image = known["image"]
    counts: Counter[str] = Counter()
    for name in timm.list_pretrained():
        pretrained = timm.get_pretrained_cfg(name).to_dict(remove_source=True, remove_null=True)
        config = {"architecture": name.split(".")[0], "pretrained_cfg": pretrained}
        one = BackboneCard(
            source=name, kind="hub", name=name, library="timm", model_type=config["architecture"], config=config
        )
        assert {answer(one, "audio"), answer(one, "text")} <= {"wrong_modality"}
        try:
            fit(one, match(one, image, known), image, {}, None)
        except RefusedError as error:
            counts[error.reason] += 1
        else:
            counts["accepted"] += 1
    print(sorted(counts.items()))
    assert set(counts) <= {"accepted", "channels", "no_head"}
    assert counts["accepted"] > 1800


# What fills tensors. On the meta device it changes nothing, and takes most of the time of building.
FILLS = ("normal_", "uniform_", "trunc_normal_", "clamp_", "mul_", "add_", "sub_", "div_", "erfinv_", "fill_", "zero_",
         "copy_")  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("first", "step", "num_families"),
    [(0, 40, 15), pytest.param(0, 2, 40, marks=pytest.mark.long), pytest.param(1, 2, 40, marks=pytest.mark.long)],
)
def test_the_heads_of_timms_rows_are_those_of_the_built_networks(
    first: int, step: int, num_families: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Architectures of timm, built without memory for 7 classes; of each family one also runs, in both modes.

    The head is what has a parameter for each class. No row, and a refusal instead, is right for a network that
    has no classifier at all.
    """
    import timm
    import torch

    rules = registry.get("image").rules
    built, wrong = [], []
    families: dict[type, tuple[int, Any]] = {}
    gc.disable()  # a network is a million objects without a cycle that matters
    with monkeypatch.context() as patched:
        for name in FILLS:
            if hasattr(torch.Tensor, name):
                patched.setattr(torch.Tensor, name, lambda self, *_args, **_more: self)
        patched.setattr("timm.layers.weight_init.trunc_normal_", lambda tensor, *_args, **_more: tensor)
        patched.setattr(torch.nn.Module, "apply", lambda self, _function: self)
        for layer in (torch.nn.Linear, torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.LayerNorm, torch.nn.GroupNorm):
            patched.setattr(layer, "reset_parameters", lambda _self: None)
        for architecture in timm.list_models()[first::step]:
            with torch.device("meta"):
                model = timm.create_model(architecture, num_classes=7)
            sized = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.shape and p.shape[0] == 7}
            classifier = (
                {id(one) for one in _several(model.get_classifier())} if hasattr(model, "get_classifier") else ()
            )
            named = {name for name, module in model.named_modules() if id(module) in classifier}
            built.append((architecture, sized, named))
            modules = sum(1 for _ in model.modules())
            if named and modules < families.get(type(model), (10_000, None))[0]:  # the least work to run
                families[type(model)] = modules, model
    for architecture, sized, named in built:
        if not named:  # encoders of larger models
            if architecture in rules.timm or rules.timm_refuses[architecture].reason != "no_head":
                wrong.append((architecture, "has no classifier"))
            continue
        if architecture not in rules.timm:
            wrong.append((architecture, "has no row"))
            continue
        row = {name.removeprefix("timm_model.") for name in rules.timm[architecture].head}
        # Of a classifier of several layers, the row names the whole, or the last: what depends on the classes.
        if not row or not all(any(_within(one, name) for name in row) for one in sized):
            wrong.append((architecture, f"{sorted(row)}, and classes are in {sorted(sized)}"))
        if not all(any(_within(one, name) or _within(name, one) for one in sized) for name in row):
            wrong.append((architecture, f"{sorted(row)} is more than {sorted(sized)}"))
    for _, model in families.values():
        shape = model.pretrained_cfg.get("input_size", (3, 224, 224))
        for training in (False, True):
            with torch.device("meta"), torch.no_grad():
                logits = model.train(training)(torch.empty(2, *shape))
            if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != (2, 7):
                wrong.append((type(model).__name__, f"gives {type(logits).__name__}, training: {training}"))
    gc.enable()
    print(len(built), "built,", len(families), "families ran")
    assert not wrong, wrong
    assert len(families) > num_families


def _several(classifier: Any) -> Any:
    return classifier if isinstance(classifier, (tuple, list)) else (classifier,)


def _within(module: str, outer: str) -> bool:
    return f"{module}.".startswith(f"{outer}.")
