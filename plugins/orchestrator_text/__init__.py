"""Text: one sentence, one paragraph, one document.

A declaration: the gate knows what it takes and which backbones fit. Training with it is not built yet.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from orchestrator.modality import BackboneRules, Modality, SampleField, Task


class Settings(BaseModel):
    """The text plugin's own settings: none yet."""

    model_config = ConfigDict(frozen=True, extra="forbid")


modality = Modality(
    name="text",
    title="text",
    sample=(
        SampleField(
            name="text",
            kind="text",
            dtype="int64",
            shape=("tokens",),
            unit="token ids of the backbone's own tokenizer",
        ),
    ),
    settings=Settings,
    rules=BackboneRules.from_json(Path(__file__).with_name("rows.json")),
    tasks=(Task(name="single-label", title="one class a text"),),
    by_length=True,
    extra="",
    decode=None,
    measure=None,
    fit=None,
    build=None,
    batch=None,
    toy=None,
)
