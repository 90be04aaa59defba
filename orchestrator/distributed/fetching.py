"""A run brought home: files and committed folders of a storage, copied and compared; or piece by piece from a cluster.

Standard output of a job is the one way out of a cluster whose storage the laptop does not see, so a file goes through
it in pieces, and the job's output is emptied once they have arrived.
"""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

from orchestrator.distributed.following import lines_of
from orchestrator.distributed.head import AwayError, Head
from orchestrator.distributed.request import pack_request
from orchestrator.distributed.telling import Ended, Piece, error_of, parse_line, repeating
from orchestrator.distributed.wheels import own_delivery
from orchestrator.errors import OrchestratorError, RefusedError
from orchestrator.job import CHECKPOINTS, MODEL, Advanced, PhaseBegan, Report, Storage, file_sha256

What = Literal["all", "model", "results"]
_STOP_WAIT_S = 600
"""So long Ray waits, before it kills the job that sends, for it to take back what it has written."""
_LOOK_EVERY_S = 0.5
_FETCH = "exec python -m orchestrator.distributed.fetch_job"


def copy_run(storage: Storage, name: str, folder: Path, what: What, report: Report = lambda _event: None) -> None:
    """Copy a run, or that part of it, into a folder that is not there yet; digests of committed folders are compared.

    All of it is a run again, which the same command goes on with: committed folders keep their manifests. What is
    reported is the bytes of those folders, of which nearly all of a run is.
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
    asked = {
        one.removeprefix(f"{name}/"): _num_bytes(storage, one)
        for one in sorted(commits) if what == "all" or (what == "model" and one == f"{name}/{MODEL}")
    }  # fmt: skip
    total = sum(asked.values())
    report(PhaseBegan(f"copying {name}", total, unit="bytes"))
    with _growth_told(folder, total, report):
        for inside in asked:
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            try:
                storage.fetch(f"{name}/{inside}", folder / inside).write(folder / inside)
            except RefusedError as error:  # a checkpoint that newer ones have replaced meanwhile, in a run that runs
                if error.reason != "not_found" or inside.partition("/")[0] != CHECKPOINTS:
                    raise
    for file in _small_files(storage, name, commits):
        inside = file.removeprefix(f"{name}/")
        if what == "all" or "/" not in inside:
            content = storage.read(file)
            if content is not None:  # else it is there no more
                (folder / inside).parent.mkdir(parents=True, exist_ok=True)
                (folder / inside).write_bytes(content)


@contextlib.contextmanager
def _growth_told(folder: Path, total: int, report: Report) -> Iterator[None]:
    """As long as the context lasts, how many more bytes the folder holds is reported; in the end, all are."""
    told = 0

    def tell(num_bytes: int) -> None:
        nonlocal told
        if (more := min(num_bytes, total) - told) > 0:
            report(Advanced(more))
            told += more

    def look() -> None:
        tell(_bytes_in(folder))

    with repeating(look, _LOOK_EVERY_S):
        yield
    tell(total)


def _bytes_in(folder: Path) -> int:
    num_bytes = 0
    for place, _folders, files in os.walk(folder):  # one that is renamed meanwhile is passed over
        for file in files:
            with contextlib.suppress(OSError):
                num_bytes += (Path(place) / file).stat().st_size
    return num_bytes


def _num_bytes(storage: Storage, commit: str) -> int:
    with contextlib.suppress(RefusedError):  # damaged, which is said where it is copied
        manifest = storage.find(commit)
        return sum(one.size for one in manifest.files.values()) if manifest is not None else 0
    return 0


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


def fetch_through_cluster(
    head: Head, storage: str, name: str, folder: Path, what: What, report: Report = lambda _event: None
) -> None:
    """Have the cluster send a run into a folder that is not there yet; digests of all files were compared."""
    report(PhaseBegan(f"waiting for the cluster to send {name}"))
    id = f"orchestrator-fetch-{secrets.token_hex(6)}"
    with tempfile.TemporaryDirectory(prefix="orchestrator-fetch-") as scratch:
        # Once a job is over, the cluster forgets what was delivered with it.
        packages = [head.upload(own_delivery().write(Path(scratch)))]
        request = {"storage": storage, "name": name, "what": what}
        packages.append(head.upload(pack_request(request, Path(scratch) / "request.zip")))
    head.submit(id, _FETCH, packages, {"orchestrator_kind": "fetch"}, {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S)})
    arrival, ended = Arrival(folder), None
    try:
        for told in map(parse_line, lines_of(head, id, report)):
            if isinstance(told, Piece):
                report(Advanced(arrival.take(told)))
            elif isinstance(told, PhaseBegan):
                report(told)
            elif isinstance(told, Ended):
                ended = told
                break
    finally:
        with contextlib.suppress(AwayError):  # the sender ends by itself in the end
            head.stop(id)
    if ended is not None and ended.exit_code:
        raise error_of(ended)
    if ended is None or ended.results is None:
        job = head.job(id)
        said = (job.message.strip().splitlines() if job else []) or ["without a word"]
        raise OrchestratorError(f"the cluster ended while it sent {name}: {said[-1]}", mend="the same command again")
    arrival.compare(ended.results["files"])
