"""What runs on the cluster for a submitted job: the driver as anywhere else, whose events the cluster's output keeps.

    python -m orchestrator.driver

The same job again goes on with the run that it began: it is known by its storage and its name.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.distributed.request import read_request
from orchestrator.distributed.telling import Ended, Teller
from orchestrator.errors import InterruptedRunError, OrchestratorError, first_line
from orchestrator.job import Report, Run, Stop
from orchestrator.train import finetune, pretrain

Ran = tuple[str, Mapping[str, Any]]
"""(where what came of a job lies, its figures)"""


def _training(train: Callable[..., Run]) -> Callable[..., Ran]:
    def run(tree: Mapping[str, Any], fresh: bool, report: Report, stop: Stop) -> Ran:
        done = train(tree, fresh=fresh, report=report, stop=stop)
        return done.place, done.results

    return run


def _search(tree: Mapping[str, Any], fresh: bool, report: Report, stop: Stop) -> Ran:
    from orchestrator.tuning import run_search  # noqa: PLC0415  # it imports Ray

    return run_search(tree, fresh, report, stop)


def _rank(tree: Mapping[str, Any], fresh: bool, report: Report, stop: Stop) -> Ran:
    from orchestrator.tuning import run_rank  # noqa: PLC0415  # it imports Ray

    return run_rank(tree, fresh, report, stop)


KINDS: Mapping[str, Callable[..., Ran]] = {
    "finetune": _training(finetune), "pretrain": _training(pretrain), "search": _search, "rank": _rank,
}  # fmt: skip
"""What a job can be."""


def main() -> int:
    """Run the job that was delivered; its exit code, as the command line's."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does
    request = read_request()
    stop = _stop_on_signal()
    teller = Teller(sys.stdout)
    with teller.beating():
        ended = _ended(request, teller, stop)
        teller(ended)
    return ended.exit_code


def _ended(request: Mapping[str, Any], teller: Teller, stop: threading.Event) -> Ended:
    try:
        place, results = KINDS[request["kind"]](request["job"], request["fresh"], teller, stop.is_set)
        return Ended(0, place=place, results=results)
    except KeyboardInterrupt:
        error: OrchestratorError = InterruptedRunError("stopped at once", mend="the same command goes on")
    except OrchestratorError as known:
        error = known
    except Exception as unknown:
        traceback.print_exc()
        error = OrchestratorError(f"{type(unknown).__name__}: {first_line(unknown)}", mend="orchestrator logs has more")
    return Ended(error.exit_code, error=error.as_dict())


def _stop_on_signal() -> threading.Event:
    """Set by a first SIGTERM or SIGINT, after which the run stops behind its step, resumable; a second one ends it."""
    asked = threading.Event()

    def handle(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
    return asked


if __name__ == "__main__":
    sys.exit(main())
