"""A wire to a server that can be cut and mended: every connection goes through it, and ends when it is cut."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading


class Wire(socketserver.ThreadingTCPServer):
    """`with Wire(host, port) as wire: connect to wire.address`."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Ends)
        self.target = (host, port)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.num_cut = 0
        self._is_cut = False
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.cut()
        self.shutdown()
        self.server_close()

    def cut(self) -> None:
        """End all that goes through, and let nothing through until it is mended."""
        with self._lock:
            self._is_cut = True
            self.num_cut += len(self._open)
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Let through what comes from now on."""
        self._is_cut = False

    def hold(self, *several: socket.socket) -> bool:
        """Keep both ends to be cut; false where the wire is cut."""
        with self._lock:
            if not self._is_cut:
                self._open.update(several)
            return not self._is_cut

    def let_go(self, *several: socket.socket) -> None:
        with self._lock:
            self._open.difference_update(several)


class _Ends(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Wire)
        with socket.create_connection(self.server.target) as there:
            if not self.server.hold(self.request, there):
                return
            back = threading.Thread(target=_pump, args=(there, self.request), daemon=True)
            back.start()
            _pump(self.request, there)
            back.join()
            self.server.let_go(self.request, there)


def _pump(source: socket.socket, to: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(65536):
            to.sendall(part)
    for one in (source, to):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
