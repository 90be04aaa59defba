"""What is installed: the wheel's contents, and what works without any extra."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import orchestrator
from orchestrator.errors import EXTRA_LIBRARIES
from tests.conftest import REPOSITORY

HEAVY = tuple(sorted(EXTRA_LIBRARIES))


@pytest.mark.slow
def test_the_wheel_puts_four_packages_into_site_packages(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(REPOSITORY)],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        content.extractall(tmp_path / "site")
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"orchestrator", "orchestrator_image", "orchestrator_audio", "orchestrator_text"}
    assert {"orchestrator/py.typed", *(f"orchestrator_{m}/rows.json" for m in ("image", "audio", "text"))} <= set(names)
    # From the wheel alone: the folder that it was unpacked into stands in front of the development install.
    program = (
        "import orchestrator, orchestrator_image, json; from orchestrator.modality import registry; "
        "print(orchestrator.__file__, orchestrator_image.__file__); "
        "print(json.dumps([[l.name, l.error] for l in registry.listings()]))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={"PYTHONPATH": f"{tmp_path / 'site'}:{site_packages()}"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    files, listed = done.stdout.splitlines()
    assert all(file.startswith(str(tmp_path)) for file in files.split())
    assert json.loads(listed) == [["audio", ""], ["image", ""], ["text", ""]]


def site_packages() -> str:
    import pydantic

    return str(Path(pydantic.__file__).parent.parent)


def without(names: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line where these libraries cannot be imported."""
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({names!r})); from orchestrator.terminal import cli; "
        "sys.exit(cli.run(sys.argv[1:]))"
    )
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)


def test_a_bare_install_has_the_gate(card_files: Callable[..., Path]) -> None:
    files = {"config": {"model_type": "resnet"}, "preprocessor_config": {"size": 64}, "model.safetensors": b""}
    backbone = str(card_files(**files))
    assert json.loads(without(HEAVY, "check", backbone, "--json").stdout)["accepted"]
    assert without(HEAVY, "check", backbone, "--modality", "text").returncode == 2
    assert without(HEAVY, "plugins").returncode == 0
    assert without(HEAVY, "--help").returncode == 0
    assert without(HEAVY, "runs").returncode == 0


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        (HEAVY, ("plan",)),
        (HEAVY, ("finetune",)),
        (("PIL",), ("plan",)),
        (("torch",), ("finetune",)),
        (("ray",), ("finetune", "--address", "local")),
        (("timm",), ("finetune",)),
        (("torchvision",), ("finetune",)),
    ],
)
def test_a_missing_extra_names_the_install_command(
    tiny_resnet: Path, flat_digits: Path, missing: tuple[str, ...], command: tuple[str, ...]
) -> None:
    done = without(missing, *command, "--backbone", str(tiny_resnet), "--data", str(flat_digits), "--json")
    assert done.returncode == 2, done.stderr
    refusal = json.loads(done.stdout)
    assert refusal["reason"] == "missing_extra"
    assert refusal["mend"] == "pip install 'orchestrator[image]'"


def test_the_public_names_are_these() -> None:
    assert orchestrator.__all__ == [
        "BackboneCard", "Job", "Modality", "OrchestratorError", "Plan", "RankTable", "RefusedError", "RemoteRun", "Run",
        "attach", "check", "evaluate", "finetune", "open_run", "plan", "predict", "pretrain", "rank", "register",
        "search", "submit",
    ]  # fmt: skip
    for name in orchestrator.__all__:
        assert callable(getattr(orchestrator, name))
        for module in (f"{name}.py", name):
            assert not Path(orchestrator.__file__).with_name(module).exists()
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = orchestrator.nonsense


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = f"import sys, orchestrator; heavy = set({HEAVY!r}) & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", program], check=True)
