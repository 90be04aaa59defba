"""`check_modality`: what is declared, the toy samples through the gate, and a network that trains on them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator.modality import Modality, registry
from orchestrator.testing.declaration import (
    check_declaration,
    check_in_another_process,
    check_name,
    check_pickle,
    check_rules,
    refuse_while_imported,
)
from orchestrator.testing.samples import check_garbage, check_gate, check_toys


def check_modality(
    modality: Modality,
    backbone: str | Path | Mapping[str, Any],
    *,
    settings: Mapping[str, Any] | None = None,
    shares: Sequence[str] = (),
) -> None:
    """Return if the modality keeps the contract and trains; raise `ContractError`, naming the field, if not.

        check_modality(modality, backbone={"model_type": "sensor-cnn", "channels": 3, "width": 16})

    `backbone` is a directory in Hub layout, or what its config.json holds; one without weights is pretrained on
    the toy samples first. `settings` are the plugin's own. `shares` names the modalities whose backbones
    fit this one too, on purpose. Every task that is declared is trained for. Takes seconds, works in a temporary
    directory and downloads nothing.
    """
    refuse_while_imported()
    check_declaration(modality)
    check_name(modality)
    check_rules(modality, shares)
    toys = check_toys(modality)
    check_garbage(modality, toys)
    check_pickle(modality)
    with TemporaryDirectory(prefix="orchestrator-check-") as folder, _registered(modality):
        directory = _lay_out(Path(folder), backbone)
        card = check_gate(modality, directory, toys, settings or {})
        check_in_another_process(modality, card, toys.samples[0], settings or {})
        from orchestrator.testing.network import check_network  # noqa: PLC0415  # torch

        check_network(modality, directory, Path(folder), toys, settings or {})


@contextlib.contextmanager
def _registered(modality: Modality) -> Iterator[None]:
    """The modality can be asked for by its name, installed or not."""
    if registry.claims(modality.name):
        yield
        return
    before = registry.get(modality.name) if registry.is_registered(modality.name) else None
    registry.register(modality)
    try:
        yield
    finally:
        registry.unregister(modality.name)
        if before is not None:
            registry.register(before)


def _lay_out(folder: Path, backbone: str | Path | Mapping[str, Any]) -> Path:
    """The backbone's directory; where its config was given, one with that config.json alone."""
    if not isinstance(backbone, Mapping):
        return Path(backbone).expanduser().absolute()
    directory = folder / "backbone"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(dict(backbone)), encoding="utf-8")
    return directory
