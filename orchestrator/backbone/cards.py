"""A repository, directory or earlier run -> BackboneCard, from metadata files only.

Refused here is what has no card: no config.json, an adapter alone, a licence that was not accepted, no such repository.
What its files may set is looked at in `untrusted.py`, its weights in `weights.py`, and whether it fits, by the gate.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.backbone.hub import ask_hub, offline
from orchestrator.backbone.stored import commit_of, fetch_stored, is_stored, small_files, stored_model
from orchestrator.backbone.timm_settings import without_sources
from orchestrator.errors import RefusedError
from orchestrator.job import GONE, BackboneCard, Run, is_run_at, is_uri, local_path

METADATA = (
    "config.json", "processor_config.json", "preprocessor_config.json", "adapter_config.json", "tokenizer_config.json",
    "modules.json",
)  # fmt: skip
_MODULE_CONFIG = re.compile(r"[\w.-]+/config\.json")
_NAMES_OF_NOTHING = ("backbone", "model", "checkpoint", "final", "best", "output", "outputs", "pretrained", "weights")
_REPO_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


def read_card(source: str, with_lineage: bool = True) -> BackboneCard:
    """The card of `org/name[@revision]`, a local directory, or an earlier run, also one in an object store.

    A directory of that name wins over a repository. Raises `RefusedError`; asks for no weight byte. `with_lineage`: of
    a run, where it came from too, which needs its lineage.json.
    """
    if is_uri(source) and not source.startswith("hf://"):
        return _read_stored(source, with_lineage)
    path = local_path(source)
    if path.is_dir():
        return _read_run(source, path, with_lineage) if is_run_at(path) else _read_directory(source, path)
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


def _read_run(source: str, path: Path, with_lineage: bool) -> BackboneCard:
    run = Run(path)
    if not (path / "plan.json").exists():
        raise run.damaged({"plan.json": GONE})
    if not (path / "results.json").is_file():
        raise RefusedError(
            "not_found",
            f"the run {source} has not finished, so it has no model yet",
            expected="a finished run",
            mend=run.mend,
        )
    _ = run.results  # refuses one that has lost its model
    with run.explained():
        card = _read_directory(source, path / "model")
    lineage = run.lineage if with_lineage else None
    return card.model_copy(update={"kind": "run", "name": path.resolve().name, "lineage": lineage})


def _read_stored(source: str, with_lineage: bool) -> BackboneCard:
    """That of a run in an object store."""
    run, manifest = stored_model(source)
    card = _read_directory(source, small_files(run))
    modules = "modules.json" in manifest.files
    files = {
        name: file.size for name, file in manifest.files.items()
        if "/" not in name or (modules and name.endswith("/config.json"))
    }  # fmt: skip
    lineage = run.lineage if with_lineage else None
    found = {"kind": "run", "name": run.name, "lineage": lineage, "path": None, "commit": commit_of(manifest)}
    return card.model_copy(update={**found, "files": files})


def _read_directory(source: str, path: Path) -> BackboneCard:
    files = {file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.is_file()}
    if "modules.json" in files:  # the layout of sentence-transformers: a folder a module
        files |= {str(f.relative_to(path)): f.stat().st_size for f in sorted(path.glob("*/config.json")) if f.is_file()}
    metadata = {name: (path / name).read_bytes() for name in _wanted(files)}
    return _make_card(
        source, "directory", _name_of(path.resolve(), metadata), files, metadata, path=str(path.resolve())
    )


def _name_of(path: Path, metadata: Mapping[str, bytes]) -> str:
    """A directory's name; where that says nothing, what its config calls the network, or the folder above."""
    if path.name.lower() not in _NAMES_OF_NOTHING:
        return path.name
    with contextlib.suppress(ValueError, AttributeError, RecursionError):  # what is wrong with it is told later
        told = json.loads(metadata.get("config.json", b"{}")).get("_name_or_path")
        if isinstance(told, str) and _REPO_ID.fullmatch(told):
            owner, _, name = told.rpartition("/")
            if owner.strip(".") and name.strip(".") and name.lower() not in _NAMES_OF_NOTHING:
                return name
    return path.parent.name or path.name


def _read_repository(source: str, repo_id: str, revision: str | None) -> BackboneCard:
    from httpx2 import HTTPError
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        info = ask_hub(source, lambda: HfApi().model_info(repo_id, revision=revision, files_metadata=True))
    except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        return _read_cached(source, repo_id, revision, error)
    files = {file.rfilename: -1 if file.size is None else file.size for file in info.siblings or []}
    commit = str(info.sha)

    def read(name: str) -> bytes:
        # By branch first: so the client notes which commit the branch is at, for a day without a connection.
        file = Path(hf_hub_download(repo_id, name, revision=revision or "main"))
        if file.parent.name != commit:  # the branch moved since
            file = Path(hf_hub_download(repo_id, name, revision=commit))
        return file.read_bytes()

    try:
        metadata = {name: ask_hub(source, partial(read, name)) for name in _wanted(files)}
    except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise offline(source, error) from error
    return _make_card(source, "hub", repo_id.split("/")[-1], files, metadata, repo_id=repo_id, commit=commit)


def _wanted(files: Mapping[str, int]) -> list[str]:
    of_modules = (name for name in files if name == "sentence_bert_config.json" or _MODULE_CONFIG.fullmatch(name))
    return [name for name in METADATA if name in files] + (list(of_modules) if "modules.json" in files else [])


def metadata_file(card: BackboneCard, name: str) -> Path | None:
    """A small file of the backbone (its tokenizer, say) on this machine, None where the backbone has none.

    Raises `RefusedError` where the Hub cannot be asked for it. Never for weights.
    """
    assert not name.endswith(".safetensors")
    if name not in card.files:
        return None
    if card.path:
        return Path(card.path) / name
    if is_stored(card):
        return fetch_stored(card, with_weights=False) / name
    from httpx2 import HTTPError
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(ask_hub(card.source, lambda: hf_hub_download(str(card.repo_id), name, revision=card.commit)))
    except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise offline(card.source, error) from error


def _read_cached(source: str, repo_id: str, revision: str | None, error: Exception) -> BackboneCard:
    """The card out of the client's cache, for a machine without a connection."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    if not isinstance(cached, str):
        raise offline(source, error) from error
    snapshot = Path(cached).parent
    card = _read_directory(source, snapshot)
    if not card.weight_files:  # somebody asked about it once, and never trained on it
        raise offline(source, error) from error
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
        raise RefusedError(
            "bad_config", f"{source}: {name} is not JSON: {error}", mend="fetch or save the backbone again"
        ) from None
    if not isinstance(value, dict):
        raise RefusedError(
            "bad_config",
            f"{source}: {name} holds a {type(value).__name__}, not an object",
            mend="fetch or save the backbone again",
        )
    return value


def _make_card(
    source: str, kind: str, name: str, files: dict[str, int], metadata: dict[str, bytes], **where: Any
) -> BackboneCard:
    modules = _parse_modules(source, metadata.pop("modules.json", None), metadata)
    parsed = {key: _parse(content, key, source) for key, content in metadata.items() if "/" not in key}
    if "config.json" not in parsed:
        raise _no_config(source, files, parsed)
    config = parsed["config.json"]
    library, model_type = _identify(source, config)
    if library == "timm":
        config = without_sources(config)
    processor = parsed.get("processor_config.json") or {}
    preprocessor = (
        processor.get("image_processor")
        or processor.get("feature_extractor")
        or parsed.get("preprocessor_config.json")
        or processor
        or None
    )
    if preprocessor is not None and not isinstance(preprocessor, dict):
        raise RefusedError(
            "bad_config",
            f"{source}: the processor's settings are {preprocessor!r}, not an object",
            mend="save the processor beside the model again: AutoProcessor...save_pretrained()",
        )
    return BackboneCard(
        source=source,
        kind=kind,
        name=name,
        library=library,
        model_type=model_type,
        config=config,
        preprocessor=preprocessor,
        tokenizer=parsed.get("tokenizer_config.json"),
        modules=modules,
        files=files,
        **where,
    )


def _parse_modules(source: str, listing: bytes | None, metadata: Mapping[str, bytes]) -> tuple[dict[str, Any], ...]:
    """[{"type": "Pooling", "config": {...}}, ...] of a repository in the layout of sentence-transformers."""
    if listing is None:
        return ()
    try:
        rows = json.loads(listing)
        listed = [(str(row["type"]).rpartition(".")[2], str(row["path"])) for row in rows]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RefusedError(
            "bad_config",
            f"{source}: modules.json cannot be understood: {error}",
            mend="save it again with sentence-transformers, or take modules.json out",
        ) from None
    modules = []
    for kind, path in listed:
        name = f"{path}/config.json" if path else "sentence_bert_config.json"
        config = _parse(metadata[name], name, source) if name in metadata else {}
        modules.append({"type": kind, "config": config})
    return tuple(modules)


def _identify(source: str, config: Mapping[str, Any]) -> tuple[str, str]:
    model_type = config.get("model_type")
    if "pretrained_cfg" in config or model_type == "timm_wrapper":
        architecture = config.get("architecture")
        if not isinstance(architecture, str) or not isinstance(config.get("pretrained_cfg", {}), dict):
            raise RefusedError(
                "bad_config",
                f"{source}: config.json is timm's, but names no architecture",
                mend="save the network again with timm's push_to_hf_hub or save_for_hf",
            )
        return "timm", architecture
    if model_type is None:
        raise RefusedError(
            "no_model_type",
            f"{source}: config.json names no model_type and has no pretrained_cfg of timm, so nobody can know how to "
            "build it without running code of the repository",
            expected="a transformers or timm repository",
            mend="save the network again with transformers' or timm's own function",
        )
    if not isinstance(model_type, str):
        raise RefusedError(
            "bad_config",
            f"{source}: model_type in config.json is {model_type!r}, not a word",
            mend="fetch or save the backbone again",
        )
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
