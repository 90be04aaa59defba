"""A run of a test's own, to write."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path

from orchestrator.job import DirectoryStorage, HeldRun, Lease, hold


def held(folder: Path) -> AbstractContextManager[HeldRun]:
    """The run in that folder, for this process alone."""
    return hold(DirectoryStorage(folder.parent), folder.name)


def leased(folder: Path) -> HeldRun:
    """The run in that folder under a lease that another process holds, as workers have it."""
    lease = Lease(folder.name, "a driver", 1, "token")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".lease.json").write_text(json.dumps(vars(lease)))
    return HeldRun(DirectoryStorage(folder.parent), lease)
