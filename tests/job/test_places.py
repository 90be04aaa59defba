"""Places that are nowhere are said to be, before anything is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

import orchestrator
from orchestrator.backbone import read_card
from orchestrator.data import prepare_data
from orchestrator.errors import RefusedError
from orchestrator.job import BackboneCard, Data, holds_secret, list_runs, local_path, make_job, open_run, redacted
from orchestrator.modality import registry

NOBODY = "~nobody-of-this-name"


def test_home_is_found_and_that_of_nobody_is_not_there() -> None:
    assert local_path("~/photos") == Path.home() / "photos"
    assert local_path(f"{NOBODY}/photos") == Path(NOBODY) / "photos"


def test_a_place_in_the_home_of_nobody_is_refused_as_missing(tiny_resnet: Path) -> None:
    job = make_job(backbone=f"{NOBODY}/backbone", data=f"{NOBODY}/photos")
    assert job.digest() == make_job(job).digest()
    assert list_runs(f"{NOBODY}/runs") == []
    with pytest.raises(RefusedError, match="there is no run"):
        open_run(f"{NOBODY}/runs/one")
    with pytest.raises(RefusedError, match=f"there is no directory {NOBODY}/backbone"):
        read_card(f"{NOBODY}/backbone")
    with pytest.raises(RefusedError, match=f"there is no {NOBODY}/photos"):
        prepare_data(
            Data(path=f"{NOBODY}/photos"), registry.get("image"), BackboneCard(source="b", kind="run", name="b")
        )
    with pytest.raises(RefusedError, match=f"there is no {NOBODY}/photos"):
        orchestrator.finetune(method="head", backbone=str(tiny_resnet), data=f"{NOBODY}/photos")
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("s3://bucket/runs", "s3://bucket/runs"),
        ("photos/a@b", "photos/a@b"),
        ("s3://key:word@bucket/runs", "s3://..."),
        ("https://host/data.csv?sv=1&sig=abc", "https://..."),
        ("abfss://photos@account.dfs.core.windows.net/runs", "abfss://photos@account.dfs.core.windows.net/runs"),
        ("abfs://c@a/x?account_key=abc", "abfs://..."),
    ],
)
def test_places_are_shown_without_keys(place: str, shown: str) -> None:
    assert redacted(place) == shown
    assert holds_secret(place) == (place != shown)
