"""The forms of a repository once more, against a Hub that somebody else wrote: olah, over git repositories.

Off line it answers for a named revision only, hence the @main; and of one that is missing it says that the
repository is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("olah") is None, reason="olah is not installed: pip install olah"),
]

RESNET = json.dumps({"model_type": "resnet", "num_channels": 3}).encode()
PROCESSOR = json.dumps({"size": {"shortest_edge": 224}, "crop_pct": 0.875}).encode()
EMPTY = b"\x08\0\0\0\0\0\0\0{}      "
"""A safetensors file without a tensor."""
REPOSITORIES = {
    "good": {"config.json": RESNET, "preprocessor_config.json": PROCESSOR, "model.safetensors": EMPTY},
    "empty": {"README.md": b"nothing here"},
    "pickle": {"config.json": RESNET, "pytorch_model.bin": b"x"},
    "adapter": {"adapter_config.json": b'{"base_model_name_or_path": "org/base"}'},
}
_START_S = 40


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *identity, *arguments], cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def olah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """(URL, name -> commit sha) of a server over `REPOSITORIES`."""
    root = tmp_path_factory.mktemp("olah")
    commits = {}
    for name, files in REPOSITORIES.items():
        directory = root / "mirror" / "models" / "org" / name
        directory.mkdir(parents=True)
        git(directory, "init", "--quiet")
        for file, content in files.items():
            (directory / file).write_bytes(content)
        git(directory, "add", ".")
        git(directory, "commit", "--quiet", "-m", "all")
        commits[name] = git(directory, "rev-parse", "HEAD")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    settings = root / "olah.toml"
    settings.write_text(
        f'[basic]\nhost = "127.0.0.1"\nport = {port}\nrepos-path = "{root / "repos"}"\nmirrors-path = '
        f'["{root / "mirror"}"]\nmirror-scheme = "http"\nmirror-netloc = "127.0.0.1:{port}"\n'
        f'mirror-lfs-netloc = "127.0.0.1:{port}"\n[accessibility]\noffline = true\n'
    )
    log = root / "log.txt"
    program = "import sys; from olah.server import cli; sys.exit(cli())"
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-c", program, "--config", str(settings), "--log-path", str(root / "logs")],
            cwd=root, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        end = time.monotonic() + _START_S
        while not answers(f"{url}/api/models/org/good/revision/main"):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield url, commits
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.parametrize(
    ("source", "modality", "code", "reason", "words"),
    [
        ("org/good@main", "image", 0, "", ""),
        ("org/good@main", "audio", 2, "wrong_modality", "--modality image"),
        ("org/none@main", "image", 2, "not_found", "org/none"),
        ("org/good@no-such-branch", "image", 2, "not_found", "org/good"),
        ("org/empty@main", "image", 2, "no_config", "config.json"),
        ("org/pickle@main", "image", 2, "pickle_only", "pickle"),
        ("org/adapter@main", "image", 2, "adapter_only", "org/base"),
    ],
)
def test_the_forms_of_a_repository(
    olah: tuple[str, dict[str, str]], tmp_path: Path, source: str, modality: str, code: int, reason: str, words: str
) -> None:
    url, commits = olah
    # The client reads its environment when it is imported: hence a process of its own.
    home = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.terminal.cli", "check", source, "--modality", modality, "--json"],
        env={**os.environ, **home}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    if code == 0:
        assert answer["commit"] == commits["good"]
    else:
        assert answer["reason"] == reason
        assert words in json.dumps(answer)
