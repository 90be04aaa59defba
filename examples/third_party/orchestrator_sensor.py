"""Sensor recordings, .npy files of float32 [channels, time]; their backbone is a small convolutional network."""

import io

import numpy as np
from pydantic import BaseModel, ConfigDict

from orchestrator.errors import BadSampleError, RefusedError
from orchestrator.modality import BackboneRules, Fit, Modality, SampleField, Task
from orchestrator.plans import BackboneRow


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    steps: int = 128  # every recording is cut, or filled up with zeros, to this


def decode(sample):
    try:
        signal = np.load(io.BytesIO(sample["sensor"]), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadSampleError(f"is no .npy file: {error}") from None
    if signal.ndim != 2 or not signal.size or signal.dtype.kind not in "fiu" or not np.isfinite(signal).all():
        raise BadSampleError(f"is {signal.dtype} {signal.shape}, not finite numbers [channels, time]")
    return signal.astype(np.float32)


def fit(card, row, settings, profile):
    channels = card.config["channels"]
    if profile and profile.share(lambda one: one["channels"] != channels):
        raise RefusedError(
            "channels", f"{card.source} takes {channels} channels, the data has {profile.ranges['channels']}"
        )
    return Fit(input={"channels": channels, "width": card.config["width"], "steps": settings.steps})


def build(plan, directory):
    from orchestrator.model import build_module, nn

    c, w = plan.input["channels"], plan.input["width"]
    return build_module(plan, directory, head="8", make=lambda: nn.Sequential(
        nn.Conv1d(c, w, 7, 2), nn.BatchNorm1d(w), nn.ReLU(), nn.Conv1d(w, w, 5, 2), nn.BatchNorm1d(w), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(w, len(plan.classes))))  # fmt: skip


def batch(plan, directory):
    from torch import from_numpy, stack
    from torch.nn.functional import pad

    n = plan.input["steps"]  # a negative padding cuts
    return lambda rows, train: {"input": stack([pad(from_numpy(s), (0, n - s.shape[1])) for s in rows])}


modality = Modality(
    name="sensor", title="sensor recordings", settings=Settings, by_length=False, extra="", decode=decode, fit=fit,
    sample=(SampleField(name="sensor", kind="file", dtype="float32", shape=("channels", "time"), unit="as recorded",
                        suffixes=(".npy",)),), build=build, batch=batch,
    rules=BackboneRules(generated_from="sensor 0.1", accepts={"sensor-cnn": BackboneRow(head=("8",))}), toy=None,
    measure=lambda signal, card: {"channels": len(signal)}, tasks=(Task(name="single-label", title="one class"),),
)  # fmt: skip
