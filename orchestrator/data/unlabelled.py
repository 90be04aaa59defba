"""Samples without labels out of a table: what a finished run is asked about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from orchestrator.data.columns import find_inputs, input_columns
from orchestrator.data.rows import Row, inside, inside_store
from orchestrator.data.table_rows import fill_file, fill_text
from orchestrator.data.tables import TextForm, open_table
from orchestrator.errors import BadSampleError, DataError
from orchestrator.job import Data, is_uri, shown as as_shown
from orchestrator.job.asking import PATIENCE_S, Asker, UnansweredError
from orchestrator.job.locations import cached, path_or_location
from orchestrator.job.object_storage import read_once
from orchestrator.modality import Sample, SampleField


@dataclass(frozen=True)
class Unlabelled:
    """One row of a table, as far as it is read: its bytes or texts, or the place of its file."""

    number: int
    """From 1, as the rows of a table are counted everywhere."""
    shown: str
    """The path as it stands in the table, the text, or both of a pair; '' of bytes."""
    sample: Sample = field(default_factory=dict)
    """{field: its bytes}, which are empty where a file holds them."""
    file: str = ""
    """The absolute path or URI of that file."""
    problem: str = ""

    def read(self) -> Sample:
        """{field: its bytes}. Raises `BadSampleError` or `OSError` where they cannot be read.

        `RefusedError` (`offline`) where their store does not answer for a minute.
        """
        if self.problem:
            raise BadSampleError(self.problem)
        if not self.file:
            return self.sample
        (name,) = self.sample
        return {name: _of_store(self.file) if is_uri(self.file) else Path(self.file).read_bytes()}


def _of_store(file: str) -> bytes:
    folder, _, name = file.rpartition("/")
    read = partial(read_once, cached(folder), name)
    try:
        return read()
    except UnansweredError:
        return Asker(folder, PATIENCE_S)(file, read)


def read_unlabelled(spec: Data, sample: Sequence[SampleField], notes: list[str]) -> Iterator[Unlabelled]:
    """The rows of the table `spec.path`, one after the other.

    `input_column`, `root`, `separator` and `encoding` of the spec are used, if it has any. How the table was read goes
    to `notes`, which are whole once all rows were taken.

    A path that leaves the root is not read. Raises `DataError` where the table cannot be read, or has no such column.
    """
    table = open_table(path_or_location(spec.path), input_columns(spec), TextForm(spec.separator, spec.encoding))
    if as_shown(spec.path) != spec.path:
        table = replace(table, text=as_shown(spec.path))
    try:
        names = find_inputs(table, spec, sample)
    except DataError as error:
        error.mend = f"name its column of what the model takes ({sample[0].name}): input_column (--input-column)"
        raise
    root = path_or_location(spec.root) if spec.root is not None else table.root
    root = root.resolve() if isinstance(root, Path) else root
    fields, resolved, number = [one.name for one in sample], dict[str, str](), 0
    for batch in table.batches(list(names)):
        for cells in zip(*(batch[name] for name in names), strict=True):
            number += 1
            row = Row("", "", number=number)
            if sample[0].kind == "text":
                fill_text(row, cells[0], cells[1] if len(cells) > 1 else None, len(cells) > 1)
                yield _of_texts(row, fields, cells)
                continue
            fill_file(row, cells[0])
            shown, file = row.uri, ""
            if row.uri:
                uri, why = inside(root, row.uri, resolved) if isinstance(root, Path) else inside_store(root, row.uri)
                if uri is None:
                    row.problem = f"the path {why} {root if isinstance(root, Path) else root.text}"
                else:
                    file = str(root / uri) if isinstance(root, Path) else root.join(uri).text
            yield Unlabelled(number, shown, {fields[0]: row.content or b""}, file, row.problem)
    notes += table.notes


def _of_texts(row: Row, fields: Sequence[str], cells: Sequence[object]) -> Unlabelled:
    texts = [text for text in (row.content, row.second) if text is not None]
    shown = " | ".join("" if cell is None else str(cell) for cell in cells)
    return Unlabelled(row.number, shown, dict(zip(fields, texts, strict=False)), problem=row.problem)
