"""What `--every-reason` looks at: which refusals the product gave while the tests ran, in all of their processes."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import pytest

from orchestrator import errors

_PRODUCT = ("orchestrator", "orchestrator_image", "orchestrator_audio", "orchestrator_text")


class Recorder:
    """A plugin of pytest's: it notes each refusal that code of ours makes, and fails the session at its end.

    Each process of xdist notes its own, and the first one puts them together. What a test makes itself does not count.
    """

    def __init__(self) -> None:
        self.reasons: set[str] = set()
        self.without_mend: set[str] = set()
        original = errors.RefusedError.__init__

        @functools.wraps(original)
        def noting(error: errors.RefusedError, *arguments: Any, **parts: Any) -> None:
            original(error, *arguments, **parts)
            self._note(error)

        errors.RefusedError.__init__ = noting  # type: ignore[method-assign]

    def _note(self, error: errors.RefusedError) -> None:
        frame = sys._getframe(2)  # of what made the error
        while frame.f_back is not None and frame.f_code.co_filename == errors.__file__:
            frame = frame.f_back
        if frame.f_globals["__name__"].split(".")[0] not in _PRODUCT:
            return
        self.reasons.add(error.reason)
        if not error.mend:
            test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" (")[0]
            place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            self.without_mend.add(f"{place} in {test}: {error.message}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        workeroutput = getattr(session.config, "workeroutput", None)
        if workeroutput is not None:  # a process of xdist's
            workeroutput["refusals"] = [sorted(self.reasons), sorted(self.without_mend)]
        elif session.exitstatus == pytest.ExitCode.OK and self._problems():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        reasons, without_mend = getattr(node, "workeroutput", {}).get("refusals", ([], []))
        self.reasons |= set(reasons)
        self.without_mend |= set(without_mend)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if problems := self._problems():
            terminalreporter.section("refusals", red=True)
            for line in problems:
                terminalreporter.line(line)

    def _problems(self) -> list[str]:
        never = [f"no test was refused with the reason {reason!r}" for reason in errors.REASONS
                 if reason not in self.reasons]  # fmt: skip
        return never + [f"a refusal without a mend: {line}" for line in sorted(self.without_mend)]
