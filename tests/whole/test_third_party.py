"""examples/third_party as pip installs it, and docs/plugins.md as it is written: its listings, and its commands run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.conftest import REPOSITORY

Cli = Callable[..., CompletedProcess[str]]
SOURCE = REPOSITORY / "examples" / "third_party"
PAGE = (REPOSITORY / "docs" / "plugins.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the distribution is there, and the commands of this installation first."""
    target = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--disable-pip-version-check", "--target", str(target), str(SOURCE)],
        check=True, capture_output=True,
    )  # fmt: skip
    path = os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "PYTHONPATH": path, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_it_is_a_plugin_of_sixty_lines() -> None:
    lines = (SOURCE / "orchestrator_sensor.py").read_text().splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 120


def test_the_page_shows_the_files_as_they_are() -> None:
    assert blocks("toml") == [(SOURCE / "pyproject.toml").read_text()]
    assert blocks("python") == [(SOURCE / name).read_text() for name in ("orchestrator_sensor.py", "test_sensor.py")]


@pytest.mark.long
@pytest.mark.slow
def test_the_commands_of_the_page_do_what_it_says(installed: dict[str, str]) -> None:
    """All but pip's, which the fixture did, into a folder of its own."""
    shutil.copytree(SOURCE, Path("examples/third_party"), ignore=shutil.ignore_patterns("__pycache__"))
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert commands.pop(0) == "pip install --no-deps ./examples/third_party"
    done = {}
    for command in commands:
        if command.startswith("cd "):
            os.chdir(command.removeprefix("cd "))
            continue
        done[command] = subprocess.run(
            command, shell=True, env=installed, capture_output=True, text=True, timeout=240, check=False
        )
        wanted = 2 if "# refused" in command else 0
        assert done[command].returncode == wanted, (command, done[command].stdout, done[command].stderr)
    assert "1 passed" in done["pytest examples/third_party"].stdout
    assert "orchestrator-sensor" in done["orchestrator plugins"].stdout
    assert "refused (wrong_modality)" in done[commands[-1]].stderr
    for name in ("base", "pumps"):
        assert json.loads(Path(f"runs/{name}/results.json").read_text())["test"]["accuracy"] > 0.8
    assert json.loads(Path("runs/pumps/lineage.json").read_text())["features"] == "once"
    card = Path("runs/pumps/model/README.md").read_text()
    assert "pipeline" not in card
    assert "orchestrator predict runs/pumps FILE..." in card
    (code,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    program = f"import os; os.chdir('runs/pumps/model')\n{code.replace('a file', '../../../pumps/left/0.npy')}"
    shown = subprocess.run([sys.executable, "-c", program], env=installed, check=True, capture_output=True, text=True)
    assert "label='left'" in shown.stdout
    assert "left" in next(out.stdout for command, out in done.items() if "predict" in command)


@pytest.mark.slow
def test_what_does_not_fit_is_refused_and_a_broken_file_named(
    installed: dict[str, str], cli_process: Cli, tiny_resnet: Path
) -> None:
    rows = {row["name"]: row for row in json.loads(cli_process("plugins", "--json", env=installed).stdout)}
    assert (rows["sensor"]["distribution"], rows["sensor"]["trainable"]) == ("orchestrator-sensor", True)
    refused = cli_process("check", tiny_resnet, "--modality", "sensor", "--json", env=installed)
    assert (refused.returncode, json.loads(refused.stdout)["reason"]) == (2, "wrong_modality")
    subprocess.run([sys.executable, SOURCE / "make_data.py"], check=True, env=installed)
    for channels, name in ((3, "three"), (4, "four")):
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps({"model_type": "sensor-cnn", "channels": channels, "width": 4}))
    train = ("pretrain", "--modality", "sensor", "--data", "pumps", "--json")
    other = json.loads(cli_process(*train, "--backbone", "four", env=installed).stdout)
    assert (other["reason"], other["message"]) == ("channels", "four takes 4 channels, not 3")
    Path("pumps/left/broken.npy").write_bytes(b"\x93NUMPY")
    broken = json.loads(cli_process(*train, "--backbone", "three", env=installed).stdout)
    assert broken["reason"] == "data"
    assert "broken.npy: is no .npy file of numbers" in broken["message"]


@pytest.mark.slow
def test_full_fine_tuning_from_python(installed: dict[str, str]) -> None:
    subprocess.run([sys.executable, SOURCE / "make_data.py"], check=True, env=installed)
    Path("cnn").mkdir()
    Path("cnn/config.json").write_text('{"model_type": "sensor-cnn", "channels": 3, "width": 16}')
    program = (
        "import orchestrator; more = dict(modality='sensor', report=lambda _: None)\n"
        "base = orchestrator.pretrain(backbone='cnn', data='machines', training={'epochs': 4}, **more)\n"
        "run = orchestrator.finetune(backbone=str(base.path), data='pumps', method='full', **more)\n"
        "print(run.accuracy)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=installed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0.8


@pytest.mark.slow
def test_what_the_plugin_changes_and_whose_the_type_is_are_said(installed: dict[str, str]) -> None:
    """Recordings of 90 to 159 steps are filled up or cut to 128: not in silence; and the type is not transformers'."""
    subprocess.run([sys.executable, SOURCE / "make_data.py"], env=installed, check=True)
    Path("cnn").mkdir()
    Path("cnn/config.json").write_text('{"model_type": "sensor-cnn", "channels": 3, "width": 16}')

    def run(*arguments: str) -> str:
        done = subprocess.run(
            ["orchestrator", *arguments, "--modality", "sensor"],
            env=installed, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("pretrain", "--backbone", "cnn", "--data", "machines", "--epochs", "1", "--name", "base")
    out = run("check", "runs/base", "--data", "pumps")
    assert re.search(r"length +\d+ to \d+ .* 128 +9\d%", out), out
    assert "orchestrator-sensor sensor-cnn, run" in " ".join(out.split())
