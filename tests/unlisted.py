"""A folder that nobody can list, root neither."""

from __future__ import annotations

import os
from pathlib import Path


def make_unlisted(folder: Path) -> None:
    """Put folders into one another below it, until the path is too long.

    A folder without the right to read it fails in the same call, but not for root.
    """
    here = os.open(folder, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=here)
        inner = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
