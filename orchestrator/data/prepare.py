"""The user's data -> one checked sample table: classes, splits, what is measured on it, its fingerprint.

What is wrong with the data is found here, before anything is downloaded or scheduled, and each kind of fault
has one outcome, which `docs/data.md` lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from orchestrator.data.contents import Ints, fingerprint
from orchestrator.data.duplicates import drop_duplicates, warn_of_contradictions, warn_of_leaks
from orchestrator.data.ingest import ingest
from orchestrator.data.ingested import Example, IngestedTable, Skip, view
from orchestrator.data.labels import (
    Targets,
    class_names,
    hint_of_separator,
    make_targets,
    notes_on_labels,
    refuse_unlearnable,
    strata_of,
)
from orchestrator.data.samples import INDEX_FILE, ROWS_FILE, Samples, SampleWriter, write_index
from orchestrator.data.seen import warn_of_seen
from orchestrator.data.sources import open_source
from orchestrator.data.spellings import unify_spellings
from orchestrator.data.splits import TEST, TRAIN, UNUSED, VALIDATION, split_for_evaluation, split_samples
from orchestrator.errors import DataError
from orchestrator.job import SPLITS, BackboneCard, Data, DataSummary, TaskName, shown
from orchestrator.modality import Modality, Profile

LEAVE_OUT = "leave such out, listed: data.on_bad_sample skip (--on-bad-sample skip)"


@dataclass(frozen=True)
class Prepared:
    """Data that a job can be planned with."""

    classes: tuple[str, ...]
    summary: DataSummary
    profile: Profile
    skipped: tuple[Skip, ...]
    examples: tuple[Example, ...] = ()
    """A few samples, as they were read."""


def prepare_data(
    spec: Data,
    modality: Modality,
    card: BackboneCard,
    task: TaskName = "single-label",
    classes: tuple[str, ...] | None = None,
    directory: Path | None = None,
    fewest_validation: int = 0,
) -> Prepared:
    """Read, check, split and measure the data. `classes` fixes them, for the evaluation of a finished model.
    `fewest_validation`: where the job leaves the validation's size open, none is taken that would be smaller.

    The sample table is written into `directory`, for `Samples` to read; without one nothing of it is kept.
    Raises `DataError`, naming the file, row or class, and `RefusedError` where a store or the Hub does not answer.
    """
    if directory is None:
        with TemporaryDirectory(prefix="orchestrator-") as folder:
            return _prepare(spec, modality, card, task, classes, Path(folder), fewest_validation, keep=False)
    return _prepare(spec, modality, card, task, classes, directory, fewest_validation, keep=True)


def _prepare(
    spec: Data, modality: Modality, card: BackboneCard, task: TaskName, classes: tuple[str, ...] | None,
    directory: Path, fewest_validation: int, keep: bool,
) -> Prepared:  # fmt: skip
    source = open_source(spec, modality.sample, task, classes or ())
    with SampleWriter(directory / ROWS_FILE, [one.name for one in modality.sample], with_content=keep) as writer:
        ingested = ingest(source, modality, card, task, writer, may_skip=spec.on_bad_sample == "skip")
    _refuse_broken(ingested.skipped, len(ingested), spec)
    source.notes += unify_spellings(ingested, source)
    table = IngestedTable(ingested, source.origins, directory / ROWS_FILE)
    rows = drop_duplicates(table)
    names = class_names(table, source, rows, spec, task, classes)
    exact = make_targets(table, rows, names, spec, task)
    targets = exact.astype(np.float32) if task == "regression" else exact
    notes = list(source.notes)
    warnings = warn_of_contradictions(table, rows) if task != "regression" else []
    if classes:
        split = split_for_evaluation(table, rows)
    else:
        strata, strata_names = strata_of(targets, names, task)
        split = split_samples(table, rows, strata, strata_names, len(names), source.ready_made, spec, fewest_validation)
        hint = hint_of_separator(ingested, spec, task)
        refuse_unlearnable(exact, split, names, task, hint)
        warnings += [hint] if hint else []
        notes += notes_on_labels(ingested, names, spec, task, hint)
        notes += _notes_on_splits(split, spec.validation_fraction is None and fewest_validation > 0)
    warnings += warn_of_leaks(table, rows, split)
    of_a_run = card.kind == "run" and not classes
    if keep or of_a_run:
        _write_index(directory / INDEX_FILE, table, rows, targets, split, grouped=spec.group_column is not None)
    if of_a_run:
        fields = tuple(one.name for one in modality.sample)
        warnings += warn_of_seen(card, Samples(directory, fields), fields)
    summary = DataSummary(
        fingerprint=fingerprint(
            (ingested.column(ingested.uri_id), ingested.label_keys(), ingested.known_by()), rows, split
        ),
        root=source.origins[0].root_text,
        num_samples={name: int((split == i).sum()) for i, name in enumerate(SPLITS)},
        per_class={name: _per_class(targets[split == i], len(names), task) for i, name in enumerate(SPLITS)}
        if task != "regression"
        else {},
        **_spread(targets[split == TRAIN], task),
        num_duplicates=len(ingested) - len(rows),
        num_skipped=len(ingested.skipped),
        notes=tuple(notes),
        warnings=tuple(warnings),
    )
    return Prepared(tuple(names), summary, ingested.profile, tuple(ingested.skipped), tuple(ingested.examples))


def _refuse_broken(skipped: Sequence[Skip], num_rows: int, spec: Data) -> None:
    """Raise `DataError` where broken rows may not be left out, or leave nothing."""
    first = f"{skipped[0].place}: {skipped[0].problem}" if skipped else ""
    if spec.on_bad_sample == "fail" and skipped:
        more = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
        raise DataError(
            f"{first}{more}",
            expected="samples that can all be used",
            mend=f"mend or remove them, or {LEAVE_OUT}" if num_rows else _mend_of_all(first),
        )
    if not num_rows:
        raise DataError(
            f"{shown(spec.path)} holds no sample that can be used",
            mend=f"look at the first: {first}" if first else "name data that holds samples",
        )


def _mend_of_all(first: str) -> str:
    """What to do where no sample can be used, so that leaving them out leaves nothing."""
    if "data.split_column" in first:
        return "name the column that says it, or leave data.split_column out"
    if "where a text should stand" in first:
        return "write them as texts (in a CSV every cell is one), or name another column: data.input_column"
    return "mend them, or name the data and its columns otherwise: of those that were read none can be used"


def _notes_on_splits(split: Ints, is_left_open: bool) -> list[str]:
    if is_left_open and not (split == VALIDATION).any():
        none = "no validation split: of so few samples each is worth more in training (data.validation_fraction)"
        return [none, *([] if (split == TEST).any() else ["nothing is held back: there will be no figures"])]
    if (split == TEST).any():
        return []
    if (split == VALIDATION).any():
        return ["there is no test split: the final figures are the validation's"]
    return ["nothing is held back: there will be no figures, and the last epoch counts"]


def _write_index(
    file: Path, table: IngestedTable, rows: Ints, targets: Targets, split: Ints, grouped: bool
) -> None:  # fmt: skip
    ingested, is_used = table.ingested, split != UNUSED
    used = slice(None) if is_used.all() else is_used  # a view, where nothing is left out
    rows = rows[used]
    timed, stats = (ingested.column(values)[rows] for values in (ingested.timed, ingested.stat_id))
    write_index(
        file, rows, targets[used], split[used], view(ingested.num_bytes)[rows].clip(0),
        (view(ingested.content_id)[rows], view(ingested.content_high)[rows]), np.where(timed, stats, np.uint64(0)),
        [origin.root_text for origin in table.origins], view(ingested.group)[rows] if grouped else None,
    )  # fmt: skip


def _per_class(targets: Targets, num_classes: int, task: TaskName) -> tuple[int, ...]:
    """How many samples each class has."""
    if task == "multi-label":
        return tuple(int(n) for n in targets.sum(axis=0))
    return tuple(int(n) for n in np.bincount(targets, minlength=num_classes))


def _spread(targets: Targets, task: TaskName) -> dict[str, Any]:
    """Mean and standard deviation of regression targets, as fields of `DataSummary`."""
    if task != "regression" or not len(targets):
        return {}
    wide = targets.astype(np.float64)  # a sum of many float32 loses the small ones
    return {"target_mean": tuple(wide.mean(axis=0).tolist()), "target_std": tuple(wide.std(axis=0).tolist())}
