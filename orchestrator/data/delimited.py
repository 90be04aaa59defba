"""CSV and TSV -> records, lists of cells: which separator, and which quotation marks are characters.

A cell that begins with a quotation mark ends at the next one that stands before a separator or a line's end; in
between, two are one. Somebody may also have opened a quotation and never closed it, and then all rows up to the next
quotation mark would be one cell. Such a mark is a character where the line without it has the header's number of cells.
"""

from __future__ import annotations

import contextlib
import csv
import re
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator.data.text_files import BLOCK_BYTES, UnreadableError, open_text
from orchestrator.job.locations import Location

SEPARATORS = (",", ";", "\t", "|")
"""Those that are looked for in the first line; of as many the first."""
_MARK = '"'
_ESCAPED = '\\"'
_SAID = re.compile(r'"?sep=(.)"?[,;\t|]*[\r\n]*', re.IGNORECASE)
"""The line that Excel writes before the header, and reads there."""


def is_tsv(name: str) -> bool:
    """Whether a tabulator separates the cells, by the file's name."""
    return name.lower().endswith(".tsv")


def read_header(
    place: Path | Location, separator: str | None, encoding: str | None, notes: list[str]
) -> tuple[list[str], str]:
    """(the names of the columns, what separates them): as given, else as the suffix and the first line say.

    Raises `OSError`, `UnreadableError`.
    """
    usual = usual_separator(place)
    with open_text(place, encoding, notes) as text:
        records = _Records(text, separator or usual, said_first=separator is None)
        header = next(records.read(), None)
        if header is None:
            raise UnreadableError("it is empty", "write a line with the names of the columns, and the rows behind it")
        if separator is not None:
            return header, separator
        if records.said:
            notes.append(f"its columns are separated by {records.said!r}, as its first line says")
            return header, records.said
    found = max(SEPARATORS, key="".join(header).count) if len(header) == 1 else usual
    if found == usual or found not in "".join(header):
        return header, usual
    with open_text(place, encoding) as text:
        rows = _Records(text, found).read()
        cut = next(rows, [])
        if len(next(rows, cut)) == 1:  # one column, whose name has that character
            return header, usual
    notes.append(f"its columns are separated by {found!r}, as its first line shows")
    return cut, found


def usual_separator(place: Path | Location) -> str:
    """What the suffix stands for."""
    return "\t" if is_tsv(place.name if isinstance(place, Path) else place.path) else ","


def read_records(
    place: Path | Location, num_columns: int, separator: str, encoding: str | None, notes: list[str]
) -> Iterator[Sequence[str]]:
    """The cells of each row behind the header. Notes what quotation marks made doubtful, once all rows were read.

    Raises `OSError`, and `UnreadableError` that names the line.
    """
    with open_text(place, encoding) as text:
        records = _Records(text, separator, num_columns)
        rows = records.read()
        next(rows, None)
        yield from rows
    notes += records.notes()


class _Records:
    """The records of a file, and what was doubtful about them."""

    def __init__(
        self, lines: Iterator[str], separator: str, num_columns: int | None = None, said_first: bool = False
    ) -> None:
        csv.field_size_limit(max(csv.field_size_limit(), 2 * BLOCK_BYTES))  # of all the process, and 128 KiB by default
        self._lines, self._separator, self._num_columns = lines, separator, num_columns
        self._said_first = said_first
        """Whether the separator is the one that the first line says, if it says one."""
        self.said = ""
        """That one, '' where it says none."""
        self._waiting: deque[str] = deque()
        """Lines that were looked at, and belong to the next records."""
        self._line = 0
        """Number of the line that was taken last, from 1."""
        self._num_characters, self._first_character = 0, 0
        """Quotation marks that are characters, and the line of the first."""
        self._num_escaped = 0
        """Lines of these that have a backslash before a mark."""
        self._num_doubtful, self._first_doubtful = 0, 0
        """Cells with line breaks that may as well be rows, and the line of the first."""

    def read(self) -> Iterator[list[str]]:
        """Each record; empty lines are none. Raises `UnreadableError`."""
        while (line := self._take()) is not None:
            number = self._line
            if not line.rstrip("\r\n"):
                continue
            if number == 1 and (said := _SAID.fullmatch(line)):
                self.said = said[1]
                self._separator = self.said if self._said_first else self._separator
                continue
            cells = self._split(line) if _MARK not in line else self._quoted(line)
            if self._num_columns is not None and len(cells) != self._num_columns:
                raise UnreadableError(
                    f"line {number} has {len(cells)} cells, and the header {self._num_columns}",
                    f"give it {self._num_columns}, or name what separates the cells: data.separator (--separator)",
                )
            yield cells

    def notes(self) -> list[str]:
        """What is to be said of quotation marks."""
        notes = []
        if self._num_characters:
            notes.append(
                "quotation marks that open a cell and do not close it are read as characters: "
                f"{self._num_characters}, the first in line {self._first_character}"
                + (
                    f"; {self._num_escaped} have backslashes before marks, and CSV doubles them"
                    * bool(self._num_escaped)
                )
            )
        if self._num_doubtful:
            how = "rows of their own" if self._separator == "\t" else "one cell each"
            notes.append(
                f"several lines between quotation marks that look like whole rows are read as {how}: "
                f"{self._num_doubtful} times, first from line {self._first_doubtful}; if that is wrong, close the "
                "quotation there, or double the mark"
            )
        return notes

    def _take(self) -> str | None:
        line = self._waiting.popleft() if self._waiting else next(self._lines, None)
        self._line += line is not None
        return line

    def _give_back(self, lines: list[str]) -> None:
        self._waiting.extendleft(reversed(lines))
        self._line -= len(lines)

    def _split(self, line: str) -> list[str]:
        return line.rstrip("\r\n").split(self._separator)

    def _is_row(self, line: str) -> bool:
        return len(self._split(line)) == self._num_columns

    def _quoted(self, first: str) -> list[str]:
        """The cells of a record that begins with this line, which holds a quotation mark."""
        number, taken = self._line, [first]
        cells = self._closed(first, taken)
        if cells is not None and len(taken) == 1:
            return cells
        # With one column every line looks like a row.
        alike = self._num_columns != 1 and sum(map(self._is_row, taken)) * 2 > len(taken) > 1
        is_row = self._is_row(first) or self._num_columns is None
        if cells is not None and len(taken) > 1 and self._num_columns not in (None, len(cells)) and is_row:
            cells = None
        if cells is not None and alike:
            self._num_doubtful += 1
            self._first_doubtful = self._first_doubtful or number
        if cells is not None and not (alike and is_row and self._separator == "\t"):
            return cells
        self._give_back(taken[1:])
        if not is_row:
            if _ESCAPED in first:
                raise UnreadableError(
                    f"line {number} has backslashes before quotation marks, which do not escape them",
                    'double each mark within a quotation ("" instead of \\"); pandas: to_csv without escapechar',
                )
            raise UnreadableError(
                f"line {number} opens a cell with a quotation mark, and none closes it",
                "close the quotation there, or double each mark that is a character",
            )
        if cells is None:
            self._num_characters += 1
            self._num_escaped += _ESCAPED in first
            self._first_character = self._first_character or number
        return self._split(first)

    def _closed(self, first: str, taken: list[str]) -> list[str] | None:
        """The cells of a record whose quotations all close, None where one does not; the lines behind the first that
        it looked at are added to `taken`.
        """

        def lines() -> Iterator[str]:
            yield first
            size = len(first)
            while size <= BLOCK_BYTES and (line := self._take()) is not None:
                taken.append(line)
                size += len(line)
                yield line

        for some in ((first,), lines()):  # most end in their own line
            with contextlib.suppress(csv.Error):
                return next(csv.reader(some, delimiter=self._separator, strict=True))
        return None
