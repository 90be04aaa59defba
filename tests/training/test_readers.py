"""Processes that read samples: the same batches as without them, whatever is broken and whoever dies."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
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
from orchestrator.errors import TrainingError
from orchestrator.features import Batch, SampleSource, SourceSpec
from orchestrator.modality import Modality, registry
from orchestrator.training import batches, loop
from orchestrator.training.batches import BatchLoader
from orchestrator.training.readers import Readers
from tests.training.test_loop import train
from tests.whole.test_train import same, weights_of

AS_IT_IS = {"method": "full", "settings": {"augment": "light"}, "training": {"epochs": 2, "batch_size": 40}}


@pytest.fixture
def run(tiny_resnet: Path, digits: Path) -> orchestrator.Run:
    return train(tiny_resnet, digits, name="plain", **AS_IT_IS)


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    with ExitStack() as resources:
        yield resources


def source_of(run: orchestrator.Run, backbone: Path, resources: ExitStack, modality: Modality | None = None) -> Any:
    """The run's samples."""
    table = table_of(run)
    assert table is not None
    spec = SourceSpec(run.plan.model_dump_json(), table, backbone, modality)
    return spec.opened(resources.enter_context(ThreadPoolExecutor(2)))


def started(source: SampleSource, resources: ExitStack, notes: list[str]) -> Readers:
    """Two readers; ready, unless a note says why not."""
    assert source.spec is not None
    readers = Readers(source.spec, 2, False, notes.append)
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
        for later in range(i + 1, min(num, i + 1 + loader.num_ahead(1))):
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


def test_they_give_what_this_process_gives_and_end_with_it(
    run: orchestrator.Run, tiny_resnet: Path, resources: ExitStack
) -> None:
    source, notes = source_of(run, tiny_resnet, resources), list[str]()
    plain = loaded(BatchLoader(torch.device("cpu"), resources, ahead=False), source)
    readers = started(source, resources, notes)
    assert readers.ready, notes
    loader = BatchLoader(torch.device("cpu"), resources, True, readers)
    assert loader.num_ahead(1) == 4
    assert_equal(loaded(loader, source), plain)
    as_they_are = [source.batch(np.arange(9), train=False), source.batch(np.arange(9, 70), train=False)]
    assert_equal(list(loader.each(source, [np.arange(9), np.arange(9, 70)])), as_they_are)  # the second one is larger
    assert readers.process is not None
    processes = psutil.Process(readers.process.pid).children()
    assert len(processes) == 2
    readers.close()
    assert not psutil.wait_procs(processes, timeout=20)[1]


def test_one_that_dies_leaves_the_reading_to_the_worker(
    run: orchestrator.Run, tiny_resnet: Path, resources: ExitStack
) -> None:
    source, notes = source_of(run, tiny_resnet, resources), list[str]()
    plain = loaded(BatchLoader(torch.device("cpu"), resources, ahead=False), source)
    readers = started(source, resources, notes)
    loader = BatchLoader(torch.device("cpu"), resources, True, readers)
    assert readers.process is not None
    for process in psutil.Process(readers.process.pid).children():
        os.kill(process.pid, signal.SIGKILL)
    assert_equal(loaded(loader, source), plain)
    assert not readers.ready
    assert len(notes) == 1
    assert "has died" in notes[0]
    assert_equal(loaded(loader, source), plain)


def test_samples_that_cannot_be_read_are_left_out_or_end_the_run(
    digits: Path, tmp_path: Path, tiny_resnet: Path, resources: ExitStack
) -> None:
    run = train(tiny_resnet, Path(shutil.copytree(digits, tmp_path / "data")), name="plain", **AS_IT_IS)
    source, notes = source_of(run, tiny_resnet, resources), list[str]()
    Path(source.samples.place(5)).write_bytes(b"nothing")
    skipping = dataclasses.replace(source, skip=True)
    plain = [skipping.batch(np.arange(17), train=False)]
    assert list(skipping.skipped) == [5]
    loader = BatchLoader(torch.device("cpu"), resources, True, started(source, resources, notes))
    with pytest.raises(TrainingError, match="is no image") as caught:
        list(loader.each(source, [np.arange(17)]))
    assert source.samples.place(5) in str(caught.value)
    assert "--on-bad-sample skip" in caught.value.mend
    job = run.plan.job.model_copy(update={"data": run.plan.job.data.model_copy(update={"on_bad_sample": "skip"})})
    lenient = dataclasses.replace(source.spec, plan_json=run.plan.model_copy(update={"job": job}).model_dump_json())
    again = lenient.opened(source.pool)
    loader = BatchLoader(torch.device("cpu"), resources, True, started(again, resources, notes))
    assert_equal(list(loader.each(again, [np.arange(17)])), plain)
    assert again.skipped == skipping.skipped


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
    plain = loaded(BatchLoader(torch.device("cpu"), resources, ahead=False), source)
    assert_equal(loaded(BatchLoader(torch.device("cpu"), resources, True, readers), source), plain)


def test_what_fails_in_the_other_process_is_said(
    run: orchestrator.Run, tmp_path: Path, tiny_resnet: Path, resources: ExitStack
) -> None:
    source, notes = source_of(run, tiny_resnet, resources), list[str]()
    source.spec = dataclasses.replace(source.spec, table=tmp_path / "nowhere")
    assert not started(source, resources, notes).ready
    assert "no process that reads samples could be started" in notes[0]
    assert "nowhere" in notes[0]


@pytest.mark.parametrize("mix", ["none", "mixup"])
def test_a_run_is_the_same_with_them(
    mix: str, tiny_resnet: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {**AS_IT_IS, "training": {"epochs": 6, "batch_size": 40, "mix": mix}}
    plain = train(tiny_resnet, digits, name="plain", **fields)
    made: list[Readers] = []

    def readers_of(raw: SampleSource, *_: object) -> Readers:
        assert raw.spec is not None
        made.append(Readers(raw.spec, 2, False, lambda text: pytest.fail(text)))
        return made[0]

    def ahead(device: torch.device, resources: ExitStack, readers: Readers) -> BatchLoader:
        loader = BatchLoader(device, resources, True, readers)
        readers.start()
        while not readers.ready:
            time.sleep(0.02)
        return loader

    monkeypatch.setattr(loop, "_readers", readers_of)
    monkeypatch.setattr(loop, "BatchLoader", ahead)
    run = train(tiny_resnet, digits, name="ahead", **fields)
    assert made[0].largest > 1  # they were asked
    assert same(weights_of(run), weights_of(plain))
    assert [line["validation_loss"] for line in run.metrics] == [line["validation_loss"] for line in plain.metrics]


def test_they_start_where_steps_wait_for_samples(
    run: orchestrator.Run, tiny_resnet: Path, resources: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, notes = source_of(run, tiny_resnet, resources), list[str]()
    readers = Readers(source.spec, 2, False, notes.append)
    loader = BatchLoader(torch.device("cpu"), resources, True, readers)
    loaded(loader, source, 1)
    assert not readers.started  # a job that is through at once does not pay for them
    monkeypatch.setattr(batches, "_READ_S", 0.0)
    loaded(loader, source, 3)
    assert readers.started
