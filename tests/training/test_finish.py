"""The end of a run, however often it is reached."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.job import Event, PhaseBegan


@pytest.mark.parametrize("method", ["head", "full"])
def test_what_was_left_out_is_named_once_after_ends_in_the_last_phase(
    method: str, tiny_resnet: Path, flat_digits: Path, tmp_path: Path
) -> None:
    """Two samples turn bad after the start; the process ends twice between the figures and the results."""
    shutil.copytree(flat_digits, tmp_path / "data")
    victims = sorted((tmp_path / "data").glob("3/*.png"))[:2]

    def spoil(event: Event) -> None:
        if event == PhaseBegan("loading the backbone"):
            for victim in victims:
                victim.write_bytes(b"no image")

    def spoil_and_end(event: Event) -> None:
        spoil(event)
        if event == PhaseBegan("writing the model"):
            raise KeyboardInterrupt

    job: dict[str, Any] = {
        "backbone": str(tiny_resnet), "data": {"path": str(tmp_path / "data"), "on_bad_sample": "skip"},
        "method": method, "training": {"epochs": 1}, "scaling": {"threads_per_worker": 1},
    }  # fmt: skip
    content = [(flat_digits / "3" / victim.name).read_bytes() for victim in victims]
    for report in (spoil_and_end, spoil_and_end, spoil):
        for victim, image in zip(victims, content, strict=True):  # the data is as it was when it was first looked at
            victim.write_bytes(image)
        try:
            run = orchestrator.finetune(job, report=report)
        except KeyboardInterrupt:
            assert report is spoil_and_end
    lines = [json.loads(line) for line in (run.path / "skipped.jsonl").read_text().splitlines()]
    assert [line["place"] for line in lines] == [str(victim) for victim in victims]
    assert run.results["num_skipped"] == 2
