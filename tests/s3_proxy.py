"""A proxy in front of an S3 server that fails when it is told to: 500s, cut bodies, silence, gone for a while."""

from __future__ import annotations

import contextlib
import http.client
import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO, Literal
from urllib.parse import urlsplit

Fault = Literal["500", "403", "cut", "silent", "short"]
_DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


_OF_THE_WAY = (
    "transfer-encoding", "content-encoding", "content-length", "content-md5", "expect", "x-amz-trailer",
    "x-amz-decoded-content-length", "x-amz-content-sha256", "x-amz-checksum", "x-amz-sdk-checksum",
)  # fmt: skip
"""Headers on how the body came here: it goes on as it is."""


def _unchunked(source: BinaryIO) -> bytes:
    """The content of chunks, each of which begins with its size in hexadecimal; what follows the last is dropped."""
    content = b""
    while size := int(source.readline().split(b";")[0], 16):
        content += source.read(size)
        source.readline()
    while source.readline().strip():
        pass
    return content


@dataclass
class Proxy:
    """What goes wrong next."""

    url: str
    faults: list[tuple[str, Fault]] = field(default_factory=list)
    """(method, what happens to the next such request), in this order."""
    away_until: float = 0.0
    """By the monotonic clock: until then connections are closed without a word."""
    always: Fault | None = None
    """What happens to every request, as long as it is set."""
    on_request: Callable[[str, str], None] | None = None
    """Called with the method and the path of each request, before it is answered."""
    num_requests: int = 0

    def fail(self, method: str, fault: Fault, times: int = 1) -> None:
        """So happens to the next requests of that method."""
        self.faults += [(method, fault)] * times

    def fault_of(self, method: str) -> Fault | None:
        """What happens to this request."""
        self.num_requests += 1
        if self.always is not None:
            return self.always
        for i, (failing, fault) in enumerate(self.faults):
            if failing == method:
                del self.faults[i]
                return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no trace among what a person reads."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serve(server: str) -> Iterator[Proxy]:
    """A proxy on 127.0.0.1 in front of `server`."""
    target, lock = urlsplit(server).netloc, threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self._body()
            if proxy.on_request is not None:
                proxy.on_request(self.command, self.path)
            if time.monotonic() < proxy.away_until:
                self.close_connection = True
                return
            with lock:
                fault = proxy.fault_of(self.command)
            if fault == "silent":
                time.sleep(3)
            if fault == "silent" or (fault == "cut" and self.command == "PUT"):  # it never arrives
                self.close_connection = True
                return
            if fault in ("500", "403"):
                self._answer(int(fault), {}, _DENIED if fault == "403" else b"")
                return
            if fault == "short":
                body = body[: len(body) // 2]
            headers = {key: value for key, value in self.headers.items() if not key.lower().startswith(_OF_THE_WAY)}
            headers["Content-Length"] = str(len(body))
            connection = http.client.HTTPConnection(target, timeout=10)
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            self._answer(answer.status, dict(answer.getheaders()), content, cut=fault == "cut")

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = _unchunked(self.rfile)
            return _unchunked(io.BytesIO(body)) if self.headers.get("Content-Encoding") == "aws-chunked" else body

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

        def _answer(self, status: int, headers: dict[str, str], content: bytes, cut: bool = False) -> None:
            self.send_response_only(status)
            size = headers.get("Content-Length", str(len(content))) if self.command == "HEAD" else str(len(content))
            for key, value in headers.items():
                if key.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(key, value)
            self.send_header("Content-Length", size)
            self.end_headers()
            if cut:
                content = content[: len(content) // 2]
                self.close_connection = True
            with contextlib.suppress(OSError):  # the client has given up
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    listening = _Server(("127.0.0.1", 0), Handler)
    proxy = Proxy(f"http://127.0.0.1:{listening.server_port}")
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield proxy
    listening.shutdown()
    listening.server_close()
    thread.join()
