"""The user's data -> one checked sample table: classes, splits, what is measured on it, its fingerprint.

What is wrong with the data is found here, before anything is downloaded or scheduled, and each kind of fault
has one outcome, which `docs/data.md` lists.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orchestrator.errors import BadSampleError, DataError
from orchestrator.modality import Facts, Modality, Profile, Sample
from orchestrator.plans import SPLITS, BackboneCard, DataSummary
from orchestrator.sources import Row, inside, label_columns, read_rows
from orchestrator.spec import Data, TaskName
from orchestrator.splits import balanced_subset, grouped, stratified

Ints = npt.NDArray[np.int64]

NUM_MEASURED_ALL = 5_000
"""Up to so many samples are all decoded before the start; of more, `NUM_MEASURED` at even distances."""
NUM_MEASURED = 1_000
MAX_HASHED_BYTES = 256 * 2**20
"""Up to so many bytes the fingerprint is of the contents; above, of sizes and modification times."""
_UNSPLIT = -1
_NUM_BINS = 10


@dataclass(frozen=True)
class Skip:
    """A sample that is left out, and why."""

    place: str
    problem: str


@dataclass(frozen=True)
class Prepared:
    """Data that a job can be planned with."""

    classes: tuple[str, ...]
    summary: DataSummary
    profile: Profile
    skipped: tuple[Skip, ...]
    table: pa.Table
    """uri: string (relative to the root, '' where there is no file), a binary column for each field of a sample
    (null where it stands in the file), num_bytes: int64, target: int32, or float32 [classes], split: int8."""


def prepare(
    spec: Data,
    modality: Modality,
    card: BackboneCard,
    task: TaskName = "single-label",
    classes: tuple[str, ...] | None = None,
) -> Prepared:
    """Read, check, split and measure the data. `classes` fixes them, for the evaluation of a finished model.

    Raises `DataError`, naming the file, row or class.
    """
    source = read_rows(spec, modality.sample, task)
    _find_missing(source.rows, modality)
    rows, num_duplicates = _drop_duplicates([row for row in source.rows if not row.problem])
    skipped = [Skip(row.place, row.problem) for row in source.rows if row.problem]
    if spec.on_bad_sample == "fail" and skipped:
        raise _bad(skipped)
    ids, num_bytes, facts, broken = _measure(rows, modality, card)
    if broken:
        if spec.on_bad_sample == "fail":
            raise _bad(broken)
        skipped += broken
        out = {skip.place for skip in broken}
        keep = [i for i, row in enumerate(rows) if row.place not in out]
        rows, ids, num_bytes = [rows[i] for i in keep], [ids[i] for i in keep], [num_bytes[i] for i in keep]
    if not rows:
        raise DataError(
            f"{spec.path} holds no sample that can be used",
            mend=_first(skipped) and f"look at the first: {_first(skipped)}",
        )
    names: Sequence[str]
    if task == "regression":
        names = label_columns(spec)
        if classes and len(names) != len(classes):
            raise DataError(
                f"data.label_column names {len(names)} targets, and the model has {len(classes)}",
                expected=", ".join(classes),
            )
    else:
        names = classes or _class_names(rows, source.classes, spec, task)
    targets = _targets(rows, names, spec, task)
    strata, kinds = _strata(targets, names, task)
    split = _for_evaluation(rows) if classes else _split(rows, strata, kinds, len(names), spec, source.ready_made)
    if not classes:
        _REFUSALS[task](targets, split, names)
    notes = list(source.notes) + _leaks(rows, ids, split)
    if not classes and not (split == 2).any():
        has = (split == 1).any()
        notes.append(
            "there is no test split: the final figures are the validation's"
            if has
            else "nothing is held back: there will be no figures, and the last epoch counts"
        )
    uris = [_relative(row, source.root) for row in rows]
    table = pa.table(
        {
            "uri": pa.array(uris, pa.large_string()),
            **{
                field.name: pa.array([part(row) for row in rows], pa.large_binary())
                for field, part in zip(modality.sample, _PARTS, strict=False)
            },
            "num_bytes": pa.array(num_bytes, pa.int64()),
            "target": _as_column(targets),
            "split": pa.array(split, pa.int8()),
        }
    ).filter(pa.array(split != _UNSPLIT))
    summary = DataSummary(
        fingerprint=_fingerprint(rows, ids, split),
        root=str(source.root),
        num_samples={name: int((split == i).sum()) for i, name in enumerate(SPLITS)},
        per_class={name: _per_class(targets[split == i], len(names), task) for i, name in enumerate(SPLITS)}
        if task != "regression"
        else {},
        **_spread(targets[split == 0], task),
        num_duplicates=num_duplicates,
        num_skipped=len(skipped),
        notes=tuple(notes),
    )
    return Prepared(tuple(names), summary, Profile.of(facts), tuple(skipped), table)


_PARTS: tuple[Callable[[Row], bytes | None], ...] = (lambda row: row.content, lambda row: row.second)


def _as_column(targets: npt.NDArray[Any]) -> Any:
    if targets.ndim == 1:
        return pa.array(targets, pa.int32())
    return pa.FixedSizeListArray.from_arrays(pa.array(targets.ravel(), pa.float32()), targets.shape[1])


def _per_class(targets: npt.NDArray[Any], num_classes: int, task: TaskName) -> tuple[int, ...]:
    if task == "multi-label":
        return tuple(int(n) for n in targets.sum(axis=0))
    return tuple(int(n) for n in np.bincount(targets, minlength=num_classes))


def _spread(targets: npt.NDArray[Any], task: TaskName) -> dict[str, Any]:
    if task != "regression" or not len(targets):
        return {}
    wide = targets.astype(np.float64)  # a sum of many float32 loses the small ones
    return {"target_mean": tuple(wide.mean(axis=0).tolist()), "target_std": tuple(wide.std(axis=0).tolist())}


def _find_missing(rows: Iterable[Row], modality: Modality) -> None:
    resolved: dict[str, str] = {}
    for row in rows:
        if row.problem or not row.uri:
            continue
        if _is_sentence(row.uri, modality) and not os.path.isfile(row.root / row.uri):
            raise DataError(
                f"{row.place}: there is no file {row.uri[:60]!r}; this looks like a text",
                expected=f"paths of {modality.sample[0].name} files",
                mend="if the data is text: --modality text; else name the column of paths: data.input_column",
            )
        file, why = inside(row.root, row.uri, resolved)
        if file is None:
            # Never a matter of skipping: somebody wrote a path that reaches for other files.
            raise DataError(
                f"{row.place}: the path {row.uri!r} {why} {row.root}",
                expected="paths below the data's root",
                mend="move the files below it, or name a higher one: data.root",
            )
        row.uri = os.path.relpath(file, row.root)
        if not os.path.isfile(file):
            row.problem = f"the file {row.uri} is missing" if row.place != file else "is no file"


def _is_sentence(uri: str, modality: Modality) -> bool:
    return " " in uri.strip() and os.path.splitext(uri)[1].lower() not in modality.sample[0].suffixes


def _drop_duplicates(rows: list[Row]) -> tuple[list[Row], int]:
    """One row a file. The same file with two labels is refused: one of them is wrong."""
    first: dict[tuple[str, str], Row] = {}
    kept = []
    for row in rows:
        if not row.uri:
            kept.append(row)
            continue
        key = (str(row.root), os.path.normpath(row.uri))
        other = first.setdefault(key, row)
        if other is row:
            kept.append(row)
            continue
        for what, mine, theirs in (("label", row.label, other.label), ("group", row.group, other.group)):
            if mine != theirs:
                raise DataError(
                    f"{row.uri} has two {what}s: {theirs!r} in {other.place}, {mine!r} in {row.place}",
                    mend=f"leave the row with the right {what}",
                )
        if row.split != other.split:
            raise DataError(
                f"{row.uri} stands in two splits, by {other.place} and {row.place}",
                mend="leave it in one of them",
            )
    return kept, len(rows) - len(kept)


def _measure(
    rows: list[Row], modality: Modality, card: BackboneCard
) -> tuple[list[str], list[int], list[Facts], list[Skip]]:
    """What each sample is known by, its size in bytes, the facts of the measured ones, those that cannot be decoded."""
    step = 1 if len(rows) <= NUM_MEASURED_ALL else len(rows) // NUM_MEASURED
    stats = [None if row.content is not None else os.stat(row.root / row.uri) for row in rows]
    sizes = [len(row.content or b"") if stat is None else stat.st_size for row, stat in zip(rows, stats, strict=True)]
    total = sum(sizes)
    first, *others = (field.name for field in modality.sample)
    decode, measure = modality.decode, modality.measure
    assert decode is not None
    assert measure is not None

    def look(i: int) -> tuple[str, Facts | None, Skip | None]:
        row, stat = rows[i], stats[i]
        measured = i % step == 0
        content = row.content
        if content is None and (measured or total <= MAX_HASHED_BYTES):
            try:
                content = (row.root / row.uri).read_bytes()
            except OSError as error:
                return "", None, Skip(row.place, f"cannot be read: {error.strerror}")
        if content is not None and (total <= MAX_HASHED_BYTES or stat is None):  # cells are in memory anyway
            known_by = hashlib.sha256(content + (b"" if row.second is None else b"\0" + row.second)).hexdigest()
        else:
            assert stat is not None
            known_by = f"{stat.st_size}:{stat.st_mtime_ns}"
        if not measured:
            return known_by, None, None
        try:
            sample = {first: content or b""} | ({} if row.second is None else {others[0]: row.second})
            return known_by, measure(decode(sample), card), None
        except BadSampleError as error:
            return known_by, None, Skip(row.place, error.message)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        looks = list(pool.map(look, range(len(rows))))
    return (
        [known_by for known_by, _, _ in looks],
        sizes,
        [facts for _, facts, _ in looks if facts is not None],
        [skip for _, _, skip in looks if skip is not None],
    )


def _bad(skips: list[Skip]) -> DataError:
    more = f" (and {len(skips) - 1} more)" if len(skips) > 1 else ""
    return DataError(
        f"{_first(skips)}{more}",
        expected="samples that can all be used",
        mend="mend or remove them, or leave them out, listed: --on-bad-sample skip",
    )


def _first(skips: list[Skip]) -> str:
    return f"{skips[0].place}: {skips[0].problem}" if skips else ""


def _class_names(rows: list[Row], named: list[str], spec: Data, task: TaskName) -> list[str]:
    counts = Counter(
        str(name) for row in rows for name in (row.label if isinstance(row.label, tuple) else (row.label,))
    )
    if task == "multi-label" and named:
        return named
    empty = [name for name in named if not counts[name]]
    if empty:
        raise DataError(
            f"the class {empty[0]!r} has no usable sample", mend="remove its folder, or put samples into it"
        )
    if task == "multi-label" and not counts:
        raise DataError(f"{spec.path} holds no label at all", expected="labels in data.label_column")
    if len(counts) < 2 and task == "single-label":
        raise DataError(
            f"{spec.path} holds one class only: {next(iter(counts))!r}",
            expected="two classes or more",
            mend="add samples of another class; everything else can be a class too",
        )
    if all(name.isdecimal() for name in counts):
        return sorted(counts, key=lambda name: (int(name), name))
    return sorted(counts)


def _targets(rows: list[Row], names: Sequence[str], spec: Data, task: TaskName) -> npt.NDArray[Any]:
    """int64 [rows], the class; multi-label: float32 [rows, classes], 0 or 1; regression: float32 [rows, targets]."""
    if task == "regression":
        return np.array([row.label for row in rows], dtype=np.float32)
    number = {name: i for i, name in enumerate(names)}
    for row in rows:
        for name in row.label if isinstance(row.label, tuple) else (row.label,):
            if name not in number:
                raise DataError(
                    f"{row.place} has the label {name!r}, which the model never learnt",
                    expected="one of " + ", ".join(list(number)[:20]),
                    mend=f"take it out of {spec.path}",
                )
    if task == "single-label":
        return np.array([number[str(row.label)] for row in rows], dtype=np.int64)
    targets = np.zeros((len(rows), len(names)), dtype=np.float32)
    for i, row in enumerate(rows):
        targets[i, [number[str(name)] for name in row.label]] = 1
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


def _split(rows: list[Row], labels: Ints, names: Sequence[str], num_classes: int, spec: Data, ready_made: bool) -> Ints:
    groups = _group_numbers(rows) if spec.group_column else None
    if ready_made:
        split = np.array([row.split or 0 for row in rows], dtype=np.int64)
        if groups is not None:
            _refuse_crossing(groups, split, rows)
        chosen = np.flatnonzero(split == 0)
        fractions = (0.0 if (split == 1).any() else spec.validation_fraction, 0.0)
    else:
        split = np.zeros(len(rows), dtype=np.int64)
        chosen = np.arange(len(rows))
        fractions = (spec.validation_fraction, spec.test_fraction)
    if any(fractions):
        if groups is not None:
            _, mine = np.unique(groups[chosen], return_inverse=True)
            wanted = 1 + sum(fraction > 0 for fraction in fractions)
            if mine.max() + 1 < wanted:
                raise DataError(
                    f"{spec.path} holds {mine.max() + 1} groups in {spec.group_column!r}, too few for {wanted} splits",
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


def _for_evaluation(rows: list[Row]) -> Ints:
    """All samples are test samples, but where the data came with a test split: then those alone."""
    ready_made = np.array([2 if row.split is None else row.split for row in rows], dtype=np.int64)
    if (ready_made == 2).any():
        return np.where(ready_made == 2, 2, _UNSPLIT)
    return np.full(len(rows), 2, dtype=np.int64)


def _group_numbers(rows: list[Row]) -> Ints:
    _, numbers = np.unique([row.group or "" for row in rows], return_inverse=True)
    return numbers.astype(np.int64)


def _refuse_crossing(groups: Ints, split: Ints, rows: list[Row]) -> None:
    side: dict[int, int] = {}
    for i, (group, here) in enumerate(zip(groups.tolist(), split.tolist(), strict=True)):
        if side.setdefault(group, here) != here:
            raise DataError(
                f"the group {rows[i].group!r} stands in {SPLITS[side[group]]} and in {SPLITS[here]} ({rows[i].place})",
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


def _leaks(rows: list[Row], ids: list[str], split: Ints) -> list[str]:
    """A note where the same content is trained on and tested with."""
    trained = {
        known_by for known_by, here in zip(ids, split.tolist(), strict=True) if here == 0 and ":" not in known_by
    }
    notes = []
    for here in (1, 2):
        same = [i for i in np.flatnonzero(split == here) if ids[i] in trained]
        if same:
            notes.append(
                f"{len(same)} of {SPLITS[here]} have the same content as a training sample, "
                f"such as {rows[same[0]].place}"
            )
    return notes


def _relative(row: Row, root: Path) -> str:
    if not row.uri:
        return ""
    file = os.path.normpath(row.root / row.uri)
    return os.path.relpath(file, root) if row.root == root else file


def _fingerprint(rows: list[Row], ids: list[str], split: Ints) -> str:
    lines = [
        json.dumps([os.path.normpath(row.uri) if row.uri else "", row.label, here, known_by], ensure_ascii=False)
        for row, here, known_by in zip(rows, split.tolist(), ids, strict=True)
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


class Samples:
    """The sample table of a run, memory-mapped; a sample's bytes are read when asked for."""

    def __init__(self, file: Path, root: str, fields: tuple[str, ...]) -> None:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        self._root = root
        self._uri = table.column("uri").combine_chunks()
        self._content = {name: table.column(name).combine_chunks() for name in fields if name in table.column_names}
        self._first = fields[0]
        target = table.column("target").combine_chunks()
        self.targets: npt.NDArray[Any]
        """int64 [samples], the class; multi-label and regression: float32 [samples, classes]."""
        if pa.types.is_fixed_size_list(target.type):
            self.targets = target.flatten().to_numpy().reshape(len(target), -1)
        else:
            self.targets = target.to_numpy().astype(np.int64)
        self.num_bytes: Ints = table.column("num_bytes").to_numpy()
        """int64 [samples]: of the first field; samples of like size are mostly of like length."""
        self._split: Ints = table.column("split").to_numpy().astype(np.int64)

    def rows(self, split: str) -> Ints:
        """The rows of a split, int64, ascending."""
        return np.flatnonzero(self._split == SPLITS.index(split))

    def by_length(self, rows: Ints) -> Ints:
        """The rows with the shortest samples first, by their size in bytes."""
        return rows[np.argsort(self.num_bytes[rows], kind="stable")]

    def known_by(self, row: int) -> str:
        """What tells this sample from others: its file, or the digest of its content."""
        if self._uri[row].as_py():
            return os.path.realpath(self.place(row))
        return hashlib.sha256(repr(sorted(self.read(row).items())).encode()).hexdigest()

    def place(self, row: int) -> str:
        """What the sample is called in a message."""
        uri = self._uri[row].as_py()
        return os.path.join(self._root, uri) if uri else f"table row {row + 1}"

    def read(self, row: int) -> Sample:
        """{field: its bytes} of one sample. Raises `BadSampleError` where they cannot be read."""
        sample = {name: column[row].as_py() for name, column in self._content.items() if column[row].is_valid}
        if self._first not in sample:
            try:
                with open(self.place(row), "rb") as file:
                    sample[self._first] = file.read()
            except OSError as error:
                raise BadSampleError(f"cannot be read: {error.strerror}") from None
        return sample


def write_table(table: pa.Table, file: Path) -> None:
    """The table as an Arrow file that `Samples` maps."""
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
