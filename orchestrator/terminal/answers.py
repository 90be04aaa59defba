"""What the commands answer: for a person a table, with `as_json` the same as JSON on standard output."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from orchestrator.errors import counted
from orchestrator.job import BackboneCard, Run, figure, is_uri
from orchestrator.modality import registry
from orchestrator.terminal.answers_json import print_json
from orchestrator.terminal.console import cut_middle, out, pairs, settings_line, show_results, table, when

if TYPE_CHECKING:
    from orchestrator.data import StoredTable
    from orchestrator.gate import Checked
    from orchestrator.job import Setting
    from orchestrator.modality import Listing
    from orchestrator.predictor import Prediction, Written
    from orchestrator.store import Listing as FeatureListing


_WIDEST_EXAMPLE = 16
_BOUNDLESS = 1_000_000  # columns


def show_run(run: Run, as_json: bool) -> None:
    """The figures of a run, where its files are, and what to do with it next."""
    if as_json:
        print_json({"run": run.place, **run.results})
        return
    show_results(run.results)
    where = _relative(run)
    takes = '"A TEXT"...' if registry.get(run.plan.job.modality).sample[0].kind == "text" else "FILE..."
    out.print(
        pairs(
            [
                ("model", f'in Python: orchestrator.open_run("{where}").model' if is_uri(where) else f"{where}/model"),
                ("metrics", f"{where}/metrics.jsonl, {where}/results.json"),
                ("epochs", _epochs(run)),
                ("next", f"orchestrator predict {where} {takes}"),
            ]
        )
    )


def _epochs(run: Run) -> str:
    """`12 of 40, number 7 kept: the average of the weights`"""
    results = run.results
    planned = results.get("num_epochs", run.plan.recipe.num_epochs)
    ran = results.get("epochs", planned)
    what = ": the average of the weights" if results.get("averaged") else ""
    return f"{ran}{f' of {planned}' if ran != planned else ''}, number {results['best_epoch']} kept{what}"


def show_backbone(backbone: Checked, modality: str, as_json: bool) -> None:
    """What a backbone is, and how the data becomes its input."""
    card, fit, data = backbone.card, backbone.fit, backbone.data
    warnings = [*(fit.warnings if fit else ()), *(data.warnings if data else ())]
    if as_json:
        print_json(
            {
                "accepted": True,
                "backbone": card.source,
                "kind": card.kind,
                "commit": card.commit,
                "library": card.library,
                "type": card.model_type,
                "architecture": backbone.row.architecture,
                "modality": modality,
                "input": dict(fit.input) if fit else None,
                "adaptations": [one.model_dump() for one in fit.adaptations] if fit else [],
                "warnings": warnings,
                "notes": list(data.notes) if data else [],
                "num_duplicates": data.num_duplicates if data else 0,
                "num_skipped": data.num_skipped if data else 0,
            }
        )
        return
    at = f" @ {card.short_commit}" if card.commit else ""
    rows: list[tuple[str, object]] = [
        ("accepted", f"{card.source} for {modality}"),
        ("what", f"{_whose(card, modality)} {card.model_type}, {card.kind}{at}"),
    ]
    if fit is not None:
        rows.append(("input", settings_line(fit.input)))
    rows += [("warning", one) for one in warnings]
    if data is not None:
        rows += [("note", one) for one in data.notes]
        rows += [("left out", data.left_out)] if data.left_out else []
    out.print(pairs(rows))
    if backbone.profile is not None:
        measured = {key: str(value) for key, value in backbone.profile.ranges.items()}
        measured |= {key: ", ".join(f"{w} x {n}" for w, n in c.items()) for key, c in backbone.profile.counts.items()}
        out.print(table([f"of {backbone.profile.num_measured} samples", "measured"], list(measured.items())))
    if fit is not None and fit.adaptations:
        cells = [[one.what, one.received, one.used, f"{one.share:.0%}"] for one in fit.adaptations]
        out.print(table(["adapted", "the data", "becomes", "samples"], cells, right=(3,)))
    elif backbone.profile is not None:
        out.print("nothing has to be adapted")


def _whose(card: BackboneCard, modality: str) -> str:
    """The library of a model type; a type of a third party's is its distribution's, whatever the card's layout."""
    brings = registry.distribution_of(modality)
    return card.library if brings == "orchestrator" or card.library == "timm" else brings


def show_predictions(predictions: Sequence[Prediction], task: str, as_json: bool) -> None:
    """A line an input: what the model says of it, or why it cannot be read."""
    if as_json:
        print_json([one.as_dict() for one in predictions])
        return
    titles = {"regression": ["target", "value", "then"], "multi-label": ["labels", "scores"]}
    # On a screen whole where there is room; into a pipe or a file always.
    screen = out if out.is_terminal else Console(highlight=False, emoji=False, width=_BOUNDLESS)
    cells = [[cut_middle(one.input, screen.width * 2 // 5), *_prediction_cells(one, task)] for one in predictions]
    shown = titles.get(task, ["label", "score", "then"])
    made = table(["input", *shown], cells, right=(2,) if len(shown) > 2 else ())
    made.show_edge = out.is_terminal  # no empty line before and behind what a program reads
    screen.print(made)


def show_written(written: Written, as_json: bool) -> None:
    """How many predictions there are in the table, and how many inputs have a problem instead."""
    if as_json:
        print_json({"output": str(written.file), "rows": written.num_rows, "problems": written.num_problems})
        return
    out.print(f"{written.num_rows} rows in {written.file}", markup=False, soft_wrap=True)
    if written.num_problems:
        out.print(f"{written.num_problems} of them have no prediction: the column 'problem' says why")


def _prediction_cells(one: Prediction, task: str) -> list[str]:
    if one.problem:
        return ["", one.problem] if task == "multi-label" else ["", "", one.problem]
    shown = figure if task == "regression" else "{:.3f}".format
    (best, value), *others = one.top
    if task == "multi-label":  # which of several the score is of, is said with each
        scores = ", ".join(f"{name} {shown(value)}" for name, value in one.top)
        return [one.label or "none reaches 0.5", scores]
    label = best if task == "regression" else (one.label or f"{best} (below 0.5)")
    return [label, shown(value), ", ".join(f"{name} {shown(value)}" for name, value in others)]


def show_evaluation(figures: Mapping[str, Any], as_json: bool) -> None:
    """The figures on labelled data, over all and for each class."""
    if as_json:
        print_json(figures)
        return
    show_results({"task": figures["task"], "data": figures})
    if figures["num_seen"]:
        out.print(
            f"{figures['num_seen']} of these samples were in the run's own training or validation: "
            "the figures are better than on new data"
        )
    for note in figures["notes"]:
        out.print(note, markup=False, soft_wrap=True)
    if figures["task"] != "regression":  # whose targets stand beside the figures
        worst = sorted((v, k) for k, v in figures["per_class"].items() if v is not None)[:10]
        what = "accuracy" if figures["task"] == "single-label" else "F1"
        out.print(table(["class", what], [[name, figure(value)] for value, name in worst], right=(1,)))
    if figures["num_skipped"]:
        out.print(f"left out, as they cannot be used: {counted(figures['num_skipped'], 'sample')}")


def show_plugins(listings: Sequence[Listing], as_json: bool) -> None:
    """What each modality takes and which backbones fit; below, why a broken one does not load."""
    if as_json:
        print_json(
            [
                {
                    "name": one.name,
                    "distribution": one.distribution,
                    "version": one.version,
                    "takes": one.modality.title if one.modality else None,
                    "trainable": bool(one.modality and one.modality.trainable),
                    "types": sorted(one.modality.rules.accepts) if one.modality else [],
                    "num_timm": len(one.modality.rules.timm) if one.modality else 0,
                    "error": one.error or None,
                }
                for one in listings
            ]
        )
        return
    rows = []
    for one in listings:
        takes = one.modality.title if one.modality else "broken"
        if one.modality and not one.modality.trainable:
            takes += " (check only, no training yet)"
        rows.append([one.name, f"{one.distribution} {one.version}".strip(), takes, _families(one)])
    out.print(table(["modality", "from", "takes", "backbone families"], rows))
    for one in listings:
        if one.error:
            out.print(f"{one.name}: {one.error}", markup=False)


def _families(one: Listing) -> str:
    if one.modality is None:
        return ""
    rules = one.modality.rules
    names = sorted(rules.accepts, key=lambda name: len(name) > _WIDEST_EXAMPLE)  # longer ones are cut over two lines
    count = "1 type" if len(names) == 1 else f"{len(names)} types"
    timm = f", {len(rules.timm)} timm" if rules.timm else ""
    return f"{count}{timm}: {', '.join(names[:3])}" + (", …" if names[3:] else "")


def show_settings(groups: Mapping[str, Sequence[Setting]], modalities: Sequence[str], as_json: bool) -> None:
    """What can be set, by group; `modalities` have settings of their own, listed when they are asked for."""
    if as_json:
        print_json({name: [_setting(one) for one in several] for name, several in groups.items()})
        return
    for name, several in groups.items():
        rows = [
            [one.key.rpartition(".")[2], one.default, f"{one.takes}: {one.meaning}" if one.meaning else one.takes]
            for one in several
        ]
        out.print(table([name, "default", "what it takes, and what for"], rows))
    if modalities:
        out.print("settings of a modality: " + ", ".join(f"orchestrator settings {name}" for name in modalities))


def _setting(one: Setting) -> dict[str, Any]:
    """With its default as JSON has it."""
    told = dataclasses.asdict(one)
    return told | {"default": told.pop("value")}


def show_types(modality: str, as_json: bool) -> None:
    """Every model type that a modality takes."""
    rules = registry.get(modality).rules
    if as_json:
        print_json({"types": sorted(rules.accepts), "timm": sorted(rules.timm)})
        return
    out.print(f"{modality}, from {rules.generated_from}", markup=False)
    out.print(", ".join(sorted(rules.accepts)), markup=False)
    if rules.timm:
        out.print(f"and {len(rules.timm)} timm architectures", markup=False)


def _relative(run: Run) -> str:
    with contextlib.suppress(ValueError):
        return str(Path(run.place).relative_to(Path.cwd()))
    return run.place


def show_features(listings: Sequence[FeatureListing], place: str, as_json: bool) -> None:
    """The sets of features of a storage, or of an object store."""
    if as_json:
        print_json([_as_dict(one) for one in listings])
        return
    if not listings:
        out.print(f"there are no features in {place}", markup=False)
        return
    cells = [[one.name, one.num_samples, _size(one.num_bytes), when(one.used)] for one in listings]
    out.print(table(["features", "samples", "size", "used"], cells, right=(1, 2)))
    out.print(f"{_size(sum(one.num_bytes for one in listings))} in all; orchestrator features prune --max-size 50GB")


def show_feature_set(one: FeatureListing, as_json: bool) -> None:
    """What a set of features is of."""
    if as_json:
        print_json(_as_dict(one))
        return
    key = one.key
    inputs = key.get("input")
    rows = [
        ("features", one.name),
        ("backbone", f"{key.get('backbone')} @ {str(key.get('commit')).removeprefix('sha256:')[:12]}"),
        ("modality", key.get("modality")),
        ("body ends", key.get("cut")),
        ("input", settings_line(inputs) if isinstance(inputs, dict) else ""),
        ("samples", one.num_samples),
        ("shards", f"{one.num_shards}, {_size(one.num_bytes)}"),
        ("used", when(one.used)),
    ]
    out.print(pairs(rows))


def show_pruned(
    removed: Sequence[FeatureListing], left: Sequence[FeatureListing], tables: Sequence[StoredTable], dry_run: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """What was removed, or would be, and what is left; `tables` are the sample tables among it."""
    if as_json:
        print_json({"removed": [_as_dict(one) for one in removed], "left": [_as_dict(one) for one in left],
                "tables": [dataclasses.asdict(one) for one in tables], "dry_run": dry_run})  # fmt: skip
        return
    what = "would be removed" if dry_run else "removed"
    for one in removed:
        out.print(f"{what}: {one.name}, {_size(one.num_bytes)}, used {when(one.used)}", markup=False, soft_wrap=True)
    for one_table in tables:
        out.print(
            f"{what}: sample table {one_table.key}, {_size(one_table.num_bytes)}, which no run uses", soft_wrap=True
        )
    out.print(f"{len(removed)} {what}; {_size(sum(one.num_bytes for one in left))} in {len(left)} sets left")


def _as_dict(one: FeatureListing) -> dict[str, Any]:
    return {**dataclasses.asdict(one), "used": when(one.used)}


def _size(num_bytes: int) -> str:
    """In the largest unit that leaves a digit before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            break
        num_bytes /= 1000  # type: ignore[assignment]
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
