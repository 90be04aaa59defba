"""A repository, directory or earlier run -> BackboneCard, from metadata files only.

What a card can be refused for here is its form: no config.json, an adapter alone, pickles alone, gated, not
found. Whether it fits the data is the gate's business. Weights are fetched by `fetch`, which only a running
job calls.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.errors import RefusedError
from orchestrator.plans import BackboneCard
from orchestrator.runs import Run

_METADATA = ("config.json", "processor_config.json", "preprocessor_config.json", "adapter_config.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_REPO_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_RETRIES_S = (0.3, 1.0)
_MAX_HEADER_BYTES = 100_000_000  # the limit that the safetensors library itself sets

T = TypeVar("T")
Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (dtype, shape), from the safetensors headers."""


def read_card(source: str) -> BackboneCard:
    """The card of `org/name[@revision]`, a local directory, or an earlier run.

    A directory of that name wins over a repository. Raises `RefusedError`; asks for no weight byte.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_run(source, path) if (path / "plan.json").is_file() else _read_directory(source, path)
    if path.is_file():
        raise RefusedError(
            "not_found",
            f"{source} is a file",
            expected="org/name[@revision] on the Hub, a directory in Hub layout, or a run",
            mend=f"name its directory: {path.parent}",
        )
    repo_id, _, revision = source.partition("@")
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_local or not _REPO_ID.match(repo_id):
        raise RefusedError(
            "not_found",
            f"there is no directory {source}",
            expected="org/name[@revision] on the Hub, a directory in Hub layout, or a run",
            mend="check the path",
        )
    return _read_repository(source, repo_id, revision or None)


def _read_run(source: str, path: Path) -> BackboneCard:
    if not (path / "results.json").is_file():
        raise RefusedError(
            "not_found",
            f"the run {source} has not finished, so it has no model yet",
            expected="a finished run",
            mend=f"go on with it: orchestrator finetune {path / 'job.yaml'}",
        )
    if not (path / "model").is_dir():
        raise RefusedError(
            "damaged", f"the run {source} has lost its model", mend="train it again: orchestrator finetune ... --fresh"
        )
    card = _read_directory(source, path / "model")
    lineage = Run(path).lineage
    return card.model_copy(update={"kind": "run", "name": path.resolve().name, "lineage": lineage})


def _read_directory(source: str, path: Path) -> BackboneCard:
    files = {file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.is_file()}
    metadata = {name: (path / name).read_bytes() for name in _METADATA if name in files}
    return _make_card(source, "directory", path.resolve().name, files, metadata, path=str(path.resolve()))


def _read_repository(source: str, repo_id: str, revision: str | None) -> BackboneCard:
    from httpx2 import HTTPError
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        info = _asking(source, lambda: HfApi().model_info(repo_id, revision=revision, files_metadata=True))
    except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        return _read_cached(source, repo_id, revision, error)
    files = {file.rfilename: -1 if file.size is None else file.size for file in info.siblings or []}
    commit = str(info.sha)

    def read(name: str) -> bytes:
        # By branch first: so the client notes which commit the branch is at, for a day without a connection.
        found = Path(hf_hub_download(repo_id, name, revision=revision or "main"))
        if found.parent.name != commit:  # the branch moved since
            found = Path(hf_hub_download(repo_id, name, revision=commit))
        return found.read_bytes()

    try:
        metadata = {name: _asking(source, partial(read, name)) for name in _METADATA if name in files}
    except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise _offline(source, error) from error
    return _make_card(source, "hub", repo_id.split("/")[-1], files, metadata, repo_id=repo_id, commit=commit)


def _asking(source: str, question: Callable[[], T]) -> T:
    """The Hub's answer; its refusals become ours, and a connection that fails is tried again."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    for pause_s in (*_RETRIES_S, None):
        try:
            return question()
        except GatedRepoError as error:
            raise RefusedError(
                "gated",
                f"{source} asks for its licence to be accepted first",
                mend="accept it on the repository's page, then run: hf auth login",
            ) from error
        except RevisionNotFoundError as error:
            raise RefusedError(
                "bad_revision",
                f"{source}: the repository has no such revision",
                expected="a branch, tag or full commit sha behind the @",
                mend="leave the @revision out for the newest commit",
            ) from error
        except RepositoryNotFoundError as error:
            raise RefusedError(
                "not_found",
                f"the Hub has no repository {source}, or it is private and you are not logged in",
                expected="org/name[@revision], or a local directory",
                mend="correct the name, or run: hf auth login",
            ) from error
        except HFValidationError as error:
            raise RefusedError("not_found", f"{source} is no repository name: {error}") from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise RefusedError(
                    "unauthorised",
                    f"the Hub did not accept the token for {source} (status {status})",
                    mend="run: hf auth login",
                ) from error
            if status < 500 or pause_s is None:
                raise
        except HTTPError:
            if pause_s is None:
                raise
        time.sleep(pause_s)
    raise AssertionError("unreachable")


def _offline(source: str, error: Exception) -> RefusedError:
    return RefusedError(
        "offline",
        f"the Hub cannot be asked about {source}: {type(error).__name__}: {str(error).splitlines()[0]}",
        mend="check the connection and HF_ENDPOINT, or give a local directory",
    )


def _read_cached(source: str, repo_id: str, revision: str | None, error: Exception) -> BackboneCard:
    """The card out of the client's cache, for a machine without a connection."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    if not isinstance(found, str):
        raise _offline(source, error) from error
    snapshot = Path(found).parent
    card = _read_directory(source, snapshot)
    if not card.weight_files:  # somebody asked about it once, and never trained on it
        raise _offline(source, error) from error
    return card.model_copy(
        update={
            "kind": "hub",
            "repo_id": repo_id,
            "commit": snapshot.name,
            "name": repo_id.split("/")[-1],
            "path": None,
        }
    )


def _parse(content: bytes, name: str, source: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RefusedError("bad_config", f"{source}: {name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RefusedError("bad_config", f"{source}: {name} holds a {type(value).__name__}, not an object")
    return value


def _make_card(
    source: str, kind: str, name: str, files: dict[str, int], metadata: dict[str, bytes], **where: Any
) -> BackboneCard:
    parsed = {key: _parse(content, key, source) for key, content in metadata.items()}
    if "config.json" not in parsed:
        raise _no_config(source, files, parsed)
    config = parsed["config.json"]
    library, model_type = _identify(source, config)
    processor = parsed.get("processor_config.json") or {}
    preprocessor = (
        processor.get("image_processor")
        or processor.get("feature_extractor")
        or parsed.get("preprocessor_config.json")
        or processor
        or None
    )
    if preprocessor is not None and not isinstance(preprocessor, dict):
        raise RefusedError("bad_config", f"{source}: the processor's settings are {preprocessor!r}, not an object")
    return BackboneCard(
        source=source,
        kind=kind,
        name=name,
        library=library,
        model_type=model_type,
        config=config,
        preprocessor=preprocessor,
        files=files,
        **where,
    )


def _identify(source: str, config: Mapping[str, Any]) -> tuple[str, str]:
    model_type = config.get("model_type")
    if "pretrained_cfg" in config or model_type == "timm_wrapper":
        architecture = config.get("architecture")
        if not isinstance(architecture, str) or not isinstance(config.get("pretrained_cfg", {}), dict):
            raise RefusedError("bad_config", f"{source}: config.json is timm's, but names no architecture")
        return "timm", architecture
    if model_type is None:
        raise RefusedError(
            "no_model_type",
            f"{source}: config.json names no model_type and no timm architecture, so nobody can know how to "
            "build it without running code of the repository",
            expected="a transformers or timm repository",
            mend="save the network again with transformers' or timm's own function",
        )
    if not isinstance(model_type, str):
        raise RefusedError("bad_config", f"{source}: model_type in config.json is {model_type!r}, not a word")
    return "transformers", model_type


def _no_config(source: str, files: Mapping[str, int], parsed: Mapping[str, Any]) -> RefusedError:
    if "adapter_config.json" in parsed:
        base = parsed["adapter_config.json"].get("base_model_name_or_path") or "the model it was made for"
        return RefusedError(
            "adapter_only",
            f"{source} holds an adapter, not a model",
            expected="a repository with a whole model",
            mend=f"use its base: {base}",
        )
    if any(file.endswith(".gguf") for file in files):
        return RefusedError(
            "gguf_only",
            f"{source} holds GGUF files, which are for inference only",
            expected="safetensors weights",
            mend="use the repository that they were converted from",
        )
    return RefusedError(
        "no_config",
        f"{source} has no config.json",
        expected="a directory or repository in Hub layout: config.json and safetensors weights",
        mend="save the network with transformers' save_pretrained or timm's save_for_hf",
    )


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
        found = _asking(
            card.source,
            lambda: HfApi().get_safetensors_metadata(str(card.repo_id), revision=card.commit),
        )
    except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        from huggingface_hub import try_to_load_from_cache

        tensors = {}
        for name in card.weight_files:
            path = try_to_load_from_cache(card.repo_id, name, revision=card.commit)
            if not isinstance(path, str):
                raise _offline(card.source, error) from error
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
    """The card with its `commit`: for a directory, the digest of its metadata and weights."""
    if card.commit or not card.path:
        return card
    digest = hashlib.sha256()
    for name in sorted((*card.weight_files, *(name for name in _METADATA if name in card.files))):
        digest.update(name.encode())
        with (Path(card.path) / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return card.model_copy(update={"commit": f"sha256:{digest.hexdigest()}"})


def fetch(card: BackboneCard, weights: bool = True) -> Path:
    """The directory that holds the backbone's files, downloaded if need be (at the pinned commit)."""
    if card.path:
        return Path(card.path)
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download

    assert card.repo_id
    patterns = ["*.json", "*.txt", "*.model", *(card.weight_files if weights else [])]
    try:
        return Path(
            _asking(
                card.source,
                lambda: snapshot_download(
                    str(card.repo_id), revision=card.commit, allow_patterns=patterns, ignore_patterns=["*/*"]
                ),
            )
        )
    except HTTPError as error:
        raise _offline(card.source, error) from error
