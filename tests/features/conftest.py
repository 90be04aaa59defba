"""What the tests of features share."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.features import body_pass

FORMATS = {"fp32": "float32", "bf16": "bfloat16"}
"""`training.precision` -> the format of the features, of a body that bfloat16 is good enough for."""


def head(precision: str = "fp32", **training: Any) -> dict[str, Any]:
    """A short job whose features have one format on every processor; bfloat16 is emulated where it has to be."""
    return {
        "method": "head",
        "training": {"epochs": 3, "learning_rate": 3e-3, "precision": precision, **training},
        "scaling": {"threads_per_worker": 1},
    }


@pytest.fixture
def one_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of few samples ends in one shard, however long it takes."""
    monkeypatch.setattr(body_pass, "FIRST_FLUSH_S", 1000.0)
    monkeypatch.setattr(body_pass, "FLUSH_S", 1000.0)
