"""The same labels whatever the file's type: what Parquet, Arrow and JSON have types for, CSV has words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from orchestrator.data.spellings import meaning, numbers_by_meaning
from tests.data.test_sources import parquet, read, refusal, saved, texts

Rows = list[dict[str, Any]]


def rows_with(labels: list[Any], num: int = 40) -> Rows:
    return [{"text": f"sentence {i}", "label": labels[i % len(labels)]} for i in range(num)]


def csv(file: Path, rows: Rows, write: Any = str) -> Path:
    file.write_text("text,label\n" + "".join(f"{row['text']},{write(row['label'])}\n" for row in rows))
    return file


def more(rows: Rows) -> Rows:
    return [{**row, "text": f"new {row['text']}"} for row in rows[:10]]


@pytest.mark.parametrize(
    ("labels", "write"),
    [
        ([True, False], str),
        ([True, False], lambda cell: str(cell).lower()),
        ([True, False], lambda cell: str(cell).upper()),
        ([1, 2], lambda cell: f"{cell}.0"),
        ([1.0, 2.0], str),
        ([1.0, 2.0], lambda cell: str(int(cell))),
        ([0, 12], lambda cell: f"+{cell}."),
    ],
)
@pytest.mark.parametrize("first", ["parquet", "csv"])
def test_labels_of_one_meaning_are_one_class_in_training_and_test(
    tmp_path: Path, labels: list[Any], write: Any, first: str
) -> None:
    """They were four classes, of which test had two that training never saw."""
    rows = rows_with(labels)
    files = {"parquet": lambda name, some: parquet(tmp_path / f"{name}.parquet", some),
             "csv": lambda name, some: csv(tmp_path / f"{name}.csv", some, write)}  # fmt: skip
    train = files[first]("train", rows)
    test = files["csv" if first == "parquet" else "parquet"]("test", more(rows))
    found = read(train, test=str(test))
    assert len(found.classes) == 2
    assert found.summary.per_class["test"] == (5, 5)


@pytest.mark.parametrize("classes", [("false", "true"), ("False", "True")])
def test_a_finished_model_knows_its_labels_in_any_spelling(tmp_path: Path, classes: tuple[str, str]) -> None:
    """They were `never learnt`."""
    for file in (csv(tmp_path / "t.csv", rows_with([True, False])),
                 parquet(tmp_path / "t.parquet", rows_with([True, False]))):  # fmt: skip
        assert read(file, classes=classes).summary.per_class["test"] == (20, 20)
    numbers = csv(tmp_path / "n.csv", rows_with(["2.0", "1.0"]))
    assert read(numbers, classes=("1", "2")).summary.per_class["test"] == (20, 20)
    assert "never learnt" in refusal(numbers, classes=("1", "3")).message


def test_a_label_of_one_spelling_stays_as_it_is_written(tmp_path: Path) -> None:
    for labels in (
        ["True", "False"],
        ["1.0", "2.5"],
        ["007", "7"],
        ["1.10", "1.1"],
        ["v2", "v2.0"],
        ["TRUE!", "true?"],
    ):
        found = read(csv(tmp_path / "t.csv", rows_with(labels)))
        assert set(found.classes) == set(labels)
        assert not any("are one class" in note for note in found.summary.notes)


def test_spellings_that_become_one_are_said(tmp_path: Path) -> None:
    found = read(csv(tmp_path / "t.csv", rows_with(["1.0", "true", "1", "True", "yes"], 100)))
    assert found.classes == ("1", "true", "yes")
    assert "the labels '1.0' and '1' are one class: '1'" in found.summary.notes
    assert "the labels 'true' and 'True' are one class: 'true'" in found.summary.notes
    assert saved().targets[:5].tolist() == [0, 1, 0, 1, 2]
    lists = [{"text": f"t {i}", "label": [["True", "a"], ["true"], ["b"]][i % 3]} for i in range(60)]
    several = read(parquet(tmp_path / "t.parquet", lists), task="multi-label")
    assert several.classes == ("a", "b", "true")
    assert saved().targets[:3].tolist() == [[1, 0, 1], [0, 0, 1], [0, 1, 0]]


def test_groups_of_one_meaning_are_one_group(tmp_path: Path) -> None:
    rows = [{**row, "who": i % 8} for i, row in enumerate(texts(80))]
    train = parquet(tmp_path / "train.parquet", rows)
    lines = [f"new {i},{'odd' if i % 2 else 'even'},{i % 8}.0\n" for i in range(16)]
    (tmp_path / "test.csv").write_text("text,label,who\n" + "".join(lines))
    assert "stands in train and in test" in refusal(train, test=str(tmp_path / "test.csv"), group_column="who").message


def test_meanings() -> None:
    same = [("True", "true"), ("FALSE", "false"), ("2.0", "2"), ("+2", "2"), ("-3.", "-3"), ("0.000", "0")]
    assert all(meaning(one) == other for one, other in same)
    for name in ("2.5", "1e3", "007.5", "v1.0", "", ".", "1.0.0", "yes", "1,0", "\u0663."):
        assert meaning(name) == name


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_float32_is_the_number_that_was_written(tmp_path: Path, suffix: str) -> None:
    """0.1 was 0.10000000149011612, and no label of a CSV."""
    values = np.array([0.1, 2.5, 0.30000001192092896] * 20, np.float32)
    table = pa.table({"text": [f"t {i}" for i in range(60)], "label": values})
    file = tmp_path / f"t{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        pyarrow.feather.write_feather(table, str(file))
    assert read(file).classes == ("0.1", "0.3", "2.5")


# --- what the schema tells ---


def with_class_labels(feature: Any, labels: list[Any]) -> pa.Table:
    info = {"info": {"features": {"text": {"dtype": "string", "_type": "Value"}, "label": feature}}}
    table = pa.table({"text": [f"sentence {i}" for i in range(len(labels))], "label": labels})
    return table.replace_schema_metadata({"huggingface": json.dumps(info), "other": "x"})


CLASS_LABEL = {"names": ["weather", "food"], "_type": "ClassLabel"}


def write_as(file: Path, table: pa.Table) -> Path:
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(table, file)
    elif file.suffix == ".feather":
        pyarrow.feather.write_feather(table, str(file))
    else:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    return file


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_names_of_classes_in_the_schema_s_metadata(tmp_path: Path, suffix: str) -> None:
    """They were `0` and `1`."""
    found = read(write_as(tmp_path / f"t{suffix}", with_class_labels(CLASS_LABEL, [0, 1] * 30)))
    assert found.classes == ("food", "weather")
    assert saved().targets[:2].tolist() == [1, 0]
    file = write_as(tmp_path / f"u{suffix}", with_class_labels(CLASS_LABEL, [0, 1] * 30 + [-1, 2]))
    assert "row 61: has no label in 'label' (and 1 more)" in refusal(file).message


def test_the_classes_of_a_large_model_are_looked_through_once() -> None:
    """Each was counted among all: with so many the test would run into its time limit."""
    names = [f"class {i}" for i in range(300_000)]
    found = numbers_by_meaning([*names, "True", "true"])
    assert found == {name: number for number, name in enumerate(names)}


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_numbers_of_classes_where_numbers_are_asked_for(tmp_path: Path, suffix: str) -> None:
    """Their names were refused: `'weather'`, and a regression target is a number; `'absent'`, not 0 or 1."""
    file = write_as(tmp_path / f"t{suffix}", with_class_labels(CLASS_LABEL, [0, 1] * 30))
    read(file, task="regression")
    assert saved().targets[:4].flatten().tolist() == [0, 1, 0, 1]
    of_each = {"wet": ["absent", "present"], "cold": ["no", "yes"], "dry": ["yes", "no"]}
    info = {"info": {"features": {key: {"names": names, "_type": "ClassLabel"} for key, names in of_each.items()}}}
    cells = {"text": [f"t {i}" for i in range(60)], "wet": [0, 1] * 30, "cold": [1, 0] * 30, "dry": [0, 1] * 30}
    table = pa.table(cells).replace_schema_metadata({"huggingface": json.dumps(info)})
    found = read(write_as(tmp_path / f"u{suffix}", table), task="multi-label", label_column=tuple(of_each))
    columns = [found.classes.index(name) for name in of_each]
    assert saved().targets[:2][:, columns].tolist() == [[0, 1, 1], [1, 0, 0]]
    bad = write_as(tmp_path / f"v{suffix}", with_class_labels({**CLASS_LABEL, "names": ["a", "b", "c"]}, [0, -1] * 30))
    assert "has no number in 'label'" in refusal(bad, task="regression").message


@pytest.mark.parametrize("kind", ["Sequence", "List", "LargeList", "[]"])
def test_names_of_classes_in_lists(tmp_path: Path, kind: str) -> None:
    feature = [CLASS_LABEL] if kind == "[]" else {"feature": CLASS_LABEL, "length": -1, "_type": kind}
    table = with_class_labels(feature, [[0], [1], [0, 1], []] * 15)
    assert read(write_as(tmp_path / "t.parquet", table), task="multi-label").classes == ("food", "weather")


def test_what_datasets_itself_writes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    cells = {"text": [f"t {i}" for i in range(40)], "label": [i % 2 for i in range(40)]}
    data = datasets.Dataset.from_dict(cells, features=features)
    data.to_parquet(str(tmp_path / "t.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    for place in (tmp_path / "t.parquet", tmp_path / "saved", arrow):
        assert read(place).classes == ("no", "yes")


@pytest.mark.parametrize(
    "metadata",
    [b"", b"\xff", b"[]", b"{}", b'{"info": 3}', b'{"info": {"features": ["label"]}}', b"[" * 100_000,
     b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": [1, 2]}}}}',
     b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": "ab"}}}}'],
)  # fmt: skip
def test_metadata_of_another_form_counts_for_nothing(tmp_path: Path, metadata: bytes) -> None:
    table = pa.table({"text": [f"t {i}" for i in range(40)], "label": [i % 2 for i in range(40)]})
    pyarrow.parquet.write_table(table.replace_schema_metadata({b"huggingface": metadata}), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet").classes == ("0", "1")


def test_texts_under_a_class_label_stay_texts(tmp_path: Path) -> None:
    """Somebody put names in the place of the numbers, and left the metadata."""
    file = write_as(tmp_path / "t.parquet", with_class_labels(CLASS_LABEL, ["a", "b"] * 30))
    assert read(file).classes == ("a", "b")


# --- an end that is missing, or wrong ---


def test_a_stream_of_arrow_that_does_not_say_where_it_ends(tmp_path: Path) -> None:
    file = write_as(tmp_path / "t.arrow", with_class_labels(CLASS_LABEL, [0, 1] * 30))
    content = file.read_bytes()
    assert not any("mark of its end" in note for note in read(file).summary.notes)
    file.write_bytes(content[:-8])
    found = read(file)
    assert sum(found.summary.num_samples.values()) == 60
    assert any("t.arrow: it carries no mark of its end" in note for note in found.summary.notes)
    file.write_bytes(content + content)
    assert f"its last batch ends at {len(content)} of {2 * len(content)} bytes" in refusal(file).message
    file.write_bytes(content[: len(content) - 300])
    assert "cannot be read" in refusal(file).message


def test_batches_that_the_index_of_an_arrow_file_does_not_name(tmp_path: Path) -> None:
    """Its footer alone was believed: rows were lost without a word."""
    table, names = with_class_labels(CLASS_LABEL, [0, 1] * 30), []
    for num in (2, 3):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            for batch in table.slice(0, 20 * num).to_batches(max_chunksize=20):
                writer.write_batch(batch)
        names.append(sink.getvalue().to_pybytes())
    short, whole = names
    at = short.rindex(b"\xff\xff\xff\xff\0\0\0\0") + 8  # what comes behind the end of the stream is the index
    end = whole.rindex(b"\xff\xff\xff\xff\0\0\0\0") + 8
    file = tmp_path / "t.feather"
    file.write_bytes(whole)
    assert sum(read(file).summary.num_samples.values()) == 60
    file.write_bytes(whole[:end] + short[at:])
    assert "its end names 2 batches, and it holds 3" in refusal(file).message


def test_rows_that_a_parquet_file_promises_and_lacks(tmp_path: Path) -> None:
    file = write_as(tmp_path / "t.parquet", with_class_labels(CLASS_LABEL, [0, 1] * 20))
    content = file.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    at = content.index(b"\x16\x50", footer)  # the number of rows, 40, as Thrift's compact protocol writes it
    file.write_bytes(content[:at] + b"\x16\x52" + content[at + 2 :])
    assert "it holds 40 of 41 rows" in refusal(file).message


def test_a_page_that_claims_two_gigabytes_takes_none(tmp_path: Path) -> None:
    """Found by the fuzz test: a buffer for the claim was made before the file was asked."""
    import resource

    sink = pa.BufferOutputStream()
    table = pa.table({"text": [f"sentence {i}" for i in range(60)], "label": ["a", "b"] * 30})
    pyarrow.parquet.write_table(table, sink, compression="NONE", use_dictionary=False)
    content = sink.getvalue().to_pybytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    num_refused = 0
    for at in range(4, 24):  # the header of the first page
        changed = content[:at] + b"\xff\xff\xff\xff\x0f" + content[at + 5 :]
        (tmp_path / "t.parquet").write_bytes(changed)
        num_refused += "cannot be read" in refusal(tmp_path / "t.parquet").message
    assert num_refused == 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
