"""Where a cluster's head is, the token for it, and what answers there."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.distributed.address import agreed, find_token, is_loopback, seen_by_others
from orchestrator.distributed.head import open_head
from orchestrator.errors import RefusedError


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_the_environment_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own client takes RAY_ADDRESS and drops the address that it was given."""
    with pytest.raises(RefusedError, match="not said to which cluster"):
        agreed(None)
    assert agreed("http://head:8265/") == "http://head:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265/")
    assert agreed(None) == agreed("http://head:8265") == "http://head:8265"
    with pytest.raises(
        RefusedError, match="RAY_ADDRESS is http://head:8265/, and the job is for http://other:8265"
    ) as caught:
        agreed("http://other:8265")
    assert (caught.value.reason, caught.value.mend) == ("usage", "unset RAY_ADDRESS, or give it the same address")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://third:8265")
    with pytest.raises(RefusedError, match="RAY_API_SERVER_ADDRESS is http://third"):
        agreed("http://head:8265")


@pytest.mark.parametrize(
    "address", ["head:6379", "ray://head:10001", "auto", "http://", "http://head:port", "ftp://head"]
)
def test_what_is_no_dashboard_is_refused(address: str) -> None:
    with pytest.raises(RefusedError, match="is no address that jobs are submitted to") as caught:
        agreed(address)
    assert "http://HOST:8265" in caught.value.expected


def test_a_password_in_the_address_is_refused_and_not_shown() -> None:
    with pytest.raises(RefusedError, match="the address of head holds a user or a password") as caught:
        agreed("http://me:hunter2@head:8265")
    assert "hunter2" not in str(caught.value)


def test_loopback() -> None:
    assert all(map(is_loopback, ("http://127.0.0.1:1", "http://localhost:8265", "http://[::1]:8265")))
    assert not any(map(is_loopback, ("http://10.0.0.1:8265", "http://head:8265")))


def test_the_token_as_ray_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_token() is None
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("of-the-home\n")
    with pytest.raises(RefusedError, match=r"can be read by others") as caught:
        find_token()
    assert (caught.value.reason, caught.value.mend) == ("unauthorised", f"chmod 600 {file}")
    file.chmod(0o600)
    found = find_token()
    assert found is not None
    assert found.header == "Bearer of-the-home"
    assert "of-the-home" not in repr(found)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(RefusedError, match="none cannot be read: No such file"):
        find_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-the-environment")
    found = find_token()
    assert found is not None
    assert found.value == "of-the-environment"


@pytest.mark.parametrize("content", ["a-secret\n# of May\n", "a secret", "a-s\0ecret", "gehe\u00efm"])
def test_what_is_no_token_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str
) -> None:
    """HTTP could not send it; its library shows it in its error."""
    file = tmp_path / "token"
    file.write_text(content)
    file.chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    with pytest.raises(RefusedError, match=r"the token file .* holds something else than a token") as caught:
        find_token()
    assert caught.value.reason == "unauthorised"
    assert not any(word in str(caught.value.as_dict()) for word in ("secret", "ecret", "gehe"))


def test_a_token_file_from_windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_bytes(b"\xef\xbb\xbfa-secret\r\n")
    file.chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    found = find_token()
    assert found is not None
    assert found.value == "a-secret"


@pytest.mark.parametrize(
    ("name", "value"), [("ALL_PROXY", "socks5://127.0.0.1:1"), ("HTTPS_PROXY", "nonsense://127.0.0.1:1")]
)
def test_settings_of_proxies_that_let_no_connection_be_made_are_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(RefusedError, match=r"no connection to https://head\.invalid can be made") as caught:
        open_head("https://head.invalid", print)
    assert name in caught.value.mend


class _Open(http.server.BaseHTTPRequestHandler):
    """What a head that asks for no token says, or a server that is none."""

    body = b'{"version": "4", "ray_version": "2.60.0"}'

    def do_GET(self) -> None:
        self.server.asked.append(dict(self.headers))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        pass


class _NoHead(_Open):
    body = b"<html>"


@contextlib.contextmanager
def served(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[http.server.ThreadingHTTPServer]:
    """A server on 127.0.0.1 that answers so, while the context lasts."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as one:
        thread = threading.Thread(target=one.serve_forever)
        thread.start()
        yield one
        one.shutdown()
        thread.join()


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[http.server.ThreadingHTTPServer]:
    with served(request.param) as one:
        one.asked = []  # type: ignore[attr-defined]
        yield one


def test_a_token_file_that_others_may_read_is_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a driver joins; in a pod it is a Secret that is mounted, as a link, and nobody else is there."""
    token = tmp_path / "token"
    token.write_text("f" * 64)
    token.chmod(0o640)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    told = seen_by_others()
    assert told is not None
    assert told.text.endswith(f"can be read by others (mode 0640): chmod 600 {token}")
    (tmp_path / "mounted").symlink_to(token)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "mounted"))
    assert seen_by_others() is None
    token.chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert seen_by_others() is None


@pytest.mark.parametrize("server", [_Open], indirect=True)
def test_a_head_that_asks_for_no_token_gets_none_and_is_warned_of(
    server: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-secret")
    noted: list[object] = []
    assert open_head(f"http://127.0.0.1:{server.server_port}", noted.append).ray_version == "2.60.0"
    assert "asks for no token: whoever reaches it can run code there" in str(noted[0])
    assert "a-secret" not in str(server.asked)  # type: ignore[attr-defined]


@pytest.mark.parametrize("server", [_NoHead], indirect=True)
def test_what_is_no_head_is_refused(server: http.server.ThreadingHTTPServer) -> None:
    with pytest.raises(RefusedError, match=r"no Ray cluster at .*: what answers there is no dashboard") as caught:
        open_head(f"http://127.0.0.1:{server.server_port}", print)
    assert caught.value.reason == "resources"


def test_where_nothing_listens_it_is_said_at_once() -> None:
    with pytest.raises(RefusedError, match=r"there is no Ray cluster at http://127\.0\.0\.1:1: Connection refused"):
        open_head("http://127.0.0.1:1", print)
