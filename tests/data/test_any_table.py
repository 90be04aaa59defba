"""Any table is refused with a `DataError`, or each of its rows is in one split, skipped or left out."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from orchestrator.data.prepare import prepare_data
from orchestrator.data.samples import Samples
from orchestrator.errors import DataError
from orchestrator.job import SPLITS, BackboneCard, Data, TaskName
from orchestrator.modality import registry

CARD = BackboneCard(source="b", kind="directory", name="b")
PROPERTY = settings(max_examples=100, deadline=None, database=None, derandomize=True)
LABELS = st.sampled_from(["a", "b", "c"])
TARGETS = st.floats(-1e6, 1e6)
ODD = st.sampled_from(
    [None, "", " ", 1, 1.0, "1", 0.5, True, [], ["a"], {}, "\ud800", "a\0", "e\u0301", "é", 1e400, -(2**70)]
)
WORDS = st.sampled_from(["train", "train", "train", "val", "test"])
FRACTIONS = st.sampled_from([(0.1, 0.1), (0.3, 0.3), (0.2, 0.0), (0.0, 0.0)])


def cells(task: TaskName) -> dict[str, st.SearchStrategy[Any]]:
    label = {"single-label": LABELS, "multi-label": st.lists(LABELS, max_size=3), "regression": TARGETS}[task]
    return {"text": st.text("abc", min_size=1, max_size=5), "label": label, "group": st.integers(0, 9), "side": WORDS}


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[dict[str, Any]], dict[str, Any], TaskName]:
    """(rows, settings of `data`, task); half of the tables have odd cells among the others."""
    is_odd = draw(st.booleans())
    task: TaskName = draw(st.sampled_from(["single-label", "single-label", "multi-label", "regression"]))
    columns = cells(task)
    if is_odd:
        columns = {name: cell | cell | ODD for name, cell in columns.items()}
    num_rows = draw(st.integers(1, 12) | st.integers(12, 40))
    rows = draw(st.lists(st.fixed_dictionaries(columns), min_size=num_rows, max_size=num_rows))
    chosen: dict[str, Any] = {"on_bad_sample": "skip" if is_odd else "fail", "seed": draw(st.integers(0, 99))}
    chosen["validation_fraction"], chosen["test_fraction"] = draw(FRACTIONS)
    if draw(st.booleans()):
        chosen["group_column"] = "group"
    if draw(st.integers(0, 3)) == 0:
        chosen["split_column"] = "side"
    if draw(st.integers(0, 3)) == 0:
        chosen["num_train"] = draw(st.integers(2, 12))
    return rows, chosen, task


@PROPERTY
@given(table=tables())
def test_any_table(
    table: tuple[list[dict[str, Any]], dict[str, Any], TaskName], tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows, chosen, task = table
    folder = tmp_path_factory.mktemp("any")
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = Data(path=str(folder / "t.jsonl"), **chosen)
    try:
        prepared = prepare_data(spec, registry.get("text"), CARD, task, directory=folder)
    except DataError:
        return
    samples, summary = Samples(folder, ("text", "text_pair")), prepared.summary
    in_splits = np.concatenate([samples.rows(split) for split in SPLITS])
    assert sorted(in_splits.tolist()) == list(range(len(samples.targets)))
    assert {split: len(samples.rows(split)) for split in SPLITS} == summary.num_samples
    num_left_out = len(rows) - summary.num_skipped - len(in_splits)
    if "num_train" in chosen:
        assert num_left_out >= 0
        assert summary.num_samples["train"] == chosen["num_train"]
    else:
        assert num_left_out == 0
    assert np.isfinite(samples.targets).all()

    row_of = [rows[int(samples.place(i).removeprefix("table row ")) - 1] for i in range(len(samples.targets))]
    texts = [samples.read(i)["text"].decode("utf-8", "surrogatepass") for i in range(len(row_of))]
    assert texts == [row["text"] for row in row_of]
    if "group_column" in chosen:
        splits_of = defaultdict(set)
        for split in SPLITS:
            for i in samples.rows(split).tolist():
                splits_of[str(row_of[i]["group"])].add(split)
        assert {len(splits) for splits in splits_of.values()} == {1}
    if task == "single-label":
        assert set(samples.targets[samples.rows("train")].tolist()) == set(range(len(prepared.classes)))
    assert prepare_data(spec, registry.get("text"), CARD, task) == prepared
