"""Folders: splits under any usual name, folders that only wrap others, tables beside the files that they name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.layout import children
from orchestrator.data.prepare import Prepared, prepare_data
from orchestrator.errors import DataError
from orchestrator.job import Data, name_splits, split_of
from orchestrator.modality import registry
from orchestrator.terminal import cli as commands
from tests.data.test_prepare import CARD, png, put, read, refusal
from tests.data.test_sources import jsonl, read as read_texts, texts

CLASSES = ("cat", "dog")


def classes_in(folder: Path, num: int = 10, shade: int = 0) -> Path:
    """Class folders of images, each of other bytes."""
    for i in range(num):
        put(folder / CLASSES[i % 2] / f"{i}.png", png(shade + i))
    return folder


def evaluated(path: Path, classes: tuple[str, ...] = CLASSES) -> Prepared:
    return prepare_data(Data(path=str(path)), registry.get("image"), CARD, classes=classes)


SPLIT_FOLDERS = [
    ("train", "test"),
    ("Training", "Validation"),
    ("training_set", "test_set"),
    ("trainset", "testset"),
    ("Train Set", "Test Set"),
    ("TrainImages", "TestImages"),
    ("train-data", "val-data"),
    ("training_set/training_set", "test_set/test_set"),
    ("train/train", "test/testing"),
    ("train/images", "valid/images"),
    ("seg_train/seg_train", "seg_test/seg_test"),
    ("train2017", "val2017"),
    ("archive/train", "archive/test"),
    ("archive/birds/train_set", "archive/birds/test_set"),
]


@pytest.mark.parametrize("names", SPLIT_FOLDERS)
def test_class_folders_that_look_like_splits_are_splits(tmp_path: Path, names: tuple[str, str]) -> None:
    """They were the classes `training_set` and `test_set`, without a word."""
    root = tmp_path / "data"
    classes_in(root / names[0], 20)
    classes_in(root / names[1], 6, shade=100)
    put(root / "__MACOSX" / names[0] / "cat" / "._0.png", b"x")
    found = read(root, validation_fraction=0.1)
    held = "test" if "test" in names[1].lower() else "validation"
    assert found.classes == CLASSES
    assert found.summary.num_samples[held] == 6
    assert sum(found.summary.num_samples.values()) == 26
    plain = all(name.lower() in ("train", "test", "training", "validation") for name in names)
    said = " ".join(found.summary.notes)
    assert ("read as splits: " in said) != plain
    assert plain or all(f"{name}/ (" in said for name in names)
    assert ("all lies in the folder archive" in said) == names[0].startswith("archive")


def test_one_folder_around_the_classes_is_said(tmp_path: Path) -> None:
    classes_in(tmp_path / "data" / "photos" / "2024", 20)
    put(tmp_path / "data" / "readme.md", b"x")
    found = read(tmp_path / "data")
    assert found.classes == CLASSES
    assert any("all lies in the folder photos/2024/, whose folders" in note for note in found.summary.notes)


def test_a_lone_class_folder_of_a_finished_model_is_that_class(tmp_path: Path) -> None:
    for i in range(4):
        put(tmp_path / "data" / "cat" / f"{2020 + i % 2}" / f"{i}.png", png(i))
    assert evaluated(tmp_path / "data").summary.per_class["test"] == (4, 0)


def test_a_test_split_alone_is_evaluated_on_and_not_trained_on(tmp_path: Path) -> None:
    classes_in(tmp_path / "data" / "test_set" / "test_set", 4)
    for place in ("data", "data/test_set", "data/test_set/test_set"):
        assert evaluated(tmp_path / place).summary.per_class["test"] == (2, 2)
    assert "has no train/ folder" in refusal(tmp_path / "data").message


def test_names_that_are_classes_stay_classes(tmp_path: Path) -> None:
    for name in ("train_station", "test_tube", "dev_board", "development", "trainer", "training wheels", "contest",
                 "set", "test of time", "train_test"):  # fmt: skip
        assert split_of(name) is None, name
    assert name_splits(["train_station", "bus_station"]) == {"train_station": None, "bus_station": None}
    for i in range(20):
        put(tmp_path / "traffic" / ("train" if i % 2 else "bus") / f"{i}.png", png(i))
    found = read(tmp_path / "traffic")
    assert found.classes == ("bus", "train")
    assert any("the folder train/ is read as a class" in note for note in found.summary.notes)


def test_a_test_folder_beside_the_classes_of_training_is_refused(tmp_path: Path) -> None:
    classes_in(tmp_path / "data", 10)
    classes_in(tmp_path / "data" / "test", 4, shade=100)
    error = refusal(tmp_path / "data")
    assert "test/ looks like a split: it holds cat/, which lies beside it too" in error.message
    assert error.mend == "move cat, dog into train/"


@pytest.mark.parametrize(
    "names", [("trainval", "test"), ("train_val", "test"), ("fold1", "fold2"), ("cv_fold_1", "cv_fold_2", "test")]
)
def test_parts_with_the_same_classes_are_no_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    """They were the classes `test` and `trainval`."""
    for i, name in enumerate(names):
        classes_in(tmp_path / "data" / name, 10, shade=20 * i)
    error = refusal(tmp_path / "data")
    assert "hold the same folders, cat, dog: these look like the classes" in error.message
    assert "name them train/, validation/ and test/" in error.mend
    (tmp_path / "data" / names[0]).rename(tmp_path / "data" / "train")
    (tmp_path / "data" / names[1]).rename(tmp_path / "data" / "test_set")
    assert read(tmp_path / "data", validation_fraction=0.2).classes == CLASSES


def test_classes_with_the_same_folders_stay_classes(tmp_path: Path) -> None:
    """Such as a folder a speaker below each word."""
    for i in range(40):
        put(tmp_path / "data" / ("test_tube", "yes")[i % 2] / ("anna", "ben")[i // 2 % 2] / f"{i}.png", png(i))
    assert read(tmp_path / "data").classes == ("test_tube", "yes")


def test_a_class_of_the_model_is_no_split(tmp_path: Path) -> None:
    """`train/` alone was a split, whose classes were its folders, or none."""
    for i in range(4):
        put(tmp_path / "flat" / "train" / f"{i}.png", png(i))
        put(tmp_path / "deep" / ("train", "bus")[i % 2] / "2020" / f"{i}.png", png(i))
        put(tmp_path / "both" / "train" / ("train", "bus")[i % 2] / f"{i}.png", png(i))
    classes = ("bus", "train")
    assert evaluated(tmp_path / "flat", classes).summary.per_class["test"] == (0, 4)
    for name in ("deep", "both"):
        assert evaluated(tmp_path / name, classes).summary.per_class["test"] == (2, 2), name


def test_train_beside_several_folders_of_samples_is_asked_about(tmp_path: Path) -> None:
    """It was read as the split, and the other classes were not read."""
    for i in range(60):
        name, year = ("train", "car", "bus")[i % 3], 2020 + i // 3 % 2
        put(tmp_path / "data" / name / f"{year}" / f"{i}.png", png(i))
    error = refusal(tmp_path / "data")
    assert "train/ may be a split or a class: bus, car beside it hold samples too" in error.message
    assert f"name it as the data: {tmp_path / 'data' / 'train'}" in error.mend
    assert read(tmp_path / "data" / "train").classes == ("2020", "2021")
    (tmp_path / "data" / "train").rename(tmp_path / "data" / "train_class")
    assert read(tmp_path / "data").classes == ("bus", "car", "train_class")


def test_numbered_splits_are_all_read(tmp_path: Path) -> None:
    """train_2 was left out, since there is no test_2."""
    assert name_splits(["train_1", "train_2", "test_1"]) == {"train_1": 0, "train_2": 0, "test_1": 2}
    assert name_splits(["train_1", "train_2"]) == {"train_1": None, "train_2": None}
    for i, name in enumerate(("train_1", "train_2", "test_1")):
        classes_in(tmp_path / "data" / name, 10, shade=20 * i)
    found = read(tmp_path / "data", validation_fraction=0.1)
    assert found.summary.num_samples == {"train": 18, "validation": 2, "test": 10}


def test_splits_below_the_classes_are_not_read_in_silence(tmp_path: Path) -> None:
    for i in range(40):
        put(tmp_path / "data" / CLASSES[i % 2] / ("train" if i < 30 else "test") / f"{i}.png", png(i))
    found = read(tmp_path / "data")
    assert found.classes == CLASSES
    assert any("cat/train/, cat/test/" in note or "cat/test/, cat/train/" in note for note in found.summary.notes)


def test_one_class_s_folder_asks_for_the_folder_above_it(tmp_path: Path) -> None:
    """The mend was to delete the files."""
    classes_in(tmp_path / "data")
    with pytest.raises(DataError) as caught:
        evaluated(tmp_path / "data" / "cat")
    assert "holds image files, such as 0.png, and no class folders" in caught.value.message
    assert caught.value.mend.startswith("name the folder above it")
    put(tmp_path / "data" / "cat" / "labels.csv", b"path,label\n")
    assert refusal(tmp_path / "data" / "cat").mend.endswith("data/cat/labels.csv")


@pytest.mark.parametrize(
    "names",
    [("training_set", "test_set"), ("reviews_train", "reviews_test"), ("train_0", "test_0"), ("TrainData", "TestData")],
)
def test_tables_that_are_splits_under_other_names(tmp_path: Path, names: tuple[str, str]) -> None:
    (tmp_path / "t").mkdir()
    jsonl(tmp_path / "t" / f"{names[0]}.jsonl", texts(30))
    jsonl(tmp_path / "t" / f"{names[1]}.jsonl", [{**row, "text": f"new {row['text']}"} for row in texts(10)])
    assert read_texts(tmp_path / "t").summary.num_samples == {"train": 26, "validation": 4, "test": 10}


def test_parts_of_a_table_are_no_splits(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    for i in range(3):
        rows = [{**row, "text": f"{i} {row['text']}"} for row in texts(10)]
        jsonl(tmp_path / "t" / f"part-{i}.jsonl", rows)
    assert sum(read_texts(tmp_path / "t").summary.num_samples.values()) == 30


def test_a_column_of_splits_in_other_spellings(tmp_path: Path) -> None:
    rows = [{**row, "part": ("Training Set", "test_set")[i >= 30]} for i, row in enumerate(texts())]
    found = read_texts(jsonl(tmp_path / "t.jsonl", rows), split_column="part")
    assert found.summary.num_samples["test"] == 10


def test_listing_a_folder_asks_for_links_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file was asked for once more, which takes minutes of many files on a disk far away."""
    classes_in(tmp_path / "data")
    put(tmp_path / "data" / "x.png", b"x")
    (tmp_path / "data" / "link").symlink_to("cat")
    (tmp_path / "data" / "circle").symlink_to("circle")
    (tmp_path / "data" / "nowhere").symlink_to("gone")
    asked: list[str] = []
    stat = os.stat

    def counted(path: Any, *args: Any, **settings: Any) -> os.stat_result:
        asked.append(os.fspath(path))
        return stat(path, *args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", counted)
        found = children(tmp_path / "data")
    assert found == [
        ("cat", True), ("circle", False), ("dog", True), ("link", True), ("nowhere", False), ("x.png", False)
    ]  # fmt: skip
    assert asked == []


# --- a table beside the files ---


def described(folder: Path, name: str, num: int = 20, shade: int = 0, below: str = "") -> Path:
    """Images without class folders, and the table that labels them."""
    rows = []
    for i in range(num):
        put(folder / below / f"{i:03}.png", png(shade + i))
        rows.append({"file_name": f"{below}{i:03}.png", "label": CLASSES[i % 2]})
    if name.endswith("csv"):
        text = "file_name,label\n" + "".join(f"{row['file_name']},{row['label']}\n" for row in rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    if name:
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_files_beside_a_metadata_table_are_read_as_the_table(tmp_path: Path, name: str) -> None:
    """They were `no label: it lies beside the class folders`."""
    found = read(described(tmp_path / "flat", name))
    assert found.classes == CLASSES
    assert found.summary.num_samples == {"train": 16, "validation": 2, "test": 2}
    assert f"read as the table {name} in it" in found.summary.notes
    alone = read(described(tmp_path / "alone" / "train", name).parent)
    assert alone.summary.num_samples == {"train": 16, "validation": 2, "test": 2}
    described(tmp_path / "split" / "train", name)
    described(tmp_path / "split" / "test_set", name, 6, shade=100)
    (tmp_path / "split" / "notes").mkdir()
    several = read(tmp_path / "split")
    assert several.summary.num_samples == {"train": 18, "validation": 2, "test": 6}
    assert "folders that are not read: notes" in several.summary.notes


def test_a_metadata_table_of_splits_tells_them_by_its_paths(tmp_path: Path) -> None:
    root = tmp_path / "data"
    described(root, "", 20, below="train/")
    described(root, "", 6, shade=100, below="test/")
    lines = [f"{part}/{i:03}.png,{CLASSES[i % 2]}\n" for part, num in (("train", 20), ("test", 6)) for i in range(num)]
    (root / "metadata.csv").write_text("file_name,label\n" + "".join(lines))
    found = read(root)
    assert found.summary.num_samples == {"train": 18, "validation": 2, "test": 6}
    assert any("by the folders of its paths: test/ (test), train/ (train)" in note for note in found.summary.notes)
    put(root / "x.png", png(99))
    with (root / "metadata.csv").open("a") as file:
        file.write("x.png,cat\n")
    assert "row 27: lies in none of test, train" in refusal(root).message


def test_a_metadata_table_that_labels_nothing_leaves_the_class_folders(tmp_path: Path) -> None:
    classes_in(tmp_path / "data", 20)
    (tmp_path / "data" / "metadata.csv").write_text("file_name,width\ncat/0.png,9\n")
    assert read(tmp_path / "data").classes == CLASSES
    lines = [f"{CLASSES[i % 2]}/{i}.png,{'xy'[i % 2]}\n" for i in range(20)]
    (tmp_path / "data" / "metadata.csv").write_text("file_name,label\n" + "".join(lines))
    found = read(tmp_path / "data")
    assert found.classes == ("x", "y")
    assert "read as the table metadata.csv in it, not as class folders" in found.summary.notes
    (tmp_path / "flat").mkdir()
    described(tmp_path / "flat", "metadata.csv")
    assert "no column 'kind'" in refusal(tmp_path / "flat", label_column="kind").message


@pytest.mark.parametrize("places", [["train"], ["train", "test"], [""]])
def test_a_metadata_table_that_labels_nothing_leaves_the_splits(tmp_path: Path, places: list[str]) -> None:
    """They were refused for want of a column of labels."""
    root = tmp_path / "data"
    classes_in(root / "train", 20)
    classes_in(root / "test", 6, shade=100)
    for place in places:
        name = "cat/0.png" if place else "train/cat/0.png"
        (root / place / "metadata.csv").write_text(f"file_name,width\n{name},9\n")
    found = read(root, validation_fraction=0.1)
    assert found.classes == CLASSES
    assert found.summary.num_samples == {"train": 18, "validation": 2, "test": 6}
    files = ", ".join(f"{place}/metadata.csv".lstrip("/") for place in sorted(places))
    assert f"read as class folders: not read, for want of a column 'label': {files}" in found.summary.notes


def test_files_without_class_folders_want_a_label(tmp_path: Path) -> None:
    described(tmp_path / "data" / "train", "metadata.csv")
    described(tmp_path / "data" / "test", "metadata.csv", 6, shade=100)
    assert "no column 'kind'" in refusal(tmp_path / "data", label_column="kind").message


def test_check_says_how_the_data_is_read(tmp_path: Path, tiny_resnet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes_in(tmp_path / "data" / "archive" / "train_set", 20)
    classes_in(tmp_path / "data" / "archive" / "test_set", 6, shade=100)
    assert commands.run(["check", str(tiny_resnet), "--data", str(tmp_path / "data")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "note all lies in the folder archive/" in shown
    assert "read as splits: archive/test_set/ (test)" in shown
    assert commands.run(["check", str(tiny_resnet), "--data", str(tmp_path / "data"), "--json"]) == 0
    assert any("read as splits" in note for note in json.loads(capsys.readouterr().out)["notes"])
