"""Joining a cluster, or starting one here; a token that it refuses is said at once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.distributed.address import gives_token, is_loopback, seen_by_others, unguarded
from orchestrator.distributed.events import EventQueue
from orchestrator.distributed.leftovers import end_with_driver
from orchestrator.errors import RefusedError, first_line
from orchestrator.job import Plan, Report, holds_secret

_PASSED_ON = (
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_HUB_DISABLE_XET",
    "OMP_WAIT_POLICY",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_DEFAULT_REGION",
)  # never a token: Ray shows these to all


@contextlib.contextmanager
def joined(plan: Plan, report: Report, num_cpus: int | None = None, dashboard: bool | None = False) -> Iterator[bool]:
    """Connected to the cluster at the plan's `scaling.address`, or to one that is started here for it.

    A cluster that was there is left at the end. One that is started here has `num_cpus` cores, by default what the plan
    takes, and Ray's dashboard where `dashboard` says so (None: where it is installed). It serves the later calls of
    this process too, as far as its cores suffice, since a start takes some 3 s; Ray stops it when the process ends.
    That a cluster beyond this machine asks for no token is reported. Yields whether the connection is ours, and not one
    that the caller had made.
    """
    address = plan.job.scaling.address
    here = address in (None, "local")
    num_cpus = num_cpus or _num_cpus(plan)
    cores = _started.get(ray.get_runtime_context().gcs_address) if ray.is_initialized() else None
    if cores is not None and (not here or cores < num_cpus):
        shut_down()
    if ray.is_initialized():
        yield cores is not None
        return
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the command line's own process
    for name in _of_the_job():
        environment.pop(name, None)
    for name in [name for name, value in environment.items() if holds_secret(value)]:
        environment.pop(name)  # processes of a cluster that starts here have it from this one
        if not here:
            raise RefusedError(
                "usage", f"{name} holds a password or a key, and Ray shows to all what it passes on to workers",
                expected="a place alone",
                mend=f"take it out of {name} here, and set it where the nodes are started: their own environment",
            )  # fmt: skip
    quiet: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {"env_vars": environment},
    }
    with contextlib.ExitStack() as leaving:
        try:
            if here:
                with _for_us_alone(Path("~/.ray/auth_token").expanduser()), _own_signals():
                    ray.init(
                        address="local",
                        num_cpus=num_cpus,
                        include_dashboard=dashboard,
                        **quiet,
                    )
                _started.clear()
                _started[ray.get_runtime_context().gcs_address] = num_cpus
                _watching.extend(end_with_driver())
            else:
                leaving.enter_context(_joined_at(str(address), report, quiet))
        except (ConnectionError, ValueError) as error:
            raise _no_cluster(address, first_line(error)) from None
        yield True


@contextlib.contextmanager
def _joined_at(address: str, report: Report, settings: Mapping[str, Any]) -> Iterator[None]:
    where = _resolved(address)
    guarded = _is_guarded(where)
    with _in_mode(guarded):
        with _own_signals():
            ray.init(address=address, **settings)
        try:
            if guarded is False and not is_loopback(f"http://{where}"):
                report(unguarded(where))
            elif guarded and (seen := seen_by_others()) is not None:
                report(seen)
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _for_us_alone(token: Path) -> Iterator[None]:
    """Ray makes a token for a cluster of this machine, and a file of it that every user can read: ours alone then."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # there is none, or it is somebody else's
            if token.stat().st_mode & 0o077:
                token.chmod(0o600)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Puts the caller's handlers of SIGTERM and SIGINT back after `ray.init`, which replaces them by its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if callable(handler):
                    signal.signal(number, handler)


def _of_the_job() -> list[str]:
    """Variables that the job which this process drives has set for its workers: Ray takes each of one place alone."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return list((job.get("runtime_env") or {}).get("env_vars") or {})


_started: dict[str, int] = {}
"""The address of the cluster that this process has started, if it has, and its cores. Another one is the caller's."""

_watching: list[subprocess.Popen[bytes]] = []
"""Processes that end what is left of such clusters, should this one be killed."""


def shut_down() -> None:
    """Leave Ray; with this process go all that it has started on the cluster."""
    _started.clear()
    ray.shutdown()
    for watch in _watching:
        if watch.stdin is not None:
            watch.stdin.close()
    _watching[:] = [watch for watch in _watching if watch.poll() is None]


def _num_cpus(plan: Plan) -> int:
    return plan.num_workers * max(1, plan.threads_per_worker) + plan.num_extractors * max(1, plan.extractor_threads)


def event_queue() -> Any:
    """The handle of a new queue: on the driver's node, whose end ends the driver too, and started again if it dies."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
    return ray.remote(**options)(EventQueue).remote()


# --- whether the cluster lets us in ---

_PROBE = """
import sys
from ray._raylet import GcsClient
GcsClient(address=sys.argv[1])
"""
"""Ray itself asks for 20 s, prints a raw line a second, and in the end does not tell why."""
_PROBE_TIMEOUT_S = 30.0
_MODE = "RAY_AUTH_MODE"
_REFUSED = ("AuthenticationError", "InvalidAuthToken", "Unauthenticated", "couldn't find an authentication token")


def _resolved(address: str) -> str:
    """HOST:PORT of the cluster that Ray would join for `auto`; else, or where it finds none, the address as it is."""
    if address != "auto":
        return address
    from ray._private import services  # noqa: PLC0415  # its public door looks and joins in one

    with contextlib.suppress(Exception):  # then Ray's own words
        return str(services.get_ray_address_from_environment(address, None))
    return address


def _is_guarded(address: str) -> bool | None:
    """Whether the cluster at HOST:PORT wants a token, and takes ours; None where only Ray can tell.

    Raises `RefusedError` where nothing answers, or where it wants another token.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")  # of IPv6
    if not host or not port.isdecimal() or "/" in address:  # auto, or Ray Client's ray://
        return None
    try:
        socket.create_connection((host, int(port)), timeout=_PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise _no_cluster(address, error.strerror or str(error)) from None
    mode = os.environ.get(_MODE) or "token"
    if mode not in ("token", "disabled"):
        return None
    lets_in_all = _lets_in(address, "disabled")
    if lets_in_all is not False:
        return None if lets_in_all is None else False
    given = mode == "token" and gives_token()
    if given and _lets_in(address, "token") is not False:
        return True
    raise RefusedError(
        "unauthorised",
        f"the Ray cluster at {address} refuses the token"
        if given
        else f"the Ray cluster at {address} wants a token, and none is given",
        expected="the token that the cluster was started with",
        mend="export RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH with a file that holds it (mode 0600); "
        "its administrator has it: `ray get-auth-token`, or the Secret that the cluster is given",
    )


def _lets_in(address: str, mode: str) -> bool | None:
    """Whether the cluster lets a process in that is in this mode; None where it cannot be told."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, address], capture_output=True, text=True, errors="replace", check=False,
            timeout=_PROBE_TIMEOUT_S, env={**os.environ, _MODE: mode},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None
    if done.returncode and any(word in done.stderr for word in _REFUSED):
        return False
    return None if done.returncode else True


@contextlib.contextmanager
def _in_mode(guarded: bool | None) -> Iterator[None]:
    """As the cluster is: Ray gives a token where `RAY_AUTH_MODE` says so, and else none that there may be.

    A process that asks for tokens joins a cluster that has none, and then hears of none of its actors; Ray itself has
    it ask for them once it finds the file which an earlier start on this machine has left.
    """
    if guarded is None:
        yield
        return
    from ray._raylet import Config  # type: ignore[attr-defined]  # noqa: PLC0415  # it reads the variable, once

    before = os.environ.get(_MODE)
    os.environ[_MODE] = "token" if guarded else "disabled"
    Config.initialize("")
    try:
        yield
    finally:
        os.environ.pop(_MODE)
        if before is not None:
            os.environ[_MODE] = before
        Config.initialize("")


def _no_cluster(address: str | None, why: str) -> RefusedError:
    return RefusedError(
        "resources",
        f"there is no Ray cluster to join at {address}: {why}",
        mend="start one with `ray start --head`, correct scaling.address, or leave it out",
    )
