"""Runs beside each other: their figures, and whether they differ by more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.job import Run, figure, figures_of, interval
from orchestrator.terminal.console import out


def figure_rows(runs: Sequence[Run], figures: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """A row a figure with its interval, of a regression with the targets, and how many samples they are of."""
    shown = {key: title for run in runs for title, key in figures_of(run.plan.job.task, *figures)}
    rows: list[list[object]] = []
    for key, title in shown.items():
        cells = []
        for one in figures:
            edges = interval(one, key)
            cells.append(figure(one.get(key)) + (f" ({edges})" if edges else ""))
        rows.append([title, *cells])
    rows += _target_rows(runs, figures)
    rows.append(["samples", *(one.get("num_samples", "") for one in figures)])
    rows.append(["state", *(run.state for run in runs)])
    return rows


def _target_rows(runs: Sequence[Run], figures: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """The names of the targets, and the figures of each of several: one of all has no unit."""
    targets = [run.plan.classes if run.plan.job.task == "regression" else () for run in runs]
    names = list(dict.fromkeys(name for several in targets for name in several))
    of_each = [one.get("per_class") or {} for one in figures]
    rows: list[list[object]] = [["targets", *(", ".join(several) for several in targets)]] if names else []
    for name in names if len(names) > 1 else ():
        for title, key in (("MAE", "mae"), ("R2", "r2")):
            rows.append([f"{title} of {name}", *(figure((one.get(name) or {}).get(key)) for one in of_each)])
    return rows


def judge(runs: Sequence[Run], figures: Sequence[Mapping[str, Any]]) -> None:
    """Whether the figures may be held against each other, and whether they differ by more than chance."""
    if not all(figures):
        return
    if len({(one.get("num_samples"), run.plan.data.fingerprint) for one, run in zip(figures, runs, strict=True)}) > 1:
        out.print("these figures are of different samples")
        return
    key = figures_of(runs[0].plan.job.task, *figures)[0][1]
    edges = [one[f"{key}_95"] for one in figures if one.get(f"{key}_95")]
    if len(edges) == len(runs) and max(low for low, _ in edges) <= min(high for _, high in edges):
        out.print("the intervals overlap: the difference may be chance")
