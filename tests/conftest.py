"""What tests share: a quiet environment, real digits, and backbones in Hub layout.

Nothing is downloaded: the digits are scikit-learn's (8 x 8, 1,797 of them), the small backbones are built here.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from tests import s3_proxy
from tests.hub_server import Hub, serve
from tests.refusals import Recorder
from tests.tiny import REPOSITORY, make_digits, make_resnet, save_backbone

# Of several processes of tests each keeps to a core of its own, and so does all that it starts: threads beyond the
# cores make everything many times slower. Not so where tests wait most of the time, and work on several cores
# (SHARE_CORES).
ALL_CORES = os.sched_getaffinity(0)
_number = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
if _number and not os.environ.get("SHARE_CORES"):
    os.sched_setaffinity(0, {sorted(ALL_CORES)[int(_number) % len(ALL_CORES)]})

# Where tests run in the background of a shell, it has them ignore Ctrl-C, and all that they start would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The client reads its environment when it is imported, so the Hub of the tests must be there before that.
_stack = contextlib.ExitStack()
_hub = _stack.enter_context(serve())
_home = _stack.enter_context(tempfile.TemporaryDirectory(prefix="orc-", ignore_cleanup_errors=True))
os.environ |= {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_OFFLINE": "0",
    "HF_ENDPOINT": _hub.url,
    "HF_HOME": _home,
    "RAY_TMPDIR": _home,  # short: the paths of its sockets have a limit
    "RAY_USAGE_STATS_ENABLED": "0",
    "HYPOTHESIS_STORAGE_DIRECTORY": _home,  # else it leaves a folder in the repository
    "COLUMNS": "80",
    "TERM": "dumb",
}
os.environ.pop("HF_TOKEN", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-reason", action="store_true",
        help="for a run of all tests: fail where a published reason was never given, or a refusal had no mend",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if not re.search(r"(?<!not )\bgpu\b", config.getoption("-m") or ""):  # all others are the same on every machine
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if config.getoption("--every-reason"):
        config.pluginmanager.register(Recorder())


def pytest_unconfigure() -> None:
    _stack.close()


@pytest.fixture(scope="module", autouse=True)
def _no_ray_is_left() -> Iterator[None]:
    """A search leaves its Ray for the next call in this process; the next module wants one of its own."""
    yield
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()


@pytest.fixture
def hub() -> Hub:
    """The Hub on 127.0.0.1, empty, with no request recorded yet."""
    _hub.repositories.clear()
    _hub.requests.clear()
    _hub.failures = 0
    return _hub


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test in a directory of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 real digits as class folders of PNG: train/ (400) and test/ (200)."""
    return make_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def flat_digits(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """300 of them without ready-made splits."""
    import shutil

    root = tmp_path_factory.mktemp("flat")
    for file in sorted((digits / "train").glob("*/*.png"), key=lambda file: file.name)[:300]:
        (root / file.parent.name).mkdir(exist_ok=True)
        shutil.copy(file, root / file.parent.name / file.name)
    return root


@pytest.fixture(scope="session")
def tiny_resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet with BatchNorm and 7 classes, some 20,000 parameters, 32 x 32 pixels."""
    return make_resnet(tmp_path_factory.mktemp("tiny-resnet"))


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT with dropout and 10 classes, 16 x 16 pixels."""
    from transformers import ViTConfig, ViTImageProcessor

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16,
        patch_size=4, num_labels=10, hidden_dropout_prob=0.1,
    )  # fmt: skip
    return save_backbone(
        tmp_path_factory.mktemp("tiny-vit"), config, ViTImageProcessor(size={"height": 16, "width": 16})
    )


@pytest.fixture(scope="session")
def efficientnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet EfficientNet-Lite0, real trained weights, as the demo makes it."""
    sys.path.insert(0, str(REPOSITORY / "examples" / "digits"))
    try:
        from make_backbone import make_backbone
    finally:
        sys.path.pop(0)
    return Path(make_backbone(tmp_path_factory.mktemp("efficientnet-lite0")))


@pytest.fixture(scope="session")
def uninterrupted(tiny_resnet: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> orchestrator.Run:
    """The run that the tests of interruptions interrupt (`LONG` in test_train.py), left alone, in this process."""
    return orchestrator.finetune(
        backbone=str(tiny_resnet), data=str(digits), method="full", report=lambda _: None,
        training={"epochs": 15, "batch_size": 16, "checkpoint_every_steps": 5},
        scaling={"threads_per_worker": 1}, storage=str(tmp_path_factory.mktemp("uninterrupted")),
    )  # fmt: skip


@pytest.fixture
def card_files(tmp_path: Path) -> Callable[..., Path]:
    """A directory of metadata files: `card_files(config={...}, **{"model.safetensors": b""})`."""

    def write(name: str = "backbone", **files: object) -> Path:
        directory = tmp_path / name
        directory.mkdir(parents=True, exist_ok=True)
        for key, content in files.items():
            file = directory / (f"{key}.json" if "." not in key else key)
            file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return directory

    return write


Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli() -> Cli:
    """The command line in this process, as a terminal would see it: `cli("runs", "--json").stdout`."""
    from orchestrator.terminal.cli import run as run_command

    def run(*arguments: object, input: str = "") -> subprocess.CompletedProcess[str]:
        words = [str(one) for one in arguments]
        stdin = io.TextIOWrapper(io.BytesIO(input.encode()), encoding="utf-8")
        before = dict(os.environ)
        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(sys, "stdin", stdin)
            code = run_command(words)
        for name in os.environ.keys() - before.keys():  # what is set for a process of its own
            del os.environ[name]
        return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def cli_process() -> Cli:
    """The command line as a process of its own: for signals, an environment, what it imports, what its streams take."""

    def run(*arguments: object, **more: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "orchestrator.terminal.cli", *(str(one) for one in arguments)],
            capture_output=True, text=True, timeout=240, check=False, **more,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3 server on 127.0.0.1."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty bucket, `s3://bucket`, as pyarrow's file system with a prefix of it."""
    import pyarrow as pa
    import pyarrow.fs

    from orchestrator.job import locations

    for key, value in {
        "AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "something", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_server,
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    locations.cached.cache_clear()
    fs = pa.fs.S3FileSystem(endpoint_override=s3_server, allow_bucket_creation=True, allow_bucket_deletion=True)
    fs.create_dir("bucket")
    yield pa.fs.SubTreeFileSystem("bucket", fs)
    fs.delete_dir("bucket")
    locations.cached.cache_clear()


@pytest.fixture
def proxy(bucket: Any, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3_proxy.Proxy]:  # noqa: ARG001
    """The same bucket, through what fails when it is told to."""
    from orchestrator.job import locations

    with s3_proxy.serve(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        locations.cached.cache_clear()
        yield proxy
