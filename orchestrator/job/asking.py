"""Asking a store again while it fails, for a while; what no waiting mends is said at once."""

from __future__ import annotations

import errno
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa

from orchestrator.errors import InterruptedRunError, OrchestratorError, RefusedError, first_line
from orchestrator.job.locations import store_errors

PATIENCE_S = 60.0
"""A store that does not answer is asked again for so long."""
_FIRST_WAIT_S, _MOST_WAIT_S = 0.2, 5.0
_SAID_S = 2.0
"""A store that has failed for so long is said to be away."""
_REFUSED = (
    "ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "EXPIRED_TOKEN", "INVALID_CLIENT_TOKEN_ID",
)  # fmt: skip
"""Errors as pyarrow's S3 names them, which no waiting mends."""
_NO_BUCKET = "NO_SUCH_BUCKET"
"""Likewise, of a bucket that is not there."""
_OF_THE_FILE = re.compile(
    r"ACCESS_DENIED|PERMISSION_DENIED|NO_SUCH_KEY|\b40[34]\b(?=\)| Client Error| Forbidden| Not Found)"
)
"""In errors that say nothing of the store."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

Answer = TypeVar("Answer")


class UnansweredError(OSError):
    """A store does not answer, and may do so later."""


def is_of_the_file(error: OSError) -> bool:
    """Whether a store says that the file which it was asked for is not there, or not for us; else it has failed."""
    kinds = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, kinds) or _OF_THE_FILE.search(str(error)) is not None


@dataclass(frozen=True)
class Asker:
    """How one store is asked."""

    store: str
    """As messages name it."""
    patience_s: float
    note: Callable[[str], None] | None = None
    """Told when the store stays away, and when it is back."""
    stop: Callable[[float], bool] | None = None
    """Whether the caller wants to end and waits no longer for a store that has been away for so many seconds."""

    def __call__(self, place: str, call: Callable[[], Answer]) -> Answer:
        """What the store answers; it is asked again while it fails.

        Raises `FileNotFoundError`, `OrchestratorError` for this machine's disk, and `RefusedError`: `unauthorised`,
        `not_found` (no such bucket), or `offline` once it has taken too long; `InterruptedRunError` where it is away
        and the caller wants to end.
        """
        began_s, wait_s, said = time.monotonic(), _FIRST_WAIT_S, False
        while True:
            try:
                answer = call()
            except FileNotFoundError:
                raise
            except (OSError, pa.ArrowException) as error:
                _raise_hopeless(place, error)
                away_s = time.monotonic() - began_s
                if away_s + wait_s > self.patience_s:
                    with store_errors(place):
                        raise
                if self.stop is not None and away_s >= _SAID_S and self.stop(away_s):
                    raise InterruptedRunError(
                        f"stopped while {self.store} did not answer: {first_line(error)}",
                        mend="the same command goes on",
                    ) from None
                if self.note is not None and not said and away_s >= _SAID_S:
                    said = True
                    self.note(f"{self.store} does not answer, and is asked again: {first_line(error)}")
            else:
                if said and self.note is not None:
                    self.note(f"{self.store} answers again")
                return answer
            time.sleep(wait_s * random.uniform(0.5, 1))
            wait_s = min(2 * wait_s, _MOST_WAIT_S)


def _raise_hopeless(place: str, error: Exception) -> None:
    """Raise what no waiting mends."""
    number = error.errno if isinstance(error, OSError) else None
    if number in _NO_ROOM:
        raise OrchestratorError(
            f"this machine's disk cannot be written: {os.strerror(number or 0)}", expected="a disk with room",
            mend="make room, or name a folder on another disk: XDG_CACHE_HOME",
        ) from None  # fmt: skip
    if isinstance(error, PermissionError) or any(word in str(error) for word in _REFUSED):
        raise RefusedError(
            "unauthorised", f"{place} refuses us: {first_line(error)}",
            expected="credentials that may list, read, write and delete there",
            mend="check AWS_PROFILE, AWS_ACCESS_KEY_ID and their like in the environment, and what they may do",
        ) from None  # fmt: skip
    if _NO_BUCKET in str(error):
        raise RefusedError(
            "not_found", f"there is no such bucket for {place}: {first_line(error)}",
            expected="a bucket that is there", mend="make it, or correct storage (--storage)",
        ) from None  # fmt: skip
