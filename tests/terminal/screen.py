"""A command, run in this process, and what it printed."""

from __future__ import annotations

import pytest

from orchestrator.terminal import cli as commands


class Screen:
    """What a command printed, and its exit code; run in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self._capsys.readouterr()
        code = commands.run([str(one) for one in arguments])
        out, err = self._capsys.readouterr()
        assert max(map(len, out.splitlines()), default=0) <= 80 or "--json" in arguments, out
        return code, out, " ".join(err.split())
