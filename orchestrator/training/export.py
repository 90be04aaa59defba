"""The best weights -> a Hugging Face directory that serves without this package, with its card and lineage."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.job import Plan, sync
from orchestrator.network import Network, StateDict
from orchestrator.training.card import model_card


def export(
    network: Network, state_dict: StateDict, plan: Plan, results: Mapping[str, Any], lineage: Mapping[str, Any],
    directory: Path,
) -> None:  # fmt: skip
    """Write `directory` whole or not at all: model, processor, README.md, lineage.json.

    `state_dict` are the whole network's tensors. Once this returns, it is on the disk under its name.
    """
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    network.save(partial, state_dict)
    (partial / "lineage.json").write_text(json.dumps(lineage, indent=1, ensure_ascii=False), encoding="utf-8")
    card = partial / "README.md"
    card.write_text(model_card(plan, results, lineage, network.usage, network.library), encoding="utf-8")
    # As files are made here: safetensors makes its own for the owner alone, whatever the umask.
    _settle(partial, mode=card.stat().st_mode)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)
    sync(directory.parent)


def _settle(folder: Path, mode: int) -> None:
    """Give all files below a folder the same mode, and return once they and their folders are on the disk."""
    for child in sorted(folder.iterdir()):
        if child.is_dir():
            _settle(child, mode)
        else:
            child.chmod(mode)
            sync(child)
    sync(folder)
