"""What came of each candidate, as a table; and whether two of them differ by more than the noise. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

# Two-sided 95 % quantiles of Student's t, by degrees of freedom: of 2 to 5 folds.
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


@dataclass(frozen=True)
class RankRow:
    """A candidate. Of one that was refused or failed, what had not been measured by then is None."""

    backbone: str
    """As it was given."""
    name: str
    """Short."""
    state: Literal["ranked", "left", "refused", "failed"]
    """left: out of the race, as it fell behind on fewer samples."""
    score: float | None = None
    """Of the linear probe, cross-validated on `num_samples`: accuracy, macro F1 or R2."""
    interval: tuple[float, float] | None = None
    """Its 95 % interval."""
    neighbours: float | None = None
    """The same figure of its 10 nearest neighbours."""
    num_samples: int = 0
    """Samples that it was measured on at last."""
    behind: float | None = None
    """How much lower its score is than that of the best, on the same folds of the same samples."""
    is_beyond_noise: bool | None = None
    """Whether that is more than chance."""
    parameters: int | None = None
    """Its body's, and those of the new head."""
    samples_per_s: float | None = None
    """Through the frozen body; None where all features were stored already."""
    seconds: float = 0.0
    """That its ranking took: loading, the body, the probes."""
    full_minutes: float | None = None
    """That full fine-tuning would take on this machine, with the method's defaults."""
    full_is_measured: bool = False
    """From steps forward and backward that were timed; else it is three times the passes of the frozen body."""
    problem: Mapping[str, str] | None = None
    """Why it was refused, or what it failed of: reason, message, expected, mend."""


@dataclass(frozen=True)
class RankTable:
    """Candidates, the best first; behind them those that left, were refused, or failed."""

    rows: tuple[RankRow, ...]
    task: str
    figure: str
    """What the score is: accuracy, macro_f1 or r2."""
    num_samples: int
    """Of the largest sample."""
    modality: str
    data: str

    @property
    def best(self) -> RankRow:
        """The one to take."""
        return self.rows[0]

    @property
    def largest(self) -> RankRow:
        """The one with the most parameters: what a person would take who does not rank."""
        measured = [row for row in self.rows if row.state in ("ranked", "left")]
        return max(measured, key=lambda row: row.parameters or 0)

    def __getitem__(self, backbone: str) -> RankRow:
        """The row of a backbone, by what it was given as, or its short name. Raises `KeyError`."""
        for row in self.rows:
            if backbone in (row.backbone, row.name):
                return row
        raise KeyError(backbone)

    def as_dict(self) -> dict[str, Any]:
        """The table as `--json` prints it."""
        return {**asdict(self), "best": self.best.backbone, "largest": self.largest.backbone}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> RankTable:
        """The table that `as_dict` has written, JSON in between or not."""
        fields = {key: value for key, value in tree.items() if key not in ("best", "largest")}
        rows = [{**row, "interval": tuple(row["interval"]) if row["interval"] else None} for row in tree["rows"]]
        return cls(**{**fields, "rows": tuple(RankRow(**row) for row in rows)})


@dataclass(frozen=True)
class Standing:
    """What a candidate reached on so many samples."""

    num_samples: int
    score: float | None
    interval: tuple[float, float] | None
    loss: float
    fold_scores: tuple[float, ...]
    neighbours: float | None

    @property
    def key(self) -> tuple[float, float]:
        """The larger the better."""
        return (-math.inf if self.score is None else self.score, -self.loss)


def compare(best: Sequence[float], other: Sequence[float]) -> tuple[float, bool]:
    """(how much lower the other's scores are, as a mean over the same folds; whether that is more than chance).

    The t-test of Nadeau and Bengio (2003), whose variance counts that the folds' training samples are mostly the same:
    the plain one takes chance for a difference much too often.
    """
    differences = [one - two for one, two in zip(best, other, strict=True)]
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return (math.nan, False)
    num = len(differences)
    mean, variance = statistics.fmean(differences), statistics.variance(differences)
    noise = math.sqrt(variance * (1 / num + 1 / (num - 1)))  # of a sample one part is held out, num - 1 are trained on
    return mean, mean > _T95[min(num - 1, 4)] * noise


def leaving(standings: Mapping[str, Standing]) -> list[str]:
    """Which candidates leave the race: the worse half, but for those that are within the noise of the best."""
    ordered = sorted(standings, key=lambda name: standings[name].key, reverse=True)
    best = standings[ordered[0]].fold_scores
    return [
        name for name in ordered[(len(ordered) + 1) // 2 :]
        if standings[name].score is None or compare(best, standings[name].fold_scores)[1]
    ]  # fmt: skip


def sample_sizes(num: int, num_classes: int, most: int) -> list[int]:
    """Sizes of the nested samples, the smallest first: each three times the one before, the last `num`, or `most`."""
    last = min(num, most)
    sizes, size = [], max(_LEAST, _LEAST_A_CLASS * num_classes)
    while 2 * size < last:
        sizes.append(size)
        size *= 3
    return [*sizes, last]


_LEAST, _LEAST_A_CLASS = 512, 20
"""Samples of the first round. More than 256: of fewer the number format of features is not tried (formats.py)."""
