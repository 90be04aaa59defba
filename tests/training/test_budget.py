"""How many epochs fit into what a job may take."""

from __future__ import annotations

import pytest

from orchestrator.training.budget import epochs_that_fit, seconds_of


@pytest.mark.parametrize(
    ("left_s", "step_s", "num_evaluated", "epochs", "epoch_s"),
    [
        (100.0, [0.5, 0.5, 0.5], 0, 20, 5.0),  # 10 steps an epoch
        (100.0, [0.5, 9.0, 0.5], 0, 20, 5.0),  # one step that something else held up
        (100.0, [0.5], 30, 18, 5.5),  # as many as 3 steps have, forward alone
        (4.9, [0.5], 0, 0, 5.0),
        (-3.0, [0.5], 0, 0, 5.0),
    ],
)
def test_epochs_with_their_validation(
    left_s: float, step_s: list[float], num_evaluated: int, epochs: int, epoch_s: float
) -> None:
    found = epochs_that_fit(left_s, step_s, steps_per_epoch=10, num_train=100, num_evaluated=num_evaluated)
    assert found[0] == epochs
    assert found[1] == pytest.approx(epoch_s)


def test_the_first_step_is_taken_and_not_counted() -> None:
    taken: list[int] = []
    assert len(seconds_of(taken.append)) == len(taken) - 1
    assert taken == list(range(len(taken)))
