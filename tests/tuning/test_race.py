"""The samples of a race: nested, each beginning in the proportions of all, and features brought to one width."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.backbone import read_card
from orchestrator.data import Samples, prepare_data
from orchestrator.job import SPLITS, Data
from orchestrator.modality import registry
from orchestrator.training import epoch_batches
from orchestrator.tuning.race import flat, stratified
from orchestrator.tuning.steps import mean_batch
from tests.tiny import make_bert


@pytest.fixture
def samples(tiny_resnet: Path, digits: Path, tmp_path: Path) -> Samples:
    prepare_data(Data(path=str(digits)), registry.get("image"), read_card(str(tiny_resnet)), directory=tmp_path)
    return Samples(tmp_path, ("image",))


def test_each_beginning_is_in_the_proportions_of_all(samples: Samples) -> None:
    rows = samples.rows("train")
    ordered = stratified(samples, rows, 0)
    assert sorted(ordered.tolist()) == rows.tolist()
    assert not np.array_equal(ordered, np.sort(ordered))
    whole = np.bincount(samples.targets[rows], minlength=10) / len(rows)
    for num in (50, 120, 300):
        part = np.bincount(samples.targets[ordered[:num]], minlength=10)
        assert np.abs(part - whole * num).max() <= 1
    assert np.array_equal(ordered, stratified(samples, rows, 0))


def test_a_part_of_a_table_is_that_part_of_its_splits(samples: Samples) -> None:
    rows = np.sort(np.concatenate([samples.rows(name)[::7] for name in SPLITS]))
    some = samples.only(rows)
    for name in SPLITS:
        assert np.array_equal(some.rows(name), np.intersect1d(samples.rows(name), rows))
        assert len(samples.rows(name)) > len(some.rows(name))
    assert some.read(int(rows[3])) == samples.read(int(rows[3]))


def test_the_steps_that_are_timed_are_of_a_batch_as_training_makes_them(tmp_path: Path) -> None:
    """Of texts most of which are short: a batch with the longest of all beside the others is none of them."""
    backbone, table = make_bert(tmp_path / "bert"), tmp_path / "texts.csv"
    lines = [f"{'word ' * (300 if number % 40 == 0 else 1 + number % 5)},{number % 2}" for number in range(800)]
    table.write_text("text,label\n" + "\n".join(lines))
    prepare_data(Data(path=str(table)), registry.get("text"), read_card(str(backbone)), directory=tmp_path)
    samples = Samples(tmp_path, ("text",))
    batches = epoch_batches(samples, samples.rows("train"), 3, 0, 40, length_bucketing=True)
    rows = mean_batch(samples, 3, 40, length_bucketing=True)
    assert any(np.array_equal(rows, batch) for batch in batches)
    longest = [samples.num_bytes[batch].max() * len(batch) for batch in batches]
    assert max(longest) > 10 * np.mean(longest) / 2
    chosen = samples.num_bytes[rows].max() * len(rows)
    assert abs(chosen - np.mean(longest)) == min(abs(one - np.mean(longest)) for one in longest)


def test_features_with_places_are_their_mean() -> None:
    pixels, tokens = torch.rand(3, 4, 2, 5), torch.rand(3, 6, 4)
    assert torch.allclose(flat(pixels), pixels.flatten(2).mean(2))
    assert torch.allclose(flat(tokens), tokens.mean(1))
    assert torch.equal(flat(tokens[:, 0]), tokens[:, 0])
