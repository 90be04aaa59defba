"""A cluster's head, asked over HTTP: the jobs that it runs, their output, what is delivered to its nodes.

The Jobs API that every Ray since 2.0 answers, without Ray's own client: so a laptop needs neither Ray nor aiohttp, a
refused token is told at once, and no variable of the environment sends a job to another cluster in silence.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from orchestrator.distributed.address import Token, agreed, find_token, is_loopback, unguarded
from orchestrator.errors import OrchestratorError, RefusedError, first_line
from orchestrator.job import Noted, Report

_TIMEOUT = httpx2.Timeout(30.0, connect=10.0)
_QUIET_S = 8.0
"""A job tells something every two seconds: a stream that is silent for longer than this is opened again."""
_OF_CONNECTIONS = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "SSL_CERT_DIR", "SSL_CERT_FILE")
_MAX_PACKAGE_BYTES = 100 * 2**20
_STATES = {
    "PENDING": "waiting", "RUNNING": "running", "SUCCEEDED": "finished", "FAILED": "failed", "STOPPED": "stopped",
}  # fmt: skip


@dataclass(frozen=True)
class ClusterJob:
    """A job as the cluster knows it."""

    id: str
    state: str
    """`waiting`, `running`, `finished`, `failed` or `stopped`."""
    message: str
    metadata: Mapping[str, str]
    started: float
    """Seconds since 1970, 0 where it is not known."""
    ended: float
    node_id: str
    """Of the node that its driver runs on, '' as long as none does."""

    @property
    def is_over(self) -> bool:
        """Whether its state is the last one."""
        return self.state in ("finished", "failed", "stopped")


@dataclass(frozen=True)
class Head:
    """The head of a cluster that lets us in."""

    address: str
    ray_version: str
    _client: httpx2.Client = field(repr=False)

    # --- jobs ---

    def jobs(self) -> list[ClusterJob]:
        """All that were ever submitted to this cluster. Raises `OrchestratorError`."""
        answer = self._ask("GET", "/api/jobs/")
        return [_job(one) for one in self._content(answer) if one.get("submission_id")]

    def job(self, id: str) -> ClusterJob | None:
        """The job of that id, None where the cluster knows none."""
        answer = self._ask("GET", f"/api/jobs/{id}", but=(404,))
        return None if answer.status_code == 404 else _job(self._content(answer))

    def submit(
        self, id: str, entrypoint: str, packages: list[str], metadata: Mapping[str, str], environment: Mapping[str, str]
    ) -> bool:
        """Start a job; False where there is one of that id. What is given here, everybody can read: no secret."""
        runtime_env = {"py_modules": packages, "env_vars": dict(environment)}
        body = {
            "entrypoint": entrypoint,
            "submission_id": id,
            "runtime_env": runtime_env,
            "metadata": dict(metadata),
        }
        answer = self._ask("POST", "/api/jobs/", but=(400, 500), json=body)
        if answer.status_code == 200:
            return True
        if "already exists" in answer.text:
            return False
        raise self._unexpected(answer)

    def stop(self, id: str) -> None:
        """Ask a job to stop; one that is over stays as it is."""
        self._ask("POST", f"/api/jobs/{id}/stop", but=(404,))

    # --- what a job says ---

    def lines(self, id: str, is_over: bool = True) -> list[str]:
        """All that a job has written until now; of one that still writes, as far as it has ended its lines.

        Raises `OrchestratorError`.
        """
        text = str(self._content(self._ask("GET", f"/api/jobs/{id}/logs"))["logs"])
        text = text if is_over else text[: text.rfind("\n") + 1]
        return text.removesuffix("\n").split("\n") if text else []  # at no other character, as `stream` does

    def stream(self, job: ClusterJob) -> Iterator[str]:
        """The lines of a running job from the first one on, as they are written; it ends when nothing more comes.

        That is not the end of the job: who follows asks for its state, and opens the stream again.
        """
        params = {"node_id": job.node_id, "filename": f"job-driver-{job.id}.log", "lines": "-1"}
        timeout = httpx2.Timeout(_QUIET_S, connect=10.0)
        rest, newlines = "", io.IncrementalNewlineDecoder(None, translate=True)  # as Ray reads what `lines` gives
        try:
            with self._client.stream("GET", "/api/v0/logs/stream", params=params, timeout=timeout) as answer:
                if answer.status_code != 200:
                    return
                for text in answer.iter_text():
                    *lines, rest = (rest + newlines.decode(text)).split("\n")
                    yield from lines
        except httpx2.HTTPError:
            return

    # --- what is delivered ---

    def upload(self, package: Path) -> str:
        """Where the nodes find a zip file; the same content is uploaded once. Raises `RefusedError` for a large one."""
        size = package.stat().st_size
        if size > _MAX_PACKAGE_BYTES:
            raise RefusedError(
                "plugin", f"{package.name} has {size / 2**20:.0f} MB, which is too much to be delivered with a job",
                expected=f"{_MAX_PACKAGE_BYTES // 2**20} MB at most",
                mend="leave data and weights out of the distribution, or install it on every node",
            )  # fmt: skip
        content = package.read_bytes()
        name = f"_ray_pkg_{hashlib.sha256(content).hexdigest()}.zip"
        there = self._ask("GET", f"/api/packages/gcs/{name}", but=(404,))  # which keeps it from being cleared away
        if there.status_code == 404:
            self._ask("PUT", f"/api/packages/gcs/{name}", content=content)
        return f"gcs://{name}"

    # --- asking ---

    def _ask(self, method: str, path: str, but: tuple[int, ...] = (), **more: Any) -> httpx2.Response:
        """The answer, whose status is 200 or one of `but`."""
        try:
            answer = self._client.request(method, path, **more)
        except httpx2.HTTPError as error:
            raise AwayError(
                f"the cluster at {self.address} does not answer: {type(error).__name__}: {first_line(error)}",
                mend="check the connection; a job that runs there goes on, and the same command finds it again",
            ) from None
        if answer.status_code in (401, 403):
            raise refused_token(self.address, given=True)
        if answer.status_code != 200 and answer.status_code not in but:
            raise self._unexpected(answer)
        return answer

    def _content(self, answer: httpx2.Response) -> Any:
        """What is said in JSON. Raises `AwayError` for something else: a proxy's own page, say."""
        try:
            return answer.json()
        except ValueError:
            said = (answer.text.strip().splitlines() or [""])[0]
            raise AwayError(
                f"what answers at {self.address} is no Ray cluster: {said[:200]!r} is no JSON",
                mend="look at what stands before the head: a proxy that shows a page of its own?",
            ) from None

    def _unexpected(self, answer: httpx2.Response) -> OrchestratorError:
        lines = answer.text.strip().splitlines() or [""]
        # A proxy whose head is started again answers so, and Ray itself where its memory of jobs is away.
        kind = AwayError if answer.status_code >= 500 else OrchestratorError
        return kind(
            f"the cluster at {self.address} answers with status {answer.status_code}: {lines[-1][:300]}",
            mend="look at the dashboard's log on the head node",
        )


class AwayError(OrchestratorError):
    """The head does not answer, which may pass."""


def open_head(address: str | None, report: Report) -> Head:
    """The head at `http://HOST:PORT`, once it has let us in. Raises `RefusedError` at once where it does not.

    The token is sent only to a head that asks for one. That a head asks for none, or that the token goes over a network
    in clear text, is reported.
    """
    place = agreed(address)
    client = _client(place)
    try:
        answer = client.get("/api/version")
        token: Token | None = None
        if answer.status_code in (401, 403):
            token = find_token()
            if token is None:
                raise refused_token(place, given=False)
            client.headers["Authorization"] = token.header
            answer = client.get("/api/version")
        if answer.status_code in (401, 403):
            raise refused_token(place, given=True)
        version = str(answer.json()["ray_version"])
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise RefusedError(
            "resources", f"there is no Ray cluster at {place}: {_why(error)}",
            expected="the address of the head's dashboard, http://HOST:8265",
            mend="correct --address, or start the cluster: ray start --head --include-dashboard=true",
        ) from None  # fmt: skip
    if token is None:
        report(unguarded(place))
    elif urlsplit(place).scheme == "http" and not is_loopback(place):
        text = f"the token goes to {place} unencrypted: take a tunnel (ssh -L 8265:localhost:8265 HEAD) or https"
        report(Noted(text, is_warning=True))
    return Head(place, version, client)


def _client(place: str) -> httpx2.Client:
    """Of the head at this address. Raises `RefusedError` where this machine's settings of proxies let none be made."""
    trusts = not is_loopback(place)
    try:
        return httpx2.Client(base_url=place, timeout=_TIMEOUT, trust_env=trusts)
    except (ImportError, ValueError, OSError, httpx2.InvalidURL) as error:
        names = sorted(name for name in os.environ if name.upper() in _OF_CONNECTIONS) if trusts else []
        raise RefusedError(
            "usage", f"no connection to {place} can be made: {first_line(error)}",
            expected="an address, and settings of proxies and certificates, that an HTTP client takes",
            mend=f"correct {', '.join(names) or '--address'}" + (
                ", or unset them; NO_PROXY names hosts that need none" if names else ""
            ),
        ) from None  # fmt: skip


def refused_token(address: str, given: bool) -> RefusedError:
    """The refusal for a head that wants another token, or one at all."""
    return RefusedError(
        "unauthorised",
        f"the cluster at {address} " + ("refuses the token" if given else "wants a token, and none is given"),
        expected="the token that the cluster was started with",
        mend="export RAY_AUTH_TOKEN_PATH with a file that holds it (mode 0600), or put it into ~/.ray/auth_token; "
        "its administrator has it: `ray get-auth-token`, or the Secret that the cluster is given",
    )


def _why(error: Exception) -> str:
    if isinstance(error, httpx2.ConnectError):
        return first_line(error).removeprefix("[Errno 111] ")
    if isinstance(error, httpx2.HTTPError) and not isinstance(error, httpx2.RemoteProtocolError):
        return f"{type(error).__name__} {first_line(error)}".strip()
    return "what answers there is no dashboard of Ray's"


def _job(tree: Mapping[str, Any]) -> ClusterJob:
    return ClusterJob(
        id=str(tree["submission_id"]),
        state=_STATES.get(str(tree["status"]), str(tree["status"]).lower()),
        message=str(tree.get("message") or ""),
        metadata={str(key): str(value) for key, value in (tree.get("metadata") or {}).items()},
        started=(tree.get("start_time") or 0) / 1000,
        ended=(tree.get("end_time") or 0) / 1000,
        node_id=str(tree.get("driver_node_id") or ""),
    )


def wait_until_over(head: Head, id: str, timeout_s: float, poll_s: float = 0.5) -> ClusterJob | None:
    """The job once its state is the last one; as it is after `timeout_s`, None where the cluster knows none.

    Raises `AwayError` where the head does not answer even then.
    """
    until = time.monotonic() + timeout_s
    while True:
        try:
            job = head.job(id)
            if job is None or job.is_over or time.monotonic() > until:
                return job
        except AwayError:
            if time.monotonic() > until:
                raise
        time.sleep(poll_s)
