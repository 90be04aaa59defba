"""Refusals: each has a reason of the published list, which the docs explain, and says what to do."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import orchestrator
from orchestrator.distributed.preflight import Preflight
from orchestrator.errors import REASONS, MissingExtraError, RefusedError, missing_extra
from orchestrator.modality import registry
from tests.conftest import REPOSITORY
from tests.held import held
from tests.hub_server import Hub

REFUSALS = {"RefusedError", "JobError", "DataError", "PluginError", "ChangedError"}


def test_the_docs_explain_every_reason() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", (REPOSITORY / "docs" / "refusals.md").read_text(), re.MULTILINE)
    assert dict(rows) == REASONS


def test_every_refusal_says_what_to_do() -> None:
    without = []
    for file in sorted([*REPOSITORY.glob("orchestrator/**/*.py"), *REPOSITORY.glob("plugins/**/*.py")]):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in REFUSALS:
                mend = [one.value for one in node.keywords if one.arg == "mend"]
                if not mend or (isinstance(mend[0], ast.Constant) and not mend[0].value):
                    without.append(f"{file.relative_to(REPOSITORY)}:{node.lineno} {ast.unparse(node)}")
    assert not without, "\n".join(without)


def test_a_token_that_the_hub_does_not_take(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(RefusedError) as caught:
        orchestrator.check("org/private", "image")
    assert hub.requests
    assert (caught.value.reason, caught.value.mend) == ("unauthorised", "run: hf auth login")


def test_a_library_that_is_missing_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    decode = registry.get("audio").decode
    assert decode is not None
    with pytest.raises(MissingExtraError) as caught:
        decode({"audio": b"RIFF"})
    assert caught.value.mend == "pip install 'orchestrator[audio]'"


def test_a_library_names_the_extra_that_brings_it() -> None:
    extras = {"soundfile": "audio", "sentencepiece": "text", "timm": "image", "torch": "image"}
    for library, extra in extras.items():
        refusal = missing_extra(ImportError(name=f"{library}.part"))
        assert refusal is not None
        assert refusal.mend == f"pip install 'orchestrator[{extra}]'"


def test_a_cluster_without_nodes() -> None:
    with pytest.raises(RefusedError, match="has no node that is alive") as caught:
        Preflight([], {}).require()
    assert (caught.value.reason, caught.value.mend) == ("cluster", "start one: ray start --address=HEAD:6379")


def test_a_run_is_worked_on_by_one_at_a_time(tmp_path: Path) -> None:
    run = orchestrator.Run(tmp_path / "runs" / "a")
    with held(run.path), pytest.raises(RefusedError) as caught, held(run.path):
        pass
    assert caught.value.reason == "busy"
    assert caught.value.mend


@pytest.mark.long
def test_a_reason_that_no_test_gives_is_told(tmp_path: Path) -> None:
    """`pytest --every-reason`, which `make test` runs: of one test that is refused once, in a process of xdist's."""
    test = tmp_path / "test_refused.py"
    test.write_text(
        "import pytest\nfrom orchestrator.errors import DataError, RefusedError\n"
        "from orchestrator.job import make_job\n"
        "def test_refused():\n    DataError('made by a test')\n"
        "    pytest.raises(RefusedError, make_job, backbone='b')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "--confcutdir", tmp_path,
         "-c", REPOSITORY / "pyproject.toml", "-p", "tests.conftest", "--every-reason", "-p", "xdist", "-n", "1", test],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    told = set(re.findall(r"no test was refused with the reason '(\w+)'", done.stdout))
    assert told == set(REASONS) - {"usage"}, done.stdout
