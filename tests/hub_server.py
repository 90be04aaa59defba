"""A Hub on 127.0.0.1 for the real client: repositories in memory, every request recorded.

Large files answer with a redirect to another origin, as the real Hub does (localhost against 127.0.0.1).
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

LARGE = (".safetensors", ".bin", ".gguf")


@dataclass
class Repository:
    """One revision of files, under a commit sha of 40 hex digits."""

    files: dict[str, bytes]
    gated: bool = False
    files_gated: bool = False
    """The real Hub may answer model_info of a gated repository and refuse its files."""
    pipeline_tag: str = ""
    downloads: int = 0

    @property
    def sha(self) -> str:
        digest = hashlib.sha1(repr(sorted(self.files.items())).encode())
        return digest.hexdigest()

    @property
    def num_parameters(self) -> int | None:
        """By the header of its safetensors file, as the Hub counts them."""
        content = self.files.get("model.safetensors")
        if content is None:
            return None
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return sum(math.prod(one["shape"]) for name, one in header.items() if name != "__metadata__")


@dataclass
class Hub:
    """What is served, and what was asked for."""

    url: str = ""
    other_url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, Range header)"""
    failures: int = 0
    """So many of the next requests get status 503."""
    faults: list[str] = field(default_factory=list)
    """What happens to each of the next requests: '', a status, `cut` (half of the body), `slow`, or `away`: none is
    answered, and the connection is closed."""

    def fail(self, fault: str, after: int = 0, times: int = 1) -> None:
        """So happens to some requests, after so many that are answered as they should be."""
        self.faults += [""] * after + [fault] * times

    def asked_for(self, suffix: str) -> list[tuple[str, str, str]]:
        return [one for one in self.requests if one[1].split("?")[0].endswith(suffix)]


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub that is there while the context lasts."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_POST(self) -> None:
            asked = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
            self._asked_paths = asked.get("paths", [])
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, self.path, self.headers.get("Range", "")))
            if self.headers.get("Authorization") == "Bearer hf_expired":  # whatever it asks for, as the real Hub does
                expired = {"X-Error-Message": "Invalid credentials in Authorization header"}
                return self._send(401, b"", with_body, expired)
            if hub.failures:
                hub.failures -= 1
                return self._send(503, b"try again", with_body)
            self._fault = hub.faults.pop(0) if hub.faults else ""
            if self._fault == "away":
                self.close_connection = True
                return None
            if self._fault == "slow":
                time.sleep(2)
            if self._fault.isdigit():
                return self._send(int(self._fault), b"try again", with_body)
            parts = path.strip("/").split("/")
            if parts == ["api", "models"]:
                return self._search(parse_qs(urlsplit(self.path).query), with_body)
            if parts[:2] == ["api", "models"]:
                return self._info("/".join(parts[2:4]), parts[4:], with_body)
            if parts[:2] == ["api", "datasets"]:  # kept under datasets/org/name, as their files' addresses are
                return self._info("/".join(parts[1:4]), parts[4:], with_body)
            if parts[0] == "large":
                name, _, file = "/".join(parts[1:]).partition("/resolve/")
                content = hub.repositories[name].files[file]
                return self._send_file(content, with_body)
            if "resolve" in parts:
                at = parts.index("resolve")
                return self._resolve("/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2 :]), with_body)
            return self._error(404, "EntryNotFound", with_body)

        def _find(self, name: str, revision: str, with_body: bool) -> Repository | None:
            found = hub.repositories.get(name)
            if found is None:
                self._error(404, "RepoNotFound", with_body)
            elif found.gated:
                self._error(403, "GatedRepo", with_body)
            elif revision not in ("main", found.sha):
                self._error(404, "RevisionNotFound", with_body)
            else:
                return found
            return None

        def _search(self, asked: dict[str, list[str]], with_body: bool) -> None:
            """Two models a page, whatever the limit, as the real Hub has pages too."""
            tag, start = asked.get("pipeline_tag", [""])[0], int(asked.get("cursor", ["0"])[0])
            if tag.startswith("no-such"):
                return self._error(400, "BadRequest", with_body)
            edges = dict(part.split(":") for part in asked.get("num_parameters", [""])[0].split(",") if part)
            found = []
            for name, one in hub.repositories.items():
                num = one.num_parameters
                known = num is not None and float(edges.get("min", 0)) <= num <= float(edges.get("max", "inf"))
                if tag == one.pipeline_tag and (known or not edges):
                    found.append((one.downloads, name, num, one.gated or one.files_gated))
            found.sort(reverse=True)
            page = [
                {"_id": name, "id": name, "gated": "manual" if gated else False}
                | ({} if num is None else {"safetensors": {"parameters": {"F32": num}, "total": num}})
                for _, name, num, gated in found[start : start + 2]
            ]
            more = f"{hub.url}/api/models?{urlencode({**asked, 'cursor': [start + 2]}, doseq=True)}"
            link = {"Link": f'<{more}>; rel="next"'} if start + 2 < len(found) else {}
            self._send(200, json.dumps(page).encode(), with_body, {"Content-Type": "application/json", **link})

        def _info(self, name: str, parts: list[str], with_body: bool) -> None:
            if len(parts) > 1 and parts[0] == "tree":
                return self._tree(name, parts[1], "/".join(parts[2:]), with_body)
            if len(parts) > 1 and parts[0] == "paths-info":
                return self._paths(name, parts[1], with_body)
            revision = parts[1] if len(parts) > 1 and parts[0] == "revision" else "main"
            repository = self._find(name, revision, with_body)
            if repository is None:
                return
            siblings = [{"rfilename": f, "size": len(c), "blobId": "0"} for f, c in repository.files.items()]
            info: dict[str, Any] = {
                "_id": "1", "id": name.removeprefix("datasets/"), "sha": repository.sha, "private": False,
                "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings,
                "lastModified": "2026-01-01T00:00:00.000Z",
            }  # fmt: skip
            self._send_json(info, with_body)

        def _tree(self, name: str, revision: str, folder: str, with_body: bool) -> None:
            repository = self._find(name, revision, with_body)
            if repository is not None:
                prefix = f"{folder}/" if folder else ""
                inside = [file for file in repository.files if file.startswith(prefix)]
                if "recursive=false" in self.path.lower():
                    folders = {
                        prefix + file[len(prefix) :].split("/")[0] for file in inside if "/" in file[len(prefix) :]
                    }
                    inside = [file for file in inside if "/" not in file[len(prefix) :]]
                else:
                    folders = set()
                found = [_entry(file, repository.files[file]) for file in inside]
                found += [{"type": "directory", "path": path, "oid": "0"} for path in sorted(folders)]
                self._send_json(found, with_body)

        def _paths(self, name: str, revision: str, with_body: bool) -> None:
            repository = self._find(name, revision, with_body)
            if repository is not None:
                files = repository.files
                found = [_entry(path, files[path]) for path in self._asked_paths if path in files]
                folders = {path for path in self._asked_paths if any(f.startswith(f"{path}/") for f in files)}
                found += [{"type": "directory", "path": path, "oid": "0"} for path in sorted(folders)]
                self._send_json(found, with_body)

        def _send_json(self, value: object, with_body: bool) -> None:
            self._send(200, json.dumps(value).encode(), with_body, {"Content-Type": "application/json"})

        def _resolve(self, name: str, revision: str, file: str, with_body: bool) -> None:
            repository = self._find(name, revision, with_body)
            if repository is None:
                return
            if repository.files_gated:
                return self._error(403, "GatedRepo", with_body)
            content = repository.files.get(file)
            commit = {"X-Repo-Commit": repository.sha}
            if content is None:
                return self._error(404, "EntryNotFound", with_body, commit)
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            if file.endswith(LARGE):
                where = {"Location": f"{hub.other_url}/large/{name}/resolve/{file}"}
                large = {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content)), **where, **commit}
                return self._send(302, b"", with_body, large)
            return self._send(200, content, with_body, {"ETag": etag, **commit})

        def _send_file(self, content: bytes, with_body: bool) -> None:
            wanted = self.headers.get("Range", "")
            if not wanted.startswith("bytes="):
                return self._send(200, content, with_body)
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first or 0), min(int(last) if last else len(content) - 1, len(content) - 1)
            span = {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
            return self._send(206, content[start : end + 1], with_body, span)

        def _error(self, status: int, code: str, with_body: bool, headers: dict[str, str] | None = None) -> None:
            self._send(status, b"", with_body, {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

        def _send(self, status: int, body: bytes, with_body: bool, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.end_headers()
            if getattr(self, "_fault", "") == "cut":
                body, self.close_connection = body[: len(body) // 2], True
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    port = server.server_address[1]
    hub.url, hub.other_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
