"""An earlier run in an object store, as a backbone: its model's files, which other machines fetch from there too."""

from __future__ import annotations

import hashlib
from pathlib import Path

from orchestrator.errors import RefusedError
from orchestrator.job import MODEL, BackboneCard, Manifest, Run, is_uri, open_finished

_WEIGHTS = ".safetensors"


def is_stored(card: BackboneCard) -> bool:
    """Whether its files lie in an object store."""
    return card.kind == "run" and is_uri(card.source)


def stored_model(source: str) -> tuple[Run, Manifest]:
    """The finished run at this URI, and what its model holds. Raises `RefusedError`."""
    run = open_finished(source)
    manifest = run.storage.find(f"{run.name}/{MODEL}")
    if manifest is None:
        raise RefusedError(
            "damaged", f"the run {source} has lost its model", mend="the command that made the run writes it again"
        )
    return run, manifest


def small_files(run: Run) -> Path:
    """A folder of this machine with all of its model but the weights."""
    return run.storage.copy_of(f"{run.name}/{MODEL}", but=_WEIGHTS)


def commit_of(manifest: Manifest) -> str:
    """The digest that a model is known by, whatever it was committed as."""
    digest = hashlib.sha256()
    for name, file in sorted(manifest.files.items()):
        digest.update(f"{name} {file.sha256}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def fetch_stored(card: BackboneCard, with_weights: bool) -> Path:
    """A folder of this machine with the backbone's files. Raises `RefusedError` where they are others by now."""
    run, manifest = stored_model(card.source)
    if card.commit not in (None, commit_of(manifest)):
        raise RefusedError(
            "changed", f"the model of the run {card.source} is another one than when the plan was made",
            expected=f"{card.short_commit}, as in the plan", mend="start over: --fresh",
        )  # fmt: skip
    return run.model if with_weights else small_files(run)


def beginning_of(card: BackboneCard, name: str, num_bytes: int) -> bytes:
    """The first bytes of one of its files."""
    run, manifest = stored_model(card.source)
    return run.storage.beginning_of(f"{run.name}/{MODEL}", manifest, name, num_bytes)
