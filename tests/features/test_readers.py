"""Processes that read samples: the same batches as without them, whatever is broken and whoever dies."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import orchestrator
from orchestrator.data import table_of
from orchestrator.errors import RefusedError, TrainingError
from orchestrator.features import Batch, Readers, Request, SampleSource, SourceSpec
from orchestrator.modality import Modality, registry
from orchestrator.training import assembly, loop
from orchestrator.training.batches import BatchLoader
from tests import s3_proxy
from tests.training.test_loop import train
from tests.whole.test_train import same, weights_of

AS_IT_IS = {"method": "full", "settings": {"augment": "light"}, "training": {"epochs": 2, "batch_size": 40}}


@pytest.fixture(scope="module")
def run(tiny_resnet: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> orchestrator.Run:
    """Of a copy of the digits, whose row 99 cannot be read any more."""
    folder = tmp_path_factory.mktemp("readers")
    run = train(tiny_resnet, Path(shutil.copytree(digits, folder / "data")), storage=str(folder / "runs"), **AS_IT_IS)
    with ExitStack() as resources:
        Path(source_of(run, tiny_resnet, resources).samples.place(99)).write_bytes(b"nothing")
    return run


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    with ExitStack() as resources:
        yield resources


def source_of(run: orchestrator.Run, backbone: Path, resources: ExitStack, modality: Modality | None = None) -> Any:
    """The run's samples."""
    table = table_of(run)
    assert table is not None
    spec = SourceSpec(run.plan, table, backbone, modality)
    return spec.opened(resources.enter_context(ThreadPoolExecutor(2)))


def started(source: SampleSource, resources: ExitStack, notes: list[str]) -> Readers:
    """Two readers; ready, unless a note says why not."""
    assert source.spec is not None
    readers = source.readers = Readers(source.spec, 2, False, notes.append)
    resources.callback(readers.close)
    readers.start()
    end = time.monotonic() + 100
    while not readers.ready and not notes and readers.process is not None and time.monotonic() < end:
        time.sleep(0.02)
    return readers


def loaded(loader: BatchLoader, source: SampleSource, num: int = 6) -> list[Batch | None]:
    """Some training batches, prepared as the loop does it."""
    rows = [np.arange(17 * i, 17 * i + 17) for i in range(num)]
    found = []
    for i in range(num):
        found.append(loader.load(source, (3, i, 0), rows[i]))
        for later in range(i + 1, min(num, i + 1 + loader.num_ahead(source))):
            loader.prepare(source, (3, later, 0), rows[later])
    return found


def assert_equal(ours: list[Batch | None], theirs: list[Batch | None]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one is not None
        assert other is not None
        assert one.inputs.keys() == other.inputs.keys()
        assert all(torch.equal(one.inputs[name], other.inputs[name]) for name in one.inputs)
        assert torch.equal(one.targets, other.targets)
        assert np.array_equal(one.rows, other.rows)


def test_they_give_what_this_process_gives_and_where_one_dies_it_reads_itself(
    run: orchestrator.Run, tiny_resnet: Path, resources: ExitStack
) -> None:
    source, notes = source_of(run, tiny_resnet, resources), list[str]()
    plain = loaded(BatchLoader(torch.device("cpu"), resources, ahead=False), source, 5)
    readers = started(source, resources, notes)
    assert readers.ready, notes
    loader = BatchLoader(torch.device("cpu"), resources, True)
    assert loader.num_ahead(source) == 2  # until it is known how large a batch is
    assert_equal(loaded(loader, source, 5), plain)
    assert loader.num_ahead(source) == 4
    as_they_are = [source.batch(np.arange(9), train=False), source.batch(np.arange(9, 70), train=False)]
    assert_equal(list(loader.each(source, [np.arange(9), np.arange(9, 70)])), as_they_are)  # the second one is larger
    with pytest.raises(TrainingError, match="is no image") as caught:
        list(loader.each(source, [np.arange(90, 100)]))
    assert source.samples.place(99) in str(caught.value)
    assert "--on-bad-sample skip" in caught.value.mend
    assert readers.process is not None
    processes = psutil.Process(readers.process.pid).children()
    assert len(processes) == 2
    processes[0].kill()
    for _ in range(2):
        assert_equal(loaded(loader, source, 5), plain)
    assert not readers.ready
    assert len(notes) == 1
    assert "has died" in notes[0]
    readers.close()
    assert not psutil.wait_procs(processes, timeout=20)[1]


def loud(sample: Any) -> Any:
    """Decodes as images do, prints, and fails as a reader's pipe does for the one that is no image."""
    print("x" * 100_000)
    if sample["image"] == b"nothing":
        raise EOFError("the file ends early")
    decode = registry.get("image").decode
    assert decode is not None
    return decode(sample)


def test_what_a_plugin_prints_and_raises_is_not_taken_for_the_readers_own(
    run: orchestrator.Run, tiny_resnet: Path, resources: ExitStack
) -> None:
    modality = dataclasses.replace(registry.get("image"), decode=loud)
    source, notes = source_of(run, tiny_resnet, resources, modality), list[str]()
    readers = started(source, resources, notes)
    assert readers.ready, notes
    plain = [source.batch(np.arange(9), train=False)]
    assert_equal([readers.begin(Request(np.arange(9))).result()[0]], plain)
    with pytest.raises(EOFError, match="the file ends early") as caught:
        readers.begin(Request(np.arange(90, 100))).result()
    assert "in loud" in caught.value.__notes__[0]
    assert readers.ready
    assert not notes


def test_where_none_can_be_started_the_worker_reads(
    run: orchestrator.Run, tiny_resnet: Path, resources: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_name: str) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", full)
    source, notes = source_of(run, tiny_resnet, resources), list[str]()
    assert not started(source, resources, notes).ready
    assert "Too many open files" in notes[0]


def test_a_modality_of_a_notebook_is_read_in_the_worker(
    run: orchestrator.Run, tiny_resnet: Path, resources: ExitStack
) -> None:
    image = registry.get("image")
    decode = image.decode
    assert decode is not None
    mine = dataclasses.replace(image, decode=lambda sample: decode(sample))
    source, notes = source_of(run, tiny_resnet, resources, mine), list[str]()
    readers = started(source, resources, notes)
    assert not readers.ready
    assert "another process cannot import" in notes[0]
    plain = loaded(BatchLoader(torch.device("cpu"), resources, ahead=False), source, 2)
    assert_equal(loaded(BatchLoader(torch.device("cpu"), resources, True), source, 2), plain)


def test_what_fails_in_the_other_process_is_said(
    run: orchestrator.Run, tmp_path: Path, tiny_resnet: Path, resources: ExitStack
) -> None:
    source, notes = source_of(run, tiny_resnet, resources), list[str]()
    source.spec = dataclasses.replace(source.spec, table=tmp_path / "nowhere")
    assert not started(source, resources, notes).ready
    assert "no process that reads samples could be started" in notes[0]
    assert "nowhere" in notes[0]


def test_a_store_that_is_away_makes_no_bad_samples(
    tiny_resnet: Path, flat_digits: Path, tmp_path: Path, bucket: Any, proxy: s3_proxy.Proxy, resources: ExitStack
) -> None:
    """A reader says so soon, and the worker waits."""
    for file in sorted(flat_digits.glob("*/*.png"))[::3]:
        with bucket.open_output_stream(f"digits/{file.parent.name}/{file.name}") as out:
            out.write(file.read_bytes())
    run = orchestrator.finetune(
        backbone=str(tiny_resnet), data="s3://bucket/digits", on_bad_sample="skip", storage=str(tmp_path / "runs"),
        report=lambda _: None, **{**AS_IT_IS, "training": {"epochs": 1}},
    )  # fmt: skip
    source, notes = source_of(run, tiny_resnet, resources), list[str]()
    readers = started(source, resources, notes)
    assert readers.ready, notes
    loader = BatchLoader(torch.device("cpu"), resources, True)
    plain = loaded(loader, source, 2)
    proxy.away_until = time.monotonic() + 600
    with pytest.raises(RefusedError, match=r"s3://bucket/digits/.* does not answer") as caught:
        readers.begin(Request(np.arange(9))).result()
    assert caught.value.reason == "offline"
    proxy.away_until = time.monotonic() + 8
    assert_equal(loaded(loader, source, 2), plain)
    assert source.skipped == {}
    assert readers.ready


@pytest.fixture
def with_readers(monkeypatch: pytest.MonkeyPatch) -> list[Readers]:
    """Jobs on this CPU have them from the start; those that were made."""
    made: list[Readers] = []

    def readers_of(spec: SourceSpec, *_: object) -> Readers:
        readers = Readers(spec, 2, False, lambda text: pytest.fail(text))
        made.append(readers)
        readers.start()
        while not readers.ready:
            time.sleep(0.02)
        return readers

    monkeypatch.setattr(assembly, "_readers", readers_of)
    monkeypatch.setattr(loop, "BatchLoader", functools.partial(BatchLoader, ahead=True))
    return made


@pytest.mark.parametrize("mix", ["none", "mixup"])
def test_a_run_is_the_same_with_them(mix: str, tiny_resnet: Path, digits: Path, request: pytest.FixtureRequest) -> None:
    fields = {**AS_IT_IS, "training": {"epochs": 6, "batch_size": 40, "mix": mix}}
    plain = train(tiny_resnet, digits, name="plain", **fields)
    made = request.getfixturevalue("with_readers")
    run = train(tiny_resnet, digits, name="ahead", **fields)
    assert made[0].largest  # they were asked
    assert same(weights_of(run), weights_of(plain))
    assert [line["validation_loss"] for line in run.metrics] == [line["validation_loss"] for line in plain.metrics]


def test_features_are_the_same_with_them(
    tiny_resnet: Path, digits: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    data = Path(shutil.copytree(digits, tmp_path / "data"))
    first, second, *_ = sorted((data / "train" / "0").glob("*.png"))
    shutil.copy(first, first.with_name("again.png"))
    second.write_bytes(b"nothing")
    fields: dict[str, Any] = {
        "method": "head",
        "training": {"epochs": 2, "precision": "fp32"},
        "report": lambda _: None,
    }
    spec = {"path": str(data), "on_bad_sample": "skip"}
    job = {"backbone": str(tiny_resnet), "data": spec, **fields}
    plain = orchestrator.finetune(**job, name="plain", storage="one")
    made = request.getfixturevalue("with_readers")
    run = orchestrator.finetune(**job, name="ahead", storage="other")
    assert made[0].largest
    contents = {file.read_bytes() for file in data.glob("*/*/*.png")} - {b"nothing"}
    # Whoever has it twice among what is on its way, in two batches, computes it twice.
    assert len(contents) <= run.lineage["num_computed"] <= len(contents) + 1
    for name, tensor in weights_of(plain).items():
        assert torch.allclose(weights_of(run)[name], tensor, atol=1e-5), name
    assert (run.path / "skipped.jsonl").read_text() == (plain.path / "skipped.jsonl").read_text()


def test_they_start_where_reading_is_heavy(
    run: orchestrator.Run, tiny_resnet: Path, resources: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, notes = source_of(run, tiny_resnet, resources), list[str]()
    readers = source.readers = Readers(source.spec, 2, False, notes.append)
    resources.callback(readers.close)
    loader = BatchLoader(torch.device("cpu"), resources, True)
    loaded(loader, source, 1)
    assert not readers.started  # a job that is through at once does not pay for them
    monkeypatch.setattr("orchestrator.features.readers.READ_S", 0.0)
    loaded(loader, source, 3)
    assert readers.started
    readers.close()  # at once: the job is through
    assert readers.process is not None
    assert readers.process.returncode is not None
    time.sleep(0.5)
    assert not notes
    assert not readers.ready
