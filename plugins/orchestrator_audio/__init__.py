"""Audio: speech, sounds, music; what libsndfile reads.

A declaration: the gate knows what it takes and which backbones fit. Training with it is not built yet.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from orchestrator.modality import BackboneRules, Modality, SampleField, Task


class Settings(BaseModel):
    """The audio plugin's own settings: none yet."""

    model_config = ConfigDict(frozen=True, extra="forbid")


modality = Modality(
    name="audio",
    title="audio",
    sample=(
        SampleField(
            name="audio",
            kind="file",
            dtype="float32",
            shape=("samples",),
            unit="mono, in [-1, 1], at the backbone's own sample rate",
            suffixes=(".wav", ".flac", ".ogg", ".mp3"),
        ),
    ),
    settings=Settings,
    rules=BackboneRules.from_json(Path(__file__).with_name("rows.json")),
    tasks=(Task(name="single-label", title="one class a recording"),),
    by_length=True,
    extra="",
    decode=None,
    measure=None,
    fit=None,
    build=None,
    batch=None,
    toy=None,
)
