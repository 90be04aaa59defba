"""`orchestrator rank`: which backbone to take, as a table at 80 columns."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.job import FIGURES, figure, interval
from orchestrator.terminal.answers_json import print_json
from orchestrator.terminal.console import cut_middle, out, pairs, table
from orchestrator.terminal.flags import FLAGS, Json, takes_flags

if TYPE_CHECKING:
    from orchestrator.tuning import RankRow, RankTable

_WIDEST_NAME = 32
_UNITS = ((10**9, "B"), (10**6, "M"), (10**3, "K"))


@takes_flags(
    "--modality", "--task", "--set", "--data", "--input-column", "--label-column", "--label-separator", "--separator",
    "--encoding", "--split-column", "--group-column", "--num-train", "--on-bad-sample", "--size", "--storage",
    "--feature-store",
)  # fmt: skip
def rank(
    fields: dict[str, Any],
    backbones: Annotated[
        list[str] | None, typer.Argument(metavar="[BACKBONE]...", help="org/name, directories, or earlier runs")
    ] = None,
    from_hub: Annotated[
        str | None,
        typer.Option(metavar="QUERY", help="more of the Hub, the most downloaded: 'image-classification, < 100M'"),
    ] = None,
    num_from_hub: Annotated[int, typer.Option(help="so many of them at most")] = 8,
    num_samples: Annotated[int, typer.Option(help="the last who are left are compared on so many")] = 10_000,
    json_: Json = False,
) -> None:
    """Compare frozen backbones on your data, before training any: the best first. The features stay for the training.

    orchestrator rank microsoft/resnet-50 facebook/convnext-tiny-224 --data photos/

    orchestrator rank --from-hub 'text-classification, < 50M' --modality text --data reviews.csv
    """
    from orchestrator.tuning import rank as run_rank

    ranked = run_rank(
        backbones or (), from_hub=from_hub, num_from_hub=num_from_hub, num_samples=num_samples, **fields
    )  # fmt: skip
    if json_:
        print_json(ranked.as_dict(), indent=1)
    else:
        _show(ranked, fields)


def show_ranking(table_: Mapping[str, Any]) -> None:
    """A ranking that comes from a cluster, as `RankTable.as_dict` gives it."""
    from orchestrator.tuning import RankTable

    ranked = RankTable.from_dict(table_)
    _show(ranked, {"data": ranked.data, **({} if ranked.modality == "image" else {"modality": ranked.modality})})


def _show(ranked: RankTable, fields: dict[str, Any]) -> None:
    measured = [row for row in ranked.rows if row.score is not None or row.state in ("ranked", "left")]
    title = dict((key, name) for name, key in FIGURES[ranked.task]).get(ranked.figure, ranked.figure)
    cells = [
        [
            f"{number} {cut_middle(row.name, _WIDEST_NAME)}\n  {_cost(row)}",
            f"{figure(row.score)}\n{interval({'x_95': row.interval}, 'x')}",
            figure(row.neighbours),
            _behind(row, ranked),
        ]
        for number, row in enumerate(measured, 1)
    ]  # fmt: skip
    out.print(table(["backbone", f"{title}, 95 %", "kNN", "behind"], cells, right=(1, 2), whole=(0, 1, 2, 3)))
    lines = [line for row in ranked.rows for line in _problem(row)]
    lines += [("compared", _compared(ranked, measured)), *_largest(ranked)]
    lines.append(("full", f"minutes of full fine-tuning{_how(measured)}"))
    lines.append(("next", _next(ranked, fields)))
    out.print(pairs(lines))


def _cost(row: RankRow) -> str:
    """`4.7M, 350/s, 12 s, full 6.2 min`."""
    about = "" if row.full_is_measured else "~"
    parts = [
        _number(row.parameters),
        "" if row.samples_per_s is None else f"{row.samples_per_s:,.0f}/s",
        f"{row.seconds:,.0f} s",
        "" if row.full_minutes is None else f"full {about}{_minutes(row.full_minutes)} min",
    ]
    return ", ".join(part for part in parts if part)


def _number(value: int | None) -> str:
    if value is None:
        return ""
    for unit, name in _UNITS:
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return str(value)


def _minutes(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _behind(row: RankRow, ranked: RankTable) -> str:
    """`0.005 chance?`, and on how many samples, where it left before the last ones."""
    if row is ranked.best:
        return ""
    if row.behind is None:
        return "not defined"
    of = "" if row.num_samples == ranked.num_samples else f"\non {row.num_samples:,} samples"
    return f"{figure(row.behind)}{'' if row.is_beyond_noise else ' chance?'}{of}"


def _compared(ranked: RankTable, measured: Sequence[RankRow]) -> str:
    rest = [row for row in measured if row is not ranked.best]
    same = [row.name for row in rest if not row.is_beyond_noise]
    if not rest:
        return f"{ranked.num_samples:,} samples; there is no other one to compare with"
    if not same:
        return f"{ranked.num_samples:,} samples; the best is ahead of all others by more than chance"
    shown = ", ".join(same[:3]) + (f" and {len(same) - 3} more" if len(same) > 3 else "")
    return f"{ranked.num_samples:,} samples; between the best and {shown} it may be chance"


def _largest(ranked: RankTable) -> list[tuple[str, object]]:
    """What taking the largest would give."""
    largest, best = ranked.largest, ranked.best
    if largest is best:
        return [("largest", f"{largest.name}, which is the best")]
    text = f"{largest.name}, {_number(largest.parameters)} for {_number(best.parameters)}"
    if largest.behind is not None:
        side = "behind" if largest.behind >= 0 else "ahead of"
        text += f", is {figure(abs(largest.behind))} {side} the best"
    return [("largest", text if largest.is_beyond_noise else f"{text}: it may be chance")]


def _how(measured: Sequence[RankRow]) -> str:
    timed = [row.full_is_measured for row in measured if row.full_minutes is not None]
    if not timed:
        return ": not known"
    if all(timed):
        return ", by steps that were timed here"
    return ", by steps that were timed here; ~ by three times the frozen body's pass"


def _problem(row: RankRow) -> list[tuple[str, object]]:
    """Why it was refused, or what it failed of."""
    problem = row.problem
    if problem is None:
        return []
    word = "refused" if row.state == "refused" else "failed"
    lines: list[tuple[str, object]] = [(word, f"{row.backbone} ({problem['reason']}): {problem['message']}")]
    return [*lines, ("mend", problem["mend"])] if problem.get("mend") else lines


def _next(ranked: RankTable, fields: dict[str, Any]) -> str:
    options = {flag.setting: flag.option for flag in FLAGS if flag.setting}
    words = ["orchestrator", "finetune", "--backbone", ranked.best.backbone]
    for setting, value in fields.items():
        for one in value if isinstance(value, (list, tuple)) else [value]:
            words += [options[setting], str(one)] if setting in options else ["--set", f"{setting}={one}"]
    return shlex.join(words)
