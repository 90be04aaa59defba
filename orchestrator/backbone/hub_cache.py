"""Files of the Hub on this machine, in the folders of its own client, which other programs read too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator.job import BackboneCard


def cached_folder(card: BackboneCard, names: Sequence[str]) -> Path | None:
    """The folder with all of these files at the card's commit; None where one is missing. Asks nobody."""
    from huggingface_hub import try_to_load_from_cache

    folder = None
    for name in names:
        path = try_to_load_from_cache(str(card.repo_id), name, revision=card.commit)
        if not isinstance(path, str):
            return None
        folder = Path(path).parents[name.count("/")]
    return folder


def place_for(card: BackboneCard, name: str) -> Path:
    """Where a file of the card's commit stands once it is here."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    repository = repo_folder_name(repo_id=str(card.repo_id), repo_type="model")
    return Path(HF_HUB_CACHE) / repository / "snapshots" / str(card.commit) / name
