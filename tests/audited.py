"""What the steps of a run took, held against what they must have taken."""

from __future__ import annotations

from collections import Counter

from orchestrator.job import Run
from orchestrator.training import Taken, read_audit


def taken_of(run: Run) -> list[Taken]:
    """A run's audit. Each step has each microbatch once, in order; each epoch every sample exactly once.

    Of an epoch that has not ended no sample is there twice.
    """
    taken, ended = read_audit(run), len(run.metrics)
    assert {one.epoch for one in taken} >= set(range(1, ended + 1))
    for epoch in {one.epoch for one in taken}:
        rows = Counter(row for one in taken if one.epoch == epoch for row in one.rows)
        assert set(rows.values()) == {1}, epoch
        if epoch <= ended:
            assert len(rows) == run.plan.data.num_samples["train"], epoch
    steps = [(one.step, one.microbatch) for one in taken]
    assert steps == sorted(set(steps))
    return taken
