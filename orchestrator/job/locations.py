"""Where data lies: a path of this machine or a URI (`s3://`, `gs://`, `hf://`, whatever pyarrow or fsspec opens).

Credentials and endpoints come from the environment, as each store's own tools read them (for S3 AWS_PROFILE,
AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and the rest); they never stand in a job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import posixpath
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import pyarrow as pa
import pyarrow.fs

from orchestrator.errors import DataError, RefusedError, first_line
from orchestrator.job.places import is_uri, local_path

Kind = Literal["file", "directory", "missing"]
_BUFFER_BYTES = 8 * 2**20
_WITHOUT_FOLDERS = ("s3", "gcs", "abfs")


@dataclass(frozen=True)
class Found:
    """A file of a store, as its listing tells."""

    uri: str
    """Relative to the location that was listed."""
    size: int
    modified_ns: int


@dataclass(frozen=True)
class Location:
    """A place in a store that is no local directory; local ones are plain paths."""

    text: str
    """As the user wrote it."""
    fs: Any
    """pyarrow.fs.FileSystem"""
    path: str
    """Within `fs`."""

    def kind(self) -> Kind:
        """What is there. Raises `RefusedError` where the store cannot be asked."""
        with store_errors(self.text):
            kind = self.fs.get_file_info(self.path).type
        return {pa.fs.FileType.File: "file", pa.fs.FileType.Directory: "directory"}.get(kind, "missing")  # type: ignore[return-value]

    def join(self, uri: str) -> Location:
        """The place of `uri`, which is relative to this one."""
        return Location(f"{self.text.rstrip('/')}/{uri}", self.fs, posixpath.join(self.path, uri))

    def parent(self) -> Location:
        """The folder that it lies in."""
        return Location(posixpath.dirname(self.text.rstrip("/")), self.fs, posixpath.dirname(self.path.rstrip("/")))

    def open(self) -> BinaryIO:
        """The file, seekable. Raises `OSError`."""
        return self.fs.open_input_file(self.path)  # type: ignore[no-any-return]

    def stream(self, buffer_bytes: int) -> BinaryIO:
        """The file from its beginning to its end, so many bytes a request. Raises `OSError`."""
        return self.fs.open_input_stream(self.path, compression=None, buffer_size=buffer_bytes)  # type: ignore[no-any-return]

    def read(self) -> bytes:
        """All of the file. Raises `OSError`."""
        with self.open() as file:
            return file.read()

    def stat(self) -> tuple[int, int] | None:
        """(bytes, time of modification in ns), None where there is no such file."""
        with store_errors(self.text):
            return self.asked_stat()

    def asked_stat(self) -> tuple[int, int] | None:
        """The same. Raises `OSError`."""
        (info,) = self.fs.get_file_info([self.path])
        return (info.size, info.mtime_ns or 0) if info.type == pa.fs.FileType.File else None

    def children(self) -> list[tuple[str, bool]]:
        """(name, whether it is a folder) of what lies directly in this folder, by name. Raises `RefusedError`."""
        infos = self._list(recursive=False)
        return sorted((info.base_name, info.type == pa.fs.FileType.Directory) for info in infos)

    def files(self) -> list[Found]:
        """All files below this folder, by name; hidden ones left out. Raises `RefusedError`."""
        start = len(self.path.rstrip("/")) + 1
        files = []
        for info in self._list(recursive=True):
            uri = info.path[start:]
            if info.type == pa.fs.FileType.File and not any(part.startswith(".") for part in uri.split("/")):
                files.append(Found(uri, info.size, info.mtime_ns or 0))
        return sorted(files, key=lambda file: file.uri)

    def names(self) -> list[str]:
        """Of what lies directly in this folder; [] where there is no such folder. Raises `OSError`."""
        return [info.base_name for info in self._infos(recursive=False)]

    def entries(self, recursive: bool = False) -> list[Found]:
        """Files in this folder, hidden ones too; [] where there is no such folder. Raises `OSError`."""
        start = len(self.path.rstrip("/")) + 1
        return [
            Found(info.path[start:], info.size, info.mtime_ns or 0)
            for info in self._infos(recursive)
            if info.type == pa.fs.FileType.File
        ]

    def lacks_bucket(self) -> bool:
        """Whether there is not even the bucket; elsewhere folders are made where there are none. Raises `OSError`."""
        if self.text.split("://")[0].lower() not in ("s3", "gs", "gcs"):
            return False
        places = (self.path, self.path.split("/")[0])
        return all(self.fs.get_file_info(place).type == pa.fs.FileType.NotFound for place in places)

    def _infos(self, recursive: bool) -> Sequence[Any]:
        if isinstance(self.fs, pa.fs.PyFileSystem):
            self.fs.handler.fs.invalidate_cache()  # fsspec remembers listings
        with contextlib.suppress(NotADirectoryError):
            return self.fs.get_file_info(  # type: ignore[no-any-return]
                pa.fs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
            )
        return []

    def upload(self, file: Path) -> None:
        """Write a local file's bytes here. Raises `OSError`."""
        with file.open("rb") as source, self._new() as out:
            shutil.copyfileobj(source, out, _BUFFER_BYTES)

    def write(self, content: bytes) -> None:
        """Write these bytes here. Raises `OSError`."""
        with self._new() as out:
            out.write(content)

    def _new(self) -> BinaryIO:
        if self.fs.type_name not in _WITHOUT_FOLDERS:
            self.fs.create_dir(self.parent().path, recursive=True)
        return self.fs.open_output_stream(self.path, compression=None)  # type: ignore[no-any-return]  # .gz as it is

    def delete(self) -> None:
        """Remove the file. Raises `OSError`."""
        self.fs.delete_file(self.path)

    def delete_folder(self) -> None:
        """Remove all that lies below. Raises `OSError`."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_dir(self.path)

    def asked_once(self, timeout_s: float) -> Location:
        """The same place, for a caller that retries: S3's own client tries for 100 s where a server is silent.

        A request fails after so long without a byte. A small file is one request, where it would be three.
        """
        if not isinstance(self.fs, getattr(pa.fs, "S3FileSystem", ())):
            return self
        make, (settings,) = cast(Any, self.fs).__reduce__()
        changes = {"request_timeout": timeout_s, "connect_timeout": timeout_s, "allow_delayed_open": True}
        known = {key: value for key, value in changes.items() if key in settings}
        once = pa.fs.AwsStandardS3RetryStrategy(max_attempts=1)
        return dataclasses.replace(self, fs=make({**settings, **known, "retry_strategy": once}))

    def _list(self, recursive: bool) -> Sequence[Any]:
        with store_errors(self.text):
            return self.fs.get_file_info(pa.fs.FileSelector(self.path, recursive=recursive))  # type: ignore[no-any-return]


def locate(place: str) -> Location:
    """The location of a URI. Raises `RefusedError` where no installed library opens it."""
    scheme = place.split("://", 1)[0].lower()
    try:
        with store_errors(place):
            return Location(place, *_open(place))
    except ImportError as error:
        raise RefusedError(
            "missing_extra", f"{place}: {scheme}:// needs {error.name or 'a library'}, which is not installed",
            mend=f"pip install the fsspec library for {scheme}://: {error}",
        ) from None  # fmt: skip
    except ValueError as error:
        raise DataError(
            f"{place} is no place that can be opened: {first_line(error)}",
            expected="a path, or a URI that pyarrow or fsspec opens: s3://bucket/folder, gs://..., hf://datasets/...",
            mend="correct the URI",
        ) from None


def path_or_location(place: str) -> Path | Location:
    """Where a place of the user's is: a URI's location, else a path. Raises as `locate` does."""
    return locate(place) if is_uri(place) else local_path(place)


def _open(place: str) -> tuple[Any, str]:
    try:
        fs, path = pa.fs.FileSystem.from_uri(place)
    except pa.ArrowInvalid as error:
        if "Unrecognized filesystem type" not in str(error):
            raise
        import fsspec

        opened, path = fsspec.core.url_to_fs(place)
        return pa.fs.PyFileSystem(pa.fs.FSSpecHandler(opened)), path
    return fs, path


@lru_cache(maxsize=64)
def cached(place: str) -> Location:
    """`locate`, once a process: opening a store takes a quarter of a second."""
    return locate(place)


def feature_store(place: str) -> Location:
    """The location of a job's `feature_store`. Raises `RefusedError` where no installed library opens it."""
    try:
        return cached(place)
    except RefusedError as error:
        wrong = error.reason == "data"  # the place itself, which the data's mend would not name
        raise RefusedError("usage" if wrong else error.reason, f"feature_store: {error.message}",
                           expected=error.expected,
                           mend="correct feature_store (--feature-store)" if wrong else error.mend,
                           ) from None  # fmt: skip


@contextlib.contextmanager
def store_errors(place: str) -> Iterator[None]:
    """Errors of the store at `place` become `RefusedError`; a `ValueError`, of a place that is wrong, passes."""
    try:
        yield
    except ValueError:  # ArrowInvalid too
        raise
    except (OSError, pa.ArrowException) as error:
        raise RefusedError(
            "offline", f"{place} does not answer: {first_line(error)}",
            expected="a store that answers, and credentials that it accepts",
            mend="check the connection, the endpoint (AWS_ENDPOINT_URL) and the credentials in the environment",
        ) from None  # fmt: skip
