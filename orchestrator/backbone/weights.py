"""The weights of a backbone: are there any, what shapes they have, their digest, and, last, the files themselves."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from orchestrator.backbone.hub import ask_hub, offline
from orchestrator.backbone.hub_cache import cached_folder
from orchestrator.backbone.stored import beginning_of, fetch_stored, is_stored
from orchestrator.errors import RefusedError
from orchestrator.job import POINTER, BackboneCard

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_SMALL_SUFFIXES = (".json", ".txt", ".model", ".jinja")  # configurations, vocabularies, tokenizers
_MAX_HEADER_BYTES = 100_000_000  # the limit that the safetensors library itself sets
_NUM_ASKED_AT_ONCE = 8
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
_DISTRIBUTED = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (dtype, shape), from the safetensors headers."""


def require_weights(card: BackboneCard) -> None:
    """Refuse a card without safetensors weights that are one network's, saying what there is instead."""
    if card.weight_files:
        _require_one_set(card)
        for name in card.weight_files if card.path else ():
            require_no_pointer(Path(str(card.path)) / name, card.source)
        return
    others = [file for file in card.files if file.endswith(".safetensors")]
    also = f"; what is in {others[0]} is for another library, or a part of a model" if others else ""
    if any(file.endswith(_PICKLES) for file in card.files):
        raise RefusedError(
            "pickle_only",
            f"{card.source} holds pickled weights only; a pickle can run code, so it is not opened{also}",
            expected="model.safetensors",
            mend="convert it once, where you trust it: load with transformers, save_pretrained()",
        )
    if any(file.endswith(".gguf") for file in card.files):
        raise RefusedError(
            "gguf_only",
            f"{card.source} holds GGUF weights only",
            expected="safetensors weights",
            mend="use the repository that the GGUF was made from",
        )
    raise RefusedError(
        "no_weights",
        f"{card.source} holds no weights{also}",
        expected="model.safetensors",
        mend="train this architecture from random weights: orchestrator finetune with --method scratch",
    )


def _require_one_set(card: BackboneCard) -> None:
    """Refuse safetensors files that are not all shards of one model, or of which some are missing."""
    files = card.weight_files
    shards = [match for file in files if (match := _SHARD.fullmatch(file))]
    if any(_DISTRIBUTED.fullmatch(file) for file in files):
        raise RefusedError(
            "unsupported",
            f"{card.source} holds the pieces that the processes of a distributed training saved ({files[0]}, ...)",
            expected="model.safetensors",
            mend="put them together: transformers' consolidate_distributed_checkpoint()",
        )
    if len(files) > 1 and (len(shards) < len(files) or len({match[1] for match in shards}) > 1):
        raise RefusedError(
            "unsupported",
            f"{card.source} holds several safetensors files, and nothing says which of them is the network: "
            + ", ".join(files[:4]) + (", ..." if len(files) > 4 else ""),
            expected="model.safetensors, or its shards model-00001-of-0000N.safetensors",
            mend="call the right one model.safetensors in a copy of the repository",
        )  # fmt: skip
    numbers = {int(match[2]) for match in shards}
    missing = sorted(set(range(1, max((int(match[3]) for match in shards), default=0) + 1)) - numbers)
    if missing:
        raise RefusedError(
            "bad_config",
            f"{card.source} lacks shard {missing[0]} of its weights: there is {', '.join(files[:3])}",
            expected="every shard that the names count",
            mend="fetch or save the backbone again",
        )


def read_tensors(card: BackboneCard) -> Tensors:
    """Name, dtype and shape of every tensor, from the headers of the files that `card.weight_files` names.

    Of files on the Hub the beginning is asked for, no more. Raises `RefusedError` where one is no safetensors file.
    """
    if card.path:
        tensors: Tensors = {}
        for name in card.weight_files:
            tensors.update(_read_header(Path(card.path) / name, card.source))
        return tensors
    if is_stored(card):
        with ThreadPoolExecutor(_NUM_ASKED_AT_ONCE) as pool:
            parts = list(pool.map(partial(_read_stored_header, card), card.weight_files))
        return {key: tensor for part in parts for key, tensor in part.items()}
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        SafetensorsParsingError,
    )

    assert card.repo_id
    repo_id = str(card.repo_id)

    def ask(name: str) -> Tensors:
        try:
            header = ask_hub(
                card.source, lambda: HfApi().parse_safetensors_file_metadata(repo_id, name, revision=card.commit)
            )
        except (SafetensorsParsingError, RemoteEntryNotFoundError, AttributeError, TypeError) as error:
            raise _broken(name, card.source) from error
        return {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in header.tensors.items()}

    try:
        with ThreadPoolExecutor(_NUM_ASKED_AT_ONCE) as pool:
            return {key: tensor for part in pool.map(ask, card.weight_files) for key, tensor in part.items()}
    except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        from huggingface_hub import try_to_load_from_cache

        tensors = {}
        for name in card.weight_files:
            path = try_to_load_from_cache(card.repo_id, name, revision=card.commit)
            if not isinstance(path, str):
                raise offline(card.source, error) from error
            tensors.update(_read_header(Path(path), card.source))
        return tensors


def require_no_pointer(path: Path, source: str) -> None:
    """Raise `RefusedError` where Git LFS has put its pointer in the place of a file."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise RefusedError(
                "bad_config", f"{source}: {path.name} is a pointer of Git LFS, not the file itself",
                mend=f"fetch it: git -C {path.parent} lfs pull",
            )  # fmt: skip


def _broken(name: str, source: str) -> RefusedError:
    return RefusedError(
        "bad_config", f"{source}: {name} is no valid safetensors file", mend="fetch or save the file again"
    )


def _read_stored_header(card: BackboneCard, name: str) -> Tensors:
    return _parse_header(partial(beginning_of, card, name), card.files[name], _broken(name, card.source))


def _read_header(path: Path, source: str) -> Tensors:
    with path.open("rb") as file:

        def beginning(num_bytes: int) -> bytes:
            file.seek(0)
            return file.read(num_bytes)

        return _parse_header(beginning, path.stat().st_size, _broken(path.name, source))


def _parse_header(beginning: Callable[[int], bytes], num_bytes: int, broken: RefusedError) -> Tensors:
    """`beginning`: so many of the file's first bytes; `num_bytes`: of the whole file."""
    start = beginning(8)
    if len(start) < 8:
        raise broken
    (size,) = struct.unpack("<Q", start)
    if size > min(_MAX_HEADER_BYTES, num_bytes - 8):
        raise broken
    try:
        header = json.loads(beginning(8 + size)[8:])
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
    if 8 + size + end != num_bytes:
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
    """The directory that holds the backbone's files, downloaded if need be (at the pinned commit).

    Raises `RefusedError` where the Hub or the store cannot give them.
    """
    if card.path:
        return Path(card.path)
    if is_stored(card):
        return fetch_stored(card, with_weights)
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    assert card.repo_id
    names = files_of(card, with_weights)
    cached = cached_folder(card, names)  # whatever the Hub says by now
    if cached is not None:
        return cached
    download = partial(snapshot_download, str(card.repo_id), revision=card.commit, allow_patterns=names)
    try:
        folder = Path(ask_hub(card.source, download))
        # Where the Hub does not answer, its client is content with a folder that holds some of them.
        if lacking := [name for name in names if not (folder / name).is_file()]:
            raise LocalEntryNotFoundError(f"{', '.join(lacking[:3])} cannot be downloaded now, and is not on this node")
    except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise offline(card.source, error) from error
    return folder


def files_of(card: BackboneCard, with_weights: bool) -> list[str]:
    """The names of the files that a job reads."""
    return [*_small_files(card), *(card.weight_files if with_weights else ())]
