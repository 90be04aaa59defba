"""The images: their versions are those of the tests, and what their files install works in a fresh environment."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "cluster" / "docker"
FILES = ("cpu.Dockerfile", "cuda.Dockerfile")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
INSTRUCTIONS = {"FROM", "RUN", "ARG", "WORKDIR", "COPY", "ENV", "USER"}


def version() -> str:
    """Of this package."""
    return str(PROJECT["version"])


def requirements() -> list[Requirement]:
    """What the images install."""
    lines = (FOLDER / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pins() -> dict[str, str]:
    """{package: the version of it that the images have}."""
    return {one.name: str(one.specifier).removeprefix("==") for one in requirements()}


def wanted() -> list[Requirement]:
    """What this package wants on a node: all that its modalities need, and no tool of its developers."""
    lines = list(PROJECT["dependencies"])
    for extra in ("train", "image", "audio", "text", "datasets", "lora", "search", "mlflow", "wandb"):
        lines += PROJECT["optional-dependencies"][extra]
    return [one for line in lines if (one := Requirement(line)).name != PROJECT["name"]]


def steps(name: str) -> list[tuple[str, str]]:
    """[(instruction, what follows it)] of a Dockerfile."""
    text = re.sub(r"^#.*\n", "", (FOLDER / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]  # type: ignore[misc]


def problems(found: list[tuple[str, str]]) -> list[str]:
    """Instructions that are none, lines of a shell that are none, and files that are not there or are left out."""
    wrong = [name for name, _ in found if name not in INSTRUCTIONS]
    kept = re.findall(r"^!(.*)$", (REPOSITORY / ".dockerignore").read_text(), re.MULTILINE)
    for name, rest in found:
        if name == "RUN" and subprocess.run(["bash", "-n", "-c", rest], capture_output=True, check=False).returncode:
            wrong.append(rest)
        if name == "COPY":
            sources = [word for word in rest.split() if not word.startswith("--")][:-1]
            wrong += [one for one in sources if not (REPOSITORY / one).exists() or one not in kept]
    return wrong


def test_the_images_have_the_versions_of_the_tests() -> None:
    there = {name: importlib.metadata.version(name).split("+")[0] for name in pins()}
    assert pins() == there
    needed = {}
    for one in wanted():
        assert one.specifier.contains(pins()[one.name]), one
        needed.setdefault(one.name, set()).update(one.extras)
    assert set(needed) == set(pins()), "no more and no less than the package wants"
    extras = {one.name: one.extras for one in requirements()}
    assert not [name for name, some in needed.items() if not some <= extras[name]]
    assert "default" in extras["ray"], "else no job can be submitted"


def test_python_is_one_that_the_package_supports() -> None:
    for name in FILES:
        (image,) = [rest for instruction, rest in steps(name) if instruction == "FROM"]
        python = re.fullmatch(r"python:(\d+\.\d+)-slim-bookworm", image)
        assert python, image
        assert python[1] in PROJECT["requires-python"]


@pytest.mark.parametrize("name", FILES)
def test_a_dockerfile_reads_files_that_are_there(name: str) -> None:
    found = steps(name)
    assert problems(found) == []
    for at, (instruction, rest) in enumerate(found):  # a letter too many, in each line that can be wrong
        if instruction in ("RUN", "COPY"):
            typo = (
                instruction,
                rest.replace("orchestrator", "orchestratr").replace("&&", "&& &&"),
            )
            if typo[1] != rest:
                assert problems([*found[:at], typo, *found[at + 1 :]]), rest
        assert problems([*found[:at], (f"{instruction}S", rest), *found[at + 1 :]])


def test_the_two_differ_in_torch_alone() -> None:
    cpu, cuda = (
        [(a, re.sub(r' --extra-index-url "\$TORCH_INDEX"', "", b)) for a, b in steps(name) if a not in ("ARG", "ENV")]
        for name in FILES
    )
    assert cpu == cuda


@pytest.mark.cluster
@pytest.mark.timeout(1500)
def test_what_an_image_installs_works_in_a_fresh_environment(tmp_path: Path) -> None:
    """The lines of cpu.Dockerfile that need no Docker, one after the other, as it has them."""
    work, venv = tmp_path / "work", tmp_path / "venv"
    work.mkdir()
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    (tmp_path / "index").mkdir()  # in place of the index of builds for CPUs: pip finds them where it does here
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")},
        "PATH": f"{venv}/bin:{os.environ['PATH']}", "TORCH_INDEX": (tmp_path / "index").as_uri(),
    }  # fmt: skip
    ran = []
    for instruction, rest in steps("cpu.Dockerfile"):
        if instruction == "COPY" and "--chmod" not in rest:
            *sources, target = rest.split()
            for one in sources:
                source = REPOSITORY / one
                into = work / (target if source.is_dir() else source.name)
                shutil.copytree(source, into, ignore=shutil.ignore_patterns("__pycache__")) if source.is_dir() else (
                    shutil.copy(source, into)
                )
        if instruction == "RUN" and rest.startswith("pip "):
            subprocess.run(["bash", "-euc", rest], cwd=work, env=environment, check=True)
            ran.append(rest)
    assert len(ran) == 2
    here = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": False}
    done = subprocess.run(["pip", "check"], **here)
    assert done.returncode == 0, done.stdout
    done = subprocess.run(["orchestrator", "plugins"], **here)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("image", "audio", "text"))
    script = "import ray.dashboard.optional_deps, ray.train.torch, timm, torch, orchestrator; print(ray.__version__)"
    done = subprocess.run(["python", "-c", script], **here)
    assert done.stdout.strip() == pins()["ray"], done.stderr
