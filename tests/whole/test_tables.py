"""Predictions for tables, and into tables: what is read, what is written, what is refused."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import orchestrator
from orchestrator.errors import DataError, JobError
from tests.tiny import make_bert

Cli = Callable[..., CompletedProcess[str]]
TEXTS = ["rain and wind", 'rice, with a "hot" soup', "snow\nand fog", "bread"]


def finish(
    modality: str, backbone: Path, place: Path, storage: Path, data: dict[str, Any] | None = None, **fields: Any
) -> orchestrator.Run:
    return orchestrator.finetune(
        modality=modality, backbone=str(backbone), data={"path": str(place), **(data or {})},
        training={"epochs": 1, "batch_size": 8}, scaling={"threads_per_worker": 1}, storage=str(storage),
        report=lambda _: None, method="head", **fields,
    )  # fmt: skip


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> orchestrator.Run:
    """Two classes of texts, which stand in the column `words`."""
    folder = tmp_path_factory.mktemp("reader")
    rows = [{"words": f"{'rain wind' if i % 2 else 'hot soup'} {i}", "label": "wc"[i % 2]} for i in range(40)]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return finish("text", make_bert(folder / "backbone"), folder / "t.jsonl", folder, data={"input_column": "words"})


@pytest.fixture(scope="module")
def seer(tiny_vit: Path, flat_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> orchestrator.Run:
    return finish("image", tiny_vit, flat_digits, tmp_path_factory.mktemp("seer"))


@pytest.fixture(scope="module")
def measurer(tiny_vit: Path, tmp_path_factory: pytest.TempPathFactory) -> orchestrator.Run:
    """Two numbers an image."""
    folder = tmp_path_factory.mktemp("measurer")
    rows = []
    for i in range(30):
        (folder / f"{i}.png").write_bytes(square(8 * i))
        rows.append({"path": f"{i}.png", "light": 8.0 * i, "dark": 240.0 - 8 * i})
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return finish("image", tiny_vit, folder / "t.jsonl", folder, task="regression",
                  data={"label_column": ["light", "dark"]})  # fmt: skip


def square(level: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (16, 16), (level, level, level)).save(out, "PNG")
    return out.getvalue()


def write_table(place: Path, rows: list[dict[str, Any]]) -> Path:
    if place.suffix in (".csv", ".tsv"):
        with open(place, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if place.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif place.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), place)
    else:
        place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def read_table(place: Path) -> list[dict[str, Any]]:
    if place.suffix == ".csv":
        with open(place, newline="") as file:
            return [{key: value or None for key, value in row.items()} for row in csv.DictReader(file)]
    if place.suffix == ".parquet":
        return pyarrow.parquet.read_table(place).to_pylist()  # type: ignore[no-any-return]
    return [json.loads(line) for line in place.read_text().splitlines()]


@pytest.mark.parametrize("column", ["words", "text"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".jsonl"])
def test_a_table_is_read_and_not_taken_for_a_text(
    suffix: str, column: str, reader: orchestrator.Run, tmp_path: Path, cli: Cli
) -> None:
    """By the run's own column, or by the usual name; neither labels nor other columns are needed."""
    table = write_table(tmp_path / f"new{suffix}", [{"id": f"n{i}", column: text} for i, text in enumerate(TEXTS)])
    theirs = orchestrator.predict(reader, TEXTS)
    found = json.loads(cli("predict", reader.path, table.name, "--json").stdout)
    assert [one["input"] for one in found] == TEXTS
    assert [(one["table"], one["row"]) for one in found] == [(str(table), i) for i in range(1, 5)]
    assert [one["score"] for one in found] == pytest.approx([one.score for one in theirs], abs=1e-5)
    assert [one.label for one in orchestrator.predict(reader, table)] == [one.label for one in theirs]


@pytest.mark.parametrize("kind", ["pandas", "pyarrow", "datasets", "dicts", "generator"])
def test_a_table_in_memory_is_read_as_one_in_a_file(kind: str, reader: orchestrator.Run) -> None:
    """The names of a DataFrame's columns were taken for texts."""
    rows = [{"id": i, "words": text} for i, text in enumerate([*TEXTS, " "])]
    table: Any = rows if kind == "dicts" else (row for row in rows)
    if kind in ("pandas", "datasets"):
        library = pytest.importorskip(kind)
        table = library.DataFrame(rows) if kind == "pandas" else library.Dataset.from_list(rows)
    elif kind == "pyarrow":
        table = pa.Table.from_pylist(rows)
    found = orchestrator.predict(reader, table)
    assert [one.input for one in found] == [*TEXTS, " "]
    assert [(one.table, one.row) for one in found] == [("", i) for i in range(1, 6)]
    assert found[4].as_dict() == {"input": " ", "row": 5, "problem": "the text is empty"}
    theirs = orchestrator.predict(reader, TEXTS)
    assert [one.score for one in found[:4]] == pytest.approx([one.score for one in theirs], abs=1e-5)


def test_rows_in_memory_of_files_and_bytes(seer: orchestrator.Run, tmp_path: Path) -> None:
    """Their paths are relative to the working directory; a table without such a column is refused, by no file."""
    (tmp_path / "a.png").write_bytes(square(9))
    (byte, path, other) = orchestrator.predict(seer, [{"image": square(9)}, "a.png", {"path": "a.png"}])
    assert (byte.input, byte.row, path.row, other.row) == ("row 1", 1, 0, 1)
    assert byte.score == pytest.approx(path.score) == pytest.approx(other.score)
    assert other.path == str(tmp_path / "a.png")
    with pytest.raises(DataError, match="the data has no column of image paths or bytes: it has picture"):
        orchestrator.predict(seer, [{"picture": "a.png"}])


@pytest.mark.parametrize(
    ("inputs", "words", "mend"),
    [
        (None, "the inputs are None", "give a list"),
        (5, "the inputs are an int", "give a list"),
        ({"words": "rain"}, "the inputs are a dict", "put it in a list"),
        ([None], "input 1 is None", "as a str"),
        (["rain", 5], "input 2 is an int", "as a str"),
        ([("rain", 5)], "input 1 is a tuple", "as a str"),
    ],
)
def test_what_is_no_input_is_refused(inputs: Any, words: str, mend: str, reader: orchestrator.Run) -> None:
    """They ended with a TypeError."""
    with pytest.raises(DataError, match=words) as refused:
        orchestrator.predict(reader, inputs)
    assert mend in refused.value.mend


def test_an_image_in_memory_is_refused_and_the_mend_mends(seer: orchestrator.Run) -> None:
    from PIL import Image

    image = Image.new("RGB", (16, 16), (9, 9, 9))
    with pytest.raises(DataError, match="input 1 is a PIL Image") as refused:
        orchestrator.predict(seer, [image])
    assert "image.save(out := io.BytesIO(), 'PNG'); out.getvalue()" in refused.value.mend
    image.save(out := io.BytesIO(), "PNG")
    assert orchestrator.predict(seer, [out.getvalue()])[0].label


def test_lines_of_standard_input_keep_their_numbers(reader: orchestrator.Run, seer: orchestrator.Run, cli: Cli) -> None:
    """An empty line was left out, and nothing told which line a row was of."""
    done = cli("predict", reader.path, "-", "--json", input="rain\n\nsnow\r\n")
    found = json.loads(done.stdout)
    assert [(one["input"], one["row"], one.get("problem")) for one in found] == [
        ("rain", 1, None), ("", 2, "the line is empty"), ("snow", 3, None)
    ]  # fmt: skip
    assert done.returncode == 1
    Path("a.png").write_bytes(square(9))
    (one,) = json.loads(cli("predict", seer.path, "-", "--json", input="a.png").stdout)
    assert (one["input"], one["row"]) == ("a.png", 1)


def test_a_column_that_is_named_is_read_or_refused(reader: orchestrator.Run, tmp_path: Path, cli: Cli) -> None:
    write_table(tmp_path / "new.csv", [{"said": text, "words": "x"} for text in TEXTS])
    found = json.loads(cli("predict", reader.path, "new.csv", "--input-column", "said", "--json").stdout)
    assert [one["input"] for one in found] == TEXTS
    wrong = cli("predict", reader.path, "new.csv", "--input-column", "saying", "--json")
    assert wrong.returncode == 2
    refusal = json.loads(wrong.stdout)
    assert "has no column 'saying'" in refusal["message"]
    assert {"said", "words"} <= set(refusal["expected"].replace(",", "").split())


def test_of_a_model_for_text_a_file_of_text_is_read_and_others_are_refused(
    reader: orchestrator.Run, tmp_path: Path, cli: Cli
) -> None:
    (tmp_path / "note.txt").write_text(TEXTS[0])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "b.txt").write_text(TEXTS[3])
    (tmp_path / "soup").write_text("no text that anybody asked about")
    found = json.loads(cli("predict", reader.path, "note.txt", "notes/", "bread", "--json").stdout)
    assert [one["input"] for one in found] == ["note.txt", "notes/b.txt", "bread"]
    wanted = [one.score for one in orchestrator.predict(reader, [TEXTS[0], TEXTS[3], "bread"])]
    assert [one["score"] for one in found] == pytest.approx(wanted, abs=1e-5)
    assert found[0]["path"] == str(tmp_path / "note.txt")
    for name, words in (("soup", "neither a table nor a text"), ("tabel.csv", "there is no file tabel.csv")):
        refused = cli("predict", reader.path, name, "--json")
        assert refused.returncode == 2
        assert words in json.loads(refused.stdout)["message"]
        assert "standard input" in json.loads(refused.stdout)["mend"]
    # The mend mends; and from Python a text is a text, whatever lies here: a service may be asked about it.
    assert json.loads(cli("predict", reader.path, "-", "--json", input="soup\n").stdout)[0]["input"] == "soup"
    (said,) = orchestrator.predict(reader, ["note.txt"])
    assert (said.path, said.problem) == ("", "")


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_what_is_written_has_all_classes_and_what_to_join_on(
    suffix: str, reader: orchestrator.Run, tmp_path: Path, cli: Cli
) -> None:
    table = write_table(tmp_path / "new.jsonl", [{"text": text} for text in (*TEXTS, "", "\ud800 rain")])
    done = cli("predict", reader.path, table, "snow", "--output", f"said{suffix}")
    assert done.returncode == 1
    assert "7 rows in" in done.stdout
    assert "2 of them have no prediction" in done.stdout
    rows = read_table(tmp_path / f"said{suffix}")
    assert list(rows[0]) == ["input", "path", "table", "row", "label", "score", "problem", "score_c", "score_w"]
    assert [str(row["row"]) for row in rows] == ["1", "2", "3", "4", "5", "6", "None"]
    assert {row["table"] for row in rows} == {str(table), None}
    assert [row["problem"] for row in rows[4:6]] == ["the text is empty", "the text is not in UTF-8 (byte 0)"]
    assert rows[4]["score_c"] is None
    for row, one in zip(rows, orchestrator.predict(reader, TEXTS, top=2), strict=False):
        assert (row["input"], row["label"]) == (one.input, one.label)
        for name, score in one.top:
            assert float(row[f"score_{name}"]) == pytest.approx(score, abs=1e-5)
    assert not list(tmp_path.glob(".*partial*"))


def test_paths_and_bytes_in_a_table(seer: orchestrator.Run, flat_digits: Path, tmp_path: Path, cli: Cli) -> None:
    files = sorted(flat_digits.glob("*/*.png"))[:3]
    for i, file in enumerate(files):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{i}.png").write_bytes(file.read_bytes())
    names = ["0.png", "1.png", "gone.png", "../secret.png", "2.png"]
    (tmp_path / "secret.png").write_bytes(files[0].read_bytes())
    table = write_table(tmp_path / "in" / "t.csv", [{"path": name} for name in names])
    done = cli("predict", seer.path, table, "--output", "said.parquet")
    assert done.returncode == 1
    rows = read_table(tmp_path / "said.parquet")
    assert [row["path"] for row in rows] == [
        *(str(tmp_path / "in" / name) for name in names[:3]), None, str(tmp_path / "in" / "2.png")
    ]  # fmt: skip
    assert "No such file" in rows[2]["problem"]
    assert "leaves the data's root" in rows[3]["problem"]
    theirs = orchestrator.predict(seer, files)
    assert [rows[i]["label"] for i in (0, 1, 4)] == [one.label for one in theirs]
    there = orchestrator.predict(seer, table, root=str(tmp_path))
    assert [bool(one.problem) for one in there] == [True] * 5
    bytes_ = write_table(tmp_path / "b.parquet", [{"image": file.read_bytes()} for file in files])
    found = orchestrator.predict(seer, str(bytes_))
    assert [one.label for one in found] == [one.label for one in theirs]
    assert found[1].input == f"{bytes_} row 2"


def test_values_of_every_target_are_written(measurer: orchestrator.Run, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "a.png").write_bytes(square(100))
    assert cli("predict", measurer.path, "a.png", "--output", "said.csv").returncode == 0
    (row,) = read_table(tmp_path / "said.csv")
    assert list(row) == ["input", "path", "table", "row", "problem", "value_light", "value_dark"]
    (one,) = orchestrator.predict(measurer, "a.png")
    assert (one.label, one.score) == (None, None)  # the first target's value is no score of the whole
    (shown,) = json.loads(cli("predict", measurer.path, "a.png", "--json").stdout)
    assert shown == {"input": "a.png", "path": str(tmp_path / "a.png"), "values": pytest.approx(one.values)}
    assert list(one.values) == ["light", "dark"]
    assert [float(row["value_light"]), float(row["value_dark"])] == pytest.approx([v for _, v in one.top], rel=1e-5)


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_computed(
    seer: orchestrator.Run, tmp_path: Path, cli: Cli
) -> None:
    write_table(tmp_path / "t.csv", [{"path": "a.png"}])
    (tmp_path / "folder.csv").mkdir()
    for output, words in (
        ("said.xlsx", "no table that can be written"), ("gone/said.csv", "a folder that is not there"),
        ("folder.csv", "is a folder"), ("t.csv", "is one of the inputs"),
    ):  # fmt: skip
        refused = cli("predict", seer.path, "t.csv", "--output", output, "--json")
        assert refused.returncode == 2
        answer = json.loads(refused.stdout)
        assert words in answer["message"]
        assert answer["mend"]
    assert (tmp_path / "t.csv").read_text() == "path\na.png\n"
    for output, mend in (("x.txt", "suffixes"), ("/dev/stdout", "leave it out, with --json for JSON")):
        with pytest.raises(JobError) as refused_output:
            orchestrator.predictor.require_output(output, [])
        assert refused_output.value.mend.endswith(mend)


def test_what_the_system_refuses_is_told_of_the_output_and_not_of_the_file_beside_it(
    seer: orchestrator.Run, tmp_path: Path
) -> None:
    from orchestrator.predictor import write

    write_table(tmp_path / "t.csv", [{"path": "a.png"}])
    output = "x" * 250 + ".csv"
    with pytest.raises(JobError, match=f"^{output} cannot be written: File name too long"):
        write(seer, str(tmp_path / "t.csv"), output)


def test_a_table_that_cannot_be_read_leaves_no_output(seer: orchestrator.Run, tmp_path: Path) -> None:
    from orchestrator.predictor import write

    (tmp_path / "t.jsonl").write_text('{"path": "a.png"}\nnothing\n')
    with pytest.raises(DataError, match="row 2 is no JSON"):
        write(seer, str(tmp_path / "t.jsonl"), "said.csv")
    assert sorted(os.listdir(tmp_path)) == ["t.jsonl"]


def test_paths_are_whole_where_no_screen_shows_them(seer: orchestrator.Run, tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / ("very-long-" * 12) / ("name-" * 20 + ".png")
    file.parent.mkdir()
    file.write_bytes(square(9))
    shown = cli("predict", seer.path, file).stdout
    assert all(line.strip() for line in shown.splitlines())
    assert any(str(file) in line for line in shown.splitlines())


def test_a_large_table_is_never_in_memory_at_once(seer: orchestrator.Run, tmp_path: Path) -> None:
    """200 MB of images in a table: windows of 64 MiB."""
    from tests.whole.test_predictor import peak

    noise = np.random.default_rng(0).integers(0, 256, (450, 450, 3), dtype=np.uint8)
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(noise).save(out, "PNG")
    schema = pa.schema({"image": pa.binary()})
    with pyarrow.parquet.ParquetWriter(tmp_path / "t.parquet", schema, compression=None) as writer:
        for _ in range(320):
            writer.write_table(pa.table({"image": [out.getvalue()]}, schema=schema))
    size = (tmp_path / "t.parquet").stat().st_size / 2**20
    found: list[orchestrator.predictor.Prediction] = []
    used = peak(lambda: found.extend(orchestrator.predict(seer, str(tmp_path / "t.parquet"))))
    assert [one.problem for one in found] == [""] * 320
    assert size > 180
    assert used < 150


def test_what_the_run_was_trained_on_is_read_again(tmp_path: Path, cli: Cli) -> None:
    """It was no UTF-8, and had no column of texts; the mend named flags that there were not."""
    rows = [("rain, wind" if i % 2 else "hot, caf\xe9") + f" {i};{'wc'[i % 2]}\n" for i in range(40)]
    table = tmp_path / "t.csv"
    table.write_bytes("".join(["text:words;label\n", *rows]).encode("cp1252"))
    form = {"separator": ";", "encoding": "cp1252", "input_column": "text:words"}
    run = finish("text", make_bert(tmp_path / "backbone"), table, tmp_path, form)
    done = cli("predict", run.path, table, "--json")
    found = json.loads(done.stdout)
    assert [one["input"] for one in found] == [row.split(";")[0] for row in rows]
    assert f"{table}: read with the run's data.encoding, 'cp1252'" in done.stderr
    figures = orchestrator.evaluate(run, str(table))
    assert figures["num_samples"] == 40
    assert "read with the run's data.encoding, 'cp1252'" in figures["notes"]
    # What is of another form is read as it is, or as the user says.
    write_table(tmp_path / "u.csv", [{"text:words": TEXTS[1], "id": "1"}])
    assert json.loads(cli("predict", run.path, "u.csv", "--json").stdout)[0]["input"] == TEXTS[1]
    (tmp_path / "v.csv").write_text("id|text:words\n1|caf\xe9\n", encoding="utf-8")
    said = cli("predict", run.path, "v.csv", "--separator", "|", "--encoding", "utf-8", "--json")
    assert json.loads(said.stdout)[0]["input"] == "caf\xe9"
    assert "the run's" not in said.stderr
    parquet = write_table(tmp_path / "w.parquet", [{"text:words": text, "label": "w"} for text in TEXTS])
    figures = orchestrator.evaluate(run, str(parquet))
    assert figures["num_samples"] == 4
    assert not any("the run's" in note for note in figures["notes"])
    with pytest.raises(JobError, match="separator"):
        orchestrator.predict(run, table, separator=";;")
    with pytest.warns(UserWarning, match="read with the run's data.separator, ';'"):
        orchestrator.predict(run, table)


def test_how_a_table_was_read_is_said(reader: orchestrator.Run, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "t.tsv").write_text('words\tid\n"rain\t1\nsnow\t2\n')
    done = cli("predict", reader.path, "t.tsv", "--output", "said.csv")
    assert "t.tsv: quotation marks that open a cell and do not close it are read as characters: 1" in done.stderr
    assert len(read_table(tmp_path / "said.csv")) == 2
