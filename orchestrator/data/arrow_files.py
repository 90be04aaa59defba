"""Files in which Arrow keeps tables, in either of its two forms: opened, and looked at to their end."""

from __future__ import annotations

import os
from typing import BinaryIO

import pyarrow as pa
import pyarrow.ipc

from orchestrator.data.text_files import UnreadableError, pointer_error
from orchestrator.job import POINTER

_ARROW_FILE, _STREAM_END = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"
"""How the one form of Arrow begins, and how the other one ends."""
AGAIN = "write the table again, or take it from where it came"


def arrow_stream(file: BinaryIO) -> tuple[pa.RecordBatchStreamReader, int | None]:
    """(its batches, how many there are) of either form that Arrow has for files; `datasets` writes the other one.

    One is the other with an index behind it, and then that says how many; None of the other.
    """
    promised = None
    if file.read(len(_ARROW_FILE)) == _ARROW_FILE:
        promised = pa.ipc.open_file(file).num_record_batches
    file.seek(0 if promised is None else 8)  # the beginning is padded to 8 bytes
    return pa.ipc.open_stream(file), promised


def look_at_end(file: BinaryIO, notes: list[str]) -> None:
    """Say so where a stream, which was read, does not end with its mark. Raises `UnreadableError` where it goes on."""
    read = file.tell()
    num_bytes = file.seek(0, os.SEEK_END)
    if read < num_bytes:
        raise UnreadableError(f"its last batch ends at {read} of {num_bytes} bytes", AGAIN)
    file.seek(max(0, num_bytes - len(_STREAM_END)))
    if file.read() != _STREAM_END:
        notes.append("it carries no mark of its end: if it was cut off, it is used as a shorter one")


def refuse_pointer(file: BinaryIO) -> None:
    """Raise `UnreadableError` where Git LFS has not fetched the file, else go back to its beginning."""
    if file.read(len(POINTER)) == POINTER:
        raise pointer_error()
    file.seek(0)
