"""Which names mean a split: train, validation, test, in the spellings that folders, files and columns have. Pure."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from orchestrator.errors import DataError

SPLIT_NAMES: dict[str, int] = {
    "train": 0, "training": 0,
    "validation": 1, "valid": 1, "val": 1, "dev": 1, "devel": 1,
    "test": 2, "testing": 2,
}  # fmt: skip
_OF_ANY = {
    "set", "sets", "data", "dataset", "split", "folder", "dir", "images", "image", "imgs", "img", "pictures", "photos",
    "audio", "wav", "sounds", "text", "texts", "samples", "files", "csv",
}  # fmt: skip
"""Words that say no more: training_set, test-images."""
_PARTS = {"trainval", "traindev", "fold", "folds", "cv", "part", "parts", "split", "subset", "partition"}
_GLUED = re.compile(r"(.+?)(?:sets?|data|images|imgs)")
_WORDS = re.compile(r"[A-Z]?[^\W\d_A-Z]+|[^\W\d_]+|\d+")


def split_of(name: str) -> int | None:
    """0, 1 or 2 of a name that means a split by itself: `train`, `Test_set`, `trainingset`; None of others."""
    split, rest = _parse(name)
    return None if rest else split


def name_splits(names: Iterable[str]) -> dict[str, int | None]:
    """The split of each of the names that stand beside one another, None of those that mean none.

    Beside what `split_of` tells, names that differ in nothing but the split and numbers: `birds_train` and
    `birds_test`; `train_1`, `train_2` and `test_1`.
    """
    parsed = {name: _parse(name) for name in names}
    alike = defaultdict(set)
    for split, rest in parsed.values():
        if split is not None:
            alike[_wordy(rest)].add(split)
    plain = {rest for rest, splits in alike.items() if 0 in splits and len(splits) > 1}
    return {name: split if not rest or _wordy(rest) in plain else None for name, (split, rest) in parsed.items()}


def is_part(name: str) -> bool:
    """Whether each word of a name says that it is a part of data: `trainval`, `train_val`, `fold1`, `test`."""
    words = [word.lower() for word in _WORDS.findall(name) if not word.isdecimal()]
    says = [word in _PARTS or _split_of_word(word) is not None for word in words]
    return any(says) and all(said or word in _OF_ANY for said, word in zip(says, words, strict=True))


def _wordy(words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for word in words if not word.isdecimal())


def _parse(name: str) -> tuple[int | None, tuple[str, ...]]:
    """(the split that one of its words means, its other words); no split where two words mean one."""
    words = [word.lower() for word in _WORDS.findall(name)]
    splits = [(at, split) for at, word in enumerate(words) if (split := _split_of_word(word)) is not None]
    if len(splits) != 1:
        return None, tuple(words)
    ((at, split),) = splits
    return split, tuple(word for word in words[:at] + words[at + 1 :] if word not in _OF_ANY)


def _split_of_word(word: str) -> int | None:
    glued = _GLUED.fullmatch(word)
    return SPLIT_NAMES.get(word, SPLIT_NAMES.get(glued[1]) if glued else None)


def choose_splits(splits: Mapping[str, int | None], text: str) -> tuple[dict[str, int | None], list[str]]:
    """({name: its split} of what is read, notes), of several tables and the splits that their names say.

    What is all of one split is ours to split, whatever its name: then each split is None. Raises `DataError`.
    """
    named = {split for split in splits.values() if split is not None}
    others = [name for name, split in splits.items() if split is None]
    if len(splits) == 1 or (len(named) == 1 and not others):
        return dict.fromkeys(splits), []
    if 0 not in named:
        raise DataError(
            f"{text} has splits, and there is none for training: it has {', '.join(list(splits)[:5])}",
            expected="train, beside validation or test",
            mend="name the one to train on train, or give each by itself: data.path, data.validation, data.test",
        )
    notes = [f"beside train and no split, not read: {', '.join(others[:5])}"] if others else []
    return {name: split for name, split in splits.items() if split is not None}, notes
