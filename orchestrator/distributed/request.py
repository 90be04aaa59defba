"""What a job on a cluster is asked for: one JSON file that is delivered with the code. Standard library alone.

It is neither in the job's command, which `ps` shows, nor in its metadata.
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.job import Plan

_FILE = "orchestrator_request.json"
OF_NO_RUN = "-"
"""In place of the digest of a run's job, for a search, whose best run is not known before."""
_LONG_AGO = (1980, 1, 1, 0, 0, 0)
"""So that the same content is the same file."""


@dataclass(frozen=True)
class Sent:
    """A job as it travels, and what is known of it before it does."""

    tree: dict[str, Any]
    """The job as plain data that means the same on any machine; a search or ranking has its block in it."""
    name: str
    """Of the run, the search or the ranking."""
    storage: str
    """Where that lies."""
    plan: Plan
    """Of the run, one trial or one backbone: what the nodes must have."""
    others: tuple[Plan, ...] = ()
    """Of the other backbones of a search, which they must have too."""
    on_workers: bool = True
    """Whether it wants a place for workers; else its driver does all of it."""
    began: str = OF_NO_RUN
    """Digest of the run's job: it tells the run from another one of the same name. A search's has none."""
    like: str = ""
    """Digest of what it learns on any number of workers, where the name was left open."""


def write_zip(file: Path, contents: Mapping[str, bytes]) -> None:
    """A zip file of these {name: content}, the same bytes for the same contents."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
        for name in sorted(contents):
            info = zipfile.ZipInfo(name, _LONG_AGO)
            info.external_attr = 0o644 << 16
            out.writestr(info, contents[name], zipfile.ZIP_DEFLATED)


def pack_request(request: Mapping[str, Any], file: Path) -> Path:
    """The request as a package for the nodes."""
    write_zip(file, {_FILE: json.dumps(request, sort_keys=True).encode()})
    return file


def read_request() -> dict[str, Any]:
    """The request that was delivered to this process."""
    for folder in sys.path:
        file = Path(folder) / _FILE
        if file.is_file():
            request: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return request
    raise FileNotFoundError(f"{_FILE} was not delivered: this module is started by `orchestrator submit`")
