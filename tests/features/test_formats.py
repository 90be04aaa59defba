"""float32 or bfloat16: what is decided, that it is as good, and that jobs agree. Emulated where it has to be."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import orchestrator
from orchestrator.data import Samples
from orchestrator.features import SampleSource, formats
from orchestrator.features.formats import LEAST_COSINE, Choice, choose
from orchestrator.gate import prepare, resolve_backbone
from orchestrator.network import start_worker
from orchestrator.store import FORMAT_FILE, Format, write_first
from tests.features.conftest import head
from tests.features.test_bodies import a_convnet
from tests.whole.test_train import train


@pytest.mark.usefixtures("one_shard")
def test_bfloat16_where_it_is_asked_for(tiny_resnet: Path, flat_digits: Path) -> None:
    run = train(tiny_resnet, flat_digits, **head("bf16"))
    assert run.lineage["format_cosine"] >= LEAST_COSINE
    assert run.lineage["format"] == "bfloat16"
    (shard,) = Path("runs").glob(".features/*/bfloat16/*.safetensors")
    values = load_file(shard)["features"]
    assert values.dtype == torch.bfloat16
    train(tiny_resnet, flat_digits, **head("fp32"), name="exact")
    (exact,) = Path("runs").glob(".features/*/float32/*.safetensors")
    cosine = torch.cosine_similarity(values.float().flatten(1), load_file(exact)["features"].flatten(1))
    assert cosine.min() >= LEAST_COSINE


def test_bfloat16_that_is_not_as_good_is_not_used(
    tiny_resnet: Path, flat_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "LEAST_COSINE", 1.1)
    run = train(tiny_resnet, flat_digits, **head("bf16"))
    assert run.lineage["format"] == "float32"
    assert LEAST_COSINE <= run.lineage["format_cosine"] < 1.1


@pytest.mark.slow
def test_a_head_from_bfloat16_features_is_as_good(uninterrupted: orchestrator.Run, digits: Path) -> None:
    """Of a body that has learnt digits, on the 200 that it was not trained on."""
    exact, short = (
        train(uninterrupted.path, digits, **head(precision, epochs=20, learning_rate=0.1), name=precision)
        for precision in ("fp32", "bf16")
    )
    assert (exact.lineage["format"], short.lineage["format"]) == ("float32", "bfloat16")
    assert exact.accuracy > 0.6
    assert abs(exact.accuracy - short.accuracy) <= 0.01


def test_it_is_asked_what_is_in_force_not_what_the_processor_has() -> None:
    """With these two variables a processor that has the instructions emulates bfloat16, a hundred times slower."""
    script = (
        "import torch; from orchestrator.features.formats import has_bfloat16;"
        "print(has_bfloat16(torch.device('cpu')), torch.backends.cpu.get_cpu_capability())"
    )
    forbidden = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    out = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **forbidden}, capture_output=True, text=True, check=True
    ).stdout
    assert out.split()[0] == "False"
    assert "AVX512" not in out


@pytest.mark.parametrize("first", ["float32", "bfloat16"])
def test_of_two_jobs_that_try_at_once_the_first_answer_holds(
    first: Format, tiny_resnet: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their timings may differ: two formats would be two sets, each computed whole."""
    import orchestrator_image

    monkeypatch.setattr(formats, "has_bfloat16", lambda _: True)  # emulated where there is none
    job = orchestrator.plan(backbone=str(tiny_resnet), data=str(digits)).job
    Path("samples").mkdir()
    plan, _ = prepare(job, resolve_backbone(job), Path("samples"))
    modality = orchestrator_image.modality
    with ThreadPoolExecutor(1) as pool, start_worker(1, torch.device("cpu")) as worker:
        source = SampleSource(
            Samples(Path("samples"), tuple(field.name for field in modality.sample)), modality.decode,
            modality.batch(plan, tiny_resnet), False, pool,
        )  # fmt: skip
        rows = source.samples.rows("train")

        def num_missing(_format: Format) -> int:  # asked before the trial: meanwhile the other job ends its own
            Path(FORMAT_FILE).write_text(json.dumps(asdict(Choice(first, 1.0, 1.0))))
            return len(rows)

        choice = choose("auto", a_convnet(), source, rows, worker, Path(), num_missing)
    assert choice.format == first


def test_a_note_that_could_not_be_written_whole_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full in the middle of it: what was written by then must not be taken for the note."""

    def half(path: Path, text: str, **_: object) -> int:
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        write_first(Path(FORMAT_FILE), json.dumps(asdict(Choice("float32", 1.0, 1.0))))
    assert list(Path.cwd().iterdir()) == []
