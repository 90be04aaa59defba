"""Plugins come through the entry-point group, built-ins too; a broken one breaks nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

import orchestrator
from orchestrator.errors import PluginError
from orchestrator.modality import registry
from tests.conftest import Cli

GOOD = """
from dataclasses import replace
from orchestrator.modality import registry
modality = replace(registry.get("audio"), name="{name}", title="{name} things")
"""


def install(folder: Path, distribution: str, name: str, code: str) -> None:
    """A distribution as pip would leave it: a module, and its dist-info with the entry point."""
    module = distribution.replace("-", "_")
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-1.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(f"[orchestrator.modalities]\n{name} = {module}:modality\n")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str, str], None]]:
    """`install`, for this process and as long as the test lasts."""
    before = set(sys.modules)
    monkeypatch.setattr(registry, "_loaded", {})

    def install_here(distribution: str, name: str, code: str) -> None:
        install(tmp_path, distribution, name, code)
        monkeypatch.syspath_prepend(str(tmp_path))

    yield install_here
    for module in set(sys.modules) - before:
        if str(getattr(sys.modules[module], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[module]


def test_the_built_in_ones_are_found_and_loaded(cli: Cli) -> None:
    rows = {row["name"]: row for row in json.loads(cli("plugins", "--json").stdout)}
    assert set(rows) == {"image", "audio", "text"}
    assert all(row["distribution"] == "orchestrator" and row["error"] is None for row in rows.values())
    assert all(row["trainable"] for row in rows.values())
    assert "resnet" in rows["image"]["types"]
    assert rows["image"]["num_timm"] > 1000
    shown = cli("plugins").stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert "resnet" in cli("plugins", "--types", "image").stdout


def test_a_third_partys_plugin_is_listed_and_gates(cli_process: Cli, tmp_path: Path) -> None:
    install(tmp_path, "smell-plugin", "smell", GOOD.format(name="smell"))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": path}
    rows = {row["name"]: row for row in json.loads(cli_process("plugins", "--json", env=environment).stdout)}
    assert (rows["smell"]["distribution"], rows["smell"]["version"]) == ("smell-plugin", "1.5")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text('{"model_type": "resnet"}')
    refused = cli_process("check", tmp_path / "b", "--modality", "smell", "--json", env=environment)
    assert json.loads(refused.stdout)["reason"] == "wrong_modality"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
        ("1 / 0", "ZeroDivisionError"),
        ("modality = 3", "is a int"),
        (GOOD.format(name="taste"), "gives a modality named 'taste'"),
        ("from orchestrator import Modality\nmodality = Modality(name='smell')", "missing"),
    ],
)
def test_a_broken_plugin_is_listed_with_its_error(
    cli: Cli, installed: Callable[[str, str, str], None], code: str, words: str
) -> None:
    installed("smell-plugin", "smell", code)
    rows = {row["name"]: row for row in json.loads(cli("plugins", "--json").stdout)}
    assert words in rows["smell"]["error"]
    assert rows["image"]["error"] is None
    shown = cli("plugins")
    assert shown.returncode == 0
    assert max(map(len, shown.stdout.splitlines())) <= 80
    below = shown.stdout.split("smell: ")[1]  # the whole error, in lines of their own
    assert " ".join(below.split()) == rows["smell"]["error"]
    done = cli("check", "x/y", "--modality", "smell", "--json")
    assert (done.returncode, json.loads(done.stdout)["reason"]) == (2, "plugin")


def test_two_that_claim_one_name_are_refused_naming_both(cli: Cli, installed: Callable[[str, str, str], None]) -> None:
    installed("one-plugin", "smell", GOOD.format(name="smell"))
    installed("other-plugin", "smell", GOOD.format(name="smell"))
    done = cli("check", "x/y", "--modality", "smell", "--json")
    message = json.loads(done.stdout)["message"]
    assert done.returncode == 2
    assert "one-plugin" in message
    assert "other-plugin" in message
    rows = [row for row in json.loads(cli("plugins", "--json").stdout) if row["name"] == "smell"]
    assert len(rows) == 2
    assert all("claim the modality" in row["error"] for row in rows)


def test_register_serves_a_notebook_through_the_same_validation() -> None:
    image = registry.get("image")
    scan = dataclasses.replace(image, name="scan")
    try:
        assert orchestrator.register(scan) is registry.get("scan")
        assert "scan" in registry.names()
        again = orchestrator.register(dataclasses.replace(scan, title="scans"))
        assert registry.get("scan") is again
    finally:
        registry.unregister("scan")
    with pytest.raises(PluginError, match="is taken by"):
        orchestrator.register(image)

    class Lax(BaseModel):
        pass

    for change, words in (
        ({"name": "Not A Name"}, "lower-case identifier"),
        ({"settings": Lax}, "unknown keys"),
        ({"settings": dict}, "no pydantic model"),
        ({"sample": ()}, "without a sample field"),
        ({"tasks": ()}, "no task"),
        ({"rules": {}}, "rules is a dict"),
    ):
        with pytest.raises(PluginError, match=words):
            orchestrator.register(dataclasses.replace(scan, **change))  # type: ignore[arg-type]
    with pytest.raises(PluginError, match=r"expected: an orchestrator\.Modality"):
        orchestrator.register("image")  # type: ignore[arg-type]
