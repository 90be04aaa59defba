"""examples/third_party as pip installs it: listed, refused the wrong backbone, pretrained, fine-tuned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

from tests.conftest import REPOSITORY

Cli = Callable[..., CompletedProcess[str]]
SOURCE = REPOSITORY / "examples" / "third_party"


def recordings(root: Path, kinds: dict[str, float], num: int) -> Path:
    """Three channels of noise with a sine in the second, its frequency the class."""
    random = np.random.default_rng(len(kinds))
    for label, frequency in kinds.items():
        (root / label).mkdir(parents=True)
        for i in range(num):
            signal = random.normal(scale=0.3, size=(3, random.integers(90, 160))).astype(np.float32)
            signal[1] += np.sin(frequency * np.arange(signal.shape[1]) + random.uniform(0, 6))
            np.save(root / label / f"{i}.npy", signal)
    return root


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the distribution is there."""
    target = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--disable-pip-version-check", "--target", str(target), str(SOURCE)],
        check=True, capture_output=True,
    )  # fmt: skip
    return {**os.environ, "PYTHONPATH": str(target)}


def test_it_is_a_plugin_of_sixty_lines() -> None:
    lines = (SOURCE / "orchestrator_sensor.py").read_text().splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 120


@pytest.mark.slow
def test_from_nothing_to_a_trained_model(
    installed: dict[str, str], cli: Cli, tiny_resnet: Path, tmp_path: Path
) -> None:
    rows = {row["name"]: row for row in json.loads(cli("plugins", "--json", env=installed).stdout)}
    assert (rows["sensor"]["distribution"], rows["sensor"]["trainable"]) == ("orchestrator-sensor", True)
    refused = cli("check", tiny_resnet, "--modality", "sensor", "--json", env=installed)
    assert refused.returncode == 2
    assert json.loads(refused.stdout)["reason"] == "wrong_modality"
    backbone = tmp_path / "sensor-cnn"
    backbone.mkdir()
    (backbone / "config.json").write_text('{"model_type": "sensor-cnn", "channels": 3, "width": 16}')
    many = recordings(tmp_path / "many", {"slow": 0.2, "middle": 0.5, "fast": 1.0}, 60)
    base = cli("pretrain", "--modality", "sensor", "--backbone", backbone, "--data", many, "--epochs", "8",
               "--name", "base", "--json", env=installed)  # fmt: skip
    assert base.returncode == 0, base.stderr
    assert json.loads(base.stdout)["test"]["accuracy"] > 0.8
    few = recordings(tmp_path / "few", {"left": 0.2, "right": 1.0}, 60)
    for method in ("head", "full"):
        tuned = cli("finetune", "--modality", "sensor", "--backbone", "runs/base", "--data", few, "--method", method,
                    "--name", method, "--json", env=installed)  # fmt: skip
        assert tuned.returncode == 0, tuned.stderr
        assert json.loads(tuned.stdout)["test"]["accuracy"] > 0.8
    assert json.loads(Path("runs/head/lineage.json").read_text())["features"] == "once"
    one = cli("predict", "runs/head", next(iter(sorted((few / "left").iterdir()))), "--json", env=installed)
    assert json.loads(one.stdout)[0]["label"] == "left"
    (few / "left" / "broken.npy").write_bytes(b"\x93NUMPY")
    broken = cli("evaluate", "runs/head", "--data", few, env=installed)
    assert broken.returncode == 2
    assert "is no .npy file" in " ".join(broken.stderr.split())
