"""The toy samples of a plugin, as a user would have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.modality import registry


def write_toys(folder: Path, modality: str, task: str = "single-label", pairs: bool = False) -> Path:
    """24 of the plugin's toy samples as a table of paths or texts, in a folder that is there."""
    plugin = registry.get(modality)
    assert plugin.toy is not None
    names, rows = ("dark", "cold", "food"), []
    for i, (sample, label) in enumerate(plugin.toy(24)):
        row: dict[str, Any] = {
            "single-label": {"label": label},
            "multi-label": {"label": [name for j, name in enumerate(names) if (i >> j) % 2]},
            "regression": {"words": 3.0 * (i % 2) + i / 100, "height": 500.0 - 7 * i},
        }[task]
        if modality == "text":
            row |= {"text": sample["text"].decode()} | ({"other": "hot soup and bread"} if pairs else {})
        else:
            row["path"] = f"{i}{plugin.sample[0].suffixes[0]}"
            (folder / row["path"]).write_bytes(sample[modality])
        rows.append(json.dumps(row))
    table = folder / "table.jsonl"
    table.write_text("\n".join(rows))
    return table
