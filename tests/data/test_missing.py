"""Cells that are empty, files that are not there, and what stands in the place of either."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.data.text_files import POINTER
from orchestrator.errors import counted
from orchestrator.modality import registry
from tests.data.test_prepare import folder as folder, png, put, read as read_images, refusal as refuse_images, saved
from tests.data.test_sources import jsonl, parquet, read, refusal, saved as saved_texts

POINTED = POINTER + b"v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"


# --- several labels in a cell ---

KINDS = ("question", "attributed|question", "", "attributed", "", "long|question", "long", "attributed|long|question")


def cells(file: Path, kinds: tuple[str, ...] = KINDS, num: int = 80) -> Path:
    lines = [f"sentence {i},{kinds[i % len(kinds)]}\n" for i in range(num)]
    file.write_text("text,label\n" + "".join(lines))
    return file


def test_an_empty_cell_of_several_labels_is_no_label(tmp_path: Path) -> None:
    """They were `no label`, and the mend dropped them all."""
    found = read(cells(tmp_path / "t.csv"), task="multi-label", label_separator="|")
    assert found.classes == ("attributed", "long", "question")
    assert found.summary.num_skipped == 0
    assert saved_texts().targets[:3].tolist() == [[0, 0, 1], [1, 0, 1], [0, 0, 0]]
    assert any("20 of 80 samples have no label at all" in note for note in found.summary.notes)


def test_cells_of_several_labels_name_the_separator(tmp_path: Path) -> None:
    """The classes were `attributed|question` and the like."""
    found = read(cells(tmp_path / "t.csv"), task="multi-label")
    assert any("30 of 60 cells hold '|'" in note and "--label-separator '|'" in note for note in found.summary.warnings)
    places = read(
        cells(tmp_path / "v.csv", ('"Paris, France"', '"London, UK"', "Rome", "Oslo", "Bern")), task="multi-label"
    )
    assert not any("--label-separator ','" in note for note in places.summary.warnings)


def test_a_class_of_several_labels_that_training_lacks_names_the_separator(tmp_path: Path) -> None:
    """The mend was to leave the label out."""
    rows = [f"t {i},{('a', 'b', 'a|b')[i % 3]},train\n" for i in range(60)]
    (tmp_path / "t.csv").write_text("text,label,side\n" + "".join(rows) + "last,b|a,test\n")
    error = refusal(tmp_path / "t.csv", task="multi-label", split_column="side")
    assert error.message == "no training sample has the label 'b|a'"
    assert "--label-separator '|'" in error.mend
    assert read(tmp_path / "t.csv", task="multi-label", split_column="side", label_separator="|").classes == ("a", "b")


def test_a_label_called_as_missing_cells_are_is_said(tmp_path: Path) -> None:
    for odd in ("nan", "None", "NULL", "N/A"):
        found = read(cells(tmp_path / "t.csv", ("a", "b", odd)))
        assert any(f"{odd!r} is learnt as a label like any other" in note for note in found.summary.notes)


# --- numbers as words ---


def test_numbers_in_words_are_numbers_or_refused(tmp_path: Path) -> None:
    """Python reads 1_000 as 1000; a truth value was a number in Parquet and a word in CSV."""

    def lines(file: Path, odd: str) -> Path:
        rows = [f"t {i}\t{odd if i == 7 else i}\n" for i in range(40)]
        file.write_text("text\tprice\n" + "".join(rows))
        return file

    for word, number in ((" 7.5 ", 7.5), ("+3", 3), ("1e2", 100), ("True", 1), ("false", 0)):
        read(lines(tmp_path / "t.tsv", word), task="regression", label_column="price")
        assert saved_texts().targets[7].tolist() == [number]
    for word, mend in (
        ("1_000", "name a column of numbers"),
        ("3,5", "write it with a point"),
        ("yes", "name a column"),
    ):
        error = refusal(lines(tmp_path / "t.tsv", word), task="regression", label_column="price")
        assert f"row 8 has {word!r} in 'price'" in error.message
        assert mend in error.mend
    rows = [{"text": f"t {i}", "price": i % 2 == 0} for i in range(40)]
    read(parquet(tmp_path / "t.parquet", rows), task="regression", label_column="price")
    assert saved_texts().targets[:2].tolist() == [[1], [0]]


def test_a_number_where_a_text_should_stand_is_named(tmp_path: Path) -> None:
    rows = [{"text": 42 if i == 3 else f"t {i}", "label": i % 2} for i in range(20)]
    assert "row 4: has '42' where a text should stand" in refusal(jsonl(tmp_path / "t.jsonl", rows)).message


# --- files ---


def table_of(root: Path, names: list[str]) -> Path:
    lines = [f"{name},{'ab'[i % 2]}\n" for i, name in enumerate(names)]
    (root / "t.csv").write_text("path,label\n" + "".join(lines))
    return root / "t.csv"


def test_a_missing_file_says_where_it_was_looked_for_and_what_lies_there(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for i in range(20):
        put(root / "photos" / f"id{i:03}.jpg", png(i))
    put(root / "photos" / "readme.md", b"x")
    cases = {
        "photos/id000": f"the file photos/id000 is missing in {root}: beside it lies id000.jpg",
        "photos/ID003.JPG": f"the file photos/ID003.JPG is missing in {root}: beside it lies id003.jpg",
        "photos/x.png": f"the file photos/x.png is missing in {root}: beside it lies id000.jpg",
        "pictures/x.png": f"the file pictures/x.png is missing in {root}: there is no folder {root / 'pictures'}",
    }
    for name, problem in cases.items():
        names = [f"photos/id{i:03}.jpg" for i in range(20)]
        error = refuse_images(table_of(root, [*names, name]))
        assert error.message == f"{root / 't.csv'} row 21: {problem}"
    (root / "empty").mkdir()
    assert "is empty" in refuse_images(table_of(root, ["empty/a.png"])).message


def test_a_pointer_of_git_lfs_among_the_files_is_named(folder: Path) -> None:
    put(folder / "cat" / "1.png", POINTED)
    error = refuse_images(folder)
    assert "1.png: is a pointer of Git LFS, not the file itself: git lfs pull fetches it" in error.message
    for i in range(20):
        put(folder / "texts" / "ab"[i % 2] / f"{i}.txt", POINTED if i == 5 else b"text %d" % i)
    assert "5.txt: is a pointer of Git LFS" in refusal(folder / "texts").message


def test_jfif_is_jpeg(folder: Path) -> None:
    for file in folder.rglob("*.png"):
        file.rename(file.with_suffix(".JFIF"))
    assert sum(read_images(folder).summary.num_samples.values()) == 20
    assert ".jfif" in registry.get("image").sample[0].suffixes


@pytest.mark.parametrize("start", ["", "file://", "file://localhost"])
def test_absolute_paths_that_lie_inside_need_no_root(folder: Path, start: str) -> None:
    names = [f"{start}{file}" for file in sorted(folder.rglob("*.png"))]
    found = read_images(table_of(folder, names))
    assert sum(found.summary.num_samples.values()) == 20
    assert saved().read(0)["image"].startswith(b"\x89PNG")
    link = folder.with_name("link")
    link.symlink_to(folder)
    assert sum(read_images(link / "t.csv").summary.num_samples.values()) == 20


def test_absolute_paths_that_lie_outside_name_the_root(folder: Path) -> None:
    other = folder.with_name("tables")
    other.mkdir()
    names = [str(file) for file in sorted(folder.rglob("*.png"))]
    error = refuse_images(table_of(other, names))
    assert f"such as {Path(names[0]).parent}: data.root" in error.mend
    assert sum(read_images(other / "t.csv", root=str(folder)).summary.num_samples.values()) == 20


def test_one_is_no_plural() -> None:
    assert [counted(number, "sample") for number in (0, 1, 2, 1000)] == ["0 samples", "1 sample", "2 samples",
                                                                        "1,000 samples"]  # fmt: skip
