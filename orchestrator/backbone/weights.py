"""The weights of a backbone: are there any, what shapes they have, their digest, and, last, the files themselves."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

from orchestrator.backbone.cards import asking, offline
from orchestrator.errors import RefusedError
from orchestrator.job import BackboneCard

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_SMALL_SUFFIXES = (".json", ".txt", ".model", ".jinja")  # configurations, vocabularies, tokenizers
_MAX_HEADER_BYTES = 100_000_000  # the limit that the safetensors library itself sets

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (dtype, shape), from the safetensors headers."""


def require_weights(card: BackboneCard) -> None:
    """Refuse a card without safetensors weights, saying what there is instead."""
    if card.weight_files:
        return
    if any(file.endswith(_PICKLES) for file in card.files):
        raise RefusedError(
            "pickle_only",
            f"{card.source} holds pickled weights only; a pickle can run code, so it is not opened",
            expected="model.safetensors",
            mend="convert it once, where you trust it: load with transformers, save_pretrained()",
        )
    if any(file.endswith(".gguf") for file in card.files):
        raise RefusedError("gguf_only", f"{card.source} holds GGUF weights only", expected="safetensors weights")
    raise RefusedError(
        "no_weights",
        f"{card.source} holds no weights",
        expected="model.safetensors",
        mend="use method scratch to train this architecture from random weights",
    )


def read_tensors(card: BackboneCard) -> Tensors:
    """Name, dtype and shape of every tensor, from the headers of the safetensors files."""
    if card.path:
        tensors: Tensors = {}
        for name in card.weight_files:
            tensors.update(_read_header(Path(card.path) / name, card.source))
        return tensors
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    assert card.repo_id
    try:
        found = asking(
            card.source,
            lambda: HfApi().get_safetensors_metadata(str(card.repo_id), revision=card.commit),
        )
    except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        from huggingface_hub import try_to_load_from_cache

        tensors = {}
        for name in card.weight_files:
            path = try_to_load_from_cache(card.repo_id, name, revision=card.commit)
            if not isinstance(path, str):
                raise offline(card.source, error) from error
            tensors.update(_read_header(Path(path), card.source))
        return tensors
    return {
        name: (tensor.dtype, tuple(tensor.shape))
        for file in found.files_metadata.values()
        for name, tensor in file.tensors.items()
    }


def _read_header(path: Path, source: str) -> Tensors:
    broken = RefusedError(
        "bad_config",
        f"{source}: {path.name} is no valid safetensors file",
        mend="fetch or save the file again",
    )
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise broken
        (size,) = struct.unpack("<Q", start)
        if size > min(_MAX_HEADER_BYTES, path.stat().st_size - 8):
            raise broken
        try:
            header = json.loads(file.read(size))
        except ValueError:
            raise broken from None
    if not isinstance(header, dict):
        raise broken
    header.pop("__metadata__", None)
    try:
        tensors = {name: (str(one["dtype"]), tuple(one["shape"])) for name, one in header.items()}
        end = max((int(one["data_offsets"][1]) for one in header.values()), default=0)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise broken from None
    if 8 + size + end != path.stat().st_size:
        raise broken
    return tensors


def with_digest(card: BackboneCard) -> BackboneCard:
    """The card with its `commit`: for a directory, the digest of all that a job reads of it."""
    if card.commit or not card.path:
        return card
    digest = hashlib.sha256()
    for name in sorted((*card.weight_files, *_small_files(card))):
        digest.update(name.encode())
        with (Path(card.path) / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return card.model_copy(update={"commit": f"sha256:{digest.hexdigest()}"})


def _small_files(card: BackboneCard) -> list[str]:
    """What a job may read beside the weights."""
    depth = 1 if card.modules else 0
    return [name for name in card.files if name.endswith(_SMALL_SUFFIXES) and name.count("/") <= depth]


def fetch(card: BackboneCard, with_weights: bool = True) -> Path:
    """The directory that holds the backbone's files, downloaded if need be (at the pinned commit)."""
    if card.path:
        return Path(card.path)
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download

    assert card.repo_id
    patterns = [*_small_files(card), *(card.weight_files if with_weights else ())]
    try:
        return Path(
            asking(
                card.source,
                lambda: snapshot_download(str(card.repo_id), revision=card.commit, allow_patterns=patterns),
            )
        )
    except HTTPError as error:
        raise offline(card.source, error) from error
