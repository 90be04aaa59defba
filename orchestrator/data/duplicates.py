"""One file under two rows, and one content in two splits."""

from __future__ import annotations

import numpy as np

from orchestrator.data.contents import Ints, digest64
from orchestrator.data.ingested import IngestedTable
from orchestrator.data.splits import TEST, TRAIN, VALIDATION
from orchestrator.errors import DataError, counted
from orchestrator.job import SPLITS


def drop_duplicates(table: IngestedTable) -> Ints:
    """The rows that are samples, int64, ascending: of each file its first row, and all rows without a file.

    Raises `DataError` where one file has two labels, groups or splits: one of them is wrong.
    """
    ingested = table.ingested
    uris = ingested.column(ingested.uri_id)
    if not uris.any():
        return np.arange(len(uris))
    roots = np.array([digest64(origin.root_text) for origin in table.origins], dtype=np.uint64)
    keys = np.where(uris == 0, np.arange(len(uris), dtype=np.uint64), uris ^ roots[ingested.column(ingested.origin)])
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    is_new = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    first_at = np.maximum.accumulate(np.where(is_new, np.arange(len(order)), 0))  # where each file's rows begin
    is_duplicate = np.zeros(len(uris), dtype=bool)
    for at in np.flatnonzero(~is_new & (uris[order] != 0)).tolist():
        row, first = int(order[at]), int(order[first_at[at]])
        if table.file(row) != table.file(first):  # two files with one digest
            continue
        is_duplicate[row] = True
        _refuse_contradictions(table, first, row)
    return np.flatnonzero(~is_duplicate)


def _refuse_contradictions(table: IngestedTable, first: int, row: int) -> None:
    ingested, uri = table.ingested, table.uri(row)
    groups = ingested.group
    for what, differ, of in (
        ("label", ingested.label_key(row) != ingested.label_key(first), table.labels),
        ("group", len(groups) and groups[row] != groups[first], table.group),
    ):
        if differ:
            raise DataError(
                f"{uri} has two {what}s: {of(first)!r} in {table.place(first)}, {of(row)!r} in {table.place(row)}",
                mend=f"leave the row with the right {what}",
            )
    if ingested.split[row] != ingested.split[first]:
        raise DataError(
            f"{uri} stands in two splits, by {table.place(first)} and {table.place(row)}",
            mend="leave it in one of them",
        )


def warn_of_leaks(table: IngestedTable, rows: Ints, split: Ints) -> list[str]:
    """A warning for each split that holds contents which are trained on, too. rows, split: int64 [samples]."""
    contents = table.ingested.contents()[rows]
    trained = contents[(split == TRAIN) & (contents != 0)]
    trained.sort()
    warnings = []
    for side in (VALIDATION, TEST):
        samples = np.flatnonzero(split == side)
        at = np.searchsorted(trained, contents[samples]).clip(max=max(0, len(trained) - 1))
        leaked = samples[trained[at] == contents[samples]] if len(trained) else samples[:0]
        if len(leaked):
            what = counted(len(leaked), "sample")
            warnings.append(
                f"{what} of {SPLITS[side]} {'has' if len(leaked) == 1 else 'have'} the same content as a training "
                f"sample, such as {table.place(int(rows[leaked[0]]))}: the figures of {SPLITS[side]} are too good"
            )
    return warnings


def warn_of_contradictions(table: IngestedTable, rows: Ints) -> list[str]:
    """A warning where one content stands under several labels. rows: int64 [samples]."""
    contents, labels = table.ingested.contents()[rows], table.ingested.label_keys()[rows]
    order = np.lexsort((labels, contents))
    contents, labels = contents[order], labels[order]
    same = (contents[1:] == contents[:-1]) & (contents[1:] != 0)
    at = np.flatnonzero(same & (labels[1:] != labels[:-1]))
    if not len(at):
        return []
    num = int(np.isin(contents, contents[at]).sum())
    first, other = sorted(int(rows[order[i]]) for i in (at[0], at[0] + 1))
    return [
        f"{num} samples have the same content as one with another label, such as {table.labels(first)!r} in "
        f"{table.place(first)} and {table.labels(other)!r} in {table.place(other)}: one of them is wrong"
    ]
