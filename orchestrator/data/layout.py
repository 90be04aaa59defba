"""Where in a folder the class folders lie: at its top, below splits, or below a folder that only wraps them."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.data.tables import suffix_of
from orchestrator.errors import DataError
from orchestrator.job import SPLIT_NAMES, SPLITS, is_part, name_splits, split_of
from orchestrator.job.locations import Location

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

    Raises `DataError` where there are splits, and none to train on, and where folders may as well be splits as classes.
    """
    text = str(root) if isinstance(root, Path) else root.text
    base = _below_wrappers(root, suffixes, known)
    notes = [f"all lies in the folder {base}/, whose folders are read as if they were at the top"] if base else []
    folders = _folders(_join(root, base))
    splits = name_splits(folders)
    splits |= {name: None for name in folders if splits[name] is not None and _is_known(root, base, name, known)}
    others = [name for name, split in splits.items() if split is None]
    train = [name for name, split in splits.items() if split == 0]
    if train and not (others and not any(_folders(_join(root, posixpath.join(base, name))) for name in train)):
        _refuse_classes_beside(root, base, splits, suffixes)
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
    _refuse_parts(root, base, [name for name in folders if unicodedata.normalize("NFC", name) not in known])
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


def _is_known(root: Path | Location, base: str, name: str, known: Collection[str]) -> bool:
    """Whether the folder is a class that the model knows, and not a split that is called so and holds such classes."""
    if unicodedata.normalize("NFC", name) not in known:
        return False
    within = _folders(_join(root, posixpath.join(base, name)))
    return not any(unicodedata.normalize("NFC", one) in known for one in within)


def _refuse_classes_beside(
    root: Path | Location, base: str, splits: Mapping[str, int | None], suffixes: Collection[str]
) -> None:
    """Raise `DataError` where `train/` is the only split and several other folders hold samples: it may be a class."""
    named = [name for name, split in splits.items() if split is not None]
    others = [name for name, split in splits.items() if split is None]
    if len(named) > 1 or len(others) < 2:
        return
    holding = [name for name in others if _holds_samples(_join(root, posixpath.join(base, name)), suffixes)]
    if len(holding) < 2:
        return
    here = _join(root, base)
    text, name = str(here) if isinstance(here, Path) else here.text, named[0]
    raise DataError(
        f"{text}: {name}/ may be a split or a class: {', '.join(holding[:3])} beside it hold samples too",
        expected=f"{name}/ beside validation/ or test/, each with the class folders; or class folders alone",
        mend=f"if it is a split, name it as the data: {posixpath.join(text, name)}; if it is a class, rename its "
        f"folder, such as {name}_class",
    )


def _holds_samples(folder: Path | Location, suffixes: Collection[str]) -> bool:
    """Whether there are files of these suffixes in the folder, or in one that lies in it."""
    places = [folder, *(_join(folder, name) for name in _folders(folder))]
    return any(suffix_of(name) in suffixes for place in places for name, is_folder in _visible(place) if not is_folder)


def _refuse_parts(root: Path | Location, base: str, folders: Sequence[str]) -> None:
    """Raise `DataError` where folders that are called as parts of data are hold the same folders as another one."""
    parts = [name for name in folders if is_part(name)]
    within: dict[str, set[str]] = {}
    for name in [*parts, *(name for name in folders if name not in parts)] if parts else ():
        found = {one for one in _folders(_join(root, posixpath.join(base, name))) if not is_part(one)}
        for other in (other for other in within if other in parts):
            same = sorted(found & within[other])
            if len(same) > 1:
                here = _join(root, base)
                raise DataError(
                    f"{here if isinstance(here, Path) else here.text}: {other}/ and {name}/ hold the same folders, "
                    f"{', '.join(same[:3])}: these look like the classes, and those like splits",
                    expected="train/, validation/ and test/, each with the class folders",
                    mend="name them train/, validation/ and test/, or give each by itself: data.path and data.test",
                )
        within[name] = found


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


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Also of a link to one. Asks the file system for links alone: of all else the listing has told."""
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def children(folder: Path | Location) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of what lies directly in it, by name.

    Raises `DataError` where it may not be listed, `RefusedError` where its store does not answer.
    """
    if isinstance(folder, Location):
        return folder.children()
    try:
        with os.scandir(folder) as entries:
            return sorted((entry.name, _is_folder(entry)) for entry in entries)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be listed: {error.strerror}", expected="a folder that may be read",
            mend="give yourself the right to read it",
        ) from None  # fmt: skip
