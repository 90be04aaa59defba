"""The house as docs/design.md has it: which wing stands on which, what each holds, and by which door one goes in."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.job import Job
from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "orchestrator"
SOURCES = sorted(file for folder in (PACKAGE, REPOSITORY / "plugins") for file in folder.rglob("*.py"))
PAGES = sorted(
    file for folder in (".", "docs", "cluster", "examples", "examples/*") for file in REPOSITORY.glob(f"{folder}/*.md")
)
WINGS = sorted(file.parent.name for file in PACKAGE.glob("*/__init__.py"))

# Modules that other wings import by name and not by what their wing hands on.
BESIDE_THE_DOOR = {
    "orchestrator.distributed.cluster": "its wing hands on nothing: Ray's event queue would load torch with it",
    "orchestrator.distributed.between_nodes": "likewise",
    "orchestrator.distributed.events": "likewise",
    "orchestrator.distributed.joining": "likewise",
    "orchestrator.distributed.leaving": "likewise",
    "orchestrator.distributed.places": "likewise",
    "orchestrator.distributed.waiting": "likewise",
    "orchestrator.distributed.failures": "likewise",
    "orchestrator.distributed.fetching": "likewise",
    "orchestrator.distributed.following": "likewise",
    "orchestrator.distributed.head": "likewise",
    "orchestrator.distributed.offer": "likewise",
    "orchestrator.distributed.preflight": "likewise",
    "orchestrator.distributed.request": "likewise",
    "orchestrator.distributed.shared_storage": "likewise",
    "orchestrator.distributed.telling": "likewise",
    "orchestrator.distributed.wheels": "likewise",
    "orchestrator.job.asking": "it needs pyarrow, without which a backbone can be checked",
    "orchestrator.job.locations": "likewise",
    "orchestrator.job.object_storage": "likewise",
    "orchestrator.modality.registry": "a module that is called as one: registry.get(name)",
    "orchestrator.store.inventory": "likewise: inventory.listings(root)",
}
OLD_NAMES = {"training.num_shards"}  # told where a page says what a key was called before


# --- layers ---


def layers() -> list[str]:
    """The wings as the linter's contract has them, top floor first."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = [one for one in settings["contracts"] if one.get("exhaustive")]
    assert contract["type"] == "layers"
    return list(contract["layers"])


def test_the_design_shows_the_layers_of_the_contract() -> None:
    section = (REPOSITORY / "docs" / "design.md").read_text().split("## The house")[1]
    block = section.split("```")[1]
    shown = [re.split(r" {2,}", line)[0] for line in block.strip().splitlines()]
    assert shown == layers()
    named = {name for line in layers() for name in line.split(" | ")}
    assert named == {*WINGS, *(file.stem for file in PACKAGE.glob("*.py"))} - {"__init__"}


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        ("", "", "0 broken"),
        ("stray.py", "", "orchestrator.stray"),
        ("attic/__init__.py", "", "orchestrator.attic"),
        ("job/upward.py", "from orchestrator.train import finetune", "orchestrator.job is not allowed to import"),
        ("store/sideways.py", "from orchestrator.gate import plan", "orchestrator.store is not allowed to import"),
        ("training/leak.py", "import ray", "orchestrator.training.leak -> ray"),
    ],
)
def test_the_linter_refuses_what_stands_elsewhere(tmp_path: Path, file: str, line: str, words: str) -> None:
    for source in SOURCES:
        copy = tmp_path / source.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    if file:
        (tmp_path / "orchestrator" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "orchestrator" / file).write_text(line + "\n")
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=tmp_path, capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, tmp_path / "plugins")))},
    )  # fmt: skip
    assert done.returncode == bool(file), done.stdout
    assert words in " ".join(done.stdout.split())


# --- doors ---


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_names_its_modules(wing: str) -> None:
    docstring = ast.get_docstring(ast.parse((PACKAGE / wing / "__init__.py").read_text())) or ""
    lines = re.findall(r"^    ([a-z_]+(?:, [a-z_]+)*) {2,}\S", docstring, re.MULTILINE)
    named = [name for line in lines for name in line.split(", ")]
    assert sorted(named) == sorted(file.stem for file in (PACKAGE / wing).glob("*.py") if file.stem != "__init__")
    assert "\nIn: " in docstring
    assert " Out: " in docstring.replace("\n", " ")


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file's imports out of orchestrator, and the dotted names that they give."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{one.name}" for one in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.startswith("orchestrator."))


def module_of(name: str) -> str:
    """The module of a wing that a dotted name goes past the wing's door for, '' if for none."""
    for dotted in (name, name.rpartition(".")[0]):
        if dotted.count(".") == 2 and (REPOSITORY / dotted.replace(".", "/")).with_suffix(".py").exists():
            return dotted
    return ""


def test_wings_are_entered_by_their_doors() -> None:
    past: dict[str, str] = {}
    for file in SOURCES:
        own = ".".join(file.relative_to(REPOSITORY).parts[:2])
        for line, name in imports(file):
            module = module_of(name)
            if module and not module.startswith(f"{own}."):
                past[module] = f"{file.relative_to(REPOSITORY)}:{line} imports {name}"
    assert {module: where for module, where in past.items() if module not in BESIDE_THE_DOOR} == {}
    assert set(BESIDE_THE_DOOR) == set(past), "an exception that nothing needs"


# --- pictures and pages ---


def test_the_picture_is_drawn_from_the_code() -> None:
    program = REPOSITORY / "scripts" / "draw_wings.py"
    done = subprocess.run([sys.executable, program, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "](docs/wings.svg)" in (REPOSITORY / "README.md").read_text()


def test_the_readme_has_a_line_for_each_wing() -> None:
    layout = (REPOSITORY / "README.md").read_text().split("## The layout")[1]
    shown = re.findall(r"^  ([a-z]+)(?:/|\.py) {2,}\S", layout, re.MULTILINE)
    assert shown == [name for line in layers() for name in line.split(" | ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_a_page_names_what_is_there(page: Path) -> None:
    """Modules and names of the code, files of the repository, other pages, and settings of a job."""
    text = page.read_text()
    for dotted in set(re.findall(r"\borchestrator(?:_image|_audio|_text)?(?:\.[A-Za-z_]+)+", text)):
        if dotted != "orchestrator.modalities":  # the group of entry points
            _import(dotted)
    for name in set(re.findall(r"(?<![/\w])(?:orchestrator|tests|scripts|docs|plugins)/[\w./*-]*\w", text)):
        assert list(REPOSITORY.glob(name)), name
    for name in set(re.findall(r"\]\(([\w./-]+)\)", text)):
        assert (page.parent / name).exists(), name
    for group, name in set(re.findall(r"(?<![.\w])(training|data|scaling)\.([a-z_]+)\b", text)):
        if f"{group}.{name}" not in OLD_NAMES and name not in ("py", "md"):
            assert name in Job.model_fields[group].annotation.model_fields, f"{group}.{name}"  # type: ignore[union-attr]


def _import(dotted: str) -> None:
    """Import a module, or what a module holds; ImportError or AttributeError if there is none such."""
    module, _, name = dotted.rpartition(".")
    try:
        getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        importlib.import_module(dotted)
