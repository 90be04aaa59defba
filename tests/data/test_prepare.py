"""Each kind of faulty data has one decided outcome; docs/data.md lists them."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from orchestrator.data import ingest, samples
from orchestrator.data.prepare import Prepared, prepare_data
from orchestrator.data.samples import Samples
from orchestrator.errors import BadSampleError, DataError
from orchestrator.job.plans import BackboneCard
from orchestrator.job.spec import Data
from orchestrator.modality import registry
from tests.unlisted import make_unlisted

CARD = BackboneCard(source="b", kind="directory", name="b")


def png(shade: int, size: tuple[int, int] = (9, 7), mode: str = "L") -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, shade if mode == "L" else (shade,) * 3).save(out, "PNG")
    return out.getvalue()


def put(file: Path, content: bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of ten images, each of other bytes."""
    for i in range(20):
        put(tmp_path / "photos" / ("cat" if i % 2 else "dog") / f"{i}.png", png(i * 10))
    return tmp_path / "photos"


def read(path: Path, **settings: object) -> Prepared:
    return prepare_data(Data(path=str(path), **settings), registry.get("image"), CARD, directory=into())  # type: ignore[arg-type]


def into() -> Path:
    """Where the newest sample table stands."""
    directory = Path("samples").absolute()
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    return directory


def refusal(path: Path, **settings: object) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path, **settings)
    assert caught.value.exit_code == 2
    return caught.value


def test_a_folder_of_class_folders(folder: Path) -> None:
    found = read(folder, validation_fraction=0.2, test_fraction=0.2)
    assert found.classes == ("cat", "dog")
    assert found.summary.num_samples == {"train": 12, "validation": 4, "test": 4}
    assert found.summary.per_class == {"train": (6, 6), "validation": (2, 2), "test": (2, 2)}
    assert found.profile.num_measured == 20
    assert found.profile.counts["mode"] == {"L": 20}
    assert (found.profile.ranges["width"].median, found.profile.ranges["height"].median) == (9, 7)


def test_ready_made_splits_are_kept(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "split"
    shutil.copytree(folder, root / "train")
    for i in range(4):
        put(root / "test" / ("cat" if i % 2 else "dog") / f"t{i}.png", png(i * 10 + 3))
        put(root / "val" / ("cat" if i % 2 else "dog") / f"v{i}.png", png(i * 10 + 5))
    put(root / "notes" / "x" / "a.png", png(1))
    found = read(root)
    assert found.summary.num_samples == {"train": 20, "validation": 4, "test": 4}
    assert "notes" in found.summary.notes[0]
    shutil.rmtree(root / "val")
    assert read(root).summary.num_samples == {"train": 18, "validation": 2, "test": 4}


def test_splits_in_places_of_their_own(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "later"
    for i in range(4):
        put(other / ("cat" if i % 2 else "dog") / f"{i}.png", png(i * 10 + 3))
    found = read(folder, test=str(other), validation_fraction=0.0)
    assert found.summary.num_samples == {"train": 20, "validation": 0, "test": 4}
    samples = saved()
    assert {Path(samples.place(int(row))).parent.parent for row in samples.rows("test")} == {other}
    assert samples.read(int(samples.rows("test")[0]))["image"].startswith(b"\x89PNG")


def saved() -> Samples:
    """The sample table that was read last."""
    return Samples(Path("samples").absolute(), ("image",))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_tables_of_paths_say_the_same(folder: Path, tmp_path: Path, suffix: str) -> None:
    rows = [{"path": str(f.relative_to(folder)), "label": f.parent.name} for f in sorted(folder.rglob("*.png"))]
    found = read(table(tmp_path / f"t{suffix}", rows), root=str(folder))
    plain = read(folder)
    assert found.classes == plain.classes
    assert found.summary.num_samples == plain.summary.num_samples
    assert found.summary.fingerprint == plain.summary.fingerprint


def table(file: Path, rows: list[dict[str, object]]) -> Path:
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        mark = "\t" if file.suffix == ".tsv" else ","
        lines = [mark.join(rows[0])] + [mark.join("" if v is None else str(v) for v in row.values()) for row in rows]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("form", ["bytes", "struct"])
def test_tables_of_bytes(tmp_path: Path, form: str) -> None:
    def cell(i: int) -> object:
        return png(i) if form == "bytes" else {"bytes": png(i), "path": "x.png"}

    rows = [{"image": cell(i), "label": i % 2} for i in range(20)]
    found = read(table(tmp_path / "t.parquet", rows))
    samples = saved()
    assert found.classes == ("0", "1")
    assert all(samples.read(row)["image"] == png(row) for row in range(20))


def test_classes_in_any_script_and_numbers_in_their_order(tmp_path: Path) -> None:
    names = ["猫", "собака", "e\u0301te\u0301", "a, b/c", "🐟", "<b>"]
    rows = [{"path": f"{i}.png", "label": names[i % 6]} for i in range(24)]
    for i in range(24):
        put(tmp_path / f"{i}.png", png(i))
    found = read(table(tmp_path / "t.jsonl", rows))
    assert set(found.classes) == {"猫", "собака", "été", "a, b/c", "🐟", "<b>"}
    numbers = [{"path": f"{i}.png", "label": [10, 9, 1][i % 3]} for i in range(24)]
    assert read(table(tmp_path / "n.parquet", numbers)).classes == ("1", "9", "10")


def test_a_group_stays_on_one_side(tmp_path: Path) -> None:
    rows = [{"path": f"{i}.png", "label": i % 2, "speaker": f"s{i // 4}"} for i in range(80)]
    for i in range(80):
        put(tmp_path / f"{i}.png", png(i))
    file = table(tmp_path / "t.csv", rows)
    read(file, group_column="speaker", validation_fraction=0.2, test_fraction=0.2)
    samples = saved()
    sides = {
        split: {int(Path(samples.place(int(row))).stem) // 4 for row in samples.rows(split)}
        for split in ("train", "validation", "test")
    }
    assert all(sides.values())
    assert not sides["train"] & sides["test"] | sides["train"] & sides["validation"]
    rows = [{**row, "split": "train" if i < 42 else "test"} for i, row in enumerate(rows)]
    error = refusal(table(tmp_path / "s.csv", rows), group_column="speaker", split_column="split")
    assert "the group 's10' stands in train and in test" in error.message
    only_tests = table(tmp_path / "o.csv", [{**row, "split": "test"} for row in rows])
    error = refusal(only_tests, group_column="speaker", split_column="split")
    assert "training never sees it" in error.message
    by_class = [{**row, "speaker": row["label"]} for row in rows] + [{**rows[0], "path": "0.png"}]
    assert "too few" in refusal(table(tmp_path / "c.csv", by_class[:-1]), group_column="speaker").message
    few = [{**row, "speaker": "only"} for row in rows]
    assert "1 groups" in refusal(table(tmp_path / "f.csv", few), group_column="speaker").message
    assert "names a column" in refusal(tmp_path, group_column="speaker").message


# --- samples that cannot be used: they fail the job by name, or are left out and listed ---


def spoil_corrupt(folder: Path) -> tuple[Path, str]:
    return put(folder / "cat" / "1.png", png(10)[:40]), "1.png"


def spoil_empty(folder: Path) -> tuple[Path, str]:
    return put(folder / "cat" / "1.png", b""), "the file is empty"


def spoil_text(folder: Path) -> tuple[Path, str]:
    return put(folder / "cat" / "1.png", b"this is no image"), "is no image that Pillow can read"


def spoil_bomb(folder: Path) -> tuple[Path, str]:
    return put(folder / "cat" / "1.png", png(0, (20000, 20000))), "pixels"


def spoil_name(folder: Path) -> tuple[Path, str]:
    name = os.fsdecode(bytes(folder) + b"/cat/\xff.png")
    Path(name).write_bytes(png(1))
    return Path(f"{folder}/cat/\\xff.png"), "its name is not in UTF-8"


def spoil_loose(folder: Path) -> tuple[Path, str]:
    return put(folder / "loose.png", png(1)), "has no label"


@pytest.mark.parametrize("spoil", [spoil_corrupt, spoil_empty, spoil_text, spoil_bomb, spoil_name, spoil_loose])
def test_a_broken_file_fails_by_name_or_is_left_out(folder: Path, spoil: object) -> None:
    file, problem = spoil(folder)  # type: ignore[operator]
    error = refusal(folder)
    assert str(file) in error.message
    assert problem in error.message
    assert "--on-bad-sample skip" in error.mend
    found = read(folder, on_bad_sample="skip")
    assert [skip.place for skip in found.skipped] == [str(file)]
    assert found.summary.num_skipped == 1
    assert sum(found.summary.num_samples.values()) == (20 if spoil in (spoil_loose, spoil_name) else 19)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"path": "gone.png"}, "the file gone.png is missing"),
        ({"label": None}, "has no label in 'label'"),
        ({"path": None}, "has neither a path nor bytes"),
        ({"path": "a\0b.png"}, "has a path with a NUL byte"),
    ],
)
def test_a_broken_row_fails_by_number_or_is_left_out(
    folder: Path, tmp_path: Path, change: dict[str, object], problem: str
) -> None:
    rows = [{"path": str(f.relative_to(folder)), "label": f.parent.name} for f in sorted(folder.rglob("*.png"))]
    rows[3] = {**rows[3], **change}  # type: ignore[dict-item]
    file = table(tmp_path / "t.csv", rows)  # type: ignore[arg-type]
    error = refusal(file, root=str(folder))
    assert "t.csv row 4" in error.message
    assert problem in error.message
    found = read(file, root=str(folder), on_bad_sample="skip")
    (skip,) = found.skipped
    assert skip.place == f"{file} row 4"
    assert skip.problem.startswith(problem)


# --- what is refused whatever the user chose ---


@pytest.mark.parametrize("way", ["dots", "absolute", "link"])
def test_a_path_that_leaves_the_root_is_refused(folder: Path, tmp_path: Path, way: str) -> None:
    secret = put(tmp_path / "secret.png", png(1))
    uri = {"dots": "../secret.png", "absolute": str(secret), "link": "link.png"}[way]
    if way == "link":
        os.symlink(secret, folder / "link.png")
    rows = [{"path": f"cat/{i}.png", "label": i % 3} for i in (1, 3, 5)] + [{"path": uri, "label": 1}]
    file = table(folder / "t.csv", rows)
    for choice in ("fail", "skip"):
        error = refusal(file, on_bad_sample=choice)
        assert "row 4" in error.message
        assert "leaves the data's root" in error.message


def test_one_class_an_empty_class_and_no_class(folder: Path, tmp_path: Path) -> None:
    (folder / "bird").mkdir()
    assert "the class 'bird' has no usable sample" in refusal(folder).message
    put(folder / "bird" / "0.png", b"nothing")
    assert "has no usable sample: " in refusal(folder, on_bad_sample="skip").message
    assert "bird/0.png: " in refusal(folder, on_bad_sample="skip").message
    shutil.rmtree(folder / "bird")
    shutil.rmtree(folder / "cat")
    assert "one class only: 'dog'" in refusal(folder).message
    shutil.rmtree(folder / "dog")
    assert "holds no image files" in refusal(folder).message
    put(folder / "songs" / "a.wav", b"RIFF")
    error = refusal(folder)
    assert "songs/a.wav" in error.message
    assert "there is no" in refusal(tmp_path / "nothing").message
    assert "neither a folder nor a table" in refusal(put(tmp_path / "x.zip", b"")).message


def test_a_class_that_training_never_sees(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "split"
    shutil.copytree(folder, root / "train")
    put(root / "test" / "bird" / "b.png", png(99))
    error = refusal(root)
    assert "the class 'bird' is in test, but training never sees it" in error.message


def test_the_same_file_twice(folder: Path, tmp_path: Path) -> None:
    rows = [{"path": str(f.relative_to(folder)), "label": f.parent.name} for f in sorted(folder.rglob("*.png"))]
    twice = [*rows, {**rows[0], "path": "./" + rows[0]["path"]}]
    found = read(table(tmp_path / "t.csv", twice), root=str(folder))  # type: ignore[arg-type]
    assert found.summary.num_duplicates == 1
    assert sum(found.summary.num_samples.values()) == 20
    other = [*rows, {**rows[0], "label": "dog"}]
    error = refusal(table(tmp_path / "o.csv", other), root=str(folder))  # type: ignore[arg-type]
    assert "has two labels: 'cat'" in error.message
    assert "row 1" in error.message
    assert "row 21" in error.message


def test_the_same_content_in_two_splits_is_said(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "split"
    shutil.copytree(folder, root / "train")
    put(root / "test" / "cat" / "copy.png", (folder / "cat" / "1.png").read_bytes())
    put(root / "test" / "dog" / "new.png", png(77))
    assert "1 sample of test has the same content as a training sample" in read(root).summary.warnings[0]


def test_tables_with_wrong_columns(tmp_path: Path) -> None:
    file = table(tmp_path / "t.csv", [{"where": "a.png", "label": "x"}])
    assert "it has where, label" in refusal(file).message
    file = table(tmp_path / "u.csv", [{"path": "a.png", "class": "x"}])
    assert "no column 'label'" in refusal(file).message
    put(tmp_path / "v.csv", b"path,label\na.png,x,y\n")
    assert "cannot be read" in refusal(tmp_path / "v.csv").message
    put(tmp_path / "w.parquet", b"no parquet")
    assert "cannot be read" in refusal(tmp_path / "w.parquet").message
    put(tmp_path / "x.csv", b"path,label\n\xff\xfe.png,x\n")
    assert "cannot be read" in refusal(tmp_path / "x.csv").message


def test_backslashes_and_absolute_spellings_are_the_same_file(folder: Path, tmp_path: Path) -> None:
    rows = [{"path": str(f.relative_to(folder)), "label": f.parent.name} for f in sorted(folder.rglob("*.png"))]
    windows = [{**row, "path": row["path"].replace("/", "\\")} for row in rows]
    found = read(table(tmp_path / "w.csv", windows), root=str(folder))  # type: ignore[arg-type]
    assert sum(found.summary.num_samples.values()) == 20
    absolute = [*rows, {"path": str(folder / rows[0]["path"]), "label": "dog"}]
    assert "has two labels" in refusal(table(tmp_path / "a.csv", absolute), root=str(folder)).message  # type: ignore[arg-type]


def test_large_tables_of_bytes_are_known_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "MAX_HASHED_BYTES", 10)
    rows: list[dict[str, object]] = [{"image": png(i), "label": i % 2} for i in range(20)]
    first = read(table(tmp_path / "t.parquet", rows)).summary
    assert not [note for note in first.notes if "same content" in note]
    rows[3] = {**rows[3], "image": png(99)}
    assert read(table(tmp_path / "u.parquet", rows)).summary.fingerprint != first.fingerprint


def test_columns_of_one_name_and_labels_that_are_lists(folder: Path, tmp_path: Path) -> None:
    put(tmp_path / "t.csv", b"path,label,label\na.png,x,y\n")
    assert "two columns named 'label'" in refusal(tmp_path / "t.csv").message
    rows = [{"path": str(f.relative_to(folder)), "label": ["a", "z"]} for f in sorted(folder.rglob("*.png"))]
    assert "--task multi-label" in str(refusal(table(tmp_path / "l.jsonl", rows), root=str(folder)))  # type: ignore[arg-type]


def test_files_that_are_no_images_are_said(folder: Path) -> None:
    put(folder / "cat" / "notes.txt", b"hello")
    put(folder / "cat" / ".DS_Store", b"")
    put(folder / "dog" / "Thumbs.db", b"")
    assert "1 file that is no image, not read: cat/notes.txt" in read(folder).summary.notes[0]


def test_the_fingerprint_is_of_contents_labels_and_splits(folder: Path) -> None:
    first = read(folder).summary.fingerprint
    os.utime(folder / "cat" / "1.png", (1, 1))
    assert read(folder).summary.fingerprint == first
    assert read(folder, seed=1).summary.fingerprint != first
    put(folder / "cat" / "1.png", png(11))
    assert read(folder).summary.fingerprint != first


def test_of_many_samples_some_are_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "NUM_MEASURED_ALL", 10)
    monkeypatch.setattr(ingest, "NUM_MEASURED", 5)
    monkeypatch.setattr(ingest, "MAX_HASHED_BYTES", 100)
    found = read(folder)
    assert found.profile.num_measured == 5
    first = found.summary.fingerprint
    os.utime(folder / "cat" / "1.png", (1, 1))
    assert read(folder).summary.fingerprint != first


def test_fewer_training_samples_leave_the_other_splits_alone(folder: Path) -> None:
    all_of_them, few = read(folder), read(folder, num_train=4)
    assert few.summary.num_samples == {**all_of_them.summary.num_samples, "train": 4}
    assert few.summary.per_class["train"] == (2, 2)
    assert "leaves classes without a sample" in refusal_of_three(folder).message


def refusal_of_three(folder: Path) -> DataError:
    for i in range(10):
        put(folder / "bird" / f"b{i}.png", png(i * 7 + 1))
    return refusal(folder, num_train=2)


def test_a_file_that_vanishes_later_is_a_bad_sample(folder: Path) -> None:
    read(folder)
    samples = saved()
    assert np.bincount(samples.targets).tolist() == [10, 10]
    os.unlink(samples.place(0))
    with pytest.raises(BadSampleError, match="No such file"):
        samples.read(0)


def test_large_samples_are_decoded_a_few_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(folder)
    found, rows = saved(), np.arange(20)
    assert [len(some) for some in found.batches(rows)] == [20]
    monkeypatch.setattr(samples, "MAX_AT_ONCE", 8)
    assert [len(some) for some in found.batches(rows)] == [8, 8, 4]
    monkeypatch.setattr(samples, "_BYTES_AT_ONCE", int(found.num_bytes[:3].sum()))
    pieces = list(found.batches(rows))
    assert len(pieces[0]) == 3
    assert np.concatenate(pieces).tolist() == rows.tolist()
    monkeypatch.setattr(samples, "_BYTES_AT_ONCE", 1)  # one that is larger than all of it comes alone
    assert [len(some) for some in found.batches(rows)] == [1] * 20


def test_a_file_uri_is_the_path_with_its_links(folder: Path, tmp_path: Path) -> None:
    put(tmp_path / "outside" / "x.png", png(3))
    os.symlink(tmp_path / "outside", folder / "linked")
    rows = [{"path": f"cat/{i}.png", "label": i % 3} for i in (1, 3, 5)] + [{"path": "linked/x.png", "label": 1}]
    file = table(tmp_path / "t.jsonl", rows)
    assert Data(path=f"file://{file}").path == str(file)
    assert "leaves the data's root" in refusal(file, root=f"file://{folder}").message


def test_cells_that_no_library_expects(folder: Path, tmp_path: Path) -> None:
    named = [{"path": str(f.relative_to(folder)), "label": f.parent.name} for f in sorted(folder.rglob("*.png"))]
    Path(os.fsdecode(bytes(folder) + b"/\xff.png")).write_bytes(png(1))  # the third names it
    for i, path in enumerate(("a\\b" * 200, "\ud800.png", "\udcff.png", "\ud800/x.png")):
        file = tmp_path / f"{i}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in [*named, {"path": path, "label": "cat"}]))
        assert "row 21" in refusal(file, root=str(folder)).message
        assert read(file, root=str(folder), on_bad_sample="skip").summary.num_skipped == 1
    huge = tmp_path / "n.jsonl"
    numbers = [f'{{"path": "{row["path"]}", "y": {i}}}\n' for i, row in enumerate(named)]
    numbers[4] = numbers[4].replace('"y": 4', f'"y": {10**400}')
    huge.write_text("".join(numbers))
    spec = Data(path=str(huge), root=str(folder), label_column="y")
    with pytest.raises(DataError, match="row 5: has a number beyond all bounds"):
        prepare_data(spec, registry.get("image"), CARD, "regression")


# --- links and folders that cannot be listed ---


def test_linked_folders_below_a_class_are_counted_or_refused(folder: Path, tmp_path: Path) -> None:
    put(folder / "cat" / "more" / "x.png", png(3))
    os.symlink(folder / "cat" / "more", folder / "dog" / "same")
    found = read(folder)
    assert sum(found.summary.num_samples.values()) == 21
    assert "1 linked folder below a class, not read: dog/same" in found.summary.notes
    put(tmp_path / "outside" / "y.png", png(4))
    os.symlink(tmp_path / "outside", folder / "dog" / "other")
    for choice in ("fail", "skip"):
        assert "dog/other: the linked folder leaves the data's root" in refusal(folder, on_bad_sample=choice).message


def test_a_folder_that_cannot_be_listed_is_a_bad_sample(folder: Path) -> None:
    make_unlisted(folder / "cat")
    error = refusal(folder)
    assert "its files cannot be listed: File name too long" in error.message
    assert "--on-bad-sample skip" in error.mend
    assert read(folder, on_bad_sample="skip").summary.num_skipped == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_nobody_may_read(folder: Path) -> None:
    put(folder / "cat" / "more" / "x.png", png(3))
    os.chmod(folder / "cat" / "more", 0)
    assert "more: its files cannot be listed: Permission denied" in refusal(folder).message
    os.chmod(folder, 0)
    assert "cannot be listed: Permission denied" in refusal(folder).message
    os.chmod(folder, 0o700)
    os.chmod(folder / "cat" / "more", 0o700)


def test_one_file_by_two_names_is_one(folder: Path, tmp_path: Path) -> None:
    """Through a link to the root, and through one inside it."""
    os.symlink(folder, tmp_path / "linked")
    os.symlink(folder / "cat", folder / "kitten")
    rows: list[dict[str, object]] = [
        {"path": str(file.relative_to(folder)), "label": file.parent.name}
        for file in sorted(folder.glob("[cd]*/*.png"))
    ]
    names = [str(tmp_path / "linked" / "cat" / "1.png"), str(folder / "cat" / "1.png"), "kitten/1.png"]
    for root in (folder, tmp_path / "linked"):
        more = [*rows, *({"path": name, "label": "cat"} for name in names)]
        found = read(table(tmp_path / "t.csv", more), root=str(root))
        assert found.summary.num_duplicates == 3
        error = refusal(table(tmp_path / "u.csv", [*rows, {"path": names[0], "label": "dog"}]), root=str(root))
        assert "cat/1.png has two labels" in error.message
