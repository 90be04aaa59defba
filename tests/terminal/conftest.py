"""What tests of the command line share."""

from __future__ import annotations

import pytest

from tests.terminal.screen import Screen


@pytest.fixture
def screen(capsys: pytest.CaptureFixture[str]) -> Screen:
    return Screen(capsys)
