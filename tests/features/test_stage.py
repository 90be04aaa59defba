"""A frozen body runs once: what later jobs find in the store, and what becomes of it when jobs die or meet."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import orchestrator
from orchestrator.data import ingest
from orchestrator.errors import InterruptedRunError, JobError, TrainingError
from orchestrator.job import Noted
from orchestrator.store import inventory, sets
from orchestrator.store.shards import FeatureSet
from tests.whole.test_train import silent, train, weights_of

HEAD: dict[str, Any] = {"training": {"epochs": 3, "learning_rate": 3e-3}, "scaling": {"threads_per_worker": 1}}


def computed(run: orchestrator.Run) -> int:
    """How many samples went through the body for this run."""
    assert run.lineage["features"] == "once"
    return int(run.lineage["num_computed"])


def same_head(one: orchestrator.Run, other: orchestrator.Run) -> None:
    theirs = weights_of(other)
    for name, tensor in weights_of(one).items():
        assert torch.allclose(tensor, theirs[name], atol=1e-5), name
    assert one.results["test"] == other.results["test"]


def test_later_jobs_read_what_an_earlier_one_computed(tiny_resnet: Path, digits: Path) -> None:
    first = train(tiny_resnet, digits, **HEAD)
    again = train(tiny_resnet, digits, **HEAD, name="again")
    other_rate = train(tiny_resnet, digits, **{**HEAD, "training": {"epochs": 3, "learning_rate": 1e-2}})
    alone = train(tiny_resnet, digits, **HEAD, storage="remote")
    assert [computed(run) for run in (first, again, other_rate, alone)] == [600, 0, 0, 600]
    same_head(first, again)
    same_head(alone, again)
    in_every_step = train(tiny_resnet, digits, **HEAD, **{"training.features": "every step"})
    assert in_every_step.lineage["features"] == "every step"
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
        run = orchestrator.finetune(backbone=str(tiny_resnet), data="data", name=name, report=silent, **HEAD, **more)
        return computed(run), len(set(read))

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


def test_views_are_kept(tiny_resnet: Path, flat_digits: Path) -> None:
    augmented = {**HEAD, "settings": {"augment": "light"}}
    runs = [train(tiny_resnet, flat_digits, **augmented, **{"training.views": views}) for views in (2, 3)]
    counts = runs[0].plan.data.num_samples
    held_back = counts["validation"] + counts["test"]
    assert [computed(run) for run in runs] == [2 * counts["train"] + held_back, counts["train"]]
    names = {one.name.split("/")[1].split("-")[0:2][-1] for one in inventory.listings(Path("runs") / sets.FOLDER)}
    assert names == {"float32", "view"}
    plain = train(tiny_resnet, flat_digits, **HEAD)
    assert computed(plain) == counts["train"]  # what was held back is there: unchanged, whatever the training
    slow = train(tiny_resnet, flat_digits, **augmented)
    assert slow.lineage["features"] == slow.plan.features == "every step"
    # The views are those of the samples, whoever stands beside them.
    alone = train(tiny_resnet, flat_digits, **augmented, **{"training.views": 2}, storage="remote")
    same_head(runs[0], alone)


def test_views_of_what_is_not_changed_are_refused(tiny_resnet: Path, flat_digits: Path) -> None:
    with pytest.raises(JobError, match="not augmented"):
        train(tiny_resnet, flat_digits, **{"training.views": 2})
    with pytest.raises(JobError, match="the method is full"):
        train(tiny_resnet, flat_digits, method="full", settings={"augment": "light"}, **{"training.views": 2})


def test_bfloat16_where_it_is_asked_for(tiny_resnet: Path, flat_digits: Path) -> None:
    run = train(tiny_resnet, flat_digits, **HEAD, **{"training.precision": "bf16"})
    assert run.lineage["format_cosine"] > 0.99
    assert run.lineage["format"] == ("bfloat16" if run.lineage["format_cosine"] >= 0.998 else "float32")
    if run.lineage["format"] == "bfloat16":
        (shard,) = Path("runs").glob(".features/*/bfloat16/*.safetensors")
        values = load_file(shard)["features"]
        assert values.dtype == torch.bfloat16
        train(tiny_resnet, flat_digits, **HEAD, name="exact", **{"training.precision": "fp32"})
        (exact,) = Path("runs").glob(".features/*/float32/*.safetensors")
        assert torch.cosine_similarity(values.float().flatten(1), load_file(exact)["features"].flatten(1)).min() > 0.998


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


# --- jobs that die, and jobs that meet ---

# Each batch becomes a shard, and takes its time.
SLOW = """
import sys, time
from orchestrator.features import extraction
from orchestrator.features import body_pass as loading
import orchestrator, orchestrator.train, orchestrator.training.loop, orchestrator_image.network, ray.train.torch
extraction.FLUSH_S = 0.0
compute = loading.compute
def slowly(*what):
    time.sleep(0.08)
    return compute(*what)
loading.compute = slowly
def job(name, events):
    return orchestrator.finetune(
        backbone=sys.argv[1], data=sys.argv[2], name=name, report=events,
        training={"epochs": 3, "learning_rate": 3e-3}, scaling={"threads_per_worker": 1},
    )
"""
KILLED = (
    SLOW
    + """
import os, random, signal
chance, random_moments, at_work = random.Random(0), 10, 0
for number in range(random_moments):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        job("killed", lambda event: os.write(writing, b"x") if "frozen body" in getattr(event, "text", "") else None)
        os._exit(0)
    os.close(writing)
    os.read(reading, 1)  # the body has begun, or the job has ended
    time.sleep(chance.uniform(0, 0.5))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    at_work += os.WIFSIGNALED(status)
    os.close(reading)
    print(number, os.WIFSIGNALED(status), len([f for f in os.listdir(".") if f]), flush=True)
print("killed", at_work)
run = job("killed", lambda event: None)
print("computed", run.lineage["num_computed"])
"""
)


def run_script(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_goes_on_from_its_last_shard(tiny_resnet: Path, digits: Path) -> None:
    whole = train(tiny_resnet, digits, **HEAD, storage="remote")
    process = run_script(KILLED, tiny_resnet, digits)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert int(out.split("killed ")[-1].split()[0]) >= 3, out  # the later ones may find nothing left to do
    assert int(out.split("computed ")[-1]) < 600, out
    run = orchestrator.open_run("runs/killed")
    for name, tensor in weights_of(whole).items():
        assert torch.allclose(tensor, weights_of(run)[name], atol=1e-5), name
    assert run.results["test"]["confusion"] == whole.results["test"]["confusion"]
    (listing,) = inventory.listings(Path("runs") / sets.FOLDER)
    assert listing.num_samples == 600


@pytest.mark.slow
def test_two_jobs_at_once_share_the_work_and_end_right(tiny_resnet: Path, digits: Path) -> None:
    whole = train(tiny_resnet, digits, **HEAD, storage="remote")
    script = SLOW + "run = job(sys.argv[3], lambda event: None); print(run.lineage['num_computed'])"
    both = [run_script(script, tiny_resnet, digits, name) for name in ("one", "two")]
    outs = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    assert sum(int(out) for out, _ in outs) < 2 * 600  # they met in the middle
    for name in ("one", "two"):
        same_head(orchestrator.open_run(f"runs/{name}"), whole)
    assert not list(Path("runs").glob(".features/*/*/*.partial"))


def test_stopped_while_the_body_ran_it_goes_on(
    tiny_resnet: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.features import body_pass as loading

    asked: list[int] = []
    compute = loading.compute

    def stopping(*what: Any) -> Any:
        import signal

        asked.append(1)
        if len(asked) == 3:
            signal.raise_signal(signal.SIGINT)
        return compute(*what)

    with monkeypatch.context() as patch:
        patch.setattr(loading, "compute", stopping)
        with pytest.raises(InterruptedRunError):
            train(tiny_resnet, digits, **HEAD, name="stopped")
    run = train(tiny_resnet, digits, **HEAD, name="stopped")
    kept = 600 - computed(run)
    assert 0 < kept < 600
    assert kept % 16 == 0  # whole batches, in their order
    whole = train(tiny_resnet, digits, **HEAD, storage="remote")
    assert all(torch.equal(tensor, weights_of(whole)[name]) for name, tensor in weights_of(run).items())


def test_a_run_that_goes_on_reads_what_it_began_with(
    tiny_resnet: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.store import shards as store
    from orchestrator.training import loop

    def stopped(_session: object) -> None:
        raise InterruptedRunError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_train", stopped)
        with pytest.raises(InterruptedRunError):
            train(tiny_resnet, digits, **HEAD, name="stopped")
    (folder,) = Path("runs").glob(".features/*/float32")
    features = FeatureSet(folder)
    features.refresh()
    (shard,) = (store.Shard.from_manifest(file.stem, file.read_bytes()) for file in folder.glob("*.json"))
    assert shard is not None
    with monkeypatch.context() as patch:  # another job's shard, of before, with the same contents
        patch.setattr(store.time, "time_ns", lambda: 1)
        features.add(shard.ids, np.array(features.values(0)) + 1, "float32")
    whole = train(tiny_resnet, digits, **HEAD, storage="remote")
    run = train(tiny_resnet, digits, **HEAD, name="stopped")
    assert computed(run) == 0
    assert all(torch.equal(tensor, weights_of(whole)[name]) for name, tensor in weights_of(run).items())
    other = train(tiny_resnet, digits, **HEAD, name="other")
    assert not all(torch.equal(tensor, weights_of(whole)[name]) for name, tensor in weights_of(other).items())


def test_features_of_unlike_shape_are_refused() -> None:
    from orchestrator.features import extraction

    extraction._refuse_other_shape((3,), np.zeros((2, 3), np.float32))
    with pytest.raises(TrainingError, match=r"the shape \[4\] for some samples, and \[3\] for others") as refused:
        extraction._refuse_other_shape((3,), np.zeros((2, 4), np.float32))
    assert "every step" in refused.value.mend


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


def test_many_shards_are_read_as_one() -> None:
    from orchestrator.features.sources import StoredView

    values = [np.arange(6, dtype=np.float32).reshape(3, 2) + 10 * i for i in range(3)]
    rows = np.array([1, 2, 5, 7])
    view = StoredView(rows, np.array([2, 0, 2, 1]), np.array([0, 2, 1, 1]), values)
    found, kept = view.batch(np.array([7, 3, 1, 2]))
    assert kept.tolist() == [7, 1, 2]
    assert found.tolist() == [[12, 13], [20, 21], [4, 5]]
    assert view.batch(np.array([0, 9]))[1].tolist() == []
    nothing = StoredView(rows[:0], rows[:0], rows[:0], [])
    assert nothing.batch(np.array([0, 9]))[1].tolist() == []


def test_views_differ_by_what_the_settings_alone_say(tiny_resnet: Path, flat_digits: Path) -> None:
    from orchestrator.features.stage import view_name

    plan = orchestrator.plan(backbone=str(tiny_resnet), data=str(flat_digits))
    weak, strong = (
        plan.model_copy(update={
            "augmentation": ("strength",), "job": plan.job.model_copy(update={"settings": {"strength": strength}})
        })
        for strength in (1, 9)
    )  # fmt: skip
    assert view_name(weak, 0) != view_name(strong, 0)
