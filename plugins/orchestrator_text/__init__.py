"""Text: one sentence, one paragraph, one document, or a pair of them."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.errors import BadSampleError, MissingExtraError, RefusedError
from orchestrator.modality import (
    Adaptation,
    BackboneCard,
    BackboneRow,
    BackboneRules,
    Facts,
    Fit,
    Modality,
    Plan,
    Profile,
    Sample,
    SampleField,
    Task,
)
from orchestrator_text.families import OFFSET_BY_2, axial_shape
from orchestrator_text.vocabulary import control_token, count_tokens, notes_on_numbers

if TYPE_CHECKING:
    from orchestrator.modality import Collate
    from orchestrator.network import Network

_DEFAULT_TOKENS = 512
_FEW_NULS = 0.2  # of the characters
_CONTROL = "control token"
_UNKNOWN = "unknown tokens, %"
_MANY_UNKNOWN = 0.5  # of the tokens of a text, on average: more is worth a warning
_FEW = 0.01  # of the texts hold a control token: fewer are not worth a warning
_OFTEN = 0.1  # of the texts truncated: more is worth a warning
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model",
               "tokenizer.model", "spm.model", "sentencepiece.model", "entity_vocab.json", "vocab.bpe")  # fmt: skip
_WITHOUT_VOCABULARY = ("ByT5Tokenizer", "CanineTokenizer")  # bytes and characters are their numbers
_BY_SENTENCEPIECE = (".model",)
POOLINGS = ("mean", "cls", "max")


class Settings(BaseModel):
    """The text plugin's own settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int | None = Field(
        None, ge=4, description="longer texts are cut off there; default: what the backbone takes, at most 512"
    )
    head: Literal["auto", "native", "pooled"] = Field(
        "auto",
        description="native: the backbone's own classification head, served by pipeline('text-classification'); "
        "pooled: its pooled tokens and one layer, served by sentence-transformers; auto: pooled where the "
        "repository says how it pools",
    )


@dataclass(frozen=True)
class Text:
    """A text, or a pair of them."""

    first: str
    second: str | None = None


def decode(sample: Sample) -> Text:
    """The text, or the pair of texts, as it stands: tokenizers do their own clean-up."""
    second = sample.get("text_pair")
    return Text(_decode(sample["text"], "the text"), None if second is None else _decode(second, "the second text"))


def _decode(content: bytes, what: str) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSampleError(f"{what} is not in UTF-8 (byte {error.start})") from None
    if not text.strip():
        raise BadSampleError(f"{what} is empty")
    if text.count("\0") > _FEW_NULS * len(text):
        raise BadSampleError(f"{what} is full of NUL characters, as UTF-16 is that is read as UTF-8")
    return text


def measure(text: Text, card: BackboneCard) -> Facts:
    """Characters, and tokens by the backbone's own tokenizer where it comes as a tokenizer.json."""
    facts: dict[str, int | float | str] = {"characters": len(text.first) + len(text.second or "")}
    counts = count_tokens(card, text.first, text.second)
    if counts is not None:
        facts["tokens"], unknown = counts
        if unknown:
            facts[_UNKNOWN] = round(100 * unknown)
    if text.second is not None:
        facts["form"] = "pair"
    if control := control_token(card, text.first) or control_token(card, text.second or ""):
        facts[_CONTROL] = control
    return facts


def fit(card: BackboneCard, row: BackboneRow, settings: Settings, profile: Profile | None) -> Fit:  # noqa: ARG001
    """The number of tokens, the form of the head; truncation as an adaptation."""
    _require_tokenizer(card)
    _require_language(card)
    limit = _limit(card)
    if settings.max_tokens is not None and limit is not None and settings.max_tokens > limit:
        raise RefusedError(
            "fixed_size",
            f"{card.source} ({card.model_type}) takes at most {limit} tokens, and settings.max_tokens = "
            f"{settings.max_tokens}",
            expected=f"{limit} or less",
            mend="leave settings.max_tokens out, or choose a backbone that takes longer texts",
        )
    most = settings.max_tokens or min(limit or _DEFAULT_TOKENS, _DEFAULT_TOKENS)
    pooling = _pooling(card, settings)
    adaptations, notes = [], notes_on_numbers(card)
    if profile is not None and "tokens" in profile.ranges:
        share = profile.share(lambda one: one["tokens"] > most)
        if share:
            adaptations.append(
                Adaptation(
                    what="truncate", received=f"{profile.ranges['tokens']} tokens", used=f"the first {most}",
                    share=share,
                )
            )  # fmt: skip
        if share > _OFTEN:
            more = "" if limit is not None and most >= limit else ", or raise settings.max_tokens"
            notes.append(f"{share:.0%} of the texts are longer than {most} tokens and are cut off: choose a backbone "
                         f"that takes longer ones{more}")  # fmt: skip
        notes += _unknown(profile)
    elif profile is not None:
        notes.append("the tokens are not counted before the start: the backbone has no tokenizer.json")
    if profile is not None and _CONTROL in profile.counts:
        adaptations.append(_read_as_text(profile))
        if adaptations[-1].share >= _FEW:
            notes.append(
                f"{adaptations[-1].share:.0%} of the texts hold {adaptations[-1].received}, which the backbone uses to "
                "control it, and which is read as text: pairs of texts are two columns (data.input_column)"
            )
    return Fit(
        input={"max_tokens": most, "head": "pooled" if pooling else "native", "pooling": pooling or "its own"},
        adaptations=adaptations,
        warnings=notes,
    )


def _unknown(profile: Profile) -> list[str]:
    """A warning where the vocabulary is not one of such texts."""
    share = sum(float(one.get(_UNKNOWN, 0)) for one in profile.facts) / 100 / max(1, profile.num_measured)
    if share < _MANY_UNKNOWN:
        return []
    return [
        f"{share:.0%} of the tokens of a text, on average, are unknown to the backbone's vocabulary, to which they "
        "are all the same: choose a backbone that was trained on such texts"
    ]


def _read_as_text(profile: Profile) -> Adaptation:
    """What is done to control tokens that stand in texts."""
    found = ", ".join(map(repr, list(profile.counts[_CONTROL])[:3]))
    return Adaptation(
        what="control tokens", received=found, used="read as text", share=profile.share(lambda one: _CONTROL in one)
    )


def _require_tokenizer(card: BackboneCard) -> None:
    vocabularies = [name for name in _TOKENIZERS if name in card.files]
    if not vocabularies and (card.tokenizer or {}).get("tokenizer_class") in _WITHOUT_VOCABULARY:
        return
    if not vocabularies:
        raise RefusedError(
            "no_processor",
            f"{card.source} has no tokenizer, so nobody can know what its token numbers mean",
            expected="tokenizer.json, or the vocabulary that the type's tokenizer reads",
            mend="save the tokenizer beside the model: AutoTokenizer...save_pretrained()",
        )
    if (
        all(name.endswith(_BY_SENTENCEPIECE) for name in vocabularies)
        and importlib.util.find_spec("sentencepiece") is None
    ):
        raise MissingExtraError("sentencepiece", "text")


def _require_language(card: BackboneCard) -> None:
    languages = card.config.get("languages") or ["en_XX"]
    if card.model_type == "xmod" and card.config.get("default_language") is None:
        raise RefusedError(
            "bad_config",
            f"{card.source} (xmod) has an adapter for each of {len(languages)} languages, and config.json does not say "
            "which one the texts are in",
            expected="default_language, one of languages",
            mend=f'put "default_language": "{languages[0]}", or another of its languages, into config.json of a copy',
        )


def _limit(card: BackboneCard) -> int | None:
    """How many tokens the backbone takes, None where nothing in its files says so."""
    known = []
    for module in card.modules:
        if isinstance(module["config"].get("max_seq_length"), int):
            known.append(module["config"]["max_seq_length"])
    most = (card.tokenizer or {}).get("model_max_length")
    if isinstance(most, int) and 0 < most < 10**6:  # "no limit" is written as 10^30
        known.append(most)
    nested = card.config.get("text_config")
    for config in (card.config, nested if isinstance(nested, Mapping) else {}):
        most = next((config[key] for key in _LENGTHS if isinstance(config.get(key), int)), None)
        if most is not None and most > 0:
            known.append(most - 2 if card.model_type in OFFSET_BY_2 else most)
            break
    if card.model_type == "reformer":  # its positions are a table of rows and columns
        known += [math.prod(shape)] if (shape := axial_shape(card.config)) else []
    return min(known) if known else None


def _pooling(card: BackboneCard, settings: Settings) -> str:
    """How tokens become one vector, '' for the backbone's own head."""
    named = next((module["config"] for module in card.modules if module["type"] == "Pooling"), None)
    if settings.head == "native" or (settings.head == "auto" and named is None):
        return ""
    if card.config.get("is_encoder_decoder"):
        raise RefusedError(
            "unsupported",
            f"{card.source} ({card.model_type}) is an encoder with a decoder, whose tokens are not pooled",
            mend="use settings.head = native",
        )
    if named is None:
        return "mean"
    mode = named.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else list(mode or ())
    old = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max"}
    modes += [old.get(key.removeprefix("pooling_mode_"), key) for key, value in named.items()
              if key.startswith("pooling_mode_") and value is True]  # fmt: skip
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise RefusedError(
            "unsupported",
            f"{card.source} pools its tokens by {' and '.join(map(str, modes)) or 'nothing that it names'}",
            expected="one of " + ", ".join(POOLINGS),
            mend="use settings.head = native",
        )
    return str(modes[0])


def build(plan: Plan, directory: Path) -> Network:
    """The backbone with its new head."""
    from orchestrator_text.network import build_network

    return build_network(plan, directory)


def batch(plan: Plan, directory: Path) -> Collate:
    """Texts -> {"input_ids", "attention_mask", ...: int64 [batch, longest]}."""
    from orchestrator_text.network import make_collate

    return make_collate(plan, directory)


def toy(n: int) -> Sequence[tuple[Sample, str]]:
    """Sentences about weather and about food."""
    weather = ("the rain falls on the hills", "a cold wind blows", "the sun shines all day", "snow and fog tonight")
    food = ("fresh bread with butter", "a bowl of hot soup", "rice and beans for lunch", "sweet apple cake")
    samples = []
    for i in range(n):
        text = (food if i % 2 else weather)[i // 2 % 4]
        samples.append(({"text": f"{text}, {i}".encode()}, "food" if i % 2 else "weather"))
    return samples


modality = Modality(
    name="text",
    title="text",
    sample=(
        SampleField(
            name="text",
            kind="text",
            dtype="int64",
            shape=("tokens",),
            unit="token ids of the backbone's own tokenizer",
            suffixes=(".txt",),
        ),
        SampleField(
            name="text_pair",
            kind="text",
            dtype="int64",
            shape=("tokens",),
            unit="token ids, behind those of the first text",
            optional=True,
        ),
    ),
    settings=Settings,
    rules=BackboneRules.from_json(Path(__file__).with_name("rows.json")),
    tasks=(
        Task(name="single-label", title="one class a text"),
        Task(name="multi-label", title="any number of classes a text"),
        Task(name="regression", title="one or several numbers a text"),
    ),
    length_bucketing=True,
    extra="text",
    decode=decode,
    measure=measure,
    fit=fit,
    build=build,
    batch=batch,
    toy=toy,
)
