"""Rows of the table that no other test has: one fault of a short job, at a random moment."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.chaos.__main__ import Rounds
from tests.chaos.rows import ROWS
from tests.hub_server import serve

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def rounds() -> Iterator[Rounds]:
    with (
        tempfile.TemporaryDirectory(prefix="orc-", ignore_cleanup_errors=True) as folder,  # Ray wants a short path
        serve() as hub,
        ExitStack() as resources,
    ):
        yield Rounds(Path(folder), hub, 1, resources, epochs=6)


@pytest.mark.parametrize("row", ["controller", "raylet", "node-cut", "head-gone"])
def test_a_run_survives_with_the_weights_of_one_that_was_left_alone(row: str, rounds: Rounds) -> None:
    found = rounds.round(row, ROWS[row], 0, wanted=1)
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert found["survived"], found
    assert found["moments"] == 1
