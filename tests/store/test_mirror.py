"""Features in an object store (moto's server on 127.0.0.1), for the jobs of several machines."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import pytest
import torch

import orchestrator
from orchestrator.errors import InterruptedRunError, JobError, OrchestratorError, RefusedError
from orchestrator.job import Event, Noted
from orchestrator.job.locations import cached
from orchestrator.store import inventory, mirror
from orchestrator.store.mirror import MirroredSet
from orchestrator.store.sets import USED
from orchestrator.store.shards import FeatureSet
from tests import s3_proxy
from tests.store.test_shards import ids_of
from tests.whole.test_train import weights_of

PLACE = "s3://bucket/features"


def train(
    backbone: Path, data: Path, machine: str, notes: list[str] | None = None, precision: str = "fp32", **fields: Any
) -> orchestrator.Run:
    """On a machine of its own: with another storage."""

    def event(one: Event) -> None:
        if notes is not None and isinstance(one, Noted):
            notes.append(one.text)

    return orchestrator.finetune(
        method="head", backbone=str(backbone), data=str(data), storage=machine, report=event,
        training={"epochs": 1, "precision": precision},
        **{"feature_store": PLACE, **fields},
    )  # fmt: skip


def there(store: Any) -> list[str]:
    """The files of the feature store, but the mark of when a set was used last."""
    return sorted(
        info.path
        for info in store.get_file_info(pyarrow.fs.FileSelector("features", recursive=True))
        if info.type == pyarrow.fs.FileType.File and info.base_name != USED
    )


def same_weights(one: orchestrator.Run, other: orchestrator.Run) -> bool:
    ours, theirs = weights_of(one), weights_of(other)
    return all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


@pytest.mark.usefixtures("one_shard")
@pytest.mark.parametrize(("precision", "format"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_another_machine_computes_nothing_again(
    precision: str, format: str, tiny_resnet: Path, digits: Path, bucket: Any
) -> None:
    one = train(tiny_resnet, digits, "one", precision=precision)
    assert (one.lineage["num_computed"], one.lineage["format"]) == (600, format)
    names = there(bucket)
    shard = [Path(name) for name in names if Path(name).parent.name == format]
    notes_of_group = [Path(name).name for name in names if Path(name).parent.name != format]
    assert [file.suffix for file in shard] == [".json", ".safetensors"]
    # Only what was tried is noted: fp32 was asked for.
    assert notes_of_group == {"fp32": ["key.json"], "bf16": ["format.json", "key.json"]}[precision]
    notes: list[str] = []
    two = train(tiny_resnet, digits, "two", notes, precision=precision)
    assert two.lineage["num_computed"] == 0
    assert "features of 600 of 600 samples are stored already" in notes
    assert same_weights(one, two)
    assert there(bucket) == names
    keys = {file.read_text() for file in Path().glob("*/.features/*/key.json")}
    assert len(keys) == 1


def test_what_was_computed_before_there_was_a_store_is_brought_there(
    tiny_resnet: Path, digits: Path, bucket: Any
) -> None:  # fmt: skip
    train(tiny_resnet, digits, "one", feature_store=None)
    assert not bucket.get_file_info("features").type
    again = train(tiny_resnet, digits, "one", name="again")
    assert again.lineage["num_computed"] == 0
    assert train(tiny_resnet, digits, "two").lineage["num_computed"] == 0


@pytest.mark.usefixtures("one_shard")
def test_what_rots_here_is_brought_again(tiny_resnet: Path, digits: Path, bucket: Any) -> None:
    one = train(tiny_resnet, digits, "one")
    names = there(bucket)
    (shard,) = Path("one").glob(".features/*/float32/*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-10] ^= 1
    shard.write_bytes(bytes(content))
    notes: list[str] = []
    again = train(tiny_resnet, digits, "one", notes, name="again")
    assert "stored features were damaged, and are replaced (1 of 1 shards)" in notes
    assert again.lineage["num_computed"] == 0
    assert same_weights(one, again)
    assert there(bucket) == names


def test_the_store_of_a_run_that_goes_on_may_be_another_one(
    tiny_resnet: Path, digits: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.training import loop

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", lambda _: (_ for _ in ()).throw(InterruptedRunError("stopped")))
        with pytest.raises(InterruptedRunError):
            train(tiny_resnet, digits, "one", name="same", feature_store=None)
    run = train(tiny_resnet, digits, "one", name="same")
    assert run.lineage["num_computed"] == 0
    assert any(name.endswith(".safetensors") for name in there(bucket))


@pytest.mark.usefixtures("one_shard")
def test_a_damaged_shard_of_the_store_is_made_again(tiny_resnet: Path, digits: Path, bucket: Any) -> None:
    one = train(tiny_resnet, digits, "one")
    (shard,) = [name for name in there(bucket) if name.endswith(".safetensors")]
    with bucket.open_input_file(shard) as file:
        content = bytearray(file.read())
    content[-10] ^= 1
    with bucket.open_output_stream(shard) as out:
        out.write(bytes(content))
    notes: list[str] = []
    two = train(tiny_resnet, digits, "two", notes)
    place = f"{PLACE}/{Path(shard).parent.relative_to('features')}"
    assert f"a shard of features in {place} was damaged: it is made again" in notes
    assert two.lineage["num_computed"] == 600
    assert same_weights(one, two)
    assert shard not in there(bucket)
    assert train(tiny_resnet, digits, "three").lineage["num_computed"] == 0


@pytest.mark.usefixtures("bucket")
def test_a_store_that_falls_silent_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    place = cached(PLACE).join("cache_group/float32")
    features = MirroredSet(tmp_path / "one", place, notes.append)
    values = np.array([[1.0, 2.0]], np.float32)
    tried: list[Path] = []

    def fails(file: Path, _place: object) -> None:
        tried.append(file)
        raise OSError("timed out")

    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.job.locations.Location.upload", fails)
        for number in (1, 2, 3):
            features.add(ids_of(number), values, "float32")
            features.flush_uploads(whole=False)
    assert len(tried) == 1  # it is left alone for a while
    assert notes == [
        f"{PLACE}/cache_group/float32 does not answer: features stay here, and are brought there later (timed out)"
    ]
    features.refresh()
    assert (features.find(ids_of(1, 2, 3))[0] >= 0).all()
    again = MirroredSet(tmp_path / "one", place, notes.append)
    again.fetch_missing(ids_of(1))
    again.flush_uploads(whole=True)
    other = MirroredSet(tmp_path / "two", place, notes.append)
    other.fetch_missing(ids_of(1, 2, 3))
    shard, at = other.find(ids_of(1, 2, 3))
    assert (shard >= 0).all()
    assert other.damaged(shard.tolist()) == []
    assert other.values(int(shard[0]))[at[0]].tolist() == [1.0, 2.0]
    assert len(notes) == 1
    # What was brought here is a set of its own, without the store.
    alone = FeatureSet(tmp_path / "two")
    alone.refresh()
    assert alone.num_samples == 3


def test_a_store_that_is_needed_is_waited_for(proxy: s3_proxy.Proxy, tmp_path: Path) -> None:
    notes: list[str] = []
    place = cached(PLACE).join("cache_group/float32")
    one, two = (MirroredSet(tmp_path / name, place, notes.append) for name in ("one", "two"))
    proxy.away_until = time.monotonic() + 16  # the client itself tries for 6 s
    name = one.add(ids_of(1), np.array([[1.0, 2.0]], np.float32), "float32")
    one.flush_uploads(whole=False)
    assert one.send([name]) == []
    assert time.monotonic() > proxy.away_until
    assert len(notes) == 1
    two.fetch_missing(ids_of(1), needed=True)
    assert two.names == [name]


def test_a_store_that_is_needed_and_stays_away_is_said(
    proxy: s3_proxy.Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "PATIENCE_S", 0.5)
    features = MirroredSet(tmp_path / "one", cached(PLACE).join("cache_group/float32"), lambda _: None)
    proxy.away_until = time.monotonic() + 600
    with pytest.raises(OrchestratorError, match=f"the storage failed: {PLACE}/.* does not answer") as failed:
        features.fetch_missing(ids_of(1), needed=True)
    assert "the same command goes on" in failed.value.mend
    proxy.away_until = 0
    proxy.always = "403"
    with pytest.raises(OrchestratorError, match=f"the storage failed: {PLACE}/.* refuses us"):
        features.send(["a" * 32])


def test_what_is_damaged_on_its_way_to_who_needs_it_is_sent_again(tmp_path: Path, bucket: Any) -> None:
    name = written(tmp_path / "one", 1)
    put(bucket, f"features/cache_group/float32/{name}.safetensors", b"something else")
    notes: list[str] = []
    place = cached(PLACE).join("cache_group/float32")
    one, two = (MirroredSet(tmp_path / folder, place, notes.append) for folder in ("one", "two"))
    one.refresh()
    assert one.send([name]) == []
    two.fetch_missing(ids_of(1), needed=True)
    assert (two.names, len(notes)) == ([], 1)
    assert one.send([name]) == []
    two.fetch_missing(ids_of(1), needed=True)
    assert two.names == [name]


def test_what_is_damaged_here_is_not_sent_but_removed(tmp_path: Path, bucket: Any) -> None:
    name = FeatureSet(tmp_path / "one").add(ids_of(1), np.array([[1.0, 2.0]], np.float32), "float32")
    (file,) = (tmp_path / "one").glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    notes: list[str] = []
    features = MirroredSet(tmp_path / "one", cached(PLACE).join("cache_group/float32"), notes.append)
    features.refresh()
    assert features.send(features.names) == [name]
    assert notes == ["stored features were damaged, and are replaced (1 of 1 shards)"]
    assert not bucket.get_file_info("features").type
    assert not file.exists()


def put(bucket: Any, name: str, content: bytes) -> None:
    with bucket.open_output_stream(name) as out:
        out.write(content)


def written(folder: Path, *numbers: int) -> str:
    """The name of a shard that is in the store."""
    features = MirroredSet(folder, cached(PLACE).join("cache_group/float32"), pytest.fail)
    name = features.add(ids_of(*numbers), np.array([[n, n] for n in numbers], np.float32), "float32")
    features.flush_uploads(whole=True)
    return name


def brought(folder: Path, *numbers: int, unknown: bool = False) -> list[str]:
    """The shards that come here for these contents."""
    features = MirroredSet(folder, cached(PLACE).join("cache_group/float32"), pytest.fail)
    features.fetch_missing(ids_of(*numbers) * (0 if unknown else 1))
    return features.names


def test_only_what_is_asked_for_is_brought(tmp_path: Path, bucket: Any) -> None:
    one, two = written(tmp_path / "one", 1, 2), written(tmp_path / "one", 3)
    assert len(there(bucket)) == 4
    assert brought(tmp_path / "two", 2) == [one]
    assert brought(tmp_path / "two", 4) == [one]
    assert brought(tmp_path / "three", 3) == [two]
    assert set(brought(tmp_path / "four", 9, unknown=True)) == {one, two}  # what they are is found when they are read


def test_for_a_few_that_nobody_knows_not_all_is_brought(tmp_path: Path, bucket: Any) -> None:
    one, _ = written(tmp_path / "one", *range(15)), written(tmp_path / "one", 99)
    assert len(there(bucket)) == 4
    features = MirroredSet(tmp_path / "two", cached(PLACE).join("cache_group/float32"), pytest.fail)
    ids = ids_of(*range(16))
    ids[15] = 0  # a sample that cannot be read
    features.fetch_missing(ids)
    assert features.names == [one]


def test_a_manifest_that_is_not_whole_is_passed_over(tmp_path: Path, bucket: Any) -> None:
    file = f"features/cache_group/float32/{written(tmp_path / 'one', 1)}.json"
    with bucket.open_input_file(file) as stored:
        text = stored.read()
    for broken in (text[:50], b"", b"[]", text.replace(b'"float32"', b'"float8"')):
        put(bucket, file, broken)
        assert brought(tmp_path / "two", 1) == []
    assert bucket.get_file_info(file).type  # another version may know it
    put(bucket, file, text)
    assert len(brought(tmp_path / "two", 1)) == 1


def test_a_manifest_whose_shard_is_gone_goes_too(tmp_path: Path, bucket: Any) -> None:
    name = written(tmp_path / "one", 1)
    bucket.delete_file(f"features/cache_group/float32/{name}.safetensors")
    assert brought(tmp_path / "two", 1) == []
    assert there(bucket) == []


@pytest.mark.usefixtures("bucket")
def test_a_store_that_is_not_there_is_refused(
    tiny_resnet: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    with pytest.raises(RefusedError, match="there is no bucket 'buckett'"):
        train(tiny_resnet, digits, "one", feature_store="s3://buckett/features")
    with pytest.raises(JobError, match="for a directory there is storage"):
        train(tiny_resnet, digits, "one", feature_store="features")
    with pytest.raises(JobError, match="is no place in a store"):
        train(tiny_resnet, digits, "one", feature_store="s3://")
    with pytest.raises(RefusedError, match="feature_store: gs4://bucket/features is no place") as refused:
        train(tiny_resnet, digits, "one", feature_store="gs4://bucket/features")
    assert refused.value.reason == "usage"
    assert "--feature-store" in refused.value.mend
    assert not Path("one").exists()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    cached.cache_clear()
    with pytest.raises(RefusedError, match="does not answer"):
        train(tiny_resnet, digits, "one")


@pytest.mark.usefixtures("bucket")
def test_the_place_is_no_part_of_what_is_learnt(tiny_resnet: Path, digits: Path) -> None:
    run = train(tiny_resnet, digits, "one", feature_store=None, name="same")
    assert train(tiny_resnet, digits, "one", name="same").path == run.path
    shutil.rmtree("one/.features")
    assert os.path.isdir("one/same")


# --- what a person asks about it ---


@pytest.fixture
def two_sets(tiny_resnet: Path, digits: Path, bucket: Any) -> list[str]:  # noqa: ARG001  # where they lie
    """Names of the sets of two backbones' features, the one used last first."""
    train(tiny_resnet, digits, "one")
    time.sleep(1.1)  # the store tells times in seconds
    train(tiny_resnet, digits, "one", settings={"size": 48})
    return [one.name for one in inventory.listings(inventory.of_store(PLACE))]


def test_what_lies_in_a_store_is_listed_as_on_the_storage(two_sets: list[str]) -> None:
    here = {one.name: one for one in inventory.listings(inventory.of_storage("one"))}
    there = {one.name: one for one in inventory.listings(inventory.of_store(PLACE))}
    assert set(two_sets) == set(here) == set(there)
    for name, one in there.items():
        assert (one.key, one.num_samples, one.num_shards) == (here[name].key, 600, here[name].num_shards)
        assert abs(one.used - here[name].used) < 60
    assert inventory.find_listing(inventory.of_store(PLACE), two_sets[0]).name == two_sets[0]


def test_a_store_is_pruned_the_set_used_last_stays(
    two_sets: list[str], tiny_resnet: Path, digits: Path, bucket: Any
) -> None:
    time.sleep(1.1)
    again = train(tiny_resnet, digits, "two")  # of the older one: read, and so used last
    assert again.lineage["num_computed"] == 0
    store = inventory.of_store(PLACE)
    names = there(bucket)
    most = max(one.num_bytes for one in inventory.listings(store))
    assert [one.name for one in inventory.prune(store, most, dry_run=True)] == [two_sets[0]]
    assert there(bucket) == names
    assert [one.name for one in inventory.prune(store, most)] == [two_sets[0]]
    assert [one.name for one in inventory.listings(store)] == [two_sets[1]]
    assert not [name for name in there(bucket) if two_sets[0].split("/")[0] in name]  # its key too
    assert len(inventory.prune(store, 0)) == 1
    assert there(bucket) == []
    # What was pruned there is brought there again, from where it still is.
    assert train(tiny_resnet, digits, "one", name="again").lineage["num_computed"] == 0
    assert any(name.endswith(".safetensors") for name in there(bucket))


@pytest.mark.usefixtures("bucket")
def test_a_place_without_features_is_said() -> None:
    with pytest.raises(JobError, match="no features at s3://bucket/none"):
        inventory.of_store("s3://bucket/none")
    with pytest.raises(JobError, match="no place in a store"):
        inventory.of_store("bucket/none")


def test_the_commands_look_there_too(two_sets: list[str], cli: Callable[..., Any]) -> None:
    listed = cli("features", "list", "--feature-store", PLACE)
    assert max(map(len, listed.stdout.splitlines())) <= 80
    assert 0 < listed.stdout.index(two_sets[0][:30]) < listed.stdout.index(two_sets[1][:30])
    assert "size 48 x 48" in cli("features", "show", two_sets[0], "--feature-store", PLACE).stdout
    told = cli("features", "prune", "--max-size", "0", "--dry-run", "--feature-store", PLACE)
    assert "2 would be removed" in told.stdout
    assert len(json.loads(cli("features", "list", "--feature-store", PLACE, "--json").stdout)) == 2
    assert "2 removed" in cli("features", "prune", "--max-size", "0", "--feature-store", PLACE).stdout
    assert cli("features", "list", "--feature-store", "s3://bucket/none").returncode == 2
    assert cli("features", "list", "--feature-store", "bucket").returncode == 2
    assert "(--feature-store)" in cli("features", "list", "--feature-store", "xyz://a/b").stderr
