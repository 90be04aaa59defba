"""The code of a job as it travels: of this package, of a plugin that is installed, and of one that is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.distributed.nodes import module_digest
from orchestrator.distributed.wheels import Delivery, as_wanted, deliveries, own_delivery
from orchestrator.errors import PluginError
from orchestrator.modality import registry
from tests.conftest import REPOSITORY
from tests.whole.test_third_party import SOURCE

PROGRAM = """
import json, sys
from pathlib import Path
from orchestrator.distributed.wheels import as_wanted, deliveries
several = deliveries("sensor")
files = [str(one.write(Path(sys.argv[1]))) for one in several]
print(json.dumps({"files": files, "names": [one.name for one in several], **as_wanted(several)}))
"""


def delivered(path: list[Path], tmp_path: Path) -> dict[str, Any]:
    """What a program delivers that has these folders on its path."""
    out = tmp_path / "out"
    out.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, REPOSITORY, REPOSITORY / "plugins"]))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, out], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_this_package_is_what_runs_here(tmp_path: Path) -> None:
    own = own_delivery("image")
    assert own.contents["orchestrator/train.py"] == (REPOSITORY / "orchestrator/train.py").read_bytes()
    assert {"orchestrator", "orchestrator_image", "orchestrator_audio", "orchestrator_text"} == set(own.modules)
    assert own.modules == {name: module_digest(name) for name in own.modules}
    assert own.contents == own_delivery("image").contents
    one, two = own.write(tmp_path), own_delivery("image")
    content = one.read_bytes()
    assert two.write(tmp_path).read_bytes() == content, "a package of the same code is uploaded once"
    assert one.stat().st_size < 3_000_000
    inside = zipfile.ZipFile(one).namelist()
    assert not [name for name in inside if "__pycache__" in name or name.startswith((".", "/", "tests", "docs"))]
    assert any(name.endswith(".dist-info/entry_points.txt") for name in inside)


def test_what_is_no_module_is_none_of_a_wheels() -> None:
    """Compiled code goes by the name that it is imported by, and libraries beside it by none."""
    suffix = EXTENSION_SUFFIXES[0]
    code = {"plug/__init__.py": b"", f"plug/_in{suffix}": b"1", f"_fast{suffix}": b"2", "alone.py": b"3",
            "plug.libs/libgomp.so.1": b"4", "plug-1.dist-info/METADATA": b"5", "LICENSE": b"6"}  # fmt: skip
    assert set(Delivery("plug", "1", code, ()).modules) == {"plug", "_fast", "alone"}


def test_what_it_requires_is_told_with_the_extra_of_the_modality() -> None:
    assert not [one for one in as_wanted([own_delivery("image")])["requires"] if one.startswith("peft")]
    assert [one for one in as_wanted(deliveries("image", {"peft"}))["requires"] if one.startswith("peft>=")]
    wanted = as_wanted([own_delivery("image")])["requires"]
    names = {text.split(">")[0].split("[")[0] for text in wanted}
    assert {"pydantic", "typer", "torch", "ray", "timm", "pillow"} <= names
    assert not {"soundfile", "pytest", "orchestrator"} & names


@pytest.mark.slow
@pytest.mark.parametrize("how", ["installed", "in place"])
def test_a_plugin_of_somebody_else(how: str, tmp_path: Path) -> None:
    """Out of its RECORD, or built from its sources: entry points are found, and nothing says where it was."""
    site = tmp_path / "site"
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "secret.txt").write_text("not in the wheel")
    words = ["--prefix", site, "--editable", source] if how == "in place" else ["--target", site, source]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--ignore-installed", "--disable-pip-version-check", *words],
        check=True, capture_output=True,
    )  # fmt: skip
    path = [*site.glob("lib/python*/site-packages"), source] if how == "in place" else [site]  # no .pth is read there
    answer = delivered(path, tmp_path)
    assert answer["names"] == ["orchestrator", "orchestrator-sensor"]
    assert "orchestrator_sensor" in answer["modules"]
    archive = zipfile.ZipFile(answer["files"][1])
    assert archive.read("orchestrator_sensor.py") == (SOURCE / "orchestrator_sensor.py").read_bytes()
    everything = b"".join(archive.read(name) for name in archive.namelist())
    assert str(tmp_path).encode() not in everything
    assert b"not in the wheel" not in everything

    bare = tmp_path / "bare"
    for file in answer["files"]:
        zipfile.ZipFile(file).extractall(bare / Path(file).stem)
    folders = os.pathsep.join(str(one) for one in bare.iterdir())
    program = "from orchestrator.modality import registry; print(registry.get('sensor').title)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=bare,
        env={**os.environ, "PYTHONPATH": folders},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_sources_that_do_not_build_are_told(tmp_path: Path) -> None:
    from orchestrator.distributed.wheels import _built

    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n[project]\nname = "x"\n'
    )
    (tmp_path / "backend.py").write_text("def build_wheel(*_):\n    raise SystemExit('no wheel today')\n")
    with pytest.raises(PluginError, match=r"x in .* cannot be built as a wheel") as caught:
        _built(tmp_path, tmp_path / "out", "x")
    assert "pip wheel" in caught.value.mend


def test_a_modality_of_a_notebook_is_refused() -> None:
    import dataclasses

    mine = orchestrator.register(dataclasses.replace(registry.get("image"), name="notebook"))
    try:
        with pytest.raises(PluginError, match="was registered by this program alone") as caught:
            deliveries("notebook")
    finally:
        registry.unregister(mine.name)
    assert "pyproject.toml" in caught.value.mend
