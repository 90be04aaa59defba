"""Which samples a run has seen: figures on those are too good."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from orchestrator.data.contents import Ints
from orchestrator.data.samples import Samples
from orchestrator.data.shared_tables import table_of
from orchestrator.errors import RefusedError
from orchestrator.job import BackboneCard, HeldRun, Run

_MOST = 100_000
"""Samples, of a job and of its backbone's run together, that are looked through before a start: some 3 s."""


def num_seen(run: Run | HeldRun, samples: Samples, rows: Ints, fields: Sequence[str], *splits: str) -> int | None:
    """How many of these rows are among the samples of the run's splits; None where nothing tells any more."""
    table = table_of(run)
    if table is None:
        return None
    own = Samples(table, tuple(fields))
    return samples.num_among(rows, own, np.concatenate([own.rows(split) for split in splits]))


def num_seen_by_backbone(card: BackboneCard, samples: Samples, rows: Ints, fields: Sequence[str], *splits: str) -> int:
    """The same of a backbone that is a run of this machine; 0 where it is none, or nothing tells."""
    if card.kind != "run" or card.path is None:
        return 0
    run = Run(Path(card.path).parent)
    try:
        if len(rows) + sum(run.plan.data.num_samples[split] for split in splits) > _MOST:
            return 0
        return num_seen(run, samples, rows, fields, *splits) or 0
    except (RefusedError, OSError, pa.ArrowException):  # damaged, which is nothing to this job
        return 0


def warn_of_seen(card: BackboneCard, samples: Samples, fields: Sequence[str]) -> list[str]:
    """A warning for each split held back whose samples the backbone was trained on, or has chosen an epoch by."""
    warnings = []
    for split, splits in (("validation", ("train",)), ("test", ("train", "validation"))):
        rows = samples.rows(split)
        num = num_seen_by_backbone(card, samples, rows, fields, *splits) if len(rows) else 0
        if num:
            warnings.append(
                f"{num:,} of {len(rows):,} samples of {split} are among those that the backbone {card.name} was "
                f"trained on: the figures of {split} are too good"
            )
    return warnings
