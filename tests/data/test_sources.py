"""Forms of data beyond images in folders: texts, several labels, numbers; and what is refused with the mend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from orchestrator.data.prepare import Prepared, prepare_data
from orchestrator.data.samples import Samples
from orchestrator.errors import DataError
from orchestrator.job.plans import BackboneCard
from orchestrator.job.spec import Data
from orchestrator.modality import registry
from tests.data.test_prepare import into

CARD = BackboneCard(source="b", kind="directory", name="b")
Rows = list[dict[str, Any]]


def read(path: Path, modality: str = "text", task: Any = "single-label", classes: Any = None, **settings: Any) -> Any:
    return prepare_data(Data(path=str(path), **settings), registry.get(modality), CARD, task, classes, into())


def refusal(path: Path, *args: Any, **settings: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path, *args, **settings)
    return caught.value


def saved() -> Samples:
    """The sample table that was read last."""
    return Samples(Path("samples").absolute(), ("text", "text_pair"))


def jsonl(file: Path, rows: Rows) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def parquet(file: Path, rows: Rows) -> Path:
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
    return file


def texts(num: int = 40) -> Rows:
    return [{"text": f"sentence number {i}, plain", "label": "odd" if i % 2 else "even"} for i in range(num)]


def renamed(rows: Rows, **names: str) -> Rows:
    return [{names.get(key, key): value for key, value in row.items()} for row in rows]


# --- texts ---


@pytest.mark.parametrize("column", ["text", "sentence", "content"])
def test_a_column_of_texts_is_found(tmp_path: Path, column: str) -> None:
    found = read(jsonl(tmp_path / "t.jsonl", renamed(texts(), text=column)))
    samples = saved()
    assert samples.read(3) == {"text": b"sentence number 3, plain"}
    assert samples.num_bytes[3] == len(b"sentence number 3, plain")
    assert samples.place(3) == "table row 4"
    assert found.summary.num_samples == {"train": 32, "validation": 4, "test": 4}


@pytest.mark.parametrize(
    ("columns", "given"),
    [
        (("premise", "hypothesis"), None),
        (("sentence1", "sentence2"), None),
        (("text", "text_pair"), None),
        (("question", "answer"), ["question", "answer"]),
    ],
)
def test_pairs_of_texts(tmp_path: Path, columns: tuple[str, str], given: Any) -> None:
    rows = [{columns[0]: f"first {i}", columns[1]: f"second {i}", "label": i % 2} for i in range(20)]
    read(parquet(tmp_path / "t.parquet", rows), input_column=given)
    assert saved().read(7) == {"text": b"first 7", "text_pair": b"second 7"}
    rows[4][columns[1]] = None
    error = refusal(parquet(tmp_path / "u.parquet", rows), input_column=given)
    assert "u.parquet row 5: has no text" in error.message
    error = refusal(tmp_path / "t.parquet", input_column=[*columns, "label"])
    assert "names 3 columns, and a sample has 2 at most" in error.message


def test_the_same_text_in_two_splits_is_said(tmp_path: Path) -> None:
    rows = [{**row, "split": "test" if i >= 30 else "train"} for i, row in enumerate(texts())]
    rows[35]["text"] = rows[3]["text"]
    found = read(jsonl(tmp_path / "t.jsonl", rows), split_column="split")
    (note,) = (one for one in found.summary.warnings if "same content" in one)
    assert "1 sample of test has the same content as a training sample, such as" in note
    assert "row 36" in note
    assert found.summary.warnings == (note,)  # the label is the same


def test_one_text_under_two_labels_is_a_warning(tmp_path: Path) -> None:
    rows = texts()
    rows[10]["text"] = rows[35]["text"] = rows[3]["text"]
    warnings = read(jsonl(tmp_path / "t.jsonl", rows)).summary.warnings
    (warning,) = (one for one in warnings if "another label" in one)
    assert warning.startswith("3 samples have the same content as one with another label, such as '")
    assert "'odd' in" in warning
    assert "'even' in" in warning
    several = read(tmp_path / "t.jsonl", task="multi-label")
    assert several.summary.warnings[0].startswith("3 samples")


@pytest.mark.parametrize("given", [{"input_column": "label"}, {"label_column": "text"}])
def test_a_column_that_is_input_and_label_is_refused(tmp_path: Path, given: dict[str, str]) -> None:
    error = refusal(jsonl(tmp_path / "t.jsonl", texts()), **given)
    assert "is both the input and the label" in error.message
    assert "out of text, label" in error.expected


def test_a_table_without_the_names_of_its_columns_is_told_to_have_some(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("".join(f"sentence {i},{'ab'[i % 2]}\n" for i in range(40)))
    assert refusal(tmp_path / "t.csv").mend.startswith("its first line looks like a sample: write a line with")
    assert read(jsonl(tmp_path / "u.jsonl", texts())).classes == ("even", "odd")


def test_a_mend_of_what_no_sample_has_does_not_leave_all_out(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "t.jsonl", texts())
    assert refusal(file, split_column="label").mend.endswith("or leave data.split_column out")
    error = refusal(jsonl(tmp_path / "u.jsonl", [{**row, "text": i} for i, row in enumerate(texts())]))
    assert error.mend.startswith("write them as texts (in a CSV every cell is one), or name another column")
    (tmp_path / "u.csv").write_text("text,label\n" + "".join(f"{i},{'ab'[i % 2]}\n" for i in range(40)))
    assert read(tmp_path / "u.csv").classes == ("a", "b")
    error = refusal(jsonl(tmp_path / "v.jsonl", [{"text": "", "label": "a"}] * 9))
    assert "of those that were read none can be used" in error.mend


def test_two_groups_are_too_few_and_the_mend_mends(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "t.jsonl", [{**row, "who": f"{i // 20}"} for i, row in enumerate(texts())])
    error = refusal(file, group_column="who")
    assert "set data.validation_fraction and data.test_fraction to 0, both" in error.mend
    assert read(file, group_column="who", validation_fraction=0, test_fraction=0).classes == ("even", "odd")


def test_a_separator_that_is_rare_is_named_by_the_mend(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text~label\n" + "".join(f"number {i}~{'ab'[i % 2]}\n" for i in range(40)))
    assert "data.separator '~'" in refusal(tmp_path / "t.csv").mend
    assert read(tmp_path / "t.csv", separator="~").classes == ("a", "b")


@pytest.mark.parametrize(
    ("name", "mend"), [("x.xlsx", "save it as .csv"), ("t.txt", "save it as .csv"), ("g.csv.gz", "unpack it")]
)
def test_files_of_another_form_are_told_what_to_become(tmp_path: Path, name: str, mend: str) -> None:
    (tmp_path / name).write_bytes(b"text,label\n")
    assert refusal(tmp_path / name).mend.startswith(mend)


def test_an_input_column_that_is_not_there(tmp_path: Path) -> None:
    error = refusal(jsonl(tmp_path / "t.jsonl", texts()), input_column="nope")
    assert "has no column 'nope' (data.input_column)" in error.message
    assert error.expected == "one of text, label"


@pytest.mark.parametrize("task", ["single-label", "multi-label"])
def test_spaces_around_labels_are_taken_off_and_said(tmp_path: Path, task: str) -> None:
    rows = [{"text": f"text {i}", "label": ("a", "a ", "b", " b c")[i % 4]} for i in range(40)]
    found = read(parquet(tmp_path / "t.parquet", rows), task=task)
    assert found.classes == ("a", "b", "b c")
    assert f"{tmp_path}/t.parquet: 20 labels are read without the spaces at the ends" in found.summary.notes
    assert not any("spaces" in note for note in read(jsonl(tmp_path / "u.jsonl", texts())).summary.notes)
    one = [{**row, "label": row["label"].strip()[:1].replace("b", "a")} for row in rows]
    one[3]["label"] = "a "
    if task == "single-label":
        assert "1 label is read without the spaces" in refusal(jsonl(tmp_path / "v.jsonl", one)).message


def test_labels_that_differ_by_case_alone_are_named(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": ("Cat", "cat", "CAT", "dog")[i % 4]} for i in range(40)]
    (note,) = read(jsonl(tmp_path / "t.jsonl", rows)).summary.notes
    assert note == "the labels 'CAT', 'Cat' and 'cat' differ by case alone, and are learnt as 3 labels"


def test_labels_that_look_the_same_are_named(tmp_path: Path) -> None:
    """By a space of no width and a no-break space: three classes stood in the plan under one name."""
    rows = [{"text": f"text {i}", "label": ("a tool", "a tool\u200b", "a\xa0tool", "dog")[i % 4]} for i in range(40)]
    (note,) = read(jsonl(tmp_path / "t.jsonl", rows)).summary.notes
    assert "'a tool', 'a tool\\u200b' and 'a\\xa0tool' look the same, and are learnt as 3 labels" in note


def test_an_empty_label_among_others_is_called_so(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": ["a", "b"][: 1 + i % 2]} for i in range(40)]
    rows[3]["label"] = ["a", None]
    message = refusal(parquet(tmp_path / "t.parquet", rows), task="multi-label").message
    assert "has an empty label among others in 'label'" in message


def test_texts_and_files_that_were_mixed_up_are_told_apart(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "t.jsonl", texts())
    assert "--modality text" in refusal(file, "image").mend
    error = refusal(file, "image", input_column="text")
    assert "t.jsonl row 1: there is no file 'sentence number 0, plain'; this looks like a text" in error.message
    assert "--modality text" in error.mend
    rows = [{"image": b"\x89PNG", "label": i % 2} for i in range(4)]
    error = refusal(parquet(tmp_path / "t.parquet", rows))
    assert "no column of texts: it has image, label" in error.message
    assert "--modality image" in error.mend
    error = refusal(tmp_path / "t.parquet", input_column="image")
    assert r"row 1: has" in error.message
    assert "where a text should stand" in error.message


@pytest.mark.parametrize(
    ("file", "asked", "mend"),
    [("x.wav", "image", "audio"), ("x.png", "audio", "image"), ("x.png", "text", "image"), ("x.txt", "image", "text")],
)
def test_folders_of_another_modality_are_named(tmp_path: Path, file: str, asked: str, mend: str) -> None:
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        (tmp_path / "data" / label / file).write_bytes(b"x")
    error = refusal(tmp_path / "data", asked)
    assert f"it holds 2 other files, such as a/{file}" in error.message
    assert f"--modality {mend}" in error.mend


def test_a_long_line_and_a_late_word_are_read(tmp_path: Path) -> None:
    """Libraries read in blocks of a megabyte and take a column's type from the first."""
    rows = texts()
    rows[7]["text"] = "long " * 500_000
    read(jsonl(tmp_path / "t.jsonl", rows))
    assert saved().num_bytes[7] == 2_500_000
    lines = [f"number {i},{i % 2},{i if i < 90_000 else 'last'}\n" for i in range(90_005)]
    (tmp_path / "t.csv").write_text("text,label,id\n" + "".join(lines))
    assert sum(read(tmp_path / "t.csv").summary.num_samples.values()) == 90_005


@pytest.mark.parametrize(
    "names", [("train.jsonl", "test.jsonl"), ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl")]
)
def test_tables_that_are_named_as_splits_are_those_splits(tmp_path: Path, names: tuple[str, str]) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    jsonl(folder / names[0], texts(30))
    jsonl(folder / names[1], [{**row, "text": f"new {row['text']}"} for row in texts(10)])
    found = read(folder)
    assert found.summary.num_samples == {"train": 26, "validation": 4, "test": 10}
    jsonl(folder / "more.jsonl", texts(5))
    assert any("no split, not read" in note for note in read(folder).summary.notes)
    (folder / names[0]).unlink()
    assert "there is none for training" in refusal(folder).message


# --- several labels ---


def many(num: int = 60) -> Rows:
    """Three labels of rising rareness; every fourth sample has none."""
    rows = []
    for i in range(num):
        labels = [name for name, every in (("red", 2), ("green", 4), ("blue", 10)) if i % every == 1]
        rows.append({"text": f"text {i}", "label": labels})
    return rows


def as_targets(found: Prepared, rows: Rows) -> None:
    assert found.classes == ("blue", "green", "red")
    targets = saved().targets
    assert targets.dtype == np.float32
    assert targets.tolist() == [[float(name in row["label"]) for name in found.classes] for row in rows]


@pytest.mark.parametrize("form", ["lists.parquet", "lists.jsonl", "cells.csv", "columns.jsonl", "columns.csv"])
def test_several_labels_say_the_same_in_every_form(tmp_path: Path, form: str) -> None:
    rows, names, settings = many(), ("blue", "green", "red"), {}
    file = tmp_path / form
    if form == "cells.csv":
        settings = {"label_separator": "|"}
        lines = [f"{row['text']},{' | '.join(row['label'])}\n" for row in rows]
        file.write_text("text,label\n" + "".join(lines))
    elif form == "columns.csv":
        settings = {"label_column": names}
        lines = [f"{row['text']},{','.join(str(int(n in row['label'])) for n in names)}\n" for row in rows]
        file.write_text(f"text,{','.join(names)}\n" + "".join(lines))
    elif form == "columns.jsonl":
        settings = {"label_column": names}
        jsonl(file, [{"text": row["text"], **{name: name in row["label"] for name in names}} for row in rows])
    else:
        (parquet if form.endswith("parquet") else jsonl)(file, rows)
    found = read(file, task="multi-label", **settings)
    as_targets(found, rows)
    per_class = np.array([found.summary.per_class[split] for split in ("train", "validation", "test")])
    assert per_class.sum(axis=0).tolist() == [6, 15, 30]
    assert (per_class[1:] > 0).all()  # the rarest, too, is in every split
    assert found.summary.per_class["train"] == tuple(per_class[0])


def test_cells_of_several_labels_that_nobody_said_how_to_cut_are_noted(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": ("a|b", "b", "a")[i % 3]} for i in range(60)]
    file = jsonl(tmp_path / "t.jsonl", rows)
    assert any("data.label_separator" in one for one in read(file, task="multi-label").summary.warnings)
    cut = read(file, task="multi-label", label_separator="|")
    assert cut.classes == ("a", "b")
    assert not any("data.label_separator" in note for note in cut.summary.notes)


def test_labels_that_are_no_labels(tmp_path: Path) -> None:
    rows = many()
    rows[2]["label"] = None
    error = refusal(parquet(tmp_path / "t.parquet", rows), task="multi-label")
    assert "row 3: has no label in 'label'" in error.message
    switches = [{"text": f"t {i}", "a": i % 2, "b": 2 if i == 5 else i % 3 == 0} for i in range(30)]
    error = refusal(jsonl(tmp_path / "s.jsonl", [{**r, "b": int(r["b"])} for r in switches]), task="multi-label",
                    label_column=["a", "b"])  # fmt: skip
    assert "row 6: has 2 in 'b', not 0 or 1" in error.message


def test_a_label_that_all_or_none_have(tmp_path: Path) -> None:
    rows = [{**row, "label": [*row["label"], "all"]} for row in many()]
    error = refusal(jsonl(tmp_path / "t.jsonl", rows), task="multi-label")
    assert "every training sample has the label 'all'" in error.message
    columns = [{"text": f"t {i}", "a": i % 2, "never": 0} for i in range(20)]
    error = refusal(jsonl(tmp_path / "u.jsonl", columns), task="multi-label", label_column=["a", "never"])
    assert "no training sample has the label 'never'" in error.message


def test_forms_of_another_task_are_refused_with_the_mend(tmp_path: Path) -> None:
    lists = jsonl(tmp_path / "t.jsonl", many())
    error = refusal(lists)
    assert "row 1 has a list of labels in 'label', and the task is single-label" in error.message
    assert "--task multi-label" in error.mend
    error = refusal(lists, label_column=["a", "b"])
    assert "names 2 columns, and the task is single-label" in error.message
    assert "--task" in error.mend
    error = refusal(lists, label_separator=",")
    assert "data.label_separator is for several labels in one cell" in error.message
    (tmp_path / "folder" / "a").mkdir(parents=True)
    for task in ("multi-label", "regression"):
        error = refusal(tmp_path / "folder", task=task)
        assert f"is a folder, where a sample has one class, and the task is {task}" in error.message


def test_a_label_that_was_never_learnt(tmp_path: Path) -> None:
    rows = many()
    rows[9]["label"] = ["red", "pink"]
    error = refusal(jsonl(tmp_path / "t.jsonl", rows), task="multi-label", classes=("blue", "green", "red"))
    assert "row 10 has the label 'pink', which the model never learnt" in error.message


# --- numbers ---


def numbers(num: int = 200) -> Rows:
    return [{"text": f"text {i}", "price": float(i), "size": -0.5 * i} for i in range(num)]


def test_numbers_are_targets(tmp_path: Path) -> None:
    columns = ("price", "size")
    found = read(parquet(tmp_path / "t.parquet", numbers()), task="regression", label_column=columns)
    samples = saved()
    assert found.classes == columns
    assert samples.targets.dtype == np.float32
    assert samples.targets[5].tolist() == [5.0, -2.5]
    train = samples.targets[samples.rows("train")].astype(float)
    assert found.summary.target_mean == pytest.approx(train.mean(axis=0).tolist(), rel=1e-6)
    assert found.summary.target_std == pytest.approx(train.std(axis=0).tolist(), rel=1e-6)
    assert found.summary.per_class == {}
    for split in ("validation", "test"):  # every tenth of the range is in each
        assert sorted(samples.targets[samples.rows(split), 0] // 20) == [float(i // 2) for i in range(20)]


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), 1e300])
def test_numbers_that_are_none(tmp_path: Path, bad: float | None) -> None:
    rows = numbers()
    rows[8]["price"] = bad
    file = parquet(tmp_path / "t.parquet", rows)
    error = refusal(file, task="regression", label_column="price")
    assert "t.parquet row 9: has" in error.message
    found = read(file, task="regression", label_column="price", on_bad_sample="skip")
    assert found.summary.num_skipped == 1
    assert all(np.isfinite(found.summary.target_std))


def test_words_and_constants_are_no_targets(tmp_path: Path) -> None:
    rows = [{**row, "price": "cheap" if i == 4 else str(row["price"])} for i, row in enumerate(numbers())]
    error = refusal(jsonl(tmp_path / "t.jsonl", rows), task="regression", label_column="price")
    assert "row 5 has 'cheap' in 'price', and a regression target is a number" in error.message
    same = [{**row, "price": 0.1} for row in numbers(300)]
    error = refusal(jsonl(tmp_path / "u.jsonl", same), task="regression", label_column="price")
    assert "the target 'price' is 0.1 in every training sample" in error.message
    assert error.mend.startswith("name another column: data.label_column")
    error = refusal(jsonl(tmp_path / "w.jsonl", same), task="regression", label_column=["size", "price"])
    assert error.mend.startswith("leave the target out of data.label_column")
    error = refusal(
        jsonl(tmp_path / "v.jsonl", numbers()), task="regression", label_column=["price", "size"], classes=("price",)
    )
    assert "names 2 targets, and the model has 1" in error.message


def test_numbers_that_are_one_in_float32_are_said_to_be_so(tmp_path: Path) -> None:
    rows = [{**row, "price": 1_700_000_000 + i} for i, row in enumerate(numbers(60))]
    error = refusal(jsonl(tmp_path / "t.jsonl", rows), task="regression", label_column="price")
    assert "lies between 1700000000 and 1700000059, and float32" in error.message
    assert "steps of 128" in error.message
    assert "such as 1700000000" in error.mend
    less = [{**row, "price": row["price"] - 1_700_000_000} for row in rows]
    found = read(jsonl(tmp_path / "u.jsonl", less), task="regression", label_column="price")
    assert 20 < found.summary.target_mean[0] < 40


def test_few_numbers_to_train_on(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "t.jsonl", numbers())
    assert read(file, task="regression", label_column="price", num_train=5).summary.num_samples["train"] == 5


# --- what names and delimiters may hold ---


def test_class_names_go_through_unchanged(tmp_path: Path) -> None:
    names = ["two words", "a, b", "up/down", "🐟", "<b>bold</b>", "e\u0301", "[red]", "'quoted'"]
    rows = [{"text": f"text {i}", "label": names[i % len(names)]} for i in range(64)]
    expected = sorted({*names[:5], "é", *names[6:]})
    assert list(read(jsonl(tmp_path / "t.jsonl", rows)).classes) == expected
    lists = [{**row, "label": [row["label"]]} for row in rows]
    assert list(read(jsonl(tmp_path / "u.jsonl", lists), task="multi-label").classes) == expected


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_another_delimiter_is_found_and_said(tmp_path: Path, mark: str) -> None:
    file = tmp_path / "t.csv"
    rows = [("text", "label"), *((f"a{i}, b", "xy"[i % 2]) for i in range(20))]
    file.write_text("".join(mark.join(row) + "\n" for row in rows))
    found = read(file)
    assert sum(found.summary.num_samples.values()) == 20
    assert f"{file}: its columns are separated by {mark!r}, as its first line shows" in found.summary.notes
    file.write_text("\n".join(mark.join(("id, old", *row)) for row in rows))
    error = refusal(file)
    assert "has no column 'label'" in error.message
    assert f"data.separator {mark!r} (--separator {mark!r})" in error.mend
    assert read(file, separator=mark).classes == ("x", "y")


# --- what lies beside, and what is not there ---


def test_hidden_folders_beside_tables_and_the_marks_of_data_sets_beside_classes(tmp_path: Path) -> None:
    (tmp_path / "tables" / ".ipynb_checkpoints").mkdir(parents=True)
    jsonl(tmp_path / "tables" / "part-0.jsonl", texts(20))
    assert sum(read(tmp_path / "tables").summary.num_samples.values()) == 20
    for mark in ("state.json", "dataset_dict.json"):
        for i in range(20):
            file = tmp_path / mark / "ab"[i % 2] / f"{i}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"text {i}")
        (tmp_path / mark / mark).write_text("{}")
        assert read(tmp_path / mark).classes == ("a", "b")


def test_a_subset_is_of_data_sets_of_the_hub(tmp_path: Path) -> None:
    error = refusal(jsonl(tmp_path / "t.jsonl", texts()), subset="en")
    assert "data.subset is 'en', and" in error.message
    assert "t.jsonl is no data set of the Hub" in error.message


def test_a_root_that_is_not_there(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "t.jsonl", [{"path": f"{i}.png", "label": i % 2} for i in range(20)])
    for choice in ("fail", "skip"):
        error = refusal(file, "image", root=str(tmp_path / "gone"), on_bad_sample=choice)
        assert error.message == f"there is no folder {tmp_path / 'gone'} (data.root)"


def test_a_key_that_json_lines_have_late_is_a_column(tmp_path: Path) -> None:
    rows = texts(300)
    late = [{"text": row["text"], **({"kind": row["label"]} if i > 150 else {})} for i, row in enumerate(rows)]
    file = jsonl(tmp_path / "t.jsonl", late)
    found = read(file, label_column="kind", on_bad_sample="skip")
    assert sum(found.summary.num_samples.values()) == 149
    assert found.summary.num_skipped == 151
    error = refusal(file)
    assert "has no column 'label'" in error.message
    assert error.expected == "one of text, kind"  # all lines were looked at


def test_one_split_alone_is_ours_to_split(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    jsonl(tmp_path / "tables" / "test.jsonl", texts(40))
    assert read(tmp_path / "tables").summary.num_samples == {"train": 32, "validation": 4, "test": 4}


# --- labels that are hardly meant so ---


def test_hundreds_of_fractions_are_no_classes(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": i / 4} for i in range(200)]
    error = refusal(parquet(tmp_path / "t.parquet", rows))
    assert "the labels are 200 different numbers with fractions" in error.message
    assert "--task regression" in error.mend
    assert not read(tmp_path / "t.parquet", task="regression").summary.notes
    steps = [{"text": f"text {i}", "label": (i % 30) / 10} for i in range(300)]
    (note,) = read(parquet(tmp_path / "u.parquet", steps)).summary.notes
    assert "30 different numbers with fractions, such as 0, 0.1, 0.2, each learnt as a class of its own" in note
    stars = [{"text": f"text {i}", "label": (i % 10) / 2} for i in range(100)]
    assert not read(parquet(tmp_path / "v.parquet", stars)).summary.notes
    years = [{"text": f"text {i}", "label": 1900 + i % 60} for i in range(600)]
    assert not read(parquet(tmp_path / "w.parquet", years)).summary.notes


@pytest.mark.parametrize("mark", [",", ";", "|"])
def test_a_separator_that_most_cells_hold_is_named(tmp_path: Path, mark: str) -> None:
    rows = [{"text": f"text {i}", "label": (f"a{mark}b", f"b{mark} c", "a")[i % 3]} for i in range(60)]
    (note,) = read(jsonl(tmp_path / "t.jsonl", rows), task="multi-label").summary.warnings
    assert f"40 of 60 cells hold {mark!r}, and each cell is learnt as one label" in note
    assert f"data.label_separator {mark!r} (--label-separator {mark!r})" in note
