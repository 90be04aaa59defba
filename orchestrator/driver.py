"""A submitted job, on the cluster: it runs as anywhere else, and prints each event as a line that the laptop follows.

    python -m orchestrator.driver

The same job again goes on with the run that it began: it is known by its storage and its name.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.distributed.request import read_request
from orchestrator.distributed.telling import Ended, Teller
from orchestrator.errors import InterruptedRunError, OrchestratorError, first_line
from orchestrator.job import Report, Run, Stop, stop_on_signal
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
    from orchestrator.tuning import run_rank  # noqa: PLC0415  # only for this kind

    return run_rank(tree, fresh, report, stop)


KINDS: Mapping[str, Callable[..., Ran]] = {
    "finetune": _training(finetune), "pretrain": _training(pretrain), "search": _search, "rank": _rank,
}  # fmt: skip
"""What a job can be."""


def main() -> int:
    """Run the job that was delivered; its exit code, as the command line's."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does
    request = read_request()
    teller = Teller(sys.stdout)
    with stop_on_signal(None, at_once=(signal.SIGINT, signal.SIGTERM)) as stop, teller.beating():
        ended = _ended(request, teller, stop)
        teller(ended)
    return ended.exit_code


def _ended(request: Mapping[str, Any], teller: Teller, stop: Stop) -> Ended:
    try:
        place, results = KINDS[request["kind"]](request["job"], request["fresh"], teller, stop)
        return Ended(0, place=place, results=results)
    except KeyboardInterrupt:
        error: OrchestratorError = InterruptedRunError("stopped at once", mend="the same command goes on")
    except OrchestratorError as known:
        error = known
    except Exception as unknown:
        traceback.print_exc()
        error = OrchestratorError(f"{type(unknown).__name__}: {first_line(unknown)}", mend="orchestrator logs has more")
    return Ended(error.exit_code, error=error.as_dict())


if __name__ == "__main__":
    sys.exit(main())
