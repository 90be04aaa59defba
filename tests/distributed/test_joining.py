"""A cluster that is guarded by a token, and that lacks a plugin which the driver has."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import orchestrator
from orchestrator.errors import RefusedError
from tests.whole.test_third_party import SOURCE, installed  # noqa: F401  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
TOKEN = "0123456789abcdef" * 2
GIVEN = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    """The address of a cluster of one node, that runs until the tests are over."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A folder of its own, or others that start a cluster here would be told of this one; its name is short for sockets.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    head = subprocess.Popen(
        [Path(sys.executable).parent / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1",
         f"--port={port}", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats",
         f"--temp-dir={folder}"],
        env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "GUARDED_CLUSTER": str(folder)},
        stdout=(folder / "head.log").open("wb"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    for _ in range(600):
        if "Ray runtime started" in (folder / "head.log").read_text(errors="replace"):
            break
        time.sleep(0.1)
    yield f"127.0.0.1:{port}"
    for process in Path("/proc").glob("[0-9]*"):  # asked kindly, the head takes half a minute
        with contextlib.suppress(OSError):
            if str(folder).encode() in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
    head.wait(60)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def _nothing_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in GIVEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.cluster
@pytest.mark.usefixtures("_nothing_given")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "wants a token, and none is given"),
        ({"RAY_AUTH_MODE": "token"}, "wants a token, and none is given"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 32}, "refuses the token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/nothere"}, "the token file /nothere cannot be read"),
    ],
)
def test_a_cluster_that_refuses_the_token_is_said_at_once(
    given: dict[str, str], message: str, guarded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray asks for 20 s, a raw line a second, and then says that there is no cluster."""
    from orchestrator.distributed import joining

    for name, value in {**given, "RAY_ADDRESS": guarded}.items():
        monkeypatch.setenv(name, value)
    for address in (guarded, joining._resolved("auto")):
        with pytest.raises(RefusedError, match=message) as caught:
            joining._is_guarded(address)
        assert "RAY_AUTH_TOKEN_PATH" in caught.value.mend


JOIN = """
import sys
from types import SimpleNamespace
from orchestrator.distributed.joining import joined
scaling = SimpleNamespace(address=sys.argv[1])
plan = SimpleNamespace(job=SimpleNamespace(scaling=scaling), num_workers=1, threads_per_worker=1, num_extractors=0,
                       extractor_threads=1)
with joined(plan, print):
    import ray
    assert ray.get(ray.remote(num_cpus=0)(lambda: 1).remote(), timeout=60) == 1
"""


@pytest.mark.cluster
@pytest.mark.usefixtures("_nothing_given")
def test_a_token_that_lies_there_is_given(guarded: str, tmp_path: Path) -> None:
    """As Ray itself does for `auto`, whatever the address: a mode need not be exported."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text(TOKEN)
    done = subprocess.run([sys.executable, "-c", JOIN, guarded], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("_nothing_given")
def test_the_token_of_a_cluster_of_this_machine_is_for_its_user_alone(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", JOIN, "local"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600


def test_a_token_that_others_may_read_is_ours_alone_whatever_becomes_of_ray(tmp_path: Path) -> None:
    from orchestrator.distributed import joining

    token = tmp_path / "auth_token"

    def start() -> None:
        with joining._for_us_alone(token):
            token.write_text("made by Ray")
            raise ConnectionError

    with pytest.raises(ConnectionError):
        start()
    assert token.stat().st_mode & 0o777 == 0o600
    with joining._for_us_alone(tmp_path / "none"):
        pass


@pytest.mark.usefixtures("_nothing_given")
@pytest.mark.parametrize("name", ["HF_ENDPOINT", "AWS_ENDPOINT_URL"])
def test_a_place_with_a_password_is_not_shown_to_all(
    name: str, tiny_resnet: Path, flat_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray shows the variables of a job to everybody who reaches the dashboard."""
    from orchestrator.distributed import joining

    fields = {"backbone": str(tiny_resnet), "data": str(flat_digits), "scaling": {"address": "127.0.0.1:1"}}
    plan = orchestrator.plan(**fields)
    monkeypatch.setenv(name, "https://user:hunter2@mirror.example")
    with pytest.raises(RefusedError, match=f"{name} holds a password or a key") as caught, joining.joined(plan, print):
        pass
    assert "hunter2" not in str(caught.value)


@pytest.mark.usefixtures("_nothing_given")
def test_a_variable_that_the_job_has_set_is_not_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray takes each of one place alone, and refuses to start where two give it."""
    from orchestrator.distributed import joining

    job = {"runtime_env": {"env_vars": {"OMP_WAIT_POLICY": "ACTIVE"}}, "metadata": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert joining._of_the_job() == ["OMP_WAIT_POLICY"]
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert joining._of_the_job() == []


@pytest.mark.usefixtures("_nothing_given")
def test_where_nothing_listens_it_is_said_at_once() -> None:
    from orchestrator.distributed import joining

    with pytest.raises(RefusedError, match=r"no Ray cluster to join at 127\.0\.0\.1:1: Connection refused") as caught:
        joining._is_guarded("127.0.0.1:1")
    assert caught.value.mend


@pytest.mark.cluster
@pytest.mark.usefixtures("_nothing_given")
def test_a_plugin_that_a_node_lacks_is_refused_with_the_node(
    guarded: str,
    installed: dict[str, str],  # noqa: F811
    tmp_path: Path,
) -> None:
    """The driver has the plugin on its path and gives the right token; the node has no such plugin."""
    token = tmp_path / "token"
    token.write_text(TOKEN)
    environment = {**installed, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    for name in GIVEN[1:2]:
        environment.pop(name, None)
    Path("sensor-cnn").mkdir()
    Path("sensor-cnn/config.json").write_text('{"model_type": "sensor-cnn", "channels": 3, "width": 16}')
    subprocess.run([sys.executable, SOURCE / "make_data.py"], env=environment, check=True)
    done = subprocess.run(
        ["orchestrator", "pretrain", "--modality", "sensor", "--backbone", "sensor-cnn", "--data", "machines",
         "--address", guarded, "--json"],
        env=environment, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    refusal = json.loads(done.stdout)
    assert done.returncode == 2, done.stderr
    assert re.search(r"on the node [\d.]+: .*sensor", refusal["message"])
    assert "on every node of the cluster" in refusal["mend"]
    assert not list(Path().glob("runs/*/plan.json")), "a start that was refused leaves nothing to go on with"
    assert "InvalidAuthToken" not in done.stderr


_STARTED = """
import sys, time
import psutil, ray
from orchestrator.distributed.leftovers import end_with_driver

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
kept = end_with_driver()
print(*(one.pid for one in psutil.Process().children(recursive=True)), flush=True)
sys.stdin.read()
"""


def test_nothing_of_a_cluster_outlives_its_killed_driver(tmp_path: Path) -> None:
    """Its agents stayed for a minute."""
    driver = subprocess.Popen(
        [sys.executable, "-c", _STARTED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert driver.stdout is not None
    left = [psutil.Process(int(pid)) for pid in driver.stdout.readline().split()]
    assert any("Agent" in one.name() for one in left)
    driver.kill()
    driver.wait()
    assert psutil.wait_procs(left, timeout=30)[1] == []
    driver.communicate()
