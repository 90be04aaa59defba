"""A frozen body runs once: what later jobs find in the store, and the stage without a training session."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import orchestrator
from orchestrator.data import Samples, ingest
from orchestrator.errors import InterruptedRunError, JobError, TrainingError
from orchestrator.features import FeatureRef, NoCut, SampleSource, compute_features, open_features
from orchestrator.gate import prepare, resolve_backbone
from orchestrator.job import SPLITS, Event, Noted, PhaseBegan
from orchestrator.network import Body, Network, start_worker
from orchestrator.store import inventory, sets
from tests.features.conftest import FORMATS, head
from tests.held import leased
from tests.whole.test_train import silent, train, weights_of

HEAD = head()


def computed(run: orchestrator.Run) -> int:
    """How many samples went through the body for this run."""
    assert run.lineage["features"] == "once"
    return int(run.lineage["num_computed"])


def same_weights(one: orchestrator.Run, other: orchestrator.Run) -> None:
    theirs = weights_of(other)
    for name, tensor in weights_of(one).items():
        assert torch.allclose(tensor, theirs[name], atol=1e-5), name


def same_head(one: orchestrator.Run, other: orchestrator.Run) -> None:
    same_weights(one, other)
    assert one.results["test"] == other.results["test"]


@pytest.mark.parametrize("precision", FORMATS)
def test_later_jobs_read_what_an_earlier_one_computed(precision: str, tiny_resnet: Path, digits: Path) -> None:
    job = head(precision)
    first = train(tiny_resnet, digits, **job)
    assert first.lineage["format"] == FORMATS[precision]
    again = train(tiny_resnet, digits, **job, name="again")
    other_rate = train(tiny_resnet, digits, **head(precision, learning_rate=1e-2))
    alone = train(tiny_resnet, digits, **job, storage="remote")
    assert [computed(run) for run in (first, again, other_rate, alone)] == [600, 0, 0, 600]
    same_head(first, again)
    same_head(alone, again)
    in_every_step = train(tiny_resnet, digits, **job, **{"training.features": "every step"})
    assert in_every_step.lineage["features"] == "every step"
    same_weights(in_every_step, again)
    if precision == "fp32":  # in every step a run's last figures are computed in fp32
        same_head(in_every_step, again)


def test_another_input_is_another_set(tiny_resnet: Path, flat_digits: Path) -> None:
    runs = [train(tiny_resnet, flat_digits, **HEAD, settings={"size": size}) for size in (32, 24, 32)]
    assert [computed(run) for run in runs[:2]] == [300, 300]
    assert len(inventory.listings(Path("runs") / sets.FOLDER)) == 2


def test_data_that_grew_by_a_tenth_costs_a_tenth(tiny_resnet: Path, digits: Path, flat_digits: Path) -> None:
    train(tiny_resnet, flat_digits, **HEAD)
    files = sorted((digits / "test").glob("*/*.png"))[:30]
    for i, file in enumerate(sorted(flat_digits.glob("*/*.png"))):  # under other names, in another place
        (Path("grown") / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, Path("grown") / file.parent.name / f"renamed-{i}.png")
    for file in files:
        shutil.copy(file, Path("grown") / file.parent.name / file.name)
    assert computed(train(tiny_resnet, Path("grown"), **HEAD)) == 30


@pytest.mark.usefixtures("one_shard")
def test_a_flipped_bit_is_said_and_the_shard_made_again(tiny_resnet: Path, flat_digits: Path) -> None:
    first = train(tiny_resnet, flat_digits, **HEAD)
    (shard,) = Path("runs").glob(".features/*/*/*.safetensors")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    notes: list[str] = []
    again = orchestrator.finetune(
        backbone=str(tiny_resnet), data=str(flat_digits), name="again", **HEAD,
        report=lambda event: notes.append(event.text) if isinstance(event, Noted) else None,
    )  # fmt: skip
    assert computed(again) == 300
    assert any("damaged" in note for note in notes)
    assert not shard.exists()
    same_head(first, again)


def test_a_file_is_not_read_again_to_find_out_what_it_is(
    tiny_resnet: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of large data the contents are not read before the start: there the memory of files counts."""
    from orchestrator.data.samples import Samples

    shutil.copytree(digits, "data")
    monkeypatch.setattr(ingest, "MAX_HASHED_BYTES", 0)
    monkeypatch.setattr(ingest, "NUM_MEASURED_ALL", 8)
    monkeypatch.setattr(ingest, "NUM_MEASURED", 4)
    read: list[int] = []
    reads = Samples.read

    def counting(self: Samples, row: int) -> Any:
        read.append(row)
        return reads(self, row)

    monkeypatch.setattr(Samples, "read", counting)

    def one(name: str, **more: Any) -> tuple[int, int]:
        read.clear()
        while_training: set[int] = set()

        def hear(event: Event) -> None:
            if event == PhaseBegan("final figures"):  # after them some are looked at to say why little was learnt
                while_training.update(read)

        run = orchestrator.finetune(backbone=str(tiny_resnet), data="data", name=name, report=hear, **HEAD, **more)
        return computed(run), len(while_training)

    assert one("first") == (600, 600)
    num_computed, num_read = one("second")
    assert num_computed == 0
    assert num_read <= 16  # the proof of the cut
    # Changed with its size and time kept: only who reads it can tell.
    file = sorted(Path("data/train").glob("*/*.png"))[100]
    before, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1  # of the last check sum, which decoders do not look at
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert one("third")[0] == 0
    assert one("fourth", verify_content=True) == (1, 600)
    assert one("fifth")[0] == 0


def test_of_a_store_that_tells_no_times_nothing_is_remembered(
    tiny_resnet: Path, flat_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the same size is no sign of the same content."""
    import fsspec

    monkeypatch.setattr(ingest, "NUM_MEASURED_ALL", 8)
    monkeypatch.setattr(ingest, "NUM_MEASURED", 4)
    place = fsspec.filesystem("memory")

    def put(change: int) -> None:
        for file in flat_digits.glob("*/*.png"):
            content = bytearray(file.read_bytes())
            content[-1] ^= change
            place.pipe(f"/timeless/{file.parent.name}/{file.name}", bytes(content))

    def one(name: str) -> int:
        return computed(orchestrator.finetune(
            backbone=str(tiny_resnet), data="memory://timeless", name=name, report=silent, **HEAD
        ))  # fmt: skip

    try:
        put(0)
        assert (one("first"), one("second")) == (300, 0)
        put(1)
        assert one("third") == 300
    finally:
        place.rm("/timeless", recursive=True)


@pytest.mark.parametrize("precision", FORMATS)
def test_views_are_kept(precision: str, tiny_resnet: Path, flat_digits: Path) -> None:
    augmented = {**head(precision), "settings": {"augment": "light"}}
    runs = [train(tiny_resnet, flat_digits, **augmented, **{"training.views": views}) for views in (2, 3)]
    counts = runs[0].plan.data.num_samples
    held_back = counts["validation"] + counts["test"]
    assert [computed(run) for run in runs] == [2 * counts["train"] + held_back, counts["train"]]
    names = [one.name.split("/")[1] for one in inventory.listings(Path("runs") / sets.FOLDER)]
    assert {name.split("-")[0] for name in names} == {FORMATS[precision]}
    assert sorted(name.split("-")[1:3] for name in names) == [[], ["view", "0"], ["view", "1"], ["view", "2"]]
    plain = train(tiny_resnet, flat_digits, **head(precision))
    assert computed(plain) == counts["train"]  # what was held back is there: unchanged, whatever the training
    slow = train(tiny_resnet, flat_digits, **augmented)
    assert slow.lineage["features"] == "every step"
    assert not slow.plan.recipe.needs_features
    # The views are those of the samples, whoever stands beside them.
    alone = train(tiny_resnet, flat_digits, **augmented, **{"training.views": 2}, storage="remote")
    same_head(runs[0], alone)


def test_views_of_what_is_not_changed_are_refused(tiny_resnet: Path, flat_digits: Path) -> None:
    with pytest.raises(JobError, match="not augmented"):
        train(tiny_resnet, flat_digits, **{"training.views": 2})
    with pytest.raises(JobError, match="the method is full"):
        train(tiny_resnet, flat_digits, method="full", settings={"augment": "light"}, **{"training.views": 2})


def test_a_notebooks_modality_keeps_its_features_to_its_run(tiny_resnet: Path, flat_digits: Path) -> None:
    import dataclasses

    from orchestrator.modality import registry

    mine = orchestrator.register(dataclasses.replace(registry.get("image"), name="mine"))
    try:
        runs = [train(tiny_resnet, flat_digits, **HEAD, modality="mine", name=name) for name in ("one", "two")]
    finally:
        registry.unregister(mine.name)
    assert [computed(run) for run in runs] == [300, 300]
    assert not (Path("runs") / sets.FOLDER).exists()
    assert not (runs[0].path / "features").exists()


def test_unreadable_samples_are_left_out_once(tiny_resnet: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(ingest, "NUM_MEASURED_ALL", 8)
    monkeypatch.setattr(ingest, "NUM_MEASURED", 4)
    shutil.copytree(digits, "data")
    broken = sorted(Path("data/train").glob("*/*.png"))[101]
    broken.write_bytes(b"no picture")
    for name, num in (("first", 599), ("second", 0)):
        run = orchestrator.finetune(
            backbone=str(tiny_resnet), data={"path": "data", "on_bad_sample": "skip"}, name=name, report=silent, **HEAD
        )
        assert (computed(run), run.results["num_skipped"]) == (num, 1)


def test_the_commands(tiny_resnet: Path, flat_digits: Path, cli: Callable[..., Any]) -> None:
    train(tiny_resnet, flat_digits, **HEAD)
    found = json.loads(cli("features", "list", "--json").stdout)
    assert [one["num_samples"] for one in found] == [300]
    assert max(map(len, cli("features", "list").stdout.splitlines())) <= 80
    shown = cli("features", "show", found[0]["name"][:12]).stdout
    assert "into classifier" in shown
    assert "size 32 x 32" in shown
    assert cli("features", "show", "nothing").returncode == 2
    assert "no set of features" in cli("features", "show", "nothing").stderr
    assert cli("features", "prune", "--max-size", "many").returncode == 2
    assert cli("features", "list", "--storage", "nowhere").returncode == 2
    kept = json.loads(cli("features", "prune", "--max-size", "1GB", "--json").stdout)
    assert (kept["removed"], len(kept["left"])) == ([], 1)
    assert "1 removed" in cli("features", "prune", "--max-size", "0").stdout
    assert json.loads(cli("features", "list", "--json").stdout) == []
    assert computed(train(tiny_resnet, flat_digits, **HEAD, name="after")) == 300


# --- the stage alone ---


def stage(backbone: Path, data: Path, name: str, resources: ExitStack, **fields: Any) -> tuple[Any, ...]:
    """What `compute_features` takes of a job, without a training session."""
    import orchestrator_image

    job = orchestrator.plan(backbone=str(backbone), data=str(data), name=name, **head(), **fields).job
    run = leased(Path("runs", name).absolute())
    (run.folder / "samples").mkdir()
    plan, _ = prepare(job, resolve_backbone(job), run.folder / "samples")
    modality = orchestrator_image.modality
    worker = resources.enter_context(start_worker(1, torch.device("cpu")))
    network = modality.build(plan, backbone)
    network.module.eval()
    source = SampleSource(
        Samples(run.folder / "samples", tuple(field.name for field in modality.sample)), modality.decode,
        modality.batch(plan, backbone), False, resources.enter_context(ThreadPoolExecutor(1)),
    )  # fmt: skip
    return plan, run, network, modality, source, worker


class Squared(torch.nn.Module):
    """What it gives is not what its last layer gives."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.inner(**inputs).logits ** 2


@pytest.mark.usefixtures("one_shard")
def test_the_features_of_a_plan_are_asked_for_without_training(tiny_resnet: Path, flat_digits: Path) -> None:
    with ExitStack() as resources:
        plan, run, network, modality, source, worker = stage(tiny_resnet, flat_digits, "alone", resources)
        ref = compute_features(plan, run, network, modality, source, worker, silent, lambda: False, resources)
        assert isinstance(ref, FeatureRef)
        assert ref.lineage["num_computed"] == 300
        samples, body = source.samples, Body(network, ref.cache.cut)
        for name in SPLITS:
            rows = samples.rows(name)
            with torch.no_grad():
                expected = body(source.batch(rows[:16], train=False).inputs)
            for stored in ref.splits[name]:
                assert np.isin(rows, stored.rows).all()
            there = open_features(ref, samples, resources, pytest.fail)[name].batch(rows[:16], train=False)
            assert torch.allclose(there.inputs["features"], expected, atol=1e-5)
    ref = pickle.loads(pickle.dumps(ref))  # it travels to who will read them
    with ExitStack() as resources:
        sources = open_features(ref, samples, resources, pytest.fail)
        assert inventory.prune(Path("runs") / sets.FOLDER, 0) == []
        assert sources.keys() == set(SPLITS)
    # A run that trains finds them.
    assert computed(train(tiny_resnet, flat_digits, **HEAD, name="later")) == 0
    (shard,) = Path("runs").glob(".features/*/float32/*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with ExitStack() as resources, pytest.raises(TrainingError, match="gone or damaged") as refused:
        open_features(ref, samples, resources, pytest.fail)
    assert refused.value.mend
    shard.unlink()
    with ExitStack() as resources, pytest.raises(TrainingError, match="gone or damaged"):
        open_features(ref, samples, resources, pytest.fail)


def test_the_stage_stops_where_it_is_told_to_and_keeps_what_it_has(tiny_resnet: Path, flat_digits: Path) -> None:
    stops = iter([False, False, True, True, True, True])
    with ExitStack() as resources:
        what = stage(tiny_resnet, flat_digits, "alone", resources)
        with pytest.raises(InterruptedRunError, match="are kept"):
            compute_features(*what, silent, lambda: next(stops), resources)
        ref = compute_features(*what, silent, lambda: False, resources)
        assert isinstance(ref, FeatureRef)
        assert 0 < ref.lineage["num_computed"] < 300


def test_where_no_cut_holds_the_stage_says_so(tiny_resnet: Path, flat_digits: Path) -> None:
    with ExitStack() as resources:
        plan, run, network, modality, source, worker = stage(tiny_resnet, flat_digits, "alone", resources)
        head_names = tuple(f"inner.{name}" for name in network.head)
        squared = Network(Squared(network.module), head_names, (), (), network.save)
        notes: list[str] = []
        ref = compute_features(
            plan, run, squared, modality, source, worker,
            lambda event: notes.append(event.text) if isinstance(event, Noted) else None, lambda: False, resources,
        )  # fmt: skip
    assert isinstance(ref, NoCut)
    assert ref.lineage["features"] == "every step"
    assert ref.lineage["cut_error"] > 1e-4
    assert notes == ["no cut into body and head holds for this network: the body runs in every step"]
