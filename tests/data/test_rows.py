"""Whatever a table's cell says, no file outside of the data's root is read."""

from __future__ import annotations

import itertools
import os
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs
import pytest
from hypothesis import example, given, settings, strategies as st

from orchestrator.data.rows import inside, inside_store
from orchestrator.job.locations import Location

PROPERTY = settings(max_examples=400, deadline=None, database=None, derandomize=True)

PIECES = st.sampled_from(
    [
        "a", "b", "photo.png", "..", ".", "", " ", "~", "...", ".. ", "..\t", ".\n.", "%2e%2e", "%2E.", "%252e%252e",
        "%2f", "%5c", "..%2f..", "．．", "‥", "。。", "..\u200b", "\u202e..", "e\u0301", "\ud800", "\udcff", "a\0b",
        "to_outside", "to_inside", "to_root", "to_secret", "to_itself", "C:", "etc", "secret", "x" * 300, "*", "$HOME",
    ]
)  # fmt: skip
"""What somebody would try, links of the fixture below among it."""
SEPARATORS = st.sampled_from(["/", "//", "\\", "/./", "/../", "%2f", "\\..\\"])


@st.composite
def paths(draw: st.DrawFn) -> str:
    """Anything at all, or pieces that somebody would try, behind beginnings that somebody would try."""
    if draw(st.booleans()):
        return draw(st.text(st.characters(), max_size=40))
    start = draw(st.sampled_from(["", "", "", "/", "//", "../", "ROOT/", "ROOT/../", "file://", "s3://bucket/data/",
                                  "s3://bucket/database/", "s3://bucket/data/../", "\\\\server\\", "~/"]))  # fmt: skip
    pieces = draw(st.lists(PIECES, min_size=1, max_size=6))
    return start + "".join(piece + draw(SEPARATORS) for piece in pieces[:-1]) + pieces[-1]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links that stay in it and links that do not, and a secret beside it."""
    above = tmp_path_factory.mktemp("above").resolve()
    folder = above / "data"
    for place in (folder / "a" / "b" / "photo.png", folder / "secret" / "photo.png", above / "secret" / "photo.png",
                  above / "database" / "photo.png"):  # fmt: skip
        place.parent.mkdir(parents=True)
        place.write_bytes(b"")
    for here in (folder, folder / "a"):
        os.symlink(above / "secret", here / "to_outside")
        os.symlink(folder / "a" / "b", here / "to_inside")
        os.symlink(folder, here / "to_root")
        os.symlink(above / "secret" / "photo.png", here / "to_secret")
        os.symlink(here / "to_itself", here / "to_itself")
    return folder


@PROPERTY
@given(path=paths())
@example(path="\ud800/x.png")
@example(path="a\0/b")
@example(path="a/to_inside/../../../secret/photo.png")
def test_no_path_leaves_the_root(root: Path, path: str) -> None:
    path = path.replace("ROOT", str(root))
    uri, resolved = inside(root, path, {})
    if uri is None:
        assert resolved  # why not
        return
    for name in (uri, resolved):
        assert below(root, os.path.realpath(root / name))
    assert os.path.realpath(root / uri) == os.path.realpath(root / resolved)


def below(root: Path, path: str) -> bool:
    return path == str(root) or path.startswith(f"{root}/")


def without_controls(text: str) -> str:
    return re.sub(r"[\t\r\n]", "", text)


def with_slashes(text: str) -> str:
    return text.replace("\\", "/")


@PROPERTY
@given(path=paths())
@example(path="%2e%2e/database/photo.png")
@example(path=".\t./database/photo.png")
@example(path=".%\t2e/database/photo.png")
@example(path="a\\..\\..\\database/photo.png")
def test_no_uri_leaves_the_root_of_a_store(root: Path, path: str) -> None:
    """However its client or its server reads the URI: with escapes, with backslashes, without control characters."""
    store = Location("s3://bucket/data", pa.fs.LocalFileSystem(), str(root))
    uri, _ = inside_store(store, path)
    if uri is None:
        return
    place = store.join(uri)
    assert place.text == f"s3://bucket/data/{uri}"
    steps: tuple[Callable[[str], str], ...] = (unquote, without_controls, with_slashes, str)
    for reader in itertools.product(steps, repeat=3):
        text = place.path
        for step in reader:
            text = step(text)
        assert below(root, posixpath.normpath(text)), text


@pytest.mark.parametrize(
    "uri",
    [
        "%2e%2e/x.png",
        "%252E%252e/x.png",
        "a/..%2f..%2fx.png",
        ".\t./x.png",
        ".%\t2e/x.png",
        "..\\x.png",
        "a\\..\\..\\x.png",
    ],
)
def test_a_uri_that_a_server_would_read_as_one_outside_is_refused(root: Path, uri: str) -> None:
    store = Location("s3://bucket/data", pa.fs.LocalFileSystem(), str(root))
    assert inside_store(store, uri) == (None, "leaves the data's root")
    assert inside_store(store, f"s3://bucket/data/{uri}") == (None, "leaves the data's root")


@pytest.mark.parametrize("uri", ["a b.png", "100%.png", "a%20b.png", "..a/x.png", "a\\b.png", "猫/é.png"])
def test_a_uri_of_an_odd_name_is_kept_as_it_is(root: Path, uri: str) -> None:
    assert inside_store(Location("s3://bucket/data", pa.fs.LocalFileSystem(), str(root)), uri) == (uri, "")


@pytest.mark.parametrize("path", ["\ud800/x.png", "a\0/b.png"])
def test_a_text_that_can_name_no_file_is_refused(root: Path, path: str) -> None:
    assert inside(root, path, {}) == (None, "is no path below")
