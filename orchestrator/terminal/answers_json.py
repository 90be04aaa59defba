"""Answers as JSON on standard output, whatever that can hold."""

from __future__ import annotations

import json
import sys


def print_json(value: object, indent: int | None = None) -> None:
    """One JSON value; where the stream is not of UTF-8, and for halves of characters, as escapes."""
    encoding = (sys.stdout.encoding or "utf-8").lower().replace("-", "").replace("_", "")
    text = json.dumps(value, ensure_ascii=not encoding.startswith("utf"), indent=indent)
    print(text.encode("utf-8", "backslashreplace").decode())  # an escape of JSON's own
