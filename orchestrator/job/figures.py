"""Which figures of a task are shown, and how they are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIGURES: dict[str, tuple[tuple[str, str], ...]] = {
    "single-label": (("accuracy", "accuracy"), ("macro F1", "macro_f1"), ("AUROC", "auroc")),
    "multi-label": (("average precision", "average_precision"), ("macro F1", "macro_f1"), ("AUROC", "auroc")),
    "regression": (("MAE", "mae"), ("R2", "r2"), ("scaled MAE", "scaled_mae"), ("RMSE", "rmse")),
}
"""Task -> (title, key in the results) of what is shown, the one that counts first."""
OF_TARGETS = (("MAE", "mae"), ("RMSE", "rmse"), ("R2", "r2"), ("scaled MAE", "scaled_mae"))
"""What is shown of each of several targets."""


def figures_of(task: str, *splits: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Those of `FIGURES` that a split has; all of them, where none has any. Several targets have no MAE in common."""
    there = tuple((title, key) for title, key in FIGURES[task] if any(one.get(key) is not None for one in splits))
    return there or FIGURES[task]


def figure(value: float | None) -> str:
    """A figure of the results, '' where there is none: three digits that count, or more."""
    if value is None:
        return ""
    if 0 < abs(value) < 0.01:
        return f"{value:.3g}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.4g}"


def interval(figures: Mapping[str, Any], key: str) -> str:
    """`0.912 to 0.944`, '' where there is no interval."""
    edges = figures.get(f"{key}_95")
    return "" if edges is None else f"{figure(edges[0])} to {figure(edges[1])}"
