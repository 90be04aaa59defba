"""What a committed folder holds, by names, sizes and digests: by it one that is whole is told from one that is not."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from orchestrator.errors import RefusedError
from orchestrator.job.files import file_sha256

MANIFEST_FILE = ".manifest.json"
"""In a committed folder of a directory; what a local folder holds under this name is not committed."""
GONE = "is not there"
VERSION = re.compile(r"(\d{8})-(\d{6})-[0-9a-f]{8}")
"""Of a commit: the number of its lease, which commit of that name it is, and what makes it unlike any other."""


class StoredFile(BaseModel):
    """A file of a committed folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    sha256: str


class Manifest(BaseModel):
    """What a committed folder holds. It may be handed on with the folder, so that it says nothing of who made it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    files: dict[str, StoredFile]
    """By their paths below the folder."""
    digest: str | None = None
    """Of the two, so that a bit that has flipped is seen; an earlier version wrote none."""

    @field_validator("version")
    @classmethod
    def _is_version(cls, version: str) -> str:
        if not VERSION.fullmatch(version):
            raise ValueError(f"{version} is no version of a commit")
        return version

    @field_validator("files")
    @classmethod
    def _stay_inside(cls, files: dict[str, StoredFile]) -> dict[str, StoredFile]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or str(path) != name or name == MANIFEST_FILE:
                raise ValueError(f"{name!r} is no path of a file in a folder")
        return files

    @model_validator(mode="after")
    def _is_as_written(self) -> Manifest:
        if self.digest not in (None, _digest(self.version, self.files)):
            raise ValueError("it is not as it was written")
        return self

    @property
    def number(self) -> int:
        """That of the lease that it was committed under."""
        return number_of(self.version)

    def write(self, folder: Path) -> None:
        """Into the folder whose files it tells, so that this is a committed one of a directory."""
        (folder / MANIFEST_FILE).write_text(self.model_dump_json(indent=1), encoding="utf-8")

    def changed(self, folder: Path) -> str:
        """Which file of a local folder has other bytes than were committed, '' if none has. Raises `OSError`."""
        for name, file in self.files.items():
            if file_sha256(folder / name) != file.sha256:
                return f"{name} was changed"
        return ""

    def problem(self, sizes: Mapping[str, int]) -> str:
        """What is wrong with files of these sizes, '' if nothing is."""
        return next((f"{name} {what}" for name, what in self.problems(sizes).items()), "")

    def problems(self, sizes: Mapping[str, int]) -> dict[str, str]:
        """{file: what is wrong with it} of files of these sizes."""
        found = {name: sizes.get(name) for name in self.files}
        return {
            name: GONE if size is None else f"has {size} bytes, not {self.files[name].size}"
            for name, size in found.items() if size != self.files[name].size
        }  # fmt: skip


def _digest(version: str, files: Mapping[str, StoredFile]) -> str:
    text = "\n".join([version, *(f"{file.sha256} {file.size} {name}" for name, file in sorted(files.items()))])
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def number_of(version: str) -> int:
    """The number of the lease that a commit of this version was made under."""
    return int(version.split("-")[0])


def next_version(lease_number: int, before: str | None) -> str:
    """The version of a commit under that lease which replaces the one `before`, if there is one."""
    count = int(before.split("-")[1]) + 1 if before and number_of(before) == lease_number else 1
    return f"{lease_number:08d}-{count:06d}-{uuid.uuid4().hex[:8]}"


def make_manifest(folder: Path, version: str) -> Manifest:
    """The manifest of a local folder, all files of which are read. Raises `RefusedError` for a link or a device."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise RefusedError(
                "usage", f"{path} is a link or a device", expected="files and folders alone",
                mend="put a copy of what it stands for in its place",
            )  # fmt: skip
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST_FILE:
            files[name] = StoredFile(size=path.stat().st_size, sha256=file_sha256(path))
    return Manifest(version=version, files=files, digest=_digest(version, files))
