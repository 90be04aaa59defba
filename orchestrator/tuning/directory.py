"""The directory that a search or a ranking works in: a store of objects is for the runs of single jobs so far."""

from __future__ import annotations

from orchestrator.errors import RefusedError
from orchestrator.job import DirectoryStorage, Job, is_uri, local_path


def directory_of(storage: object) -> DirectoryStorage:
    """The storage of that setting; None is the default. Raises `RefusedError` where it is no directory."""
    place = str(Job.model_fields["storage"].default if storage is None else storage)
    if is_uri(place):
        raise RefusedError(
            "usage", f"{place} is no directory, and the trials of a search and the backbones of a ranking lie in one",
            expected="a directory of this machine, or one that the nodes share",
            mend="leave --storage out, or name a directory; --feature-store keeps their features in an object store",
        )  # fmt: skip
    return DirectoryStorage(local_path(place).absolute())
