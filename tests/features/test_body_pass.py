"""One worker's pass: what it refuses, and how soon it writes."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.errors import TrainingError
from orchestrator.features.body_pass import flush_interval_s, refuse_other_shape


def test_features_of_unlike_shape_are_refused() -> None:
    refuse_other_shape((3,), np.zeros((2, 3), np.float32))
    with pytest.raises(TrainingError, match=r"the shape \[4\] for some samples, and \[3\] for others") as refused:
        refuse_other_shape((3,), np.zeros((2, 4), np.float32))
    assert "every step" in refused.value.mend


def test_the_first_shard_comes_soon_and_long_work_ends_in_few() -> None:
    written = []
    worked = 0.0
    while worked < 24 * 3600:
        worked += flush_interval_s(worked)
        written.append(worked)
    assert written[0] == 1
    assert sum(at <= 60 for at in written) < 20
    assert len(written) < 350  # a day
    assert max(np.diff(written)[:40]) <= 10  # what is lost in the first minutes
