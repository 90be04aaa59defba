"""Events as lines of a job's output, and back."""

from __future__ import annotations

import io

import pytest

from orchestrator.distributed.telling import Beat, Ended, Found, Piece, Teller, Told, as_line, error_of, parse_line
from orchestrator.errors import (
    CheckpointError,
    DataError,
    InterruptedRunError,
    OrchestratorError,
    RefusedError,
    TrainingError,
)
from orchestrator.job import Advanced, EpochEnded, Noted, PhaseBegan, TrialsAdvanced

ALL: list[Told] = [
    PhaseBegan("training\neverything", 30, 10, "steps", 32.0), Advanced(3), Beat(),
    EpochEnded({"epoch": 1, "train_loss": 0.5}, 3, "single-label"), Noted('a "note" \u2028 of two', is_warning=True),
    TrialsAdvanced(1, 4, 2, 0, "validation_loss", [[1, 0.5, {"method": "full"}]], 3.5),
    Ended(0, "/runs/a", {"test": {"accuracy": 0.5}}), Found([{"node": "10.0.0.1"}]), Piece("model/a", "YQ=="),
]  # fmt: skip


@pytest.mark.parametrize("told", ALL, ids=lambda told: type(told).__name__)
def test_a_line_is_what_was_told(told: Told) -> None:
    line = as_line(told)
    assert len(line.splitlines()) == 1
    assert parse_line(line) == told


@pytest.mark.parametrize(
    "line", ["", "Runtime env is setting up.", '{"loss": 1}', '{"orchestrator": "Beat"', '{"orchestrator": "Job"}',
             '{"orchestrator": "Advanced", "steps": 1}', '{"orchestrator": "Advanced"}'],
)  # fmt: skip
def test_what_others_print_is_not_taken_for_ours(line: str) -> None:
    assert parse_line(line) is None


@pytest.mark.parametrize(
    "error",
    [
        DataError("no labels", expected="labels", mend="add them"), RefusedError("busy", "a run", mend="wait"),
        TrainingError("it died", mend="again"), InterruptedRunError("stopped", mend="again"),
        CheckpointError("none"), OrchestratorError("something", mend="look"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_an_error_is_raised_as_it_was_there(error: OrchestratorError) -> None:
    told = parse_line(as_line(Ended(error.exit_code, error=error.as_dict())))
    assert isinstance(told, Ended)
    again = error_of(told)
    assert isinstance(error, type(again))
    assert (again.as_dict(), again.exit_code) == (error.as_dict(), error.exit_code)


def test_steps_are_summed_up_and_silence_is_broken() -> None:
    out = io.StringIO()
    teller = Teller(out)
    with teller.beating():
        for _ in range(1000):
            teller(Advanced(1))
        teller(Noted("done"))
    told = [parse_line(line) for line in out.getvalue().splitlines()]
    assert sum(one.num for one in told if isinstance(one, Advanced)) == 1000
    assert len(told) < 10
    assert told[-1] == Noted("done")
