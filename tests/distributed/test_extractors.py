"""Pieces of work for extractors; the pool itself runs in test_ray.py."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import orchestrator
from orchestrator import train
from orchestrator.distributed.extractors import pieces_of
from orchestrator.errors import InterruptedRunError
from orchestrator.gate.planning import num_cores
from orchestrator.job.plans import Plan
from orchestrator.training import loop


@pytest.mark.parametrize(
    ("num_rows", "num_extractors", "num_pieces"),
    [(1, 1, 1), (255, 8, 1), (256, 8, 2), (5_000, 1, 4), (5_000, 63, 39), (1_000_000, 8, 62), (10_000, 2, 8)],
)
def test_pieces_are_enough_for_all_and_not_too_small(num_rows: int, num_extractors: int, num_pieces: int) -> None:
    order, ends = pieces_of(num_rows, None, num_extractors)
    assert len(ends) == num_pieces + 1
    assert (ends[0], ends[-1]) == (0, num_rows)
    assert order.tolist() == list(range(num_rows))
    assert max(np.diff(ends)) - min(np.diff(ends)) <= 1


def test_long_samples_come_first_in_pieces_of_like_work() -> None:
    sizes = np.random.default_rng(0).lognormal(8, 1.5, 5_000).astype(np.int64)
    order, ends = pieces_of(5_000, sizes, 4)
    assert sorted(order.tolist()) == list(range(5_000))
    assert (np.diff(sizes[order]) <= 0).all()
    work = [int(sizes[order[start:stop]].sum()) for start, stop in pairwise(ends)]
    assert len(work) == 16
    assert max(work) < 1.5 * np.mean(work)
    assert min(np.diff(ends)) >= 1
    one_is_nearly_all = np.array([10**9, *[1] * 999])
    assert pieces_of(1_000, one_is_nearly_all, 2)[1] == [0, 1, 1_000]
    assert pieces_of(1_000, np.zeros(1_000, np.int64), 2)[1][-1] == 1_000


def test_who_computes_may_change_and_nothing_else_of_a_run_that_goes_on(
    tiny_resnet: Path, flat_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []

    def on_ray(_spec: object, plan: Plan, *_: object) -> None:
        plans.append(plan)
        raise InterruptedRunError("stopped")

    def stopped(_: Any) -> None:
        raise InterruptedRunError("stopped")

    monkeypatch.setattr(train, "_on_ray", on_ray)
    monkeypatch.setattr(loop, "train", stopped)
    job: dict[str, Any] = {"backbone": str(tiny_resnet), "data": str(flat_digits), "name": "same", "method": "head"}
    with pytest.raises(InterruptedRunError):
        orchestrator.finetune(**job, report=lambda _: None)
    began = orchestrator.plan(**job)
    with pytest.raises(InterruptedRunError):
        orchestrator.finetune(**job, scaling={"num_extractors": num_cores()}, report=lambda _: None)
    (plan,) = plans
    assert (plan.num_extractors, plan.extractor_threads, plan.ray) == (num_cores(), 1, True)
    assert plan.threads_per_worker == began.threads_per_worker == num_cores()
    assert plan.recipe == began.recipe
    with pytest.raises(InterruptedRunError):  # and in this process again
        orchestrator.finetune(**job, report=lambda _: None)
    assert len(plans) == 1
