"""Sensor recordings, .npy files of numbers [channels, time]; their backbone is a small convolutional network."""

# fmt: off
import io

import numpy as np
from orchestrator.errors import BadSampleError, RefusedError
from orchestrator.modality import BackboneRow, BackboneRules, Fit, Modality, SampleField, Task
from pydantic import BaseModel


class Settings(BaseModel, extra="forbid"):
    steps: int = 128  # every recording is cut, or filled up with zeros, to this

def decode(sample):
    try:
        signal = np.load(io.BytesIO(sample["sensor"]), allow_pickle=False)
        fits = (abs(signal) <= np.finfo(np.float32).max).all()  # NaN does not
    except Exception as error:  # numpy raises what its parser happens to raise
        raise BadSampleError(f"is no .npy file of numbers: {error}") from None
    if signal.ndim != 2 or not signal.size or not fits:
        raise BadSampleError(f"is {signal.shape}, not finite numbers [channels, time]")
    return signal.astype(np.float32)

def measure(signal, card):
    return {"channels": len(signal), "steps": signal.shape[1]}

def fit(card, row, settings, profile):
    channels, width = card.config["channels"], card.config["width"]
    if profile and profile.share(lambda one: one["channels"] != channels):
        raise RefusedError("channels", f"{card.source} takes {channels} channels, not {profile.ranges['channels']}")
    cut = profile.adapted("length", "steps", settings.steps) if profile else ()
    return Fit(input={"channels": channels, "width": width, "steps": settings.steps}, adaptations=cut)

def build(plan, directory):
    from orchestrator.network import build_module
    from torch import nn
    c, w = plan.input["channels"], plan.input["width"]
    return build_module(plan, directory, head="8", make=lambda: nn.Sequential(
        nn.Conv1d(c, w, 7, 2), nn.BatchNorm1d(w), nn.ReLU(), nn.Conv1d(w, w, 5, 2), nn.BatchNorm1d(w), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(w, len(plan.classes))))

def batch(plan, directory):
    from torch import from_numpy, nn, stack
    n = plan.input["steps"]  # a negative padding cuts
    return lambda rows, train: {"input": stack([nn.functional.pad(from_numpy(s), (0, n - s.shape[1])) for s in rows])}

def toy(n):
    files = [io.BytesIO() for _ in range(n)]
    for i, file in enumerate(files):
        np.save(file, np.sin(np.arange(300).reshape(3, 100) * (0.2 + i % 2 + i / 1000)))
    return [({"sensor": file.getvalue()}, "fast" if i % 2 else "slow") for i, file in enumerate(files)]

modality = Modality(
    name="sensor", title="sensor recordings", settings=Settings, length_bucketing=False, extra="",
    sample=(SampleField(name="sensor", kind="file", dtype="float32", shape=("channels", "time"), unit="as recorded",
                        suffixes=(".npy",)),), tasks=(Task(name="single-label", title="one class"),),
    rules=BackboneRules(generated_from="sensor 0.1", accepts={"sensor-cnn": BackboneRow(head=("8",))}),
    decode=decode, measure=measure, fit=fit, build=build, batch=batch, toy=toy,
)
