"""Defaults alone, on real weights and real data."""

from __future__ import annotations

import csv
import random
import runpy
from pathlib import Path

import pytest

import orchestrator
from tests.conftest import REPOSITORY
from tests.whole.test_train import silent

WORDNET = Path("/usr/share/wordnet")
GLOSSES = REPOSITORY / "examples" / "glosses"


@pytest.fixture(scope="module")
def glosses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 of WordNet's glosses of nouns with their 25 classes, and 1,916 to test on."""
    if not (WORDNET / "data.noun").is_file():
        pytest.skip(f"no WordNet in {WORDNET}: apt-get install wordnet-base")
    folder = tmp_path_factory.mktemp("glosses")
    make_data = runpy.run_path(str(GLOSSES / "make_data.py"))["make_data"]
    with make_data(WORDNET, folder).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    random.Random(0).shuffle(rows)
    table = folder / "table.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label", "split"))
        writer.writerows(
            (row["text"], row["label"], "train" if i < 1000 else "test") for i, row in enumerate(rows[:2916])
        )
    return table


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["full", "auto"])
def test_a_transformer_that_is_trained_whole_is_better_than_its_frozen_body(
    glosses: Path, tmp_path: Path, method: str
) -> None:
    """all-MiniLM-L6-v2: by less than two standard errors of the difference (some 1.5 points each) it would be luck."""
    backbone = runpy.run_path(str(GLOSSES / "make_backbone.py"))["make_backbone"](tmp_path / "all-MiniLM-L6-v2")
    found = {
        name: orchestrator.finetune(
            modality="text",
            backbone=str(backbone),
            data={"path": str(glosses), "split_column": "split"},
            method=name,
            report=silent,
        )
        for name in ("head", method)
    }
    assert found[method].results["test"]["num_samples"] == 1916
    assert found[method].accuracy > found["head"].accuracy + 0.03
