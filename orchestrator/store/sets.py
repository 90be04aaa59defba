"""The sets of a feature store: under which key they stand, and who holds them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.store import locks
from orchestrator.store.shards import FeatureSet

FOLDER = ".features"
"""Of a storage directory."""
CONTENTS = "contents"
KEY_FILE = "key.json"
FORMAT_FILE = "format.json"
"""Of a cache group: which number format was decided on, for all later jobs."""
USED = "used"
"""Of a set in an object store: written anew by each job that uses it."""
_VERSION = 1
"""Of what features are: raised when this package computes them otherwise than before."""


def cache_group_folder(root: Path, name: str, key: Mapping[str, Any]) -> Path:
    """The folder of all that has this key; made, with the key in it, if need be."""
    text = json.dumps({"version": _VERSION, **key}, sort_keys=True, indent=1, ensure_ascii=False)
    folder = root / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if not (folder / KEY_FILE).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_shared(folder / KEY_FILE, text)
    return folder


def write_shared(file: Path, text: str) -> None:
    """Write a file whole or not at all, whoever else writes it at this moment: each under a name of its own first."""
    partial = file.with_name(f"{uuid.uuid4().hex}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


@contextlib.contextmanager
def opened(features: FeatureSet, key: Mapping[str, Any]) -> Iterator[FeatureSet]:
    """A set of the cache group with that key, made if need be; nobody prunes it meanwhile."""
    cache_group = features.folder.parent
    with locks.held(features.folder):
        touch(features.folder)
        cache_group_folder(cache_group.parent, cache_group.name.rpartition("-")[0], key)  # pruned just before, perhaps
        yield features


def touch(folder: Path) -> None:
    """Note that a set was used now: what was not used for longest is pruned first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".used").touch()
