"""Mutated tables and folders: refused with a `DataError`, or all that they hold is in the rows, or it is said.

FUZZ_NUM=10000 FUZZ_SEED=7 python -m pytest tests/data/test_fuzz_tables.py    # more of them, and others
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from orchestrator.data.sources import open_source
from orchestrator.data.tables import TextForm, open_table
from orchestrator.errors import DataError
from orchestrator.job import Data
from orchestrator.modality import registry
from tests.data.test_fuzz import MOST_KIB, NUM, SEED, SLOWEST_S, mutate

SENTENCES = ("Der Regen fällt", "雨が丘に降る 🌧", 'he said "no", twice', "two\nlines, here", "plain", "a\tb", "x" * 50)
ROWS = [{"text": f"{SENTENCES[i % 7]} {i}", "label": ("a", "b, c", "d")[i % 3], "number": i / 4} for i in range(40)]
LABELS = {"text": {"dtype": "string", "_type": "Value"}, "label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}


def delimited(separator: str) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["text", "label", "number"], delimiter=separator)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


def arrow() -> pa.Table:
    cells = {"text": [row["text"] for row in ROWS], "label": pa.array([i % 3 for i in range(40)], pa.int64())}
    table = pa.table({**cells, "number": pa.array([row["number"] for row in ROWS], pa.float32())})
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": LABELS}})})


def parquet(**more: Any) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(arrow(), out, row_group_size=16, **more)
    return out.getvalue()


def stream() -> bytes:
    out = io.BytesIO()
    with pa.ipc.new_stream(out, arrow().schema) as writer:
        writer.write_table(arrow(), max_chunksize=16)
    return out.getvalue()


def feather(**more: Any) -> bytes:
    out = io.BytesIO()
    pyarrow.feather.write_feather(arrow(), out, **more)
    return out.getvalue()


FORMS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "csv": (".csv", lambda: delimited(",")),
    "csv with ;": (".csv", lambda: delimited(";")),
    "csv, UTF-16": (".csv", lambda: delimited(",").decode().encode("utf-16")),
    "tsv": (".tsv", lambda: delimited("\t")),
    "tsv, nothing quoted": (".tsv", lambda: b"text\tlabel\n" + b'a "b" c\td\n"e f\tg\n' * 20),
    "json lines": (".jsonl", lambda: "".join(json.dumps(row) + "\n" for row in ROWS).encode()),
    "parquet": (".parquet", parquet),
    "parquet, plain": (".parquet", lambda: parquet(compression="NONE", use_dictionary=False)),
    "parquet, zstd": (".parquet", lambda: parquet(compression="zstd", data_page_version="2.0")),
    "arrow stream": (".arrow", stream),
    "arrow file": (".feather", lambda: feather(compression="uncompressed")),
    "feather, lz4": (".feather", lambda: feather(compression="lz4")),
}
MARKS = (
    '"',
    '""',
    "\n",
    "\r",
    "\r\n",
    ",",
    ";",
    "\t",
    "\0",
    "|",
    "{",
    "}",
    "\\",
    "é",
    " ",
    "﻿",
    "\n\n",
    '"\n',
    ',"',
    '\t"',
)
"""What means something in a table of text, put in where chance says."""


def spoil(content: bytes, suffix: str, chance: random.Random) -> bytes:
    """Of text half are mutated in what means something there, the others as any file is."""
    if suffix not in (".csv", ".tsv", ".jsonl") or chance.random() < 0.5:
        return mutate(content, delimited(chance.choice(",;\t")), chance)
    coding = "utf-16" if content[:2] == b"\xff\xfe" else "utf-8"
    text = content.decode(coding)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(text))
        end = at + chance.choice((0, 0, 1))
        text = text[:at] + chance.choice(MARKS) + text[end:]
    return text.encode(coding)


def told(content: bytes, notes: list[str]) -> str:
    """The text of a file, in the encoding that its mark tells."""
    if any("UTF-16" in note for note in notes):
        return content.decode("utf-16")
    return content.decode("utf-32" if any("UTF-32" in note for note in notes) else "utf-8-sig")


def nothing_lost(
    content: bytes, suffix: str, rows: list[tuple[Any, ...]], header: tuple[str, ...], notes: list[str]
) -> None:
    """All that the file says is in the cells, in its order; rows are as many as lines, but for line breaks in cells."""
    said = " ".join(notes)
    if suffix == ".jsonl":
        lines = re.split(r"\r\n|\r|\n", told(content, notes))
        assert len(rows) == sum(bool(line.strip()) for line in lines)
    elif suffix in (".csv", ".tsv"):
        text = told(content, notes)
        found = re.search(r"separated by '(.|\\t)'", said)
        separator = found[1].replace("\\t", "\t") if found else "\t" if suffix == ".tsv" else ","
        marks = f'[{re.escape(separator)}"\r\n]'
        cells = [cell or "" for row in (header, *rows) for cell in row]
        assert re.sub(marks, "", text) == re.sub(marks, "", "".join(cells))
        lines = [line for line in re.split(r"\r\n|\r|\n", text) if line]
        for row in rows:
            within = [cell for cell in row if cell and ("\n" in cell or "\r" in cell)]
            spanned = sum(len(re.findall(r"\r\n|\r|\n", cell)) for cell in within)
            assert (
                spanned < 3 or "several lines between quotation marks" in said or _are_prose(within, separator, header)
            )
        assert len(rows) < len(lines)
    else:
        assert len(rows) == len(ROWS) or "no mark of its end" in said


def _are_prose(cells: list[str], separator: str, header: tuple[str, ...]) -> bool:
    """Whether lines in a cell are something else than rows: most of them have another number of separators."""
    lines = [line for cell in cells for line in re.split(r"\r\n|\r|\n", cell)]
    return sum(line.count(separator) == len(header) - 1 for line in lines) * 2 <= len(lines) + 2


@pytest.mark.parametrize("form", FORMS)
def test_a_mutated_table_is_read_whole_or_refused_or_it_is_said(form: str, tmp_path: Path) -> None:
    suffix, make = FORMS[form]
    chance, whole, file = random.Random(f"{form} {SEED}"), make(), tmp_path / f"t{suffix}"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    num_refused = num_read = without_mend = 0
    for number in range(NUM):
        content = spoil(whole, suffix, chance) if number else whole
        file.write_bytes(content)
        started = time.perf_counter()
        try:
            table = open_table(file, ("text", "label"), TextForm())
            batches = list(table.batches(table.columns))
            rows = [row for batch in batches for row in zip(*(batch[name] for name in table.columns), strict=True)]
            num_read += 1
            nothing_lost(content, suffix, rows, table.columns, table.notes)
        except DataError as error:
            num_refused += 1
            without_mend += not error.mend
        except BaseException:
            Path(f"find-{form}-{number}").write_bytes(content)  # pytest keeps the folder
            raise
        assert time.perf_counter() - started < SLOWEST_S, (form, number)
    assert num_read
    assert not without_mend
    assert num_refused
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KIB


# --- folders ---

NAMES = ("cat", "dog", "train", "test_set", "Training_Set", "val", "archive", "images", "test", "a b", "__MACOSX",
         ".hidden", "test1", "seg_train", "seg_test", "2024")  # fmt: skip
FILES = ("a.txt", "b.TXT", "c.csv", "notes.md", ".d.txt", "metadata.csv", "Thumbs.db", "labels.csv")
"""Of these `.txt` are samples of texts."""
TABLES = ("file_name,label\na.txt,x\n", "file_name,x\n", "text,label\nt,x\n", "")


def grow(root: Path, chance: random.Random, depth: int = 0) -> None:
    """A folder of folders and files under names that may mean something."""
    root.mkdir()
    for name in chance.sample(NAMES, chance.choice((1, 2, 3)) if depth < 3 else 0):
        if chance.random() < 0.9 - 0.25 * depth:
            grow(root / name, chance, depth + 1)
    for name in chance.sample(FILES, chance.choice((0, 0, 1, 3))):
        is_table = name == "metadata.csv"
        (root / name).write_text(chance.choice(TABLES) if is_table else f"text {chance.random()}")


def unread(root: Path, uris: set[str], notes: str) -> list[str]:
    """The samples that are in no row and of which no note says why: by their number, or by a folder above them."""
    missing = []
    for file in root.rglob("*"):
        uri = file.relative_to(root)
        is_sample = file.suffix.lower() == ".txt" and not any(part.startswith(".") for part in uri.parts)
        if is_sample and "__MACOSX" not in uri.parts and str(uri) not in uris:
            above = [uri.parts[0], *(part for folder in uri.parents[:-1] for part in folder.parts)]
            if not any(re.search(rf"not read.*\b{re.escape(part)}", notes) for part in above):
                missing.append(str(uri))
    return missing


def test_any_folder_is_read_whole_or_refused_or_it_is_said(tmp_path: Path) -> None:
    chance, fields = random.Random(f"folders {SEED}"), registry.get("text").sample
    num_read = num_split = without_mend = 0
    for number in range(NUM):
        root = tmp_path / str(number)
        grow(root, chance)
        try:
            source = open_source(Data(path=str(root)), fields, "single-label")
            rows = list(source.rows())
        except DataError as error:
            without_mend += not error.mend
            continue
        files = sorted(root.rglob("*"))
        num_read += 1
        num_split += source.ready_made
        notes = " ".join(source.notes)
        if any(origin.is_table for origin in source.origins):
            assert "read as the table" in notes or all(file.suffix != ".txt" for file in files if file.is_file())
            continue
        assert not unread(root, {row.uri for row in rows}, notes), (number, [str(f) for f in files], notes)
        labels = {row.label for row in rows if not row.problem}
        tops = {Path(row.uri).parts[0] for row in rows if not row.problem}
        assert source.ready_made or tops == labels or "all lies in the folder" in notes
    assert num_read > NUM / 10
    assert num_split
    assert not without_mend
