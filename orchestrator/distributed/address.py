"""Where a cluster's head is, and the token for it: as Ray looks for both, with what it passes over in silence said."""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.errors import RefusedError
from orchestrator.job import Noted, redacted

_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""What Ray's own commands look at before the address that they are given."""


def agreed(address: str | None) -> str:
    """`http://HOST:PORT`, as given or as the environment says. Raises `RefusedError` where the two disagree."""
    said = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    if address is None:
        if not said:
            raise RefusedError(
                "usage", "it is not said to which cluster", expected="the head's dashboard: http://HOST:8265",
                mend="give it: --address, or export RAY_ADDRESS",
            )  # fmt: skip
        address = next(iter(said.values()))
    place = _checked(address)
    for name, other in said.items():
        if other.rstrip("/") != place:
            raise RefusedError(
                "usage", f"{name} is {redacted(other)}, and the job is for {place}",
                expected="one cluster", mend=f"unset {name}, or give it the same address",
            )  # fmt: skip
    return place


def _checked(address: str) -> str:
    try:
        parts = urlsplit(address)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or True)
    except ValueError:
        known = False
    if not known:
        raise RefusedError(
            "usage", f"{redacted(address)} is no address that jobs are submitted to",
            expected="the head's dashboard, http://HOST:8265 or https://HOST",
            mend="give that; HOST:6379 and ray:// are for programs that run beside the cluster",
        )  # fmt: skip
    if parts.username or parts.password:
        raise RefusedError(
            "usage", f"the address of {parts.hostname} holds a user or a password", expected="http://HOST:PORT alone",
            mend="leave it out: the token comes from RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token",
        )  # fmt: skip
    return address.rstrip("/")


def is_loopback(address: str) -> bool:
    """Whether what is sent there leaves no machine."""
    host = urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# --- the token ---


def unguarded(place: str) -> Noted:
    """The warning of a cluster that lets everybody in."""
    text = f"{place} asks for no token: whoever reaches it can run code there (RAY_AUTH_MODE=token guards it)"
    return Noted(text, is_warning=True)


@dataclass(frozen=True)
class Token:
    """What a guarded cluster wants to see; it is shown nowhere."""

    value: str = field(repr=False)

    @property
    def header(self) -> str:
        """As it is sent."""
        return f"Bearer {self.value}"


def find_token() -> Token | None:
    """The token that Ray would find, None where there is none. Raises `RefusedError` for a file that others can read.

    RAY_AUTH_TOKEN, the file at RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token; the first one counts.
    """
    value = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if value:
        return Token(_one_word(value, "RAY_AUTH_TOKEN"))
    file = _token_file()
    if file is None:
        return None
    value, mode = _read(file)
    if mode & 0o077:
        raise RefusedError(
            "unauthorised", f"the token file {file} can be read by others (mode {mode:04o})",
            expected="mode 0600: whoever has the token can run code on the cluster", mend=f"chmod 600 {file}",
        )  # fmt: skip
    return Token(_one_word(value, f"the token file {file}")) if value else None


def _one_word(value: str, place: str) -> str:
    """The token, as HTTP sends it. Raises `RefusedError`, which does not show it, for what is none."""
    if not re.fullmatch(r"[!-~]+", value):
        raise RefusedError(
            "unauthorised", f"{place} holds something else than a token",
            expected="one line of printable ASCII without blanks, and nothing beside it",
            mend="put the token alone into it: `ray get-auth-token` on the head prints it",
        )  # fmt: skip
    return value


def gives_token() -> bool:
    """Whether Ray would find a token. Raises `RefusedError` for a file that cannot be read; others may, as a pod's."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    file = _token_file()
    return file is not None and bool(_read(file)[0])


def seen_by_others() -> Noted | None:
    """The warning of a token file that others may read, where it is no mounted Secret of a pod, which is a link."""
    file = None if os.environ.get("RAY_AUTH_TOKEN") else _token_file()
    if file is None or file.is_symlink() or not (mode := _read(file)[1]) & 0o077:
        return None
    return Noted(f"the token file {file} can be read by others (mode {mode:04o}): chmod 600 {file}", is_warning=True)


def _token_file() -> Path | None:
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else Path("~/.ray/auth_token").expanduser()
    return file if named or file.is_file() else None


def _read(file: Path) -> tuple[str, int]:
    """What a token file holds, and its mode. Raises `RefusedError`."""
    try:
        return file.read_text(encoding="utf-8-sig").strip(), stat.S_IMODE(file.stat().st_mode)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise RefusedError(
            "unauthorised", f"the token file {file} cannot be read: {why}", expected="a file that holds the token",
            mend="correct RAY_AUTH_TOKEN_PATH",
        ) from None  # fmt: skip
