"""Features in an object store (moto's server on 127.0.0.1), for the jobs of several machines."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import pytest
import torch

import orchestrator
from orchestrator.errors import JobError, RefusedError
from orchestrator.locations import cached
from orchestrator.mirror import MirroredSet
from orchestrator.store import FeatureSet
from tests.test_store import ids_of
from tests.test_train import weights_of

PLACE = "s3://bucket/features"


def train(backbone: Path, data: Path, machine: str, notes: list[str] | None = None, **fields: Any) -> orchestrator.Run:
    """On a machine of its own: with another storage."""

    def event(one: dict[str, Any]) -> None:
        if notes is not None and one["kind"] == "note":
            notes.append(one["text"])

    return orchestrator.finetune(
        backbone=str(backbone), data=str(data), storage=machine, training={"epochs": 1}, events=event,
        **{"feature_store": PLACE, **fields},
    )  # fmt: skip


def there(store: Any) -> list[str]:
    """The files of the feature store."""
    return sorted(
        info.path
        for info in store.get_file_info(pyarrow.fs.FileSelector("features", recursive=True))
        if info.type == pyarrow.fs.FileType.File
    )


def same_weights(one: orchestrator.Run, other: orchestrator.Run) -> bool:
    ours, theirs = weights_of(one), weights_of(other)
    return all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


def test_another_machine_computes_nothing_again(tiny_resnet: Path, digits: Path, bucket: Any) -> None:
    one = train(tiny_resnet, digits, "one")
    assert one.lineage["num_computed"] == 600
    names = there(bucket)
    assert [Path(name).suffix for name in names if "key.json" not in name] == [".json", ".safetensors"]
    two = train(tiny_resnet, digits, "two")
    assert two.lineage["num_computed"] == 0
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
    assert any("1 stored shards of features were damaged" in note for note in notes), notes
    assert two.lineage["num_computed"] == 600
    assert same_weights(one, two)
    assert shard not in there(bucket)
    assert train(tiny_resnet, digits, "three").lineage["num_computed"] == 0


@pytest.mark.usefixtures("bucket")
def test_a_store_that_falls_silent_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    features = MirroredSet(tmp_path / "one", cached(PLACE).join("family/float32"), notes.append)
    features.refresh()
    values = np.array([[1.0, 2.0]], np.float32)
    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.mirror.upload", lambda *_: (_ for _ in ()).throw(OSError("timed out")))
        features.add(ids_of(1), values, "float32")
        features.add(ids_of(2), values, "float32")
    assert notes == [f"{PLACE}/family/float32 does not answer, the features stay on the storage: timed out"]
    features.refresh()
    assert (features.find(ids_of(1, 2))[0] >= 0).all()
    features.settle()
    other = MirroredSet(tmp_path / "two", cached(PLACE).join("family/float32"), notes.append)
    other.refresh()
    shard, at = other.find(ids_of(1, 2))
    assert (shard >= 0).all()
    assert other.damaged(shard.tolist()) == []
    assert other.values(int(shard[0]))[at[0]].tolist() == [1.0, 2.0]
    # What was brought here is a set of its own, without the store.
    alone = FeatureSet(tmp_path / "two")
    alone.refresh()
    assert alone.num_samples == 2


def test_a_manifest_that_is_not_whole_is_passed_over(tmp_path: Path, bucket: Any) -> None:
    place = cached(PLACE).join("family/float32")
    writer = MirroredSet(tmp_path / "one", place, pytest.fail)
    name = writer.add(ids_of(1), np.ones((1, 2), np.float32), "float32")
    file = f"features/family/float32/{name}.json"
    with bucket.open_input_file(file) as stored:
        text = stored.read()
    for broken in (text[:50], b"", b"[]", text.replace(b'"float32"', b'"float8"')):
        with bucket.open_output_stream(file) as out:
            out.write(broken)
        reader = MirroredSet(tmp_path / "two", place, pytest.fail)
        reader.refresh()
        assert reader.names == []
    assert bucket.get_file_info(file).type  # another version may know it


@pytest.mark.usefixtures("bucket")
def test_a_store_that_is_not_there_is_refused(
    tiny_resnet: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    with pytest.raises(RefusedError, match="there is no 'buckett'"):
        train(tiny_resnet, digits, "one", feature_store="s3://buckett/features")
    with pytest.raises(JobError, match="a directory is what storage is for"):
        train(tiny_resnet, digits, "one", feature_store="features")
    assert not Path("one").exists()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    cached.cache_clear()
    with pytest.raises(RefusedError, match="cannot be asked for"):
        train(tiny_resnet, digits, "one")


@pytest.mark.usefixtures("bucket")
def test_the_place_is_no_part_of_what_is_learnt(tiny_resnet: Path, digits: Path) -> None:
    run = train(tiny_resnet, digits, "one", feature_store=None, name="same")
    assert train(tiny_resnet, digits, "one", name="same").path == run.path
    shutil.rmtree("one/.features")
    assert os.path.isdir("one/same")
