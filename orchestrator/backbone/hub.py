"""Questions to the Hub: asked again where that helps, and what the client raises told as a refusal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from orchestrator.errors import RefusedError, first_line

_RETRIES_S = (0.3, 1.0)
_TOO_MANY = 429
_LONGEST_WAIT_S = 30.0
"""Of what the Hub asks for who has asked too often."""

T = TypeVar("T")


def ask_hub(source: str, question: Callable[[], T]) -> T:
    """The Hub's answer; its refusals become ours, and a connection that fails is tried again."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    for pause_s in (*_RETRIES_S, None):
        try:
            return question()
        except GatedRepoError as error:
            raise RefusedError(
                "gated",
                f"{source} asks for its licence to be accepted first",
                mend="accept it on the repository's page, then run: hf auth login",
            ) from error
        except RevisionNotFoundError as error:
            raise RefusedError(
                "bad_revision",
                f"{source}: the repository has no such revision",
                expected="a branch, tag or full commit sha behind the @",
                mend="leave the @revision out for the newest commit",
            ) from error
        except RepositoryNotFoundError as error:
            raise RefusedError(
                "not_found",
                f"there is no directory {source}, and the Hub has no such repository, "
                "or it is private and you are not logged in",
                expected="org/name[@revision], or a local directory",
                mend="correct the name, or run: hf auth login",
            ) from error
        except HFValidationError as error:
            raise RefusedError(
                "not_found",
                f"{source} is no repository name: {error}",
                expected="org/name[@revision], or a local directory",
                mend="correct the name, or the path",
            ) from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise RefusedError(
                    "unauthorised",
                    f"the Hub did not accept the token for {source} (status {status})",
                    mend="run: hf auth login",
                ) from error
            if (status < 500 and status != _TOO_MANY) or pause_s is None:
                raise
            pause_s = max(pause_s, min(_asked_wait_s(error.response.headers), _LONGEST_WAIT_S))
        except HTTPError:
            if pause_s is None:
                raise
        time.sleep(pause_s)
    raise AssertionError("unreachable")


def _asked_wait_s(headers: Mapping[str, str]) -> float:
    """What an answer says of when to come again; 0 where it says nothing, or a date."""
    try:
        return max(0.0, float(headers.get("Retry-After", 0)))
    except ValueError:
        return 0.0


def offline(source: str, error: Exception) -> RefusedError:
    """The refusal for a Hub that cannot be reached, with the client's error."""
    return RefusedError(
        "offline",
        f"there is no directory {source}, and the Hub cannot be asked about it: "
        f"{type(error).__name__}: {first_line(error)}",
        mend="check the connection and HF_ENDPOINT, or give a local directory",
    )
