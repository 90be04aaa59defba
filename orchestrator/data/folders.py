"""A folder with a folder a class -> rows, one a file; ready-made splits where it has train/, validation/ and test/."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.data.layout import children, layout_of
from orchestrator.data.rows import Origin, Row, Source, inside, is_unicode
from orchestrator.data.tables import suffix_of
from orchestrator.errors import DataError, counted
from orchestrator.job import TABLE_SUFFIXES, name_splits
from orchestrator.job.locations import Location
from orchestrator.modality import SampleField, registry

_LITTER = {"thumbs.db", "desktop.ini", "icon\r", "__macosx"}


def open_folder(source: Source, root: Path | Location, sample: SampleField, known: Collection[str] = ()) -> None:
    """Put a row for each file of the class folders behind those of the source; lists only the top of the folder yet.

    known: the classes of a finished model. Raises `DataError` where there are splits without train/; the rows, when
    they are read, where there is none.
    """
    text = str(root) if isinstance(root, Path) else root.text
    resolved = root.resolve() if isinstance(root, Path) else root
    layout = layout_of(root, sample.suffixes, known)
    source.ready_made |= layout.ready_made
    source.notes += layout.notes
    origin = source.add(Origin(text, resolved, is_table=False, listed=isinstance(root, Location)))

    def rows() -> Iterator[Row]:
        others = _Others()
        num = 0
        for top, split in layout.tops:
            for row in _walk_top(source, root, top, sample, others):
                row.origin, row.split = origin, split
                num += 1
                yield row
        if not num:
            seen = f"; it holds {counted(others.num, 'other file')}, such as {others.first[0]}" if others.num else ""
            raise DataError(
                f"{text} holds no {sample.name} files in class folders{seen}",
                expected=f"one folder a class, with files ending in {', '.join(sample.suffixes)}",
                mend=_other_modality(others.suffixes)
                or "sort the samples into a folder a class, or name a table of them",
            )
        if others.num:
            source.notes.append(
                f"{counted(others.num, 'file')} that {'is' if others.num == 1 else 'are'} no {sample.name}, not read: "
                + ", ".join(others.first)
            )
        if others.below:
            source.notes.append(
                f"folders below a class that are called as splits are, {', '.join(others.below[:3])}, are not read as "
                "such; for splits put train/, validation/ and test/ at the top, each with the class folders"
            )
        if others.links:
            shown = ", ".join(others.links[:3])
            source.notes.append(f"{counted(len(others.links), 'linked folder')} below a class, not read: {shown}")

    source.parts.append(rows)


@dataclass
class _Others:
    """Files and links of no use, counted."""

    num: int = 0
    first: list[str] = field(default_factory=list)
    suffixes: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    """Folders below a class that are links."""
    below: list[str] = field(default_factory=list)
    """Folders below a class that are called as splits are."""

    def add(self, uri: str) -> None:
        self.num += 1
        self.suffixes.add(suffix_of(uri))
        if len(self.first) < 3:
            self.first.append(uri)


def _walk_top(source: Source, root: Path | Location, top: str, sample: SampleField, others: _Others) -> Iterator[Row]:
    """The rows of the class folders in `top`, the folder of a split below the root; '' where there are no splits."""
    here = root if not top else root / top if isinstance(root, Path) else root.join(top)
    if not source.ready_made:
        _refuse_flat(here, sample)
    for name, is_folder in children(here):
        uri = posixpath.join(top, name)
        if name.startswith(".") or name.lower() in _LITTER:
            continue
        if is_folder:
            if not source.ready_made:
                others.below += [f"{uri}/{one}/" for one, split in _splits_below(here, name) if split is not None]
            label = unicodedata.normalize("NFC", name)
            source.classes.add(label)
            walk = _walk(root, uri, others) if isinstance(root, Path) else _list(root, uri)
            for row in walk:
                if row.problem:
                    yield row
                elif suffix_of(row.uri) in sample.suffixes:
                    row.label = label
                    yield row
                elif posixpath.basename(row.uri).lower() not in _LITTER:
                    others.add(row.uri)
        elif suffix_of(name) in sample.suffixes:
            place = str(root / uri) if isinstance(root, Path) else root.join(uri).text
            yield Row(place, "", uri=uri, problem="has no label: it lies beside the class folders")


def _refuse_flat(folder: Path | Location, sample: SampleField) -> None:
    """Raise `DataError` where samples lie in the folder and no folder does, so that nothing tells their classes."""
    visible = [(name, is_folder) for name, is_folder in children(folder) if not name.startswith(".")]
    names = [name for name, is_folder in visible if not is_folder and suffix_of(name) in sample.suffixes]
    if not names or any(is_folder for _, is_folder in visible):
        return
    text = str(folder) if isinstance(folder, Path) else folder.text
    tables = [name for name, _ in visible if suffix_of(name) in TABLE_SUFFIXES]
    raise DataError(
        f"{text} holds {sample.name} files, such as {names[0]}, and no class folders: nothing tells their labels",
        expected="one folder a class, or a table of the files",
        mend=f"name the table that labels them: {posixpath.join(text, tables[0])}" if tables
        else "name the folder above it, where each folder is a class, or sort the files into such folders",
    )  # fmt: skip


def _splits_below(folder: Path | Location, name: str) -> list[tuple[str, int | None]]:
    """(name, split) of the folders in a class folder, where they are called train and something else."""
    if isinstance(folder, Location) or not os.access(folder / name, os.R_OK | os.X_OK):
        return []  # a store would be asked once more for each class
    splits = name_splits(one for one, is_folder in children(folder / name) if is_folder)
    return list(splits.items()) if len({0, *splits.values()} - {None}) > 1 and 0 in splits.values() else []


def _other_modality(suffixes: set[str]) -> str:
    """Which modality takes such files, '' if none does."""
    fitting = [name for name, other in registry.available().items() if suffixes & set(other.sample[0].suffixes)]
    return f"say what they are: --modality {fitting[0]}" if fitting else ""


def _walk(root: Path, folder: str, others: _Others) -> Iterator[Row]:
    """Every file below a folder of this machine, hidden ones left out; a folder that cannot be listed is a bad row."""
    unreadable: list[OSError] = []
    for directory, names, files in os.walk(root / folder, onerror=unreadable.append):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in names:
            if os.path.islink(os.path.join(directory, name)):
                others.links.append(_inside(root, os.path.relpath(os.path.join(directory, name), root)))
        for name in sorted(files):
            if name.startswith("."):
                continue
            file = os.path.join(directory, name)
            if not is_unicode(file):
                shown = os.fsencode(file).decode("utf-8", "backslashreplace")
                yield Row(shown, "", problem="its name is not in UTF-8")
                continue
            yield Row(file, "", uri=os.path.relpath(file, root))
    for error in unreadable:
        yield Row(str(error.filename), "", problem=f"its files cannot be listed: {error.strerror}")


def _inside(root: Path, link: str) -> str:
    """The link, which is relative to the root. Raises `DataError` where it leads out of the data's root."""
    uri, why = inside(root.resolve(), link, {})
    if uri is None:
        raise DataError(
            f"{root / link}: the linked folder {why} {root}", expected="folders below the data's root",
            mend="remove the link, or move the folder below it",
        )  # fmt: skip
    return link


def _list(root: Location, folder: str) -> Iterator[Row]:
    """Every file below a folder of a store, hidden ones left out."""
    for file in root.join(folder).files():
        uri = posixpath.join(folder, file.uri)
        yield Row(root.join(uri).text, "", uri=uri, stat=(file.size, file.modified_ns))
