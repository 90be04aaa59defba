"""The best weights -> a Hugging Face directory that serves without this package, with its card and lineage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from orchestrator.job import MODEL, HeldRun, Plan
from orchestrator.network import Network, StateDict
from orchestrator.training.card import model_card


def export(
    network: Network, state_dict: StateDict, plan: Plan, results: Mapping[str, Any], lineage: Mapping[str, Any],
    run: HeldRun,
) -> None:  # fmt: skip
    """Commit the run's model, whole or not at all: weights, config, processor, README.md, lineage.json.

    `state_dict` are the whole network's tensors.
    """
    with run.committing(MODEL) as folder:
        network.save(folder, state_dict)
        told = json.dumps(_without_paths(lineage), indent=1, ensure_ascii=False)
        (folder / "lineage.json").write_text(told, encoding="utf-8")
        card = folder / "README.md"
        card.write_text(model_card(plan, results, lineage, network.usage, network.library), encoding="utf-8")
        # As files are made here: safetensors makes its own for the owner alone, whatever the umask.
        mode = card.stat().st_mode
        for file in folder.rglob("*"):
            if file.is_file():
                file.chmod(mode)


def _without_paths(told: Any) -> Any:
    """The same, with the last part alone of each absolute path, since the model is handed on."""
    if isinstance(told, Mapping):
        return {key: _without_paths(value) for key, value in told.items()}
    if isinstance(told, str) and told.startswith("/"):
        return PurePosixPath(told).name
    return told
