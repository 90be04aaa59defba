"""What a repository's JSON files may set: what would open other files, load other repositories or run code is refused.

transformers and timm hand most of what these files hold to constructors, and some of it names files of this machine,
repositories, kernels of the Hub or classes to load. The tables below have every such key of the installed versions,
and what it would do. What published repositories have as well, and no constructor should get, is left out later
(`orchestrator.network.config`).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.backbone.cards import metadata_file
from orchestrator.backbone.timm_settings import allowed_args
from orchestrator.errors import RefusedError
from orchestrator.job import BackboneCard

FILES = (
    "config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json",
    "special_tokens_map.json",
)  # fmt: skip
"""What transformers reads settings from, wherever the card has them from."""

_OF_INPUT = ("preprocessor_config.json", "processor_config.json")
_MOST_OF_INPUT = 1_000_000
_MOST_MODULES = 10_000
_COUNTS_MODULES = re.compile(r"\w*(layers?|depths?|blocks|experts|heads|stages)")

_OTHER_FILE = "names another file to read settings from, which nobody looked at"
_OPENS = "would be opened, whatever file of this machine it is"
_KERNEL = "would be downloaded from the Hub and run"
_ELSEWHERE = "where it lay when it was saved"

REFUSED: Mapping[str, tuple[str, str]] = {
    # key, anywhere in a file -> (reason, what it does)
    "backbone_kwargs": ("bad_config", "goes into another network's constructor unseen"),
    "configuration_files": ("unsupported", _OTHER_FILE),
    "fast_tokenizer_files": ("unsupported", _OTHER_FILE),
    "gguf_file": ("bad_config", _OPENS),
    "quantization_config": ("quantised", "says that the weights are quantised, and such weights cannot be trained"),
    "transformers_weights": ("unsupported", "names the file of the weights, which is to be model.safetensors"),
}
REFUSED_OF_TOKENIZERS: Mapping[str, tuple[str, str]] = {
    "init_inputs": ("bad_config", "goes into the tokenizer's constructor in the place of its files"),
    "merges": ("bad_config", _OPENS),
    "tokenizer_object": ("bad_config", "goes into the tokenizer's constructor in the place of its files"),
    "vocab": ("bad_config", _OPENS),
}
LEFTOVERS: Mapping[str, str] = {
    # key of tokenizer_config.json that names a file, and is read by nobody
    "added_tokens_file": "the repository's own is taken",
    "chat_template_file": "the repository's own is taken",
    "name_or_path": _ELSEWHERE,
    "special_tokens_map_file": "the repository's own is taken",
    "tokenizer_config_file": "the repository's own is taken",
    "tokenizer_file": "the repository's own is taken: the text plugin names it",
}
_ATTENTION = ("attn_implementation", "_attn_implementation")
_ATTENTIONS = re.compile(r"(paged\|)?(eager|sdpa|flash_attention_\d|flex_attention)")
_FORMATS = re.compile(r"(torch\.)?(auto|half|double|float|b?float\d+(_\w+)?)")
_WORD = re.compile(r"[\w.]+")
_NAMES_A_FILE = re.compile(r"(.*_)?(file|path|dir|folder|spm|url|repo|repo_id)")
_OF_WORDS = ("do_lower_case", "never_split", "normalize_text", "trim_whitespace")
SETTINGS_OF_TOKENIZERS: Mapping[str, tuple[str, ...]] = {
    # what goes on to another library -> the keys that name no file there
    "sp_model_kwargs": ("alpha", "enable_sampling", "nbest_size"),
    "mecab_kwargs": (*_OF_WORDS, "mecab_dic"),
    "sudachi_kwargs": (*_OF_WORDS, "sudachi_dict_type", "sudachi_projection", "sudachi_split_mode"),
    "jumanpp_kwargs": _OF_WORDS,
}
CLASSES: Mapping[str, re.Pattern[str]] = {
    # transformers looks such a name up among all that it exports, and calls its from_pretrained
    "feature_extractor_type": re.compile(r"\w+(FeatureExtractor|ImageProcessor)(Fast|Pil)?"),
    "image_processor_type": re.compile(r"\w+(FeatureExtractor|ImageProcessor)(Fast|Pil)?"),
    "tokenizer_class": re.compile(r"\w+(Tokenizer|TokenizerFast|Backend)"),
}
REFUSED_CLASSES: Mapping[str, str] = {
    # what is left of the name without FeatureExtractor, ImageProcessor, Tokenizer -> what the class does
    "Auto": "loads whatever class it is told to",
    "LayoutLMv2": "runs tesseract with the options that the file gives",
    "LayoutLMv3": "runs tesseract with the options that the file gives",
    "OneFormer": "opens a file that it names, or downloads it",
    "Pix2Struct": "downloads a font from another repository",
    "Rag": "reads settings from other folders, which nobody looked at",
}
# Labels and tokens are words of the author's, and may be called anything.
_NOT_SETTINGS = ("added_tokens_decoder", "id2label", "label2id", "label_descriptions", "label_names")


def require_harmless(card: BackboneCard) -> None:
    """Return if nothing in the backbone's JSON files opens, loads or runs anything else; refuse it if something does.

    Reads small files, of a repository at the pinned commit, and no weights. Raises `RefusedError`.
    """
    if "adapter_config.json" in card.files:
        raise RefusedError(
            "unsupported" if card.weight_files else "adapter_only",
            f"{card.source} holds an adapter beside its model, and nothing says which of the two is meant",
            expected="a repository with a whole model",
            mend="merge the adapter into the model, and save that: merge_and_unload(), save_pretrained()",
        )
    architecture = card.config.get("architecture")
    if card.library == "timm" and not _WORD.fullmatch(str(architecture)):
        raise _refusal(card, "config.json", "architecture", architecture, ("bad_config", "is no name of timm's"))
    for name in FILES:
        path = metadata_file(card, name)
        if path is not None:
            _require_harmless(card, name, _read(card, path))


def _read(card: BackboneCard, path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise RefusedError(
            "bad_config", f"{card.source}: {path.name} is not JSON: {error}", mend="fetch or save the backbone again"
        ) from None
    if not isinstance(settings, dict):
        raise RefusedError(
            "bad_config",
            f"{card.source}: {path.name} holds a {type(settings).__name__}, not an object",
            mend="fetch or save the backbone again",
        )
    return settings


def _require_harmless(card: BackboneCard, file: str, settings: Mapping[str, Any]) -> None:
    of_tokenizer = file in ("tokenizer_config.json", "special_tokens_map.json")
    tables = {**REFUSED, **REFUSED_OF_TOKENIZERS} if of_tokenizer else REFUSED
    for place, key, value in _settings(settings):
        if value is None or value is False or value in ("", [], {}):
            continue
        for problem in (
            tables.get(key),
            _problem_of_value(key, value),
            _too_large(key, value) if file in _OF_INPUT else None,
            _too_many(key, value) if file == "config.json" else None,
            _problem_of_tokenizer(card, file, key, value) if of_tokenizer else None,
        ):
            if problem is not None:
                raise _refusal(card, file, place, value, problem)


def _settings(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str, Any]]:
    """(a.b.c, c, value) of every key at any depth."""
    for key, value in settings.items():
        place = f"{above}{key}"
        yield place, key, value
        inner = {"": value} if isinstance(value, Mapping) else {}
        if isinstance(value, list):
            inner = {f"[{i}]": one for i, one in enumerate(value) if isinstance(one, Mapping)}
        for index, one in inner.items():
            if key not in _NOT_SETTINGS:
                yield from _settings(one, f"{place}{index}.")


def _too_large(key: str, value: Any) -> tuple[str, str] | None:
    """Sizes, rates and windows that would take all memory for one sample."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or abs(value) <= _MOST_OF_INPUT or "pixels" in key:
        return None
    return "bad_config", f"is no size, rate or window of a sample (more than {_MOST_OF_INPUT:,})"


def _too_many(key: str, value: Any) -> tuple[str, str] | None:
    """Numbers of layers and their like that would be built for hours, and take all memory."""
    values = value if isinstance(value, list) else [value]
    numbers = (one for one in values if isinstance(one, (int, float)))
    if not _COUNTS_MODULES.fullmatch(key) or all(abs(one) <= _MOST_MODULES for one in numbers):
        return None
    return "bad_config", f"is no number of layers or their like (more than {_MOST_MODULES:,})"


def _problem_of_value(key: str, value: Any) -> tuple[str, str] | None:
    """(reason, what it does) of a value that this key may not have, None if it may."""
    check = _CHECKS.get(key)
    problem = check(value) if check is not None else None
    return ("bad_config", problem) if problem else None


def _attention(value: Any) -> str | None:
    values = value.values() if isinstance(value, Mapping) else [value]
    wrong = [one for one in values if one is not None and not _ATTENTIONS.fullmatch(str(one))]
    return _KERNEL if wrong else None


def _backbone(value: Any) -> str | None:
    return "would be loaded, another repository" if isinstance(value, str) and "/" in value else None


def _format(value: Any) -> str | None:
    values = value.values() if isinstance(value, Mapping) else [value]
    return None if all(_FORMATS.fullmatch(str(one)) for one in values) else "is no number format of torch's"


def _timm_args(value: Any) -> str | None:
    if not isinstance(value, Mapping):
        return "is to be an object of settings"
    allowed, others = allowed_args()
    other = next((name for name, one in value.items() if name not in allowed and one is not None), None)
    return None if other is None else f"{other}: {others.get(other, 'no architecture of timm takes it')}"


def _class(key: str, value: Any) -> str | None:
    name = str(value)
    if not CLASSES[key].fullmatch(name):
        return "names a class that is none of the kind"
    return REFUSED_CLASSES.get(re.sub(r"(FeatureExtractor|ImageProcessor|Tokenizer)?(Fast|Pil)?$", "", name))


_CHECKS: Mapping[str, Callable[[Any], str | None]] = {
    **dict.fromkeys(_ATTENTION, _attention),
    **dict.fromkeys(("dtype", "torch_dtype"), _format),
    "backbone": _backbone,
    "model_args": _timm_args,
    **{key: functools.partial(_class, key) for key in CLASSES},
}


def _problem_of_tokenizer(card: BackboneCard, file: str, key: str, value: Any) -> tuple[str, str] | None:
    allowed = SETTINGS_OF_TOKENIZERS.get(key)
    if allowed is not None:
        other = next((one for one in value if one not in allowed), None) if isinstance(value, Mapping) else key
        return None if other is None else ("bad_config", f"{other} reaches another library, where it may name a file")
    if not _NAMES_A_FILE.fullmatch(key) or not isinstance(value, str):
        return None
    # What is in the map of special tokens is put in last, over the files that were found.
    is_leftover = key in LEFTOVERS and file == "tokenizer_config.json"
    return None if is_leftover or value in card.files else ("bad_config", _OPENS)


def _refusal(card: BackboneCard, file: str, place: str, value: Any, problem: tuple[str, str]) -> RefusedError:
    reason, does = problem
    shown = repr(value)
    return RefusedError(
        reason,
        f"{card.source}: {file} sets {place} = {shown if len(shown) <= 80 else shown[:77] + '...'}: {does}",
        expected="settings of the network and of how its input is prepared, nothing else",
        mend="use the repository that it was quantised from" if reason == "quantised" else
        f"choose another repository, or take {place.split('.')[-1]} out of a copy of this one, if you trust it",
    )  # fmt: skip
