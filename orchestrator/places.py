"""What a place of the user's means: a path, a URI, or the name of a data set on the Hub. Pure; opens nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path

_SCHEME = re.compile(r"[a-zA-Z][\w+.-]*://")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_DATASETS = "hf://datasets/"
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson")
SPLIT_KEYS = ("path", "validation", "test")
"""The settings of `data` that name a place, one a split."""
SPLIT_NAMES: dict[str, int] = {
    "train": 0, "training": 0,
    "validation": 1, "valid": 1, "val": 1, "dev": 1,
    "test": 2, "testing": 2,
}  # fmt: skip


def is_uri(place: str) -> bool:
    """Whether it is `scheme://...` rather than a path."""
    return _SCHEME.match(place) is not None


def whole(place: str) -> str:
    """The place from anywhere: an absolute path, or the URI without a slash at its end."""
    return place.rstrip("/") if is_uri(place) or is_dataset(place) else os.path.abspath(Path(place).expanduser())


def is_dataset(place: str) -> bool:
    """Whether it names a data set of the Hub: hf://datasets/org/name[@revision], or org/name where nothing is here.

    What lies here wins, and so does a folder here of the first name: then the second is a misspelling.
    """
    if place.startswith(_DATASETS):
        return _REPOSITORY.fullmatch(place.removeprefix(_DATASETS).rstrip("/")) is not None
    if is_uri(place) or not _REPOSITORY.fullmatch(place) or place.startswith((".", "~")):
        return False
    if place.lower().endswith(TABLE_SUFFIXES):
        return False
    return not os.path.exists(place) and not os.path.exists(place.split("/")[0])


def dataset_id(place: str) -> tuple[str, str | None]:
    """(org/name, revision) of a place that `is_dataset`."""
    name, _, revision = place.removeprefix(_DATASETS).rstrip("/").partition("@")
    return name, revision or None
