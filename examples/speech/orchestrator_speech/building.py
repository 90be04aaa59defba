"""The half of the speech plugin that needs torch: a network with the backbone's weights, saved with its own code."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from orchestrator.modality import Plan
from orchestrator.network import Network, StateDict, build_module
from orchestrator_speech import networks

_USAGE = """\
import json, soundfile, soxr, torch
from networks import {architecture}  # networks.py, beside this card; torch is all that it needs
from safetensors.torch import load_file

config = json.load(open("config.json"))
model = {architecture}(config, len(config["id2label"])).eval()
model.load_state_dict(load_file("model.safetensors"))
sound, rate_hz = soundfile.read("a file", dtype="float32", always_2d=True)
sound = soxr.resample(sound.mean(axis=1), rate_hz, {rate})[: {most}]  # what follows was never listened to
with torch.no_grad():
    scores = model(torch.from_numpy(sound)[None]).{scores}[0]
print({{config["id2label"][str(i)]: round(float(score), 4) for i, score in enumerate(scores)}})"""
_SCORES = {"single-label": "softmax(-1)", "multi-label": "sigmoid()"}


def build_network(plan: Plan, directory: Path) -> Network:
    """CREPE or the voice encoder, exported with `networks.py` and, in its card, the code that calls it."""
    architecture, rate = plan.row.architecture, plan.input["sample_rate_hz"]
    usage = _USAGE.format(
        architecture=architecture,
        rate=rate,
        most=round(plan.input["max_seconds"] * rate),
        scores=_SCORES.get(plan.job.task, "float()"),
    )
    chosen = getattr(networks, architecture)
    network = build_module(
        plan,
        directory,
        make=lambda: chosen(plan.backbone.config, len(plan.classes)),
        head="classifier",
        usage=usage,
    )

    def save(folder: Path, state_dict: StateDict) -> None:
        network.save(folder, state_dict)
        shutil.copy(directory / "preprocessor_config.json", folder)
        shutil.copy(networks.__file__, folder / "networks.py")

    return replace(network, save=save)
