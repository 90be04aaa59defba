"""A search as one picture: how its score grew, what mattered, the score against each setting, parallel coordinates."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.job import Noted, Report
from orchestrator.tuning.result import SearchResult, short
from orchestrator.tuning.space import Space, is_logarithmic
from orchestrator.tuning.trials import Metric, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE_FILE = "search.png"
_COLUMNS, _MOST_SETTINGS = 3, 10
_WIDEST = 18
"""Characters of a value beside an axis."""
_WIDE = 36
"""Characters of all values below an axis that stand side by side."""
_SPREAD = 0.12
"""Of the height of an axis: trials of one value stand beside one another, the best one on top."""
_DPI = 80
_LEAST_IMPORTANCE = 4  # trials: of fewer nothing can be said


def draw_pictures(result: SearchResult, space: Space, report: Report) -> dict[str, bytes]:
    """{file: its content}; {} of fewer than two trials, and where matplotlib is not installed, which is said."""
    trials = [one for one in result.trials if one.score is not None and not one.repeat]
    if len(trials) < 2:
        return {}
    try:
        import matplotlib  # noqa: F401, PLC0415  # an extra
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ModuleNotFoundError:
        report(Noted("there is no picture of the search: it needs pip install 'orchestrator[search]'"))
        return {}
    keys = [key for key in result.keys if len({repr(one.config.get(key)) for one in trials}) > 1][:_MOST_SETTINGS]
    matters = importance(result, space, trials)
    panels = 1 + bool(matters) + len(keys)
    rows = math.ceil(panels / _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 3.2 * (rows + (len(keys) > 1))), layout="constrained")
    grid = figure.add_gridspec(rows + (len(keys) > 1), _COLUMNS)
    places = iter([(row, column) for row in range(rows) for column in range(_COLUMNS)])
    title = result.metric.key.replace("_", " ")
    _history(figure.add_subplot(grid[next(places)]), trials, result, title)
    if matters:
        _bars(figure.add_subplot(grid[next(places)]), matters)
    for key in keys:
        _scatter(figure.add_subplot(grid[next(places)]), trials, key, is_logarithmic(space.domains[key]), title)
    if len(keys) > 1:
        _parallel(figure.add_subplot(grid[rows, :]), trials, keys, space, result.metric)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=_DPI, metadata={"Software": None})
    return {PICTURE_FILE: out.getvalue()}


def importance(result: SearchResult, space: Space, trials: Sequence[Trial]) -> dict[str, float]:
    """Setting -> its share of what the best trials have in common against all (PED-ANOVA, Watanabe et al. 2023).

    By Optuna; {} where it is not installed, and of too few trials.
    """
    keys = [key for key in result.keys if len({repr(one.config.get(key)) for one in trials}) > 1]
    if len(trials) < _LEAST_IMPORTANCE or len(keys) < 2:
        return {}
    try:
        import optuna  # noqa: PLC0415  # an extra
    except ModuleNotFoundError:
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    columns = {key: [one.config.get(key) for one in trials] for key in keys}
    kinds = {key: _distribution(optuna, values, is_logarithmic(space.domains[key])) for key, values in columns.items()}
    study = optuna.create_study(direction="maximize" if result.metric.mode == "max" else "minimize")
    for number, one in enumerate(trials):
        given = {
            key: columns[key][number] if _are_numbers(columns[key]) else _text(columns[key][number]) for key in keys
        }
        study.add_trial(optuna.trial.create_trial(params=given, distributions=kinds, value=one.score))
    with warnings.catch_warnings():  # where all trials score alike, all settings matter alike
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: value for key, value in found.items() if math.isfinite(value)}


def _distribution(optuna: Any, values: Sequence[Any], logarithmic: bool) -> Any:
    kinds = optuna.distributions
    if not _are_numbers(values):
        return kinds.CategoricalDistribution(sorted({_text(value) for value in values}))
    log = logarithmic and min(values) > 0
    if all(isinstance(value, int) for value in values):
        return kinds.IntDistribution(min(values), max(values), log=log)
    return kinds.FloatDistribution(float(min(values)), float(max(values)), log=log)


def _history(axes: Axes, trials: Sequence[Trial], result: SearchResult, title: str) -> None:
    scores = [one.score or 0.0 for one in trials]
    best = np.maximum.accumulate(scores) if result.metric.mode == "max" else np.minimum.accumulate(scores)
    numbers = [one.number for one in trials]
    axes.scatter(numbers, scores, s=14, c="0.6", label="trial")
    axes.step(numbers, best, where="post", color="C0", label="best so far")
    axes.set(title="history", xlabel="trial", ylabel=title)
    axes.locator_params(axis="x", integer=True)
    axes.legend(loc="best")


def _bars(axes: Axes, matters: dict[str, float]) -> None:
    axes.barh([short(key) for key in matters][::-1], list(matters.values())[::-1], color="C0")
    axes.set(title="what mattered", xlabel="importance (PED-ANOVA)", xlim=(0, 1))


def _scatter(axes: Axes, trials: Sequence[Trial], key: str, logarithmic: bool, title: str) -> None:
    values = [one.config.get(key) for one in trials]
    places, labels = _places(values)
    axes.scatter(places, [one.score or 0.0 for one in trials], s=18, c="C0", alpha=0.6)
    axes.set(title=short(key), ylabel=title)
    if labels is not None:
        axes.set_xticks(range(len(labels)), labels, rotation=20 if sum(map(len, labels)) > _WIDE else 0)
        axes.set_xlim(-0.5, len(labels) - 0.5)
    elif logarithmic and min(places) > 0:
        axes.set_xscale("log")
        axes.tick_params(axis="x", which="minor", labelbottom=False)  # they lie over each other


def _parallel(axes: Axes, trials: Sequence[Trial], keys: Sequence[str], space: Space, metric: Metric) -> None:
    """A line a trial through its values, from the lowest at the bottom; the best trials are the darkest."""
    from matplotlib import colormaps  # noqa: PLC0415

    columns = [
        (short(key), [one.config.get(key) for one in trials], is_logarithmic(space.domains[key])) for key in keys
    ]
    columns.append((metric.key.replace("_", " "), [one.score for one in trials], False))
    sign = 1 if metric.mode == "max" else -1
    order = np.argsort(np.argsort([sign * (one.score or 0.0) for one in trials])) / max(1, len(trials) - 1)
    heights = np.zeros((len(columns), len(trials)))
    for i, (_, values, logarithmic) in enumerate(columns):
        places, labels = _places(values)
        at = np.log(places) if logarithmic and min(places) > 0 else np.asarray(places, float)
        low, high = (0.0, max(1.0, len(labels) - 1.0)) if labels is not None else (at.min(), at.max())
        heights[i] = (at - low) / (high - low) if high > low else 0.5
        if labels is not None:
            heights[i] += _SPREAD * (order - 0.5)
        ends = [(0.0, _number(min(places))), (1.0, _number(max(places)))] if labels is None else [
            (j / max(1, len(labels) - 1), label) for j, label in enumerate(labels)
        ]  # fmt: skip
        for height, text in ends:
            axes.text(
                i + 0.02, height, text, fontsize=8, va="center", ha="left", zorder=3,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
            )  # fmt: skip
    colours = colormaps["Blues"](0.15 + 0.8 * order)
    for number in np.argsort(order):
        axes.plot(range(len(columns)), heights[:, number], color=colours[number], linewidth=1)
    axes.set_xticks(range(len(columns)), [name for name, _, _ in columns])
    axes.set(yticks=[], xlim=(-0.1, len(columns) - 0.7), title="all trials, the best ones dark")
    for i in range(len(columns)):
        axes.axvline(i, color="0.8", linewidth=0.8, zorder=0)


def _places(values: Sequence[Any]) -> tuple[list[float], list[str] | None]:
    """(where values stand on an axis, what is written there); None where they are numbers."""
    if _are_numbers(values) and len(set(values)) > 2:
        return [float(value) for value in values], None
    if _are_numbers(values):
        ordered = sorted(set(values))
        return [float(ordered.index(one)) for one in values], [_number(one) for one in ordered]
    labels = sorted({_text(value) for value in values})
    return [float(labels.index(_text(one))) for one in values], labels


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _text(value: Any) -> str:
    """As it stands beside an axis: the end of a path, and no mark that matplotlib reads as mathematics."""
    text = str(value).rstrip("/").rpartition("/")[2].replace("$", r"\$")
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"


def _number(value: float) -> str:
    return f"{value:.3g}"
