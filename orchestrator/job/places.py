"""What a place of the user's means: a path, a URI, or the name of a data set on the Hub. Pure; opens nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from orchestrator.errors import DataError
from orchestrator.job.split_names import SPLIT_NAMES

_SCHEME = re.compile(r"[a-zA-Z][\w+.-]*://")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_DATASETS = "hf://datasets/"
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".jsonl", ".ndjson")
SPLIT_KEYS = ("path", "validation", "test")
"""The settings of `data` that name a place, one a split."""
SECRET = (
    "holds a password or a key, and a job is written down; a store's credentials come from the environment "
    "(AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
)
"""What is said of a URI that `holds_secret`; never the URI itself."""
_KEYS = ("key", "secret", "token", "password", "passwd", "credential", "sig")
"""What the names of a URI's parameters have in them that hold a secret."""
DATA_FOLDER = ".data"
"""The folder of the storage that holds rows which came from a program, not from a place."""


def is_uri(place: str) -> bool:
    """Whether it is `scheme://...` rather than a path."""
    return _SCHEME.match(place) is not None


def local_path(place: str | Path) -> Path:
    """A path of this machine, `~` replaced by the home directory; `~name` stays where there is no such user."""
    return Path(os.path.expanduser(place))  # Path.expanduser raises there


def plain_path(place: str) -> str:
    """The path of a file:// URI; any other place as it is."""
    return re.sub(r"^((file|local)://(localhost(?=/))?)+", "", place)


def holds_secret(place: str) -> bool:
    """Whether a URI has a password or a key in it: `s3://key:secret@bucket`, `https://host/table.csv?sig=...`.

    A name alone is none: `abfss://container@account.dfs.core.windows.net`.
    """
    authority, _, rest = place.partition("://")[2].partition("/")
    names = [one.partition("=")[0].lower() for one in re.split("[?&]", rest)[1:]]
    is_named = any(word in one for one in names for word in _KEYS)
    return is_uri(place) and (":" in authority.rpartition("@")[0] or is_named)


def redacted(place: str) -> str:
    """The place as it may be shown: `s3://...` where it `holds_secret`."""
    return f"{place.split('://')[0]}://..." if holds_secret(place) else place


def whole(place: str) -> str:
    """The place from anywhere: an absolute path, or the URI without a slash at its end."""
    return place.rstrip("/") if is_uri(place) or is_dataset(place) else os.path.abspath(local_path(place))


def whole_storage(place: str) -> str:
    """The same of a storage, which is no data set of the Hub: two of its names that mean one place become one."""
    return place if is_uri(place) else os.path.abspath(local_path(place))


def library_of(value: object) -> str:
    """The package that its type comes from."""
    return type(value).__module__.split(".")[0]


def is_rows(value: object) -> bool:
    """Whether a program gave it in the place of a place."""
    return value is not None and not isinstance(value, (str, Path))


def as_settings(data: object) -> object:
    """A job's `data` with rows alone put under the key that they have beside other settings.

    Raises `DataError` for rows under the name of a split that is no key.
    """
    if not is_rows(data) or isinstance(data, BaseModel):
        return data
    if not isinstance(data, Mapping) or library_of(data) == "datasets":  # a DatasetDict is rows
        return {"path": data}
    for key, split in SPLIT_NAMES.items():
        if key not in SPLIT_KEYS and is_rows(data.get(key)):
            raise DataError(
                f"data has the key {key!r}", expected=", ".join(SPLIT_KEYS),
                mend=f"put the rows under {SPLIT_KEYS[split]!r}",
            )  # fmt: skip
    return data


def holds_rows(data: object) -> bool:
    """Whether rows are among a job's `data`; a number in the place of a path is a slip, not rows."""
    given = [data.get(key) for key in SPLIT_KEYS] if isinstance(data, Mapping) else []
    return any(is_rows(value) and not isinstance(value, (bool, int, float)) for value in given)


def is_materialised(place: str) -> bool:
    """Whether it holds rows that a program gave: nobody knows the file, and messages do not name it."""
    return Path(place).parent.name == DATA_FOLDER and place.endswith(".parquet")


def shown(place: str) -> str:
    """The place as messages call it."""
    return "the data" if is_materialised(place) else place


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


def require_no_secret(place: str) -> str:
    """The place. Raises `ValueError`, which does not show it, where credentials stand in it: a job is written down."""
    if holds_secret(place):
        raise ValueError(SECRET)
    return place
