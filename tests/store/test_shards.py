"""The feature store: shards that are whole or not there, whoever writes, dies or damages them."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest
from safetensors.numpy import load_file

from orchestrator.data.contents import Catalog, Ids, content_id
from orchestrator.store import inventory, sets, shards as store
from orchestrator.store.shards import FeatureSet


def ids_of(*numbers: int) -> Ids:
    return np.array([content_id(str(number).encode()) for number in numbers], np.uint64)


def filled(folder: Path, *numbers: int) -> str:
    return FeatureSet(folder).add(ids_of(*numbers), np.array([[n, n + 0.5] for n in numbers], np.float32), "float32")


def read(folder: Path, *numbers: int) -> list[float | None]:
    features = FeatureSet(folder)
    features.refresh()
    shard, at = features.find(ids_of(*numbers))
    return [float(features.values(int(s))[a][0]) if s >= 0 else None for s, a in zip(shard, at, strict=True)]


def test_what_was_added_is_found_by_content(tmp_path: Path) -> None:
    name = filled(tmp_path, 3, 1, 2)
    filled(tmp_path, 5, 4)
    assert read(tmp_path, 1, 2, 3, 4, 5, 6) == [1, 2, 3, 4, 5, None]
    whole = load_file(tmp_path / f"{name}.safetensors")  # a file that anybody can read
    assert whole["features"].tolist() == [[3, 3.5], [1, 1.5], [2, 2.5]]
    assert not list(tmp_path.glob("*.partial"))


def test_nothing_is_found_where_there_is_nothing(tmp_path: Path) -> None:
    assert read(tmp_path / "nowhere", 1) == [None]
    features = FeatureSet(tmp_path)
    features.refresh()
    assert features.find(np.zeros((0, 2), np.uint64))[0].shape == (0,)
    filled(tmp_path, 1)
    features.refresh()
    assert features.find(np.zeros((1, 2), np.uint64))[0].tolist() == [-1]  # not known is nobody's content


def test_half_a_lower_id_is_not_enough(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    features = FeatureSet(tmp_path)
    features.refresh()
    ids = ids_of(1)
    ids[0, 1] ^= np.uint64(1)
    assert features.find(ids)[0].tolist() == [-1]


def test_bits_of_bfloat16(tmp_path: Path) -> None:
    import torch

    from orchestrator.features.sources import as_float32

    values = torch.randn(4, 3).bfloat16()
    features = FeatureSet(tmp_path)
    features.add(ids_of(1, 2, 3, 4), values.view(torch.uint16).numpy(), "bfloat16")
    features.refresh()
    assert torch.equal(as_float32(features.values(0)[:].copy()), values.float())


@pytest.mark.parametrize("byte", [9, 200, -1])
def test_a_flipped_bit_is_found_and_the_shard_removed(tmp_path: Path, byte: int) -> None:
    name = filled(tmp_path, *range(40))
    filled(tmp_path, 100)
    file = tmp_path / f"{name}.safetensors"
    content = bytearray(file.read_bytes())
    content[byte] ^= 4
    file.write_bytes(content)
    features = FeatureSet(tmp_path)
    features.refresh()
    assert features.damaged(range(2)) == [name]
    assert sorted(one.suffix for one in tmp_path.iterdir()) == [".json", ".safetensors"]
    assert features.find(ids_of(0, 100))[0].tolist() == [-1, 0]
    assert features.damaged(range(1)) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda _: "",
        lambda found: json.dumps(found)[:-20],
        lambda found: json.dumps([found]),
        lambda found: json.dumps({**found, "shape": [39, 2]}),
        lambda found: json.dumps({**found, "ids": "A" * 16 + found["ids"][16:]}),
        lambda found: json.dumps({**found, "ids": 5}),
        lambda found: json.dumps({**found, "offset": -8}),
    ],
)
def test_a_broken_manifest_is_no_manifest(tmp_path: Path, change: object) -> None:
    name = filled(tmp_path, *range(40))
    file = tmp_path / f"{name}.json"
    file.write_text(change(json.loads(file.read_text())))  # type: ignore[operator]
    features = FeatureSet(tmp_path)
    features.refresh()
    assert features.names == []
    assert file.exists()  # to look is not to remove
    assert features.damaged([]) == [name]
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read_or_understood_is_left_alone(tmp_path: Path) -> None:
    """Storage that does not answer is no damage, and a later version may know other formats."""
    name = filled(tmp_path, 1)
    manifest = tmp_path / f"{name}.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": "int4"}))
    (tmp_path / "unreadable.json").mkdir()  # reading it is an OSError
    features = FeatureSet(tmp_path)
    features.refresh()
    assert (features.names, features.damaged([])) == ([], [])
    assert len(list(tmp_path.iterdir())) == 3


def test_a_cut_shard_is_none(tmp_path: Path) -> None:
    name = filled(tmp_path, 1, 2)
    file = tmp_path / f"{name}.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert read(tmp_path, 1) == [None]


def test_what_dead_jobs_left_is_swept_away(tmp_path: Path) -> None:
    name = filled(tmp_path, 1)
    old, new, orphan = tmp_path / "a.partial", tmp_path / "b.partial", tmp_path / "c.safetensors"
    for file in (old, new, orphan):
        file.write_bytes(b"x")
    long_ago = time.time() - 2 * store._DEAD_S
    for file in (old, orphan, tmp_path / f"{name}.safetensors", tmp_path / f"{name}.json"):
        os.utime(file, (long_ago, long_ago))
    features = FeatureSet(tmp_path)
    features.sweep()
    assert {file.name for file in tmp_path.iterdir()} == {"b.partial", f"{name}.json", f"{name}.safetensors"}


def test_only_one_fills_alone(tmp_path: Path) -> None:
    with sets.filling(tmp_path) as first, sets.filling(tmp_path) as second:
        assert (first, second) == (True, False)
    with sets.filling(tmp_path) as third:
        assert third


def test_the_sets_used_last_are_kept(tmp_path: Path) -> None:
    for number, name in enumerate(("old", "new", "newer")):
        folder = sets.cache_group_folder(tmp_path, name, {"backbone": name}) / "float32"
        filled(folder, *range(100))
        sets.touch(folder)
        os.utime(folder / ".used", (number, number))
    found = inventory.listings(tmp_path)
    assert [one.key["backbone"] for one in found] == ["newer", "new", "old"]
    assert [one.num_samples for one in found] == [100] * 3
    most = sum(one.num_bytes for one in found) - 1
    with sets.in_use(tmp_path / found[2].name):  # a job is at work on it
        assert [one.key["backbone"] for one in inventory.prune(tmp_path, most)] == ["new"]
    filled(sets.cache_group_folder(tmp_path, "new", {"backbone": "new"}) / "float32", *range(100))
    sets.touch(tmp_path / found[1].name)
    found = inventory.listings(tmp_path)
    removed = inventory.prune(tmp_path, sum(one.num_bytes for one in found) - 1)
    assert [one.key["backbone"] for one in removed] == ["old"]
    assert {one.key["backbone"] for one in inventory.listings(tmp_path)} == {"newer", "new"}
    assert len(inventory.prune(tmp_path, 0)) == 2
    assert not list(tmp_path.iterdir())


def test_a_set_that_is_pruned_at_the_moment_it_is_taken_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lock, asked = tmp_path / "set", sets._lock, []

    def pruned_first(file: TextIO, how: int) -> bool:
        if not asked:
            shutil.rmtree(folder)
        asked.append(how)
        return lock(file, how)

    monkeypatch.setattr(sets, "_lock", pruned_first)
    with sets.in_use(folder):
        assert len(asked) == 2
        with sets.pruning(folder) as free:
            assert not free
    with sets.pruning(folder) as free:
        assert free


def test_a_set_is_held_by_many_and_pruned_by_none_of_them(tmp_path: Path) -> None:
    key = {"backbone": "one"}
    folder = sets.cache_group_folder(tmp_path, "one", key) / "float32"
    with sets.opened(FeatureSet(folder), key) as first:
        name = first.add(np.ones((1, 2), np.uint64), np.ones((1, 3), np.float32), "float32")
        with sets.opened(FeatureSet(folder), key) as second:
            second.refresh()
            assert inventory.prune(tmp_path, 0) == []
        assert inventory.prune(tmp_path, 0) == []  # the first one still reads
        assert second.names == [name]
    assert len(inventory.prune(tmp_path, 0)) == 1
    with sets.opened(
        FeatureSet(folder), key
    ):  # what was pruned before it was opened is made again, and known by its key
        (found,) = inventory.listings(tmp_path)
        assert found.key["backbone"] == "one"


def test_of_one_content_in_two_shards_the_older_counts(tmp_path: Path) -> None:
    ids = np.ones((1, 2), np.uint64)
    values = [np.full((1, 3), number, np.float32) for number in range(8)]
    for one in values:
        FeatureSet(tmp_path).add(ids, one, "float32")
        features = FeatureSet(tmp_path)
        features.refresh()
        shard, at = features.find(ids)
        assert features.values(int(shard[0]))[at[0], 0] == 0


def test_another_key_is_another_folder(tmp_path: Path) -> None:
    one = sets.cache_group_folder(tmp_path, "b", {"commit": "1", "input": {"size": [8, 8]}})
    assert sets.cache_group_folder(tmp_path, "b", {"input": {"size": [8, 8]}, "commit": "1"}) == one
    assert sets.cache_group_folder(tmp_path, "b", {"commit": "1", "input": {"size": [8, 16]}}) != one


# --- what is remembered of files ---


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def test_files_are_remembered_as_long_as_they_do_not_change(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    assert not catalog.find(numbers(1, 2), numbers(1, 1)).any()
    catalog.add(numbers(1, 2, 3), numbers(10, 20, 0), ids_of(1, 2, 3))
    found = catalog.find(numbers(2, 1, 3, 1), numbers(20, 10, 0, 11))
    assert found.tolist() == [*ids_of(2, 1).tolist(), [0, 0], [0, 0]]  # 3 had no mark, and 1 another one
    catalog.add(numbers(1), numbers(11), ids_of(7))
    assert catalog.find(numbers(1), numbers(11)).tolist() == ids_of(7).tolist()


def test_many_files_become_one(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    for number in range(40):
        catalog.add(numbers(number + 1, 1000), numbers(5, number + 1), ids_of(number, 1000 + number))
    assert len(list(tmp_path.iterdir())) < 20
    assert catalog.find(numbers(*range(1, 41)), numbers(*[5] * 40)).tolist() == ids_of(*range(40)).tolist()
    assert catalog.find(numbers(1000), numbers(40)).tolist() == ids_of(1039).tolist()  # as it was last


def test_a_damaged_memory_is_none(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    catalog.add(numbers(1), numbers(1), ids_of(1))
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert not catalog.find(numbers(1), numbers(1)).any()
    file.write_bytes(b"")
    assert not catalog.find(numbers(1), numbers(1)).any()


def test_a_pair_is_not_its_parts_together() -> None:
    assert len({content_id(b"ab"), content_id(b"a", b"b"), content_id(b"ab", b""), content_id(b"", b"ab")}) == 4
