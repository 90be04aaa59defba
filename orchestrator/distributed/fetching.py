"""A run brought home: files and committed folders of a storage, copied and compared; or piece by piece from a cluster.

Standard output of a job is the one way out of a cluster whose storage the laptop does not see, so a file goes through
it in pieces, and the job's output is emptied once they have arrived.
"""

from __future__ import annotations

import base64
import os
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from orchestrator.data import open_storage
from orchestrator.distributed.request import read_request
from orchestrator.distributed.telling import Ended, Piece, Told, as_line
from orchestrator.errors import OrchestratorError, RefusedError, first_line
from orchestrator.job import MODEL, Storage, file_sha256

What = Literal["all", "model", "results"]
_PIECE_BYTES = 384 * 1024
_WAIT_S = 600
"""How long the cluster's side waits for the laptop to say that it has everything."""


def copy_run(storage: Storage, name: str, folder: Path, what: What) -> None:
    """Copy a run, or that part of it, into a folder that is not there yet; digests of committed folders are compared.

    Raises `RefusedError`: `not_found`, or `damaged` where it is not as it was committed.
    """
    if storage.read(f"{name}/plan.json") is None:
        raise RefusedError(
            "not_found", f"there is no run {storage.place_of(name)}", expected="a run that has begun",
            mend="look whether the job has begun: orchestrator status",
        )  # fmt: skip
    folder.mkdir(parents=True)
    commits = set(storage.commits(name))
    if what == "model" and f"{name}/{MODEL}" not in commits:
        raise RefusedError(
            "not_found", f"the run {storage.place_of(name)} has no model yet", expected="a run that has finished",
            mend="follow it to its end: orchestrator attach; or fetch all of it: --what all",
        )  # fmt: skip
    for commit in sorted(commits):
        inside = commit.removeprefix(f"{name}/")
        if what == "all" or (what == "model" and inside == MODEL):
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            storage.fetch(commit, folder / inside)
    for file in _small_files(storage, name, commits):
        inside = file.removeprefix(f"{name}/")
        if what == "all" or "/" not in inside:
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            (folder / inside).write_bytes(storage.read(file) or b"")


def _small_files(storage: Storage, name: str, commits: set[str]) -> Iterator[str]:
    """Files below a name that are in no committed folder."""
    files = set(storage.times(name))
    for child in storage.children(name):
        path = f"{name}/{child}"
        if child in files:
            yield path
        elif path not in commits:
            yield from _small_files(storage, path, commits)


# --- through the cluster ---


class Arrival:
    """A run that arrives piece by piece in a folder that is not there yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def take(self, piece: Piece) -> int:
        """Write a piece down; how many bytes it has. Raises `RefusedError` for a place outside of the folder."""
        path = PurePosixPath(piece.file)
        if path.is_absolute() or ".." in path.parts:
            raise RefusedError(
                "damaged", f"the cluster sends a file to {piece.file}", expected="a path inside of the run",
                mend="look at the job that sent it: orchestrator list",
            )  # fmt: skip
        file = self._folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        content = base64.b64decode(piece.data)
        with file.open("ab") as out:
            out.write(content)
        return len(content)

    def compare(self, digests: Mapping[str, str]) -> None:
        """Return if all files are here as they were sent. Raises `OrchestratorError`."""
        for name, digest in digests.items():
            file = self._folder / name
            if not file.is_file() or file_sha256(file) != digest:
                raise OrchestratorError(
                    f"{name} has not arrived as it was sent", expected="the SHA-256 that the cluster told",
                    mend="the same command again",
                )  # fmt: skip


def main() -> int:
    """On the cluster: send a run, then wait to be told that it has arrived, and leave no copy in the output."""
    request = read_request()
    try:
        with tempfile.TemporaryDirectory(prefix="orchestrator-fetch-") as scratch:
            folder = Path(scratch) / "run"
            copy_run(open_storage(request["storage"]), request["name"], folder, request["what"])
            digests = {}
            for file, pieces in _files(folder):
                digests[file] = file_sha256(folder / file)
                _send(pieces)
            _send([Ended(0, results={"files": digests})])
    except OrchestratorError as error:
        _send([Ended(error.exit_code, error=error.as_dict())])
        return error.exit_code
    except OSError as error:
        known = OrchestratorError(f"the head cannot copy the run: {first_line(error)}", mend="make room on its disk")
        _send([Ended(1, error=known.as_dict())])
        return 1
    signal.sigtimedwait({signal.SIGTERM, signal.SIGINT}, _WAIT_S)
    os.ftruncate(sys.stdout.fileno(), 0)
    return 0


def _files(folder: Path) -> Iterator[tuple[str, Iterator[Piece]]]:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            name = file.relative_to(folder).as_posix()
            yield name, _pieces(file, name)


def _pieces(file: Path, name: str) -> Iterator[Piece]:
    with file.open("rb") as content:
        first = True
        while (part := content.read(_PIECE_BYTES)) or first:
            first = False
            yield Piece(name, base64.b64encode(part).decode())


def _send(several: Iterable[Told]) -> None:
    for one in several:
        sys.stdout.write(as_line(one) + "\n")
    sys.stdout.flush()


def beside(folder: Path) -> Path:
    """A new name for what becomes this folder once it is whole."""
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")


def settle(partial: Path, folder: Path) -> None:
    """Put what has arrived whole in its place; files of an earlier fetch that are there are replaced."""
    if not folder.exists():
        partial.rename(folder)
        return
    for child in partial.iterdir():
        target = folder / child.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        child.replace(target)
    partial.rmdir()


def request_of(storage: str, name: str, what: What) -> dict[str, Any]:
    """What the cluster's side reads."""
    return {"storage": storage, "name": name, "what": what}


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    sys.exit(main())
