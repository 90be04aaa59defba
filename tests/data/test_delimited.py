"""CSV and TSV: separators, encodings, and quotation marks that somebody never closed."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import orchestrator
from orchestrator.data.tables import BATCH_ROWS, TextForm, open_table
from orchestrator.data.text_files import POINTER
from orchestrator.errors import DataError, JobError
from orchestrator.job import Data, make_job
from orchestrator.terminal import cli as commands
from tests.data.test_sources import parquet, read, refusal, saved
from tests.tiny import make_bert

SENTENCES = [(f"sentence {i}, with a comma", "food" if i % 2 else "weather") for i in range(60)]


def written(file: Path, rows: list[tuple[str, ...]], separator: str = "\t") -> Path:
    """The rows as they are, nothing quoted."""
    file.write_text("".join(separator.join(row) + "\n" for row in [("text", "label"), *rows]), encoding="utf-8")
    return file


def cells(file: Path, **form: Any) -> list[tuple[str | None, ...]]:
    """All rows of a table."""
    table = open_table(file, form=TextForm(**form))
    batches = table.batches(table.columns)
    return [row for batch in batches for row in zip(*(batch[name] for name in table.columns), strict=True)]


@pytest.mark.parametrize("opened", [(10, 40), (10,), (59,)])
@pytest.mark.parametrize(("suffix", "separator"), [(".tsv", "\t"), (".csv", ";"), (".csv", "|")])
def test_a_quotation_that_is_never_closed_swallows_no_rows(
    tmp_path: Path, opened: tuple[int, ...], suffix: str, separator: str
) -> None:
    rows = [(f'"{text}' if i in opened else text, label) for i, (text, label) in enumerate(SENTENCES)]
    file = written(tmp_path / f"t{suffix}", rows, separator)
    found = read(file)
    assert sum(found.summary.num_samples.values()) == 60
    assert saved().read(opened[0])["text"].decode() == rows[opened[0]][0]
    (note,) = (note for note in found.summary.notes if "quotation marks" in note)
    assert note.endswith(f"are read as characters: {len(opened)}, the first in line {opened[0] + 2}")


def test_a_quotation_that_is_never_closed_in_a_line_that_is_no_row_is_refused(tmp_path: Path) -> None:
    rows = [(f'"{text}' if i == 10 else text.replace(",", ""), label) for i, (text, label) in enumerate(SENTENCES)]
    error = refusal(written(tmp_path / "t.csv", rows, ","))
    assert "line 12 opens a cell with a quotation mark, and none closes it" in error.message
    assert "close the quotation there" in error.mend


def test_rows_between_two_marks_are_rows_in_tsv_and_said_in_csv(tmp_path: Path) -> None:
    """The second mark happens to stand where it closes the cell, so that all lines between them would be one text."""
    rows = [(text.replace(",", ""), label) for text, label in SENTENCES]
    rows[10] = (f'"{rows[10][0]}', rows[10][1])
    rows[40] = (f'{rows[40][0]}"', rows[40][1])
    assert cells(written(tmp_path / "t.tsv", rows)) == rows
    notes = read(tmp_path / "t.tsv").summary.notes
    assert any("read as rows of their own: 1 times, first from line 12" in note for note in notes)
    found = read(written(tmp_path / "t.csv", rows, ","))
    assert sum(found.summary.num_samples.values()) == 30
    assert any("read as one cell each: 1 times, first from line 12" in note for note in found.summary.notes)


def test_what_is_quoted_properly_is_read_without_a_word(tmp_path: Path) -> None:
    texts = ["two\nlines", 'he said "no"', '"', "a, b; c\td", "  spaces ", "a\r\nb", "x" * 300_000, '5" nail', "ü"]
    rows = [(texts[i % len(texts)] + str(i), "ab"[i % 2]) for i in range(3 * len(texts))]
    for name, dialect in (("t.csv", csv.excel), ("t.tsv", csv.excel_tab), ("u.csv", csv.unix_dialect)):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, dialect).writerows([("text", "label"), *rows])
        assert cells(tmp_path / name) == rows
        assert not any("quotation" in note or "separated" in note for note in read(tmp_path / name).summary.notes)


@pytest.mark.parametrize(("name", "dialect"), [("t.csv", csv.excel), ("t.tsv", csv.excel_tab)])
def test_texts_of_one_column_keep_their_line_breaks(tmp_path: Path, name: str, dialect: type[csv.Dialect]) -> None:
    """Of TSV each of their lines was a row."""
    rows = [("two\nlines",), ("plain",), ("three\nof\nthem",)]
    with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, dialect).writerows([("text",), *rows])
    table = open_table(tmp_path / name)
    assert cells(tmp_path / name) == rows
    assert len(list(table.batches(["text"]))) == 1
    assert table.notes == []
    (tmp_path / name).write_text('text\n"open\nb\nc\n')
    assert cells(tmp_path / name) == [('"open',), ("b",), ("c",)]


def test_a_mark_within_a_cell_is_a_character(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text('text,label\n5" nail,a\n"Hello" he said,b\n""",a\nc""d,b\n')
    assert cells(file) == [('5" nail', "a"), ('"Hello" he said', "b"), ('"""', "a"), ('c""d', "b")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_every_kind_and_empty_lines(tmp_path: Path, end: str) -> None:
    (tmp_path / "t.csv").write_bytes(end.join(["text,label", "a,x", "", '"b', 'c",y', "", ""]).encode())
    assert cells(tmp_path / "t.csv") == [("a", "x"), (f"b{end}c", "y")]


def test_rows_of_another_length_are_refused_by_their_line(tmp_path: Path) -> None:
    for line, num in (("a,x,1", 3), ("a", 1)):
        (tmp_path / "t.csv").write_text("text,label\n" + "a,x\n" * BATCH_ROWS * 2 + line + "\n")
        error = refusal(tmp_path / "t.csv")
        assert f"line {2 * BATCH_ROWS + 2} has {num} cells, and the header 2" in error.message
        assert "data.separator (--separator)" in error.mend
    (tmp_path / "t.csv").write_text("")
    assert "it is empty" in refusal(tmp_path / "t.csv").message


def test_backslashes_before_marks_are_named(tmp_path: Path) -> None:
    """The mark was said to be closed by none."""
    (tmp_path / "t.csv").write_text('text,label\n"plain, so",a\n"he said \\"no\\", so",b\n')
    error = refusal(tmp_path / "t.csv")
    assert "line 3 has backslashes before quotation marks, which do not escape them" in error.message
    assert 'double each mark within a quotation ("" instead of \\")' in error.mend
    (tmp_path / "t.csv").write_text((tmp_path / "t.csv").read_text().replace('\\"', '""'))
    assert cells(tmp_path / "t.csv")[1] == ('he said "no", so', "b")
    (tmp_path / "u.tsv").write_text('text\tlabel\n"he said \\"no\\""\tb\n')
    table = open_table(tmp_path / "u.tsv")
    (batch,) = table.batches(["text"])
    assert batch["text"] == ['"he said \\"no\\""']
    assert table.notes[0].endswith("1, the first in line 2; 1 have backslashes before marks, and CSV doubles them")


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=;"])
def test_the_line_that_excel_writes_before_the_header(tmp_path: Path, first: str) -> None:
    """It was the header."""
    rows = [(text, label) for text, label in SENTENCES]
    file = written(tmp_path / "t.csv", rows, ";")
    file.write_text(f"{first}\r\n{file.read_text()}")
    assert cells(file) == rows
    assert cells(file, separator=";") == rows
    assert open_table(file).notes == ["its columns are separated by ';', as its first line says"]
    file.write_text(file.read_text() + "a;b;c\n")
    assert "line 63 has 3 cells" in refusal(file).message


def test_a_separator_in_the_name_of_the_only_column(tmp_path: Path) -> None:
    """The header was cut in two, and the first row refused."""
    (tmp_path / "t.csv").write_text('question|answer\n"one, two"\nthree\n')
    assert cells(tmp_path / "t.csv") == [("one, two",), ("three",)]
    assert open_table(tmp_path / "t.csv").columns == ("question|answer",)
    assert open_table(tmp_path / "t.csv").notes == []
    (tmp_path / "t.csv").write_text("question|answer\n")
    assert open_table(tmp_path / "t.csv").columns == ("question", "answer")


def test_a_separator_that_the_job_names(tmp_path: Path) -> None:
    rows = [(text.replace(",", ":"), label) for text, label in SENTENCES]
    assert cells(written(tmp_path / "t.csv", rows, "\t"), separator="\t") == rows
    job = make_job(backbone="b", data={"path": "t.csv", "separator": "tab"})
    assert job.data.separator == "\t"
    (tmp_path / "job.yaml").write_text(job.to_yaml())
    assert make_job(tmp_path / "job.yaml") == job
    for wrong in ("", ";;", '"', "\n"):
        with pytest.raises(ValidationError):
            Data(path="t.csv", separator=wrong)
    with pytest.raises(JobError, match="is no encoding of text that is known"):
        make_job(backbone="b", data={"path": "t.csv", "encoding": "hex"})


def test_settings_of_text_for_what_is_none(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": "a", "label": 1}\n')
    error = refusal(file, separator=";")
    assert f"data.separator is ';', and {file} is no table that has one" in error.message
    (tmp_path / "folder" / "a").mkdir(parents=True)
    assert "data.encoding is 'cp1252', and" in refusal(tmp_path / "folder", encoding="cp1252").message


@pytest.mark.parametrize("command", ["check", "plan", "evaluate", "finetune", "predict"])
def test_separator_and_encoding_are_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--separator" in shown
    assert "--encoding" in shown
    assert "--on-bad-sample" in shown or command == "predict"


ENCODINGS = {"utf-16": "", "utf-32": "", "utf-8-sig": "", "utf-16-le": "utf-16-le", "utf-16-be": "utf-16-be"}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_utf_16_is_read_by_its_mark_or_named(tmp_path: Path, suffix: str, encoding: str) -> None:
    rows = [(text.replace(",", " é"), label) for text, label in SENTENCES]
    if suffix == ".jsonl":
        text = "".join(f'{{"text": "{text}", "label": "{label}"}}\n' for text, label in rows)
    else:
        separator = "\t" if suffix == ".tsv" else ","
        text = "".join(separator.join(row) + "\n" for row in [("text", "label"), *rows])
    file = tmp_path / f"t{suffix}"
    file.write_bytes(text.encode(encoding))
    if ENCODINGS[encoding]:
        error = refusal(file)
        assert "looks like UTF-16 without a mark" in error.message
        assert f"--encoding {encoding}" in error.mend
    found = read(file, **({"encoding": ENCODINGS[encoding]} if ENCODINGS[encoding] else {}))
    assert sum(found.summary.num_samples.values()) == 60
    assert saved().read(0)["text"].decode() == rows[0][0]
    assert any("as the mark at its beginning says" in note for note in found.summary.notes) == (
        encoding in ("utf-16", "utf-32")
    )


def test_an_encoding_that_is_not_told_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes(b"text,label\n" + "".join(f"café {i},{'ab'[i % 2]}\n" for i in range(20)).encode("cp1252"))
    error = refusal(file)
    assert "codec can't decode byte 0xe9" in error.message
    assert "data.encoding (--encoding)" in error.mend
    read(file, encoding="cp1252")
    assert saved().read(0)["text"].decode() == "café 0"
    error = refusal(file, encoding="utf-16")
    assert "cannot be read" in error.message
    marked = tmp_path / "marked.csv"
    marked.write_bytes(codecs.BOM_UTF8 + b"text,label\n" + b"a,x\nb,y\n" * 10)
    assert read(marked, encoding="utf-8").classes == ("x", "y")


@pytest.mark.parametrize(
    ("packed", "words"),
    [(gzip.compress, "compressed, by gzip"), (bz2.compress, "bzip2"), (lzma.compress, "by xz"),
     (lambda rows: b"PK\3\4" + rows, "a ZIP archive")],
)  # fmt: skip
def test_what_is_packed_is_said_to_be(tmp_path: Path, packed: Callable[[bytes], bytes], words: str) -> None:
    """The mend named one encoding after the other."""
    file = tmp_path / "t.csv"
    file.write_bytes(packed(b"text,label\n" + b"one,a\ntwo,b\n" * 20))
    error = refusal(file)
    assert words in error.message
    assert error.mend.startswith("unpack it")


def test_names_of_columns_show_where_they_end(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("text, label\n" + "one,a\ntwo,b\n" * 20)
    error = refusal(file, label_column="label")
    assert error.mend == "did you mean ' label'?"
    assert error.expected == "one of text, ' label'"


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".arrow", ".feather"])
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"t{suffix}").write_bytes(POINTER + b"v1\noid sha256:4d7a\nsize 12345\n")
    error = refusal(tmp_path / f"t{suffix}")
    assert "it is a pointer of Git LFS, not the file itself" in error.message
    assert error.mend == "fetch it: git lfs pull"


def test_many_unclosed_marks_are_read_in_one_pass(tmp_path: Path) -> None:
    """Each looks on for a mark that closes it, and the next line has one: not all of the file each time."""
    file = tmp_path / "t.tsv"
    file.write_text("text\tlabel\n" + '"an unclosed quotation\tfood\n' * 50_000)
    table = open_table(file)
    assert sum(len(batch["text"]) for batch in table.batches(["text"])) == 50_000
    assert table.notes[0].endswith("are read as characters: 50000, the first in line 2")


def test_the_same_from_the_command_line(tmp_path: Path, tiny_resnet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`check` refuses what cannot be read with a mend that it takes itself."""
    file = tmp_path / "t.csv"
    file.write_bytes("path|label\ncafé.png|a\n".encode("cp1252"))
    assert commands.run(["check", str(tiny_resnet), "--data", str(file)]) == 2
    assert "--encoding" in capsys.readouterr().err
    asked = ["check", str(tiny_resnet), "--data", str(file), "--encoding", "cp1252", "--separator", "|"]
    assert commands.run(asked) == 2
    assert "none can be used" in " ".join(capsys.readouterr().err.split())  # to leave it out would leave nothing
    assert commands.run([*asked, "--on-bad-sample", "skip"]) == 2
    assert "that can be used" in capsys.readouterr().err
    with pytest.raises(DataError):
        orchestrator.check(str(tiny_resnet), "image", str(file))


def test_evaluate_reads_labels_of_another_type_of_file_and_says_how(tmp_path: Path) -> None:
    """A run on Booleans of Parquet refused True and False of CSV; quotation marks were not spoken of."""
    rows = [{"text": f"{text} {i}", "label": label == "food"} for i, (text, label) in enumerate(SENTENCES)]
    run = orchestrator.finetune(
        method="head",
        modality="text", backbone=str(make_bert(tmp_path / "bert")), data=str(parquet(tmp_path / "t.parquet", rows)),
        training={"epochs": 1}, scaling={"threads_per_worker": 1}, report=lambda _: None,
    )  # fmt: skip
    assert run.plan.classes == ("false", "true")
    lines = [f"{'<' if i == 3 else ''}{text}\t{label == 'food'}\n" for i, (text, label) in enumerate(SENTENCES)]
    (tmp_path / "t.tsv").write_text("text\tlabel\n" + "".join(lines).replace("<", '"'))
    figures = orchestrator.evaluate(run, tmp_path / "t.tsv")
    assert figures["num_samples"] == 60
    assert any("read as characters: 1, the first in line 5" in note for note in figures["notes"])


def test_a_key_that_a_line_of_json_has_twice_is_refused(tmp_path: Path) -> None:
    """The second value took the place of the first, without a word."""
    (tmp_path / "t.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 1, "label": 2}\n')
    error = refusal(tmp_path / "t.jsonl")
    assert "row 2 is no JSON: it has the key 'label' twice" in error.message
    assert error.mend == "write one JSON object a line, each of its keys once"
