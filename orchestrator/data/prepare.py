"""The user's data -> one checked sample table: classes, splits, what is measured on it, its fingerprint.

What is wrong with the data is found here, before anything is downloaded or scheduled, and each kind of fault
has one outcome, which `docs/data.md` lists.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.data.cells import label_columns
from orchestrator.data.ingest import IngestedRows, Skip, digest64, ingest, numbers, view
from orchestrator.data.locations import Location
from orchestrator.data.rows import Origin, Source
from orchestrator.data.samples import INDEX_FILE, ROWS_FILE, Rows, SampleWriter, write_index
from orchestrator.data.sources import open_source
from orchestrator.data.splits import balanced_subset, grouped, stratified
from orchestrator.errors import DataError
from orchestrator.job import SPLITS, BackboneCard, Data, DataSummary, TaskName, shown
from orchestrator.modality import Modality, Profile

Ints = npt.NDArray[np.int64]

LEAVE_OUT = "leave such out, listed: data.on_bad_sample skip (--on-bad-sample skip)"
_MANY_NUMBERS = 20
"""Classes whose names are numbers with fractions; above, it is doubtful that they are classes."""
_FEW_A_NUMBER = 5
"""Samples of such a class; below, it is hardly one."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_UNSPLIT = -1
_NUM_BINS = 10
_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True)
class Prepared:
    """Data that a job can be planned with."""

    classes: tuple[str, ...]
    summary: DataSummary
    profile: Profile
    skipped: tuple[Skip, ...]


def prepare(
    spec: Data,
    modality: Modality,
    card: BackboneCard,
    task: TaskName = "single-label",
    classes: tuple[str, ...] | None = None,
    directory: Path | None = None,
) -> Prepared:
    """Read, check, split and measure the data. `classes` fixes them, for the evaluation of a finished model.

    The sample table is written into `directory`, for `Samples` to read; without one nothing of it is kept.
    Raises `DataError`, naming the file, row or class, and `RefusedError` where a store or the Hub does not answer.
    """
    if directory is None:
        with TemporaryDirectory(prefix="orchestrator-") as folder:
            return _prepare(spec, modality, card, task, classes, Path(folder), keep=False)
    return _prepare(spec, modality, card, task, classes, directory, keep=True)


def _prepare(
    spec: Data, modality: Modality, card: BackboneCard, task: TaskName, classes: tuple[str, ...] | None,
    directory: Path, keep: bool,
) -> Prepared:  # fmt: skip
    source = open_source(spec, modality.sample, task)
    with SampleWriter(directory / ROWS_FILE, [one.name for one in modality.sample], with_content=keep) as writer:
        ingested = ingest(source, modality, card, task, writer, may_skip=spec.on_bad_sample == "skip")
    if spec.on_bad_sample == "fail" and ingested.skipped:
        raise _bad(ingested.skipped)
    if not len(ingested):
        raise DataError(
            f"{shown(spec.path)} holds no sample that can be used",
            mend=_first(ingested.skipped) and f"look at the first: {_first(ingested.skipped)}",
        )
    table = _Table(ingested, source, Rows(directory / ROWS_FILE, source.origins))
    kept = _drop_duplicates(table)
    names: Sequence[str]
    if task == "regression":
        names = label_columns(spec)
        if classes and len(names) != len(classes):
            raise DataError(
                f"data.label_column names {len(names)} targets, and the model has {len(classes)}",
                expected=", ".join(classes),
            )
    else:
        names = classes or _class_names(table, kept, spec, task)
    targets = _targets(table, kept, names, spec, task)
    strata, kinds = _strata(targets, names, task)
    if classes:
        split = _for_evaluation(table, kept)
    else:
        split = _split(table, kept, strata, kinds, len(names), spec)
        _REFUSALS[task](targets, split, names)
    notes = list(source.notes) + _leaks(table, kept, split)
    if not classes:
        notes += _doubtful_labels(ingested, names, spec, task)
    if not classes and not (split == 2).any():
        has = (split == 1).any()
        notes.append(
            "there is no test split: the final figures are the validation's"
            if has
            else "nothing is held back: there will be no figures, and the last epoch counts"
        )
    if keep:
        _write_index(directory / INDEX_FILE, table, kept, targets, split)
    summary = DataSummary(
        fingerprint=_fingerprint(ingested, kept, split),
        root=_text_of(source.origins[0]),
        num_samples={name: int((split == i).sum()) for i, name in enumerate(SPLITS)},
        per_class={name: _per_class(targets[split == i], len(names), task) for i, name in enumerate(SPLITS)}
        if task != "regression"
        else {},
        **_spread(targets[split == 0], task),
        num_duplicates=len(ingested) - len(kept),
        num_skipped=len(ingested.skipped),
        notes=tuple(notes),
    )
    return Prepared(tuple(names), summary, ingested.profile(), tuple(ingested.skipped))


@dataclass(frozen=True)
class _Table:
    """What was ingested in, and where a message finds more about a row."""

    ingested: IngestedRows
    source: Source
    rows: Rows

    def place(self, row: int) -> str:
        return self.rows.place(int(row))

    def labels(self, row: int) -> object:
        """The label of a row, as a message shows it."""
        ingested, known = self.ingested, list(self.ingested.names)
        if not known:
            width = len(ingested.label) // len(ingested)
            return tuple(ingested.label[row * width : (row + 1) * width])
        if not ingested.num_labels:
            return known[ingested.label[row]]
        start = sum(ingested.num_labels[:row])
        return tuple(known[i] for i in ingested.label[start : start + ingested.num_labels[row]])

    def group(self, row: int) -> str:
        """The group of a row."""
        return list(self.ingested.groups)[self.ingested.group[row]]


def _write_index(file: Path, table: _Table, kept: Ints, targets: npt.NDArray[Any], split: Ints) -> None:
    ingested, used = table.ingested, split != _UNSPLIT
    some = slice(None) if used.all() else used  # a view, where nothing is left out
    rows = kept[some]
    timed, stats = (ingested.whole(values)[rows] for values in (ingested.timed, ingested.stat_id))
    write_index(
        file, rows, targets[some], split[some], view(ingested.num_bytes)[rows].clip(0),
        (view(ingested.content_id)[rows], view(ingested.content_high)[rows]), np.where(timed, stats, np.uint64(0)),
        [_text_of(origin) for origin in table.source.origins],
    )  # fmt: skip


def _text_of(origin: Origin) -> str:
    return origin.root.text if isinstance(origin.root, Location) else str(origin.root)


def _per_class(targets: npt.NDArray[Any], num_classes: int, task: TaskName) -> tuple[int, ...]:
    if task == "multi-label":
        return tuple(int(n) for n in targets.sum(axis=0))
    return tuple(int(n) for n in np.bincount(targets, minlength=num_classes))


def _spread(targets: npt.NDArray[Any], task: TaskName) -> dict[str, Any]:
    if task != "regression" or not len(targets):
        return {}
    wide = targets.astype(np.float64)  # a sum of many float32 loses the small ones
    return {"target_mean": tuple(wide.mean(axis=0).tolist()), "target_std": tuple(wide.std(axis=0).tolist())}


def _drop_duplicates(table: _Table) -> Ints:
    """The rows to keep, int64: one a file. The same file with two labels is refused: one of them is wrong."""
    ingested = table.ingested
    uris = ingested.whole(ingested.uri_id)
    if not uris.any():
        return np.arange(len(uris))
    roots = np.array([digest64(_text_of(origin)) for origin in table.source.origins], dtype=np.uint64)
    keys = np.where(uris == 0, np.arange(len(uris), dtype=np.uint64), uris ^ roots[ingested.whole(ingested.origin)])
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    new = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    first = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))  # where each file's rows begin
    out = np.zeros(len(uris), dtype=bool)
    for at in np.flatnonzero(~new & (uris[order] != 0)).tolist():
        mine, theirs = int(order[at]), int(order[first[at]])
        if table.rows.file(mine) != table.rows.file(theirs):  # two files with one digest
            continue
        out[mine] = True
        _refuse_contradictions(table, mine, theirs)
    return np.flatnonzero(~out)


def _refuse_contradictions(table: _Table, mine: int, theirs: int) -> None:
    ingested, uri = table.ingested, table.rows.uri(mine)
    groups = ingested.group
    for what, differ, of in (
        ("label", ingested.label_key(mine) != ingested.label_key(theirs), table.labels),
        ("group", len(groups) and groups[mine] != groups[theirs], table.group),
    ):
        if differ:
            raise DataError(
                f"{uri} has two {what}s: {of(theirs)!r} in {table.place(theirs)}, {of(mine)!r} in {table.place(mine)}",
                mend=f"leave the row with the right {what}",
            )
    if ingested.split[mine] != ingested.split[theirs]:
        raise DataError(
            f"{uri} stands in two splits, by {table.place(theirs)} and {table.place(mine)}",
            mend="leave it in one of them",
        )


def _bad(skips: list[Skip]) -> DataError:
    more = f" (and {len(skips) - 1} more)" if len(skips) > 1 else ""
    return DataError(
        f"{_first(skips)}{more}",
        expected="samples that can all be used",
        mend=f"mend or remove them, or {LEAVE_OUT}",
    )


def _first(skips: list[Skip]) -> str:
    return f"{skips[0].place}: {skips[0].problem}" if skips else ""


def _class_names(table: _Table, kept: Ints, spec: Data, task: TaskName) -> list[str]:
    ingested, named = table.ingested, sorted(table.source.classes)
    if task == "multi-label" and named:
        return named if isinstance(spec.label_column, str) else list(spec.label_column)
    counts = np.bincount(_label_numbers(ingested, kept)[1], minlength=len(ingested.names))
    met = [name for name, number in ingested.names.items() if counts[number]]
    empty = [name for name in named if name not in met]
    if empty:
        raise DataError(
            f"the class {empty[0]!r} has no usable sample", mend="remove its folder, or put samples into it"
        )
    if task == "multi-label" and not met:
        raise DataError(f"{shown(spec.path)} holds no label at all", expected="labels in data.label_column")
    if len(met) < 2 and task == "single-label":
        raise DataError(
            f"{shown(spec.path)} holds one class only: {met[0]!r}",
            expected="two classes or more",
            mend="add samples of another class; everything else can be a class too",
        )
    if all(name.isdecimal() and name.isascii() for name in met):
        return sorted(met, key=lambda name: (len(name.lstrip("0")), name.lstrip("0"), name))
    return sorted(met)


def _doubtful_labels(ingested: IngestedRows, names: Sequence[str], spec: Data, task: TaskName) -> list[str]:
    """Notes on labels that may be meant otherwise. Raises `DataError` where they can hardly be meant so."""
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
    if task != "multi-label" or max(ingested.num_labels) > 1 or spec.label_separator is not None:
        return []
    if len(label_columns(spec)) > 1:
        return []
    counts = np.bincount(numbers(ingested.label), minlength=len(ingested.names)).tolist()
    held = {mark: sum(n for name, n in zip(ingested.names, counts, strict=True) if mark in name) for mark in ",;|"}
    mark = max(held, key=held.__getitem__)
    if held[mark] > sum(counts) / 2:
        return [
            f"{held[mark]} of {sum(counts)} cells hold {mark!r}, and each cell is learnt as one label; to cut them: "
            f"data.label_separator {mark!r} (--label-separator {mark!r})"
        ]
    return [
        "no sample has more than one label; if cells hold several, say what is between: data.label_separator "
        "(--label-separator)"
    ]


def _label_numbers(ingested: IngestedRows, kept: Ints) -> tuple[Ints, Ints]:
    """(position in `kept`, number of the label), one entry a label of a row."""
    labels = numbers(ingested.label)
    if not ingested.num_labels:
        return np.arange(len(kept)), labels[kept]
    counts = numbers(ingested.num_labels)
    where = np.full(len(counts), -1, dtype=np.int64)
    where[kept] = np.arange(len(kept))
    at = np.repeat(where, counts)
    return at[at >= 0], labels[at >= 0]


def _targets(table: _Table, kept: Ints, names: Sequence[str], spec: Data, task: TaskName) -> npt.NDArray[Any]:
    """int64 [rows], the class; multi-label: float32 [rows, classes], 0 or 1; regression: float32 [rows, targets]."""
    ingested = table.ingested
    if task == "regression":
        return view(ingested.label).reshape(len(ingested), -1)[kept].astype(np.float32)
    known = {name: i for i, name in enumerate(names)}
    number = np.array([known.get(name, -1) for name in ingested.names], dtype=np.int64)
    at, labels = _label_numbers(ingested, kept)
    labels = number[labels]
    unknown = np.flatnonzero(labels < 0)
    if len(unknown):
        row = int(kept[at[unknown[0]]])
        found = table.labels(row)
        strange = next(name for name in (found if isinstance(found, tuple) else (found,)) if name not in known)
        raise DataError(
            f"{table.place(row)} has the label {strange!r}, which the model never learnt",
            expected="one of " + ", ".join(list(known)[:20]),
            mend=f"take it out of {shown(spec.path)}",
        )
    if task == "single-label":
        return labels
    targets = np.zeros((len(kept), len(names)), dtype=np.float32)
    targets[at, labels] = 1
    return targets


def _strata(targets: npt.NDArray[Any], names: Sequence[str], task: TaskName) -> tuple[Ints, Sequence[str]]:
    """What the splits hold in equal proportions: classes, a sample's rarest label, or tenths of the first target."""
    if task == "single-label":
        return targets, names
    if task == "multi-label":
        counts = targets.sum(axis=0)
        rarest = np.where(targets > 0, counts, np.inf).argmin(axis=1)
        return np.where(targets.any(axis=1), rarest, len(names)).astype(np.int64), [*names, "no label"]
    edges = np.quantile(targets[:, 0], np.linspace(0, 1, _NUM_BINS + 1)[1:-1])
    return np.searchsorted(edges, targets[:, 0]).astype(np.int64), [f"tenth {i + 1}" for i in range(_NUM_BINS)]


def _refuse_unseen_labels(targets: npt.NDArray[Any], split: Ints, names: Sequence[str]) -> None:
    train = targets[split == 0]
    if not len(train):
        raise DataError("there is no training sample")
    for name, share in zip(names, train.mean(axis=0), strict=True):
        if share in (0, 1):
            raise DataError(
                f"{'every' if share else 'no'} training sample has the label {name!r}",
                expected="samples with the label and samples without it",
                mend="add some, or leave the label out",
            )


def _refuse_constants(targets: npt.NDArray[Any], split: Ints, names: Sequence[str]) -> None:
    train = targets[split == 0]
    if not len(train):
        raise DataError("there is no training sample")
    for i, name in enumerate(names):
        if (train[:, i] == train[0, i]).all():
            raise DataError(
                f"the target {name!r} is {train[0, i]:g} in every training sample", expected="numbers that differ"
            )


def _split(table: _Table, kept: Ints, labels: Ints, names: Sequence[str], num_classes: int, spec: Data) -> Ints:
    groups = numbers(table.ingested.group)[kept] if spec.group_column else None
    if table.source.ready_made:
        split = numbers(table.ingested.split)[kept].clip(0)
        if groups is not None:
            _refuse_crossing(table, kept, groups, split)
        chosen = np.flatnonzero(split == 0)
        fractions = (0.0 if (split == 1).any() else spec.validation_fraction, 0.0)
    else:
        split = np.zeros(len(kept), dtype=np.int64)
        chosen = np.arange(len(kept))
        fractions = (spec.validation_fraction, spec.test_fraction)
    if any(fractions):
        if groups is not None:
            _, mine = np.unique(groups[chosen], return_inverse=True)
            wanted = 1 + sum(fraction > 0 for fraction in fractions)
            if mine.max() + 1 < wanted:
                raise DataError(
                    f"{shown(spec.path)} holds {mine.max() + 1} groups in {spec.group_column!r}, "
                    f"too few for {wanted} splits",
                    expected=f"{wanted} groups or more",
                )
            split[chosen] = grouped(labels[chosen], mine, len(names), fractions, spec.seed)
            for side, fraction in zip((1, 2), fractions, strict=True):
                if fraction and not (split == side).any():
                    raise DataError(
                        f"the groups in {spec.group_column!r} are too few or too large: "
                        f"none is left for {SPLITS[side]}",
                        mend=f"raise data.{SPLITS[side]}_fraction, set it to 0, or split the data yourself",
                    )
        else:
            split[chosen] = stratified(labels[chosen], names, fractions, spec.seed)
    if spec.num_train is not None:
        train = np.flatnonzero(split == 0)
        if spec.num_train > len(train):
            raise DataError(f"data.num_train = {spec.num_train}, and there are {len(train)} training samples")
        if spec.num_train < num_classes:
            raise DataError(
                f"data.num_train = {spec.num_train} leaves classes without a sample",
                expected=f"{num_classes} or more",
            )
        split[np.setdiff1d(train, balanced_subset(labels, names, train, spec.num_train, spec.seed))] = _UNSPLIT
    return split


def _for_evaluation(table: _Table, kept: Ints) -> Ints:
    """All samples are test samples, but where the data came with a test split: then those alone."""
    ready_made = numbers(table.ingested.split)[kept]
    ready_made[ready_made < 0] = 2
    if (ready_made == 2).any():
        return np.where(ready_made == 2, 2, _UNSPLIT)
    return np.full(len(kept), 2, dtype=np.int64)


def _refuse_crossing(table: _Table, kept: Ints, groups: Ints, split: Ints) -> None:
    side = np.full(len(table.ingested.groups), -1, dtype=np.int64)
    order = np.arange(len(groups))[::-1]
    side[groups[order]] = split[order]  # of each group's first row
    crossing = np.flatnonzero(side[groups] != split)
    if len(crossing):
        at = int(crossing[0])
        name = table.group(int(kept[at]))
        raise DataError(
            f"the group {name!r} stands in {SPLITS[side[groups[at]]]} and in {SPLITS[split[at]]} "
            f"({table.place(kept[at])})",
            expected="every group in one split",
            mend="move its samples to one split, or leave the splitting to us",
        )


def _refuse_unseen(labels: Ints, split: Ints, names: Sequence[str]) -> None:
    seen = set(labels[split == 0].tolist())
    for here in (1, 2):
        unseen = sorted(set(labels[split == here].tolist()) - seen)
        if unseen:
            raise DataError(
                f"the class {names[unseen[0]]!r} is in {SPLITS[here]}, but training never sees it",
                expected="every class in train",
                mend=f"add training samples of it, or take it out of {SPLITS[here]}",
            )
    if not seen:
        raise DataError("there is no training sample")
    missing = [name for i, name in enumerate(names) if i not in seen]
    if missing:
        raise DataError(f"the class {missing[0]!r} has no training sample", mend="add some, or take the class out")


_REFUSALS: dict[TaskName, Callable[[npt.NDArray[Any], Ints, Sequence[str]], None]] = {
    "single-label": _refuse_unseen,
    "multi-label": _refuse_unseen_labels,
    "regression": _refuse_constants,
}


def _leaks(table: _Table, kept: Ints, split: Ints) -> list[str]:
    """A note where the same content is trained on and tested with."""
    contents = table.ingested.contents()[kept]
    trained = contents[(split == 0) & (contents != 0)]
    trained.sort()
    notes = []
    for here in (1, 2):
        rows = np.flatnonzero(split == here)
        at = np.searchsorted(trained, contents[rows]).clip(max=max(0, len(trained) - 1))
        same = rows[trained[at] == contents[rows]] if len(trained) else rows[:0]
        if len(same):
            notes.append(
                f"{len(same)} of {SPLITS[here]} have the same content as a training sample, "
                f"such as {table.place(kept[same[0]])}"
            )
    return notes


def _fingerprint(ingested: IngestedRows, kept: Ints, split: Ints) -> str:
    """Of every sample's URI, label, content and split, whatever their order."""
    mixed = np.zeros(len(kept), dtype=np.uint64)
    columns = (ingested.whole(ingested.uri_id), ingested.label_keys(), ingested.known_by())
    for start in range(0, len(kept), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        piece = mixed[some]
        for column in (*(column[kept[some]] for column in columns), split[some]):
            # Multiply and shift, as in splitmix64 (Steele et al. 2014): each row's columns become one number.
            piece += column.astype(np.uint64, copy=False)
            piece *= np.uint64(0x9E3779B97F4A7C15)
            piece ^= piece >> np.uint64(29)
    mixed.sort()
    return hashlib.sha256(mixed.astype("<u8", copy=False).data).hexdigest()
