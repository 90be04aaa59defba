"""What one pass over a source remembers of its rows: some 50 bytes each.

What a row holds stands in `samples.arrow`, and is looked up there for messages.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orchestrator.data.contents import Ints
from orchestrator.data.rows import Origin
from orchestrator.modality import Profile, Sample


@dataclass(frozen=True)
class Skip:
    """A sample that is left out, and why."""

    place: str
    problem: str


@dataclass(frozen=True)
class Example:
    """A sample as it was read, for a look at how the first batch is made."""

    place: str
    sample: Sample


@dataclass
class IngestedRows:
    """One entry a row that can be used in each array, in the order of the source.

    Arrays that say so stay empty as long as all of their entries would be 0; `column` gives those too.
    """

    label: array[Any] = field(default_factory=lambda: array("i"))
    """Single-label: the number of the name; multi-label: of all rows' names in turn; regression: floats."""
    num_labels: array[int] = field(default_factory=lambda: array("i"))
    """Multi-label alone: how many of `label` are the row's."""
    names: dict[str, int] = field(default_factory=dict)
    """Label -> number, in the order that they were met in; empty for regression."""
    group: array[int] = field(default_factory=lambda: array("i"))
    """The number of the group's name. Empty where the data has no groups."""
    groups: dict[str, int] = field(default_factory=dict)
    """Name of a group -> number."""
    split: array[int] = field(default_factory=lambda: array("b"))
    """0, 1, 2: train, validation, test; -1 where the data does not say."""
    origin: array[int] = field(default_factory=lambda: array("i"))
    """Which of the source's origins. May be empty."""
    num_bytes: array[int] = field(default_factory=lambda: array("q"))
    """-1 where it is not known."""
    uri_id: array[int] = field(default_factory=lambda: array("Q"))
    """Digest of the file's place, whatever it is called; 0 where the table holds the sample itself. May be empty."""
    label_id: array[int] = field(default_factory=lambda: array("Q"))
    """Digest of the label. Single-label: of each name, by its number; else of each row."""
    content_id: array[int] = field(default_factory=lambda: array("Q"))
    """Digest of the content; 0 where it was not read."""
    content_high: array[int] = field(default_factory=lambda: array("Q"))
    """64 more bits of that, for what is kept longer than a job."""
    stat_id: array[int] = field(default_factory=lambda: array("Q"))
    """Digest of a file's size and time of modification; 0 where they are not known. May be empty."""
    timed: array[int] = field(default_factory=lambda: array("b"))
    """Whether `stat_id` holds a time: some stores tell none, and then the same size is no sign of the same content.
    May be empty."""
    skipped: list[Skip] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    """A few of the measured rows: of each kind (mode, encoding, pair) one, and some at growing distances."""
    profile: Profile = field(default_factory=lambda: Profile.of(()))
    """What was measured: on all rows, or on some at even distances."""
    by_content: bool = True
    """Whether all rows are known by their content; of much data, files are by their size and time of modification."""

    def __len__(self) -> int:
        return len(self.split)

    def column(self, values: array[Any]) -> npt.NDArray[Any]:
        """One of the arrays as numpy's, [rows], in its own type; zeros where it stayed empty."""
        return view(values) if len(values) else np.broadcast_to(np.zeros((), values.typecode), len(self))

    def label_key(self, row: int) -> int:
        """What tells a row's label, or labels, from others."""
        return self.label_id[self.label[row] if self._by_name else row]

    def label_keys(self) -> npt.NDArray[np.uint64]:
        """`label_key` of all rows, uint64 [rows]."""
        return view(self.label_id)[view(self.label)] if self._by_name else view(self.label_id)

    @property
    def _by_name(self) -> bool:
        return bool(self.names) and not self.num_labels

    def known_by(self) -> npt.NDArray[np.uint64]:
        """What each sample is known by, uint64 [rows]: its content, or its file's size and time of modification."""
        content = view(self.content_id)
        if self.by_content:
            return content
        return np.where(self.column(self.uri_id) == 0, content, self.column(self.stat_id))

    def contents(self) -> npt.NDArray[np.uint64]:
        """The content that `known_by` is of, uint64 [rows]; 0 where it is of something else."""
        content, known_by = view(self.content_id), self.known_by()
        return np.where(known_by == content, content, np.uint64(0))


def view(values: array[Any]) -> npt.NDArray[Any]:
    """An array as numpy's, in its own type, not copied."""
    return np.frombuffer(values, dtype=values.typecode) if len(values) else np.zeros(0, values.typecode)


def numbers(values: array[Any]) -> Ints:
    """An array as int64 [rows], copied."""
    return view(values).astype(np.int64)


class IngestedTable:
    """Ingested rows together with their `samples.arrow`: what messages call a row, its file, its label, its group.

    Rows are given by their number; the file is opened when it is first asked.
    """

    def __init__(self, ingested: IngestedRows, origins: Sequence[Origin], rows_file: Path) -> None:
        self.ingested, self.origins, self._rows_file = ingested, origins, rows_file

    @cached_property
    def _columns(self) -> Any:
        return pa.ipc.open_file(pa.memory_map(str(self._rows_file))).read_all()

    def _origin(self, row: int) -> Origin:
        return self.origins[int(self._columns.column("origin")[row].as_py())]

    def uri(self, row: int) -> str:
        """Relative to the origin's root; '' where the table holds the sample itself."""
        return str(self._columns.column("uri")[row].as_py())

    def file(self, row: int) -> str:
        """The row's file, its links resolved."""
        root = self._origin(row).root
        return os.path.realpath(root / self.uri(row)) if isinstance(root, Path) else root.join(self.uri(row)).text

    def place(self, row: int) -> str:
        """What the row is called: its file, or its number in the table."""
        origin = self._origin(row)
        if origin.is_table:
            return origin.row(self._columns.column("number")[row].as_py())
        return os.path.join(origin.text, self.uri(row))

    def labels(self, row: int) -> object:
        """A class; multi-label: a tuple of labels; regression: a tuple of numbers."""
        ingested, names = self.ingested, list(self.ingested.names)
        if not names:
            width = len(ingested.label) // len(ingested)
            return tuple(ingested.label[row * width : (row + 1) * width])
        if not ingested.num_labels:
            return names[ingested.label[row]]
        start = sum(ingested.num_labels[:row])
        return tuple(names[i] for i in ingested.label[start : start + ingested.num_labels[row]])

    def group(self, row: int) -> str:
        """The name of the row's group."""
        return list(self.ingested.groups)[self.ingested.group[row]]
