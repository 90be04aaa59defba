"""Speech: all that audio is, and two small networks that transformers does not know, of torchcrepe and resemblyzer.

What is read, measured, held against the data and set is the audio plugin's; what is new is two types of backbone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import orchestrator_audio
from orchestrator.errors import RefusedError
from orchestrator.modality import BackboneCard, BackboneRow, BackboneRules, Fit, Plan, Profile

if TYPE_CHECKING:
    from orchestrator.modality import Collate
    from orchestrator.network import Network

OURS = {
    name: BackboneRow(architecture=architecture, inputs=("input_values", "lengths"), head=("classifier",))
    for name, architecture in {"crepe": "Crepe", "resemblyzer": "VoiceEncoder"}.items()
}
_SETTINGS = {"crepe": ("channels", "hop_length"), "resemblyzer": ("hidden_size", "num_layers")}
_RATE_HZ = 16_000


def fit(card: BackboneCard, row: BackboneRow, settings: orchestrator_audio.Settings, profile: Profile | None) -> Fit:
    """The audio plugin's; of ours also what their config.json must hold, and their one rate."""
    found = orchestrator_audio.fit(card, row, settings, profile)
    missing = [key for key in _SETTINGS.get(card.model_type, ()) if not card.config.get(key)]
    rate = found.input["sample_rate_hz"]
    if missing or (card.model_type in OURS and rate != _RATE_HZ):
        problem = f"config.json gives no {missing[0]}" if missing else f"its preprocessor_config.json says {rate} Hz"
        raise RefusedError(
            "bad_config",
            f"{card.source} ({card.model_type}): {problem}",
            expected=f"a directory that make_backbone.py wrote, at {_RATE_HZ} Hz",
            mend="make the backbone again: python examples/speech/make_backbone.py",
        )
    return found


def build(plan: Plan, directory: Path) -> Network:
    """Ours, or the audio plugin's network."""
    if plan.backbone.model_type not in OURS:
        return orchestrator_audio.build(plan, directory)
    from orchestrator_speech.building import build_network

    return build_network(plan, directory)


def batch(plan: Plan, directory: Path) -> Collate:
    """Waveforms and their lengths for ours, the feature extractor's output for the others."""
    if plan.backbone.model_type not in OURS:
        return orchestrator_audio.batch(plan, directory)
    from orchestrator_audio.network import make_waveform_collate

    return make_waveform_collate(plan)


modality = replace(
    orchestrator_audio.modality,
    name="speech",
    title="speech",
    rules=BackboneRules(
        generated_from="torchcrepe 0.0.24, Resemblyzer 0.1.4, " + orchestrator_audio.modality.rules.generated_from,
        accepts={**OURS, **orchestrator_audio.modality.rules.accepts},
        refuses=orchestrator_audio.modality.rules.refuses,
    ),
    fit=fit,
    build=build,
    batch=batch,
)
