"""What a run is asked about -> samples, one after the other: files, folders of them, texts, bytes, tables, rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator.data import columns_of, formed_as_run, input_columns, materialise_rows, read_unlabelled
from orchestrator.errors import BadSampleError, DataError
from orchestrator.job import DATA_FOLDER, TABLE_SUFFIXES, Data, library_of, shown
from orchestrator.modality import Modality, Sample

Input = str | Path | bytes | tuple[str, ...] | Mapping[str, Any]
_TABLES = {"pandas": "columns", "pyarrow": "schema", "datasets": "column_names", "ray": "iter_batches"}
"""Library -> what its tables have, and its columns and cells have not."""
_BYTES = "of an image or a recording in memory the bytes of a file: image.save(out := io.BytesIO(), 'PNG')"
_MEND = {
    "text": "give it as a str, or its file as a pathlib.Path",
    "bytes": f"give its path, or {_BYTES}; out.getvalue()",
}


class Line(str):
    """A line of standard input: a text or a path, and its number there, from 1."""

    __slots__ = ("number",)
    number: int

    def __new__(cls, text: str, number: int) -> Line:
        """The text with its number."""
        line = super().__new__(cls, text)
        line.number = number
        return line


@dataclass(frozen=True)
class Asked:
    """One sample that a run is asked about."""

    name: str
    """What it is called in its Prediction: the path as it was given, or the text."""
    read: Callable[[], Sample]
    """{field: its bytes}. Raises `BadSampleError`, `OSError` or `ValueError` where it cannot be read."""
    num_bytes: int
    """Of the file, 0 where it cannot be asked; of a text its characters."""
    held: int = 0
    """Bytes of it that are in memory already."""
    path: str = ""
    """The absolute path, or the URI, of its file."""
    table: str = ""
    """The absolute path of the table that it stands in."""
    row: int = 0
    """And its row there, from 1; of rows that a program gave, and of lines of standard input, without a table."""


@dataclass(frozen=True)
class Columns:
    """Where samples stand in tables, and what tables of text are like."""

    run: Data
    """What the run was trained on: its columns, separator and encoding are taken where a table has them and the user
    names none."""
    note: Callable[[str], None]
    """Is told how a table was read, as far as that is not plain, once all its rows were taken."""
    given: tuple[str, ...] = ()
    """Columns that the user names."""
    root: str | None = None
    """What paths are relative to, and may not leave; None: the table's folder."""
    separator: str | None = None
    encoding: str | None = None


def as_inputs(inputs: Any) -> Iterable[Any]:
    """The inputs of what `predict` is given: one alone, a table, or an iterable of them. Raises `DataError`."""
    if isinstance(inputs, (str, Path, bytes)) or _is_table(inputs):
        return [inputs]
    if isinstance(inputs, Mapping) or not isinstance(inputs, Iterable):
        splits = library_of(inputs) == "datasets"
        raise DataError(
            "the inputs are several data sets: " + ", ".join(inputs) if splits
            else f"the inputs are {_called(inputs)}",
            expected="a path, a text or bytes, a list of them, a table, or a list of rows (dicts)",
            mend=f"give one of them: the_data_set[{next(iter(inputs), 'test')!r}]" if splits
            else "put it in a list: [...]" if isinstance(inputs, Mapping) else "give a list, of one input too",
        )  # fmt: skip
    return inputs


def asked_about(inputs: Iterable[Any], modality: Modality, columns: Columns) -> Iterator[Asked]:
    """Each sample, in order.

    Of a modality of files a str is a path; of texts it is the text itself, and a `Path` is a file of text or a table.
    Mappings that follow each other are the rows of one table.
    Raises `DataError` for a table that cannot be read, a file that holds no such samples, and what is no input.
    """
    for are_rows, some in groupby(enumerate(inputs, 1), lambda pair: _is_row(pair[1])):
        if are_rows:
            yield from _held_rows((row for _, row in some), modality, columns)
            continue
        for number, one in some:
            yield from _asked(number, one, modality, columns)


def _asked(number: int, one: Any, modality: Modality, columns: Columns) -> Iterator[Asked]:
    """The samples of the input of that number."""
    is_text = modality.sample[0].kind == "text"
    if isinstance(one, Line) and not one.strip():
        yield Asked("", partial(_raise, "the line is empty"), 0, row=one.number)
    elif isinstance(one, Line):
        for asked in _asked(number, str(one), modality, columns):
            yield asked if asked.table else replace(asked, row=one.number)
    elif isinstance(one, bytes):
        name = f"input {number}"
        yield Asked(name, partial(_given, {modality.sample[0].name: one}), len(one), len(one))
    elif _is_table(one):
        yield from _held_rows(one, modality, columns)
    elif isinstance(one, tuple) and all(isinstance(text, str) for text in one):
        if not is_text:
            raise DataError(
                f"input {number} is a tuple of texts, and {modality.name} takes files",
                expected="paths, or bytes", mend="give the path of a file",
            )  # fmt: skip
        yield _text(one, modality)
    elif not isinstance(one, (str, Path)):
        raise DataError(
            f"input {number} is {_called(one)}", expected="a path, bytes, a table or a row (a dict)"
            if not is_text else "a text, the path of a file, a table or a row (a dict)",
            mend=_MEND["text" if is_text else "bytes"],
        )  # fmt: skip
    elif is_text and not isinstance(one, Path):
        yield _text(one, modality)
    elif _names_samples(one, modality, columns):
        yield from _rows(str(one), modality, columns)
    else:
        yield from _files(one, modality)


def _names_samples(file: str | Path, modality: Modality, columns: Columns) -> bool:
    """Whether it is a table of samples; not where samples are files of that suffix, unless the user names a column."""
    suffix = Path(file).suffix.lower()
    is_sample = suffix in modality.sample[0].suffixes and not columns.given
    return suffix in TABLE_SUFFIXES and not is_sample and os.path.isfile(file)


def _is_table(one: object) -> bool:
    return not isinstance(one, Mapping) and hasattr(one, _TABLES.get(library_of(one), "none"))


def _is_row(one: object) -> bool:
    return isinstance(one, Mapping) and library_of(one) != "datasets"


def _called(one: object) -> str:
    """As a message says what it is: `None`, `a dict`, `a PIL.Image.Image`."""
    if one is None:
        return "None"
    kind = type(one)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{library_of(one)} {kind.__name__}"
    return f"a{'n' if name[0].lower() in 'aeiou' else ''} {name}"


def _held_rows(rows: Any, modality: Modality, columns: Columns) -> Iterator[Asked]:
    """The samples of a table, or of rows, that a program holds; paths in them are relative to the working directory."""
    with TemporaryDirectory(prefix="orchestrator-") as folder:
        data: Any = materialise_rows({"path": rows}, Path(folder) / DATA_FOLDER)
        root = data["root"] if columns.root is None else columns.root
        for asked in _rows(data["path"], modality, replace(columns, root=root)):
            yield replace(asked, table="")


def _given(sample: Sample) -> Sample:
    return sample


def _text(one: str | tuple[str, ...], modality: Modality) -> Asked:
    texts = one if isinstance(one, tuple) else (one,)
    return Asked(" | ".join(texts), partial(_encoded, texts, modality), sum(map(len, texts)), sum(map(len, texts)))


def _encoded(texts: Sequence[str], modality: Modality) -> Sample:
    if len(texts) > len(modality.sample):
        raise BadSampleError(f"{len(texts)} texts, and {modality.name} takes {len(modality.sample)} at most")
    # A lone surrogate, which an argument that is not in UTF-8 becomes, is for `decode` to refuse.
    return {
        field.name: text.encode(errors="surrogatepass") for field, text in zip(modality.sample, texts, strict=False)
    }


def _files(one: str | Path, modality: Modality) -> Iterator[Asked]:
    """The file; the files of a folder that the modality reads; anything else, an empty folder too, as it is."""
    first = modality.sample[0]
    suffix = Path(one).suffix.lower()
    if first.kind == "text" and os.path.isfile(one) and suffix not in first.suffixes:
        raise DataError(
            f"{one} is a file, and neither a table nor a text",
            expected="a file ending in " + ", ".join((*TABLE_SUFFIXES, *first.suffixes)),
            mend="rename it; a text that is also the name of a file: give it on standard input (-), or in a table",
        )
    unlisted: list[OSError] = []
    found = sorted(_below(Path(one), first.suffixes, unlisted)) if os.path.isdir(one) else []
    for file in found:
        yield Asked(str(file), partial(_content, file, modality), _size(str(file)), path=os.path.abspath(file))
    for error in unlisted:
        yield Asked(
            str(error.filename),
            partial(_raise, f"its files cannot be listed: {error.strerror or error}"),
            0,
            path=os.path.abspath(error.filename),
        )
    if not found and not unlisted:
        yield Asked(str(one), partial(_content, one, modality), _size(str(one)), path=os.path.abspath(one))


def _below(folder: Path, suffixes: Sequence[str], unlisted: list[OSError]) -> Iterator[Path]:
    """The files of these suffixes, hidden ones left out; folders that cannot be listed go to `unlisted`."""
    for here, folders, names in os.walk(folder, onerror=unlisted.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = Path(here, name)
            if not name.startswith(".") and file.suffix.lower() in suffixes and file.is_file():
                yield file


def _raise(problem: str) -> Sample:
    raise BadSampleError(problem)


def _content(file: str | Path, modality: Modality) -> Sample:
    if os.path.isdir(file):
        raise BadSampleError(f"is a folder, and holds no file of {', '.join(modality.sample[0].suffixes)}")
    return {modality.sample[0].name: Path(file).read_bytes()}


def _rows(place: str, modality: Modality, columns: Columns) -> Iterator[Asked]:
    whole = os.path.abspath(place)
    usual = input_columns(columns.run)
    asked = Data(path=whole, root=columns.root, separator=columns.separator, encoding=columns.encoding)
    spec, notes = formed_as_run(asked, columns.run)
    chosen = columns.given or (usual if set(usual) <= set(columns_of(spec, usual)) else ())
    spec = spec.model_copy(update={"input_column": chosen or None})
    for row in read_unlabelled(spec, modality.sample, notes):
        held = sum(map(len, row.sample.values()))
        yield Asked(
            row.shown or (f"{place} row {row.number}" if shown(place) == place else f"row {row.number}"),
            row.read,
            held or _size(row.file),
            held,
            row.file,
            whole,
            row.number,
        )
    for note in notes:
        columns.note(f"{shown(place)}: {note}")


def _size(file: str) -> int:
    """In bytes; 0 where it cannot be asked: that is met again, and told, when the file is read."""
    try:
        return os.stat(file).st_size
    except (OSError, ValueError):
        return 0
