"""Which figures of a task are shown, and how they are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIGURES: dict[str, tuple[tuple[str, str], ...]] = {
    "single-label": (("accuracy", "accuracy"), ("macro F1", "macro_f1"), ("AUROC", "auroc")),
    "multi-label": (("average precision", "average_precision"), ("macro F1", "macro_f1"), ("AUROC", "auroc")),
    "regression": (("MAE", "mae"), ("R2", "r2"), ("RMSE", "rmse")),
}
"""Task -> (title, key in the results) of what is shown, the one that counts first."""


def figure(value: float | None) -> str:
    """A figure of the results, '' where there is none: four digits that count."""
    if value is None:
        return ""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.4g}"


def interval(figures: Mapping[str, Any], key: str) -> str:
    """`0.912 to 0.944`, '' where there is no interval."""
    edges = figures.get(f"{key}_95")
    return "" if edges is None else f"{figure(edges[0])} to {figure(edges[1])}"
