"""Where in a folder the class folders lie: at its top, below splits, or below a folder that only wraps them."""

from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.data.locations import Location
from orchestrator.data.tables import suffix_of
from orchestrator.errors import DataError
from orchestrator.job import SPLIT_NAMES, SPLITS, name_splits, split_of

_LITTER = "__macosx"  # what macOS adds to a ZIP file


@dataclass
class Layout:
    """The folders that hold class folders."""

    tops: list[tuple[str, int | None]]
    """(relative to the root, its split), '' for the root itself."""
    ready_made: bool = False
    """Whether these are splits."""
    notes: list[str] = field(default_factory=list)


def layout_of(root: Path | Location, suffixes: Collection[str], known: Collection[str] = ()) -> Layout:
    """How the folder is laid out. suffixes: of files that are samples; known: classes of a finished model.

    Raises `DataError` where there are splits, and none to train on.
    """
    text = str(root) if isinstance(root, Path) else root.text
    base = _below_wrappers(root, suffixes, known)
    notes = [f"all lies in the folder {base}/, whose folders are read as if they were at the top"] if base else []
    folders = _folders(_join(root, base))
    splits = name_splits(folders)
    others = [name for name, split in splits.items() if split is None]
    train = [name for name, split in splits.items() if split == 0]
    if train and not (others and not any(_folders(_join(root, posixpath.join(base, name))) for name in train)):
        if others:
            notes.append(f"folders beside {train[0]}/ that are no split, not read: {', '.join(others)}")
        loose = [
            name for name, is_folder in _visible(_join(root, base)) if not is_folder and suffix_of(name) in suffixes
        ]
        if loose:
            notes.append(f"files beside {train[0]}/, {len(loose)} of them, not read: {', '.join(loose[:3])}")
        named = {name: split for name, split in splits.items() if split is not None}
        return _of_splits(root, base, named, suffixes, notes)
    if splits and not others:
        if known:  # to be evaluated on: a test split alone does
            return _of_splits(root, base, {name: split or 0 for name, split in splits.items()}, suffixes, notes)
        raise DataError(
            f"{text} has no train/ folder",
            expected="train/ beside " + folders[0] + "/",
            mend="add train/, or name the folder of the classes as the data",
        )
    for name in (name for name, split in splits.items() if split is not None):
        within = [one for one in _folders(_join(root, posixpath.join(base, name))) if one in others]
        if within:
            raise DataError(
                f"{text}: {name}/ looks like a split: it holds {within[0]}/, which lies beside it too",
                expected="train/ beside " + name + "/, each with the class folders",
                mend=f"move {', '.join(others[:3])}{', …' if len(others) > 3 else ''} into train/",
            )
        notes.append(f"the folder {name}/ is read as a class, though a split may be called so")
    return Layout([(base, None)], notes=notes)


def _of_splits(
    root: Path | Location, base: str, named: dict[str, int], suffixes: Collection[str], notes: list[str]
) -> Layout:
    """The layout of folders that are splits; below each there may be one more that wraps its classes."""
    inner = {name: _only_folder(_join(root, posixpath.join(base, name)), suffixes) for name in named}
    wrapped = len(set(inner.values())) == 1 and len(inner) > 1 and None not in inner.values()
    tops: list[tuple[str, int | None]] = []
    for name, split in named.items():
        child = inner[name]
        top = posixpath.join(base, name)
        if child is not None and (wrapped or child == name or split_of(child) == split):
            top = posixpath.join(top, child)
        tops.append((top, split))
    if any(top.lower() not in SPLIT_NAMES for top, _ in tops):
        notes.append("read as splits: " + ", ".join(f"{top}/ ({SPLITS[split or 0]})" for top, split in tops))
    return Layout(tops, True, notes)


def _below_wrappers(root: Path | Location, suffixes: Collection[str], known: Collection[str]) -> str:
    """The folder that all lies in, where folders hold one folder and nothing else; '' of most.

    A lone folder that holds no folders is a class, and so is one that the model knows as such.
    """
    base = ""
    while (child := _only_folder(_join(root, base), suffixes)) is not None:
        is_split = split_of(child) is not None
        if is_split or unicodedata.normalize("NFC", child) in known:
            break
        base = posixpath.join(base, child)
    return base


def _only_folder(folder: Path | Location, suffixes: Collection[str]) -> str | None:
    """The name of the one folder in it, which holds folders too; None where there are more, or samples beside it."""
    visible = _visible(folder)
    folders = [name for name, is_folder in visible if is_folder]
    if len(folders) != 1 or any(suffix_of(name) in suffixes for name, is_folder in visible if not is_folder):
        return None
    return folders[0] if _folders(_join(folder, folders[0])) else None


def _folders(folder: Path | Location) -> Sequence[str]:
    return [name for name, is_folder in _visible(folder) if is_folder]


def _visible(folder: Path | Location) -> Sequence[tuple[str, bool]]:
    return [one for one in children(folder) if not one[0].startswith(".") and one[0].lower() != _LITTER]


def _join(root: Path | Location, uri: str) -> Path | Location:
    return root if not uri else root / uri if isinstance(root, Path) else root.join(uri)


def children(folder: Path | Location) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of what lies directly in it, by name.

    Raises `DataError` where it may not be listed, `RefusedError` where its store does not answer.
    """
    if isinstance(folder, Location):
        return folder.children()
    try:
        return sorted((child.name, child.is_dir()) for child in folder.iterdir())
    except OSError as error:
        raise DataError(
            f"{folder} cannot be listed: {error.strerror}", expected="a folder that may be read",
            mend="give yourself the right to read it",
        ) from None  # fmt: skip
