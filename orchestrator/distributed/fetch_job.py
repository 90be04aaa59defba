"""A run on its way home, on the cluster: its files go into the job's output, which is emptied afterwards."""

from __future__ import annotations

import base64
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from orchestrator.data import open_storage
from orchestrator.distributed.fetching import copy_run
from orchestrator.distributed.request import read_request
from orchestrator.distributed.telling import Ended, Piece, Told, as_line
from orchestrator.errors import OrchestratorError, first_line
from orchestrator.job import PhaseBegan, file_sha256

_stopped = threading.Event()
"""The laptop has everything, or wants no more."""
_PIECE_BYTES = 384 * 1024
_WAIT_S = 600
"""How long it waits, beside the time for the bytes, for the laptop to say that it has everything."""
_SLOWEST_BYTES_PER_S = 125_000
"""A laptop that takes less is not waited for."""


def main() -> int:
    """On the cluster: send a run, wait for the laptop to stop the job, leave no copy in the output."""
    request, num_bytes = read_request(), 0
    try:
        with tempfile.TemporaryDirectory(prefix="orchestrator-fetch-") as scratch:
            folder = Path(scratch) / "run"
            copy_run(open_storage(request["storage"]), request["name"], folder, request["what"])
            files, digests = list(_files(folder)), {}
            num_bytes = sum((folder / file).stat().st_size for file, _ in files)
            _send([PhaseBegan(f"fetching {request['name']}", num_bytes, unit="bytes")])
            for file, pieces in files:
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
    _stopped.wait(_WAIT_S + num_bytes / _SLOWEST_BYTES_PER_S)
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
        if _stopped.is_set():  # nobody reads it any more
            return
        sys.stdout.write(as_line(one) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _stopped.set())
    sys.exit(main())
