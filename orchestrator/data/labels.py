"""What is to be learnt: the names of the classes, each sample's target, and whether that can be learnt at all."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.data.columns import label_columns
from orchestrator.data.contents import Ints
from orchestrator.data.ingested import IngestedRows, IngestedTable, numbers, view
from orchestrator.data.rows import TRIMMED, Source
from orchestrator.data.spellings import listed, meaning, numbers_by_meaning
from orchestrator.data.splits import TEST, TRAIN, VALIDATION
from orchestrator.errors import DataError, counted
from orchestrator.job import SPLITS, Data, TaskName, shown

Targets = npt.NDArray[Any]
"""The class, int64 [samples]. Multi-label: 0 or 1, float32 [samples, classes]. Regression: float32 [samples, names]"""

_MANY_NUMBERS = 20
"""Classes whose names are numbers with fractions; above, it is doubtful that they are classes."""
_FEW_A_NUMBER = 5
"""Samples of such a class; below, it is hardly one."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_NUM_BINS = 10
_OF_MISSING = {"nan", "none", "null", "na", "n/a", "<na>", "nil"}
"""How programs write a cell that is missing."""


def class_names(
    table: IngestedTable, source: Source, rows: Ints, spec: Data, task: TaskName, given: Sequence[str] | None
) -> Sequence[str]:
    """The classes in their order; of regression the targets. `given`: those of a finished model, for its evaluation.

    rows: int64 [samples], those of the table that are samples. Raises `DataError` where there is nothing to tell apart.
    """
    if task == "regression":
        names = label_columns(spec)
        if given and len(names) != len(given):
            raise DataError(
                f"data.label_column names {counted(len(names), 'target')}, and the model has {len(given)}",
                expected=", ".join(given),
                mend="name a column for each target of the model, in this order",
            )
        return names
    return given or _classes_met(table.ingested, source, rows, spec, task)


def _classes_met(ingested: IngestedRows, source: Source, rows: Ints, spec: Data, task: TaskName) -> Sequence[str]:
    named = sorted(source.classes)
    if task == "multi-label" and named:
        return named if isinstance(spec.label_column, str) else list(spec.label_column)
    counts = np.bincount(_label_numbers(ingested, rows)[1], minlength=len(ingested.names))
    met = [name for name, number in ingested.names.items() if counts[number]]
    empty = [name for name in named if name not in met]
    if empty:
        bad = next((one for one in ingested.skipped if empty[0] in PurePath(one.place).parts), None)
        raise DataError(
            f"the class {empty[0]!r} has no usable sample" + (f": {bad.place}: {bad.problem}" if bad else ""),
            mend="remove its folder, or put samples into it" + (" that can be used" if bad else ""),
        )
    if task == "multi-label" and not met:
        raise DataError(
            f"{shown(spec.path)} holds no label at all",
            expected="labels in data.label_column",
            mend="name the column of the labels, or fill it",
        )
    if len(met) < 2 and task == "single-label":
        trimmed = next((f" ({note})" for note in source.notes if note.endswith(TRIMMED)), "")
        raise DataError(
            f"{shown(spec.path)} holds one class only: {met[0]!r}{trimmed}",
            expected="two classes or more",
            mend="add samples of another class; everything else can be a class too",
        )
    if all(name.isdecimal() and name.isascii() for name in met):
        return sorted(met, key=lambda name: (len(name.lstrip("0")), name.lstrip("0"), name))
    return sorted(met)


def _label_numbers(ingested: IngestedRows, rows: Ints) -> tuple[Ints, Ints]:
    """(number of the sample, number of the label), each int64: one entry a label of a sample."""
    labels = numbers(ingested.label)
    if not ingested.num_labels:
        return np.arange(len(rows)), labels[rows]
    counts = numbers(ingested.num_labels)
    sample_of = np.full(len(counts), -1, dtype=np.int64)
    sample_of[rows] = np.arange(len(rows))
    samples = np.repeat(sample_of, counts)
    return samples[samples >= 0], labels[samples >= 0]


def make_targets(table: IngestedTable, rows: Ints, names: Sequence[str], spec: Data, task: TaskName) -> Targets:
    """What each sample's label is in numbers; those of regression as they stand, float64 [samples, names].

    Raises `DataError` for a label that is none of `names`.
    """
    ingested = table.ingested
    if task == "regression":
        return view(ingested.label).reshape(len(ingested), -1)[rows]
    number_of, meant = {name: i for i, name in enumerate(names)}, numbers_by_meaning(names)
    samples, labels = _label_numbers(ingested, rows)
    number_of_label = [number_of.get(name, meant.get(meaning(name), -1)) for name in ingested.names]
    classes = np.array(number_of_label, dtype=np.int64)[labels]
    unknown = np.flatnonzero(classes < 0)
    if len(unknown):
        name = list(ingested.names)[labels[unknown[0]]]
        raise DataError(
            f"{table.place(int(rows[samples[unknown[0]]]))} has the label {name!r}, which the model never learnt",
            expected="one of " + ", ".join(list(number_of)[:20]),
            mend=f"take it out of {shown(spec.path)}",
        )
    if task == "single-label":
        return classes
    targets = np.zeros((len(rows), len(names)), dtype=np.float32)
    targets[samples, classes] = 1
    return targets


def strata_of(targets: Targets, names: Sequence[str], task: TaskName) -> tuple[Ints, Sequence[str]]:
    """(int64 [samples], the name of each number): what the splits hold in equal proportions.

    That is the class; multi-label: a sample's rarest label; regression: the tenth that its first target lies in.
    """
    if task == "single-label":
        return targets, names
    if task == "multi-label":
        counts = targets.sum(axis=0)
        rarest = np.where(targets > 0, counts, np.inf).argmin(axis=1)
        return np.where(targets.any(axis=1), rarest, len(names)).astype(np.int64), [*names, "no label"]
    edges = np.quantile(targets[:, 0], np.linspace(0, 1, _NUM_BINS + 1)[1:-1])
    return np.searchsorted(edges, targets[:, 0]).astype(np.int64), [f"tenth {i + 1}" for i in range(_NUM_BINS)]


def notes_on_labels(
    ingested: IngestedRows, names: Sequence[str], spec: Data, task: TaskName, hint: str
) -> list[str]:  # fmt: skip
    """Notes on labels that may be meant otherwise. Raises `DataError` where they can hardly be meant so.

    hint: that of `hint_of_separator`, which is said elsewhere.
    """
    if task == "single-label" and len(names) > _MANY_NUMBERS and all(map(_NUMBER.fullmatch, names)):
        if sum(not float(name).is_integer() for name in names) < len(names) / 2:
            return []
        seen = f"the labels are {len(names)} different numbers with fractions, such as {', '.join(names[:3])}"
        if len(ingested) < _FEW_A_NUMBER * len(names):
            raise DataError(
                f"{seen}, and there are {len(ingested)} samples",
                expected=f"classes, with {_FEW_A_NUMBER} samples or more each where their names are such numbers",
                mend="to learn numbers: task regression (--task regression)",
            )
        return [f"{seen}, each learnt as a class of its own; to learn numbers: task regression (--task regression)"]
    notes = []
    if odd := [name for name in names if name.lower() in _OF_MISSING] if task != "regression" else []:
        notes.append(
            f"{odd[0]!r} is learnt as a label like any other; if it stands for one that is missing: leave it empty"
        )
    notes += _notes_on_alike(names if task != "regression" else ())
    if task != "multi-label":
        return notes
    num_without = ingested.num_labels.count(0)
    if num_without and len(label_columns(spec)) == 1:
        notes.append(f"{num_without} of {len(ingested)} samples have no label at all, and are learnt from as such")
    if max(ingested.num_labels) > 1 or spec.label_separator is not None or len(label_columns(spec)) > 1:
        return notes
    if not hint:
        notes.append(
            "no sample has more than one label; if cells hold several, say what is between: data.label_separator "
            "(--label-separator)"
        )
    return notes


def _notes_on_alike(names: Sequence[str]) -> list[str]:
    """On labels that differ by case alone, or by what one cannot see: a no-break space, a space of no width."""
    seen = _grouped(names, _as_seen)
    cased = _grouped([first for first, *_ in seen], lambda name: _as_seen(name).casefold())
    return [
        f"the labels {listed(same)} {how}, and are learnt as {len(same)} labels"
        for how, groups in (("look the same", seen), ("differ by case alone", cased))
        for same in groups if len(same) > 1
    ]  # fmt: skip


def _grouped(names: Sequence[str], key: Callable[[str], str]) -> list[list[str]]:
    """Names of one key together."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(key(name), []).append(name)
    return list(found.values())


def _as_seen(name: str) -> str:
    """Without characters that have no width, and with each kind of space as one space."""
    kept = "".join(mark for mark in unicodedata.normalize("NFC", name) if unicodedata.category(mark) != "Cf")
    return " ".join(kept.split())


def hint_of_separator(ingested: IngestedRows, spec: Data, task: TaskName) -> str:
    """What to do about cells that seem to hold several labels, '' where there are none.

    They do where most hold a mark that may stand between labels, or where it makes fewer labels of them to cut them.
    """
    if task != "multi-label" or spec.label_separator is not None or len(label_columns(spec)) > 1:
        return ""
    if max(ingested.num_labels, default=0) > 1:
        return ""
    counts = np.bincount(numbers(ingested.label), minlength=len(ingested.names)).tolist()
    num_with = {mark: sum(n for name, n in zip(ingested.names, counts, strict=True) if mark in name) for mark in ",;|"}
    mark = max(num_with, key=num_with.__getitem__)
    parts = {part.strip() for name in ingested.names for part in name.split(mark)} - {""}
    if not num_with[mark] or not (num_with[mark] > sum(counts) / 2 or len(parts) < len(ingested.names)):
        return ""
    return (
        f"{num_with[mark]} of {sum(counts)} cells hold {mark!r}, and each cell is learnt as one label; to cut "
        f"them: data.label_separator {mark!r} (--label-separator {mark!r})"
    )


def refuse_unlearnable(targets: Targets, split: Ints, names: Sequence[str], task: TaskName, hint: str = "") -> None:
    """Raise `DataError` where the training samples do not tell what is to be learnt.

    targets: as `make_targets` gives them; split: int64 [samples]. hint: the
    mend, where there is a better one than that of the class or target alone.
    """
    try:
        _REFUSALS[task](targets, split, names)
    except DataError as error:
        raise DataError(error.message, expected=error.expected, mend=hint or error.mend) from None


def _refuse_unseen_classes(targets: Targets, split: Ints, names: Sequence[str]) -> None:
    trained = set(targets[split == TRAIN].tolist())
    for side in (VALIDATION, TEST):
        unseen = sorted(set(targets[split == side].tolist()) - trained)
        if unseen:
            raise DataError(
                f"the class {names[unseen[0]]!r} is in {SPLITS[side]}, but training never sees it",
                expected="every class in train",
                mend=f"add training samples of it, or take it out of {SPLITS[side]}",
            )
    if not trained:
        raise DataError(
            "there is no training sample",
            mend="add samples to train, or lower data.validation_fraction and data.test_fraction",
        )
    missing = [name for i, name in enumerate(names) if i not in trained]
    if missing:
        raise DataError(f"the class {missing[0]!r} has no training sample", mend="add some, or take the class out")


def _refuse_constant_labels(targets: Targets, split: Ints, names: Sequence[str]) -> None:
    train = targets[split == TRAIN]
    if not len(train):
        raise DataError(
            "there is no training sample",
            mend="add samples to train, or lower data.validation_fraction and data.test_fraction",
        )
    for name, share in zip(names, train.mean(axis=0), strict=True):
        if share in (0, 1):
            raise DataError(
                f"{'every' if share else 'no'} training sample has the label {name!r}",
                expected="samples with the label and samples without it",
                mend="add some, or leave the label out",
            )


def _float32_step(values: npt.NDArray[np.float64]) -> float:
    """From the largest of the values to the next number that float32 has."""
    return float(np.spacing(np.abs(values).max().astype(np.float32)))


def _refuse_constant_targets(targets: Targets, split: Ints, names: Sequence[str]) -> None:
    train = targets[split == TRAIN]
    if not len(train):
        raise DataError(
            "there is no training sample",
            mend="add samples to train, or lower data.validation_fraction and data.test_fraction",
        )
    for i, name in enumerate(names):
        if (train[:, i] == train[0, i]).all():
            other = "leave the target out of" if len(names) > 1 else "name another column:"
            raise DataError(
                f"the target {name!r} is {train[0, i]:g} in every training sample",
                expected="numbers that differ",
                mend=f"{other} data.label_column, or add samples where it differs",
            )
        step = _float32_step(train[:, i])
        if step > train[:, i].std():
            low, high = train[:, i].min(), train[:, i].max()
            raise DataError(
                f"the target {name!r} lies between {low:.15g} and {high:.15g}, and float32, in which networks "
                f"compute, has steps of {step:g} there",
                expected="numbers that differ by more than such a step",
                mend=f"subtract a number from the column, such as {low:.15g}, and add it to the predictions",
            )


_REFUSALS: dict[TaskName, Callable[[Targets, Ints, Sequence[str]], None]] = {
    "single-label": _refuse_unseen_classes,
    "multi-label": _refuse_constant_labels,
    "regression": _refuse_constant_targets,
}
