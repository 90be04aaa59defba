"""What the loop trains on."""

from __future__ import annotations

import numpy as np

from orchestrator.features.sources import StoredView


def test_many_shards_are_read_as_one() -> None:
    values = [np.arange(6, dtype=np.float32).reshape(3, 2) + 10 * i for i in range(3)]
    rows = np.array([1, 2, 5, 7])
    view = StoredView(rows, np.array([2, 0, 2, 1]), np.array([0, 2, 1, 1]), values)
    features, stored = view.batch(np.array([7, 3, 1, 2]))
    assert stored.tolist() == [7, 1, 2]
    assert features.tolist() == [[12, 13], [20, 21], [4, 5]]
    assert view.batch(np.array([0, 9]))[1].tolist() == []
    nothing = StoredView(rows[:0], rows[:0], rows[:0], [])
    assert nothing.batch(np.array([0, 9]))[1].tolist() == []
