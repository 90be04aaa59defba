"""The backbone's tokenizer.json, without transformers: how many tokens a text has, and which numbers it can give."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.backbone import metadata_file
from orchestrator.errors import BadSampleError, MissingExtraError, RefusedError, first_line
from orchestrator.modality import BackboneCard

_ROWS = ("vocab_size", "n_words")
_PARTS = ("text_config", "encoder", "decoder")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ADDITIONAL = ("additional_special_tokens", "extra_special_tokens")
STAND_INS = ("eos_token", "unk_token", "sep_token", "bos_token", "cls_token")
"""What may stand for a padding token: it is masked, so that any token of the embedding does."""

_SPECIAL_TOKENS = "special_tokens_map.json"
_tokenizers: dict[object, tuple[Any, re.Pattern[str], int | None]] = {}
_lock = threading.Lock()


def count_tokens(card: BackboneCard, first: str, second: str | None) -> tuple[int, float] | None:
    """(how many tokens a text or a pair becomes, the share of its own that the vocabulary does not know).

    None where the backbone has no tokenizer.json.

    Raises `BadSampleError` where the tokenizer cannot take it.
    """
    tokenizer = load(card)
    if tokenizer is None:
        return None
    try:
        with panics_raised():
            made = tokenizer.encode(first, second)
    except Exception as error:  # the library raises plain Exceptions
        raise BadSampleError(f"the tokenizer cannot take it: {first_line(error)}") from None
    own = len(made.ids) - sum(made.special_tokens_mask)
    return len(made.ids), made.ids.count(_loaded(card)[2]) / max(1, own)


def _unknown_token(card: BackboneCard, tokenizer: Any) -> int | None:
    """The number that stands for all that the vocabulary does not know; None where nothing does."""
    named = card.tokenizer or {}
    name = getattr(tokenizer.model, "unk_token", None) or _content(named.get("unk_token"))
    ends = {_content(named.get(key)) for key in ("bos_token", "eos_token")}  # of GPT-2, which knows every byte
    return tokenizer.token_to_id(name) if name and name not in ends else None


def control_token(card: BackboneCard, text: str) -> str:
    """The first token in a text that stands for no text to the tokenizer, and is read as text; '' where none does."""
    if load(card) is None:
        return ""
    found = _loaded(card)[1].search(text)
    return found[0] if found else ""


def load(card: BackboneCard) -> Any:
    """The fast tokenizer without truncation, None where the backbone has none. Raises `RefusedError`."""
    return _loaded(card)[0]


def _loaded(card: BackboneCard) -> tuple[Any, re.Pattern[str], int | None]:
    """(the tokenizer, what finds its control tokens, the number of its unknown one)."""
    key = (card.path or card.repo_id, card.commit, _state(card))
    with _lock:  # samples are measured in threads
        if key not in _tokenizers:
            tokenizer = _load(card)
            added = tokenizer.get_added_tokens_decoder().values() if tokenizer is not None else ()
            control = sorted((one.content for one in added if one.special and one.content), key=len, reverse=True)
            finds = re.compile("|".join(map(re.escape, control)) or "(?!)")
            unknown = _unknown_token(card, tokenizer) if tokenizer is not None else None
            _tokenizers[key] = tokenizer, finds, unknown
        return _tokenizers[key]


def _state(card: BackboneCard) -> object:
    """What tells a directory's tokenizer.json from one that is put in its place later."""
    if not card.path or "tokenizer.json" not in card.files:
        return None
    file = metadata_file(card, "tokenizer.json")
    assert file is not None
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _load(card: BackboneCard) -> Any:
    file = metadata_file(card, "tokenizer.json")
    if file is None:
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MissingExtraError("tokenizers", "text") from None
    listed = metadata_file(card, _SPECIAL_TOKENS)
    try:
        with panics_raised():
            tokenizer = keep_trained_tokens(
                Tokenizer.from_file(str(file)), card, num_embeddings(card.config), _read(listed)
            )
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.encode_special_tokens = True  # a control token in a text is text, here as in the batches
            tokenizer.encode("a", "a")
    except Exception as error:  # the library raises plain Exceptions
        raise RefusedError(
            "bad_config", f"{card.source}: tokenizer.json cannot be used: {first_line(error)}",
            mend="fetch or save the tokenizer again",
        ) from None  # fmt: skip
    return tokenizer


def _read(file: Path | None) -> Mapping[str, Any]:
    found = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else {}
    return found if isinstance(found, Mapping) else {}


def keep_trained_tokens(
    tokenizer: Any, card: BackboneCard, rows: int | None, directory: Path | Mapping[str, Any]
) -> Any:
    """A tokenizer of `tokenizers` to which additional special tokens (`<url>`, markers) stay tokens in a text.

    The network was trained with them. Control tokens (begin, end, padding, ...) are not among them, nor any beyond the
    embedding's `rows`. `directory`: where special_tokens_map.json lies, or what it holds.
    """
    from tokenizers import Tokenizer

    listed = directory if isinstance(directory, Mapping) else _read(directory / _SPECIAL_TOKENS)
    files = (card.tokenizer or {}, listed)
    control = {_content(file.get(key)) for file in files for key in _SPECIAL}
    numbers = [card.config.get(f"{key}_id") for key in _SPECIAL]
    kept = {_content(one) for file in files for key in _ADDITIONAL for one in _several(file.get(key))} - control - {""}
    if not kept:
        return tokenizer
    state = json.loads(tokenizer.to_str())
    for one in state["added_tokens"]:
        within = one["id"] not in numbers and (rows is None or one["id"] < rows)
        one["special"] = one["special"] and not (within and one["content"] in kept)
    return Tokenizer.from_str(json.dumps(state))


def _several(listed: object) -> Iterable[object]:
    """Tokens that are listed, or named each."""
    if isinstance(listed, Mapping):
        return listed.values()
    return listed if isinstance(listed, (list, tuple)) else ()


@contextlib.contextmanager
def panics_raised() -> Iterator[None]:
    """What the library gives up on in Rust is an Exception like its others."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(first_line(error)) from None


# --- numbers against the embedding ---


def num_embeddings(config: Mapping[str, Any]) -> int | None:
    """How many rows the embedding of tokens has, None where config.json does not say."""
    for part in (config, *(config.get(name) for name in _PARTS)):
        for key in _ROWS if isinstance(part, Mapping) else ():
            if isinstance(part.get(key), int) and not isinstance(part[key], bool):
                return int(part[key])
    return None


def notes_on_numbers(card: BackboneCard) -> list[str]:
    """What is done about tokens whose number lies beyond the embedding. Raises `RefusedError` where nothing can be."""
    rows = num_embeddings(card.config)
    if rows is None:
        return []
    try:
        tokenizer = load(card)
    except MissingExtraError:  # the gate alone was installed: who trains has it
        return []
    if tokenizer is None:
        return []
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    numbers = tokenizer.get_vocab()
    given = set(tokenizer.encode("a", "a").ids)
    require_within(card, rows, ((t, n) for t, n in numbers.items() if n not in special or n in given))
    named = {key: token for key in _SPECIAL if (token := _content((card.tokenizer or {}).get(key)))}
    padding = named.get("pad_token")
    if padding is None:
        return []
    following = max(numbers.values(), default=-1) + 1  # transformers adds a token that the vocabulary lacks
    at = numbers.get(padding, following)
    if at < rows:
        return []
    within = [named[key] for key in STAND_INS if key in named and numbers.get(named[key], following) < rows]
    if not within:
        raise beyond(card, rows, [(at, padding)])
    return [padded_otherwise(padding, at, rows, within[0])]


def _content(token: object) -> str:
    """The text of a special token, which is written down alone or as an object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def padded_otherwise(padding: str, number: int, rows: int, other: str) -> str:
    """That another token pads."""
    return (
        f"texts are padded with {other!r}: the tokenizer's own {padding!r} has the number {number}, beyond the "
        f"embedding's {rows} rows; padding is masked, so that any token does"
    )


def require_within(card: BackboneCard, rows: int, tokens: Iterable[tuple[str, int]]) -> None:
    """Raise `RefusedError` where a token's number lies beyond the embedding. `tokens`: (token, number)."""
    outside = sorted((number, token) for token, number in tokens if number >= rows)
    if outside:
        raise beyond(card, rows, outside)


def beyond(card: BackboneCard, rows: int, outside: Sequence[tuple[int, str]]) -> RefusedError:
    """The refusal of tokens that the embedding has no row for. `outside`: (number, token), in order."""
    (number, token), more = outside[0], f" (and {len(outside) - 1} more)" if len(outside) > 1 else ""
    return RefusedError(
        "bad_config",
        f"{card.source}: the tokenizer gives {token!r}{more} the number {number}, and the embedding has {rows} rows "
        "(vocab_size in config.json)",
        expected=f"numbers below {rows}",
        mend="save the tokenizer that the network was trained with beside it; or let the embedding grow once: "
        f"model.resize_token_embeddings({outside[-1][0] + 1}), and model.save_pretrained()",
    )
