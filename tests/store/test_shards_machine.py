"""A feature set against a dict, while shards are added, cut, flipped, pruned and swept in any order by three jobs.

Two jobs keep their `FeatureSet` all the time, on one folder; a third one comes now and then, and reads. The dict says
what lies in the folder, and what each of the two has seen of it.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orchestrator.data import Ids
from orchestrator.data.contents import content_id
from orchestrator.errors import TrainingError
from orchestrator.store import FeatureSet, cache_group_folder, inventory, opened

KEY = {"backbone": "one"}
JOBS = st.sampled_from([0, 1])
CONTENTS = st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True)


def ids_of(contents: list[int]) -> Ids:
    return np.array([content_id(str(number).encode()) for number in contents], np.uint64).reshape(-1, 2)


@dataclass
class Stored:
    """A shard, as it was written, and what has become of it."""

    name: str
    number: int
    """In the order in which they were written. The features of content n are [number, n]."""
    contents: list[int]
    file: bool = True
    right_size: bool = True
    right_bytes: bool = True
    manifest: bool = True
    right_manifest: bool = True

    @property
    def whole(self) -> bool:
        return self.file and self.right_size and self.right_bytes


@dataclass
class Seen:
    """What a job has seen of the folder."""

    features: FeatureSet
    shards: set[str] = field(default_factory=set)
    verified: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    preferred: set[str] = field(default_factory=set)


class FeatureStore(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory()
        self.root = Path(self.temporary.name)
        self.folder = cache_group_folder(self.root, "group", KEY) / "float32"
        self.jobs = [Seen(FeatureSet(self.folder)) for _ in range(2)]
        self.stored: dict[str, Stored] = {}

    def teardown(self) -> None:
        self.temporary.cleanup()

    def some(self, data: st.DataObject) -> Stored:
        # In the order written: names are random, and another run of the same draws has to choose the same.
        return self.stored[data.draw(st.sampled_from(list(self.stored)))]

    # --- what jobs do ---

    @rule(job=JOBS, contents=CONTENTS)
    def add(self, job: int, contents: list[int]) -> None:
        number = len(self.stored)
        values = np.array([[number, content] for content in contents], np.float32)
        seen = self.jobs[job]
        name = seen.features.add(ids_of(contents), values, "float32")
        assert name not in self.stored
        self.stored[name] = Stored(name, number, contents)
        seen.verified.add(name)

    @precondition(lambda self: self.stored)
    @rule(data=st.data(), job=JOBS)
    def add_the_same_again(self, data: st.DataObject, job: int) -> None:
        self.add(job, self.some(data).contents)

    @rule(job=JOBS)
    def refresh(self, job: int) -> None:
        seen = self.jobs[job]
        seen.features.refresh()
        for shard in self.stored.values():
            if shard.name in seen.shards | seen.broken or not shard.manifest or not shard.file:
                continue
            (seen.shards if shard.right_manifest and shard.right_size else seen.broken).add(shard.name)

    @rule(job=JOBS)
    def look_for_damage(self, job: int) -> None:
        seen = self.jobs[job]
        expected = {name for name in seen.shards - seen.verified if not self.stored[name].whole} | seen.broken
        assert set(seen.features.damaged(range(len(seen.features.names)))) == expected
        self.gone(expected)
        seen.shards -= expected
        seen.broken = set()
        seen.verified |= seen.shards

    @precondition(lambda self: self.stored)
    @rule(data=st.data(), job=JOBS)
    def forget(self, data: st.DataObject, job: int) -> None:
        name = self.some(data).name
        self.jobs[job].features.forget([name])
        self.jobs[job].shards.discard(name)

    @precondition(lambda self: self.stored)
    @rule(data=st.data(), job=JOBS)
    def prefer(self, data: st.DataObject, job: int) -> None:
        seen = self.jobs[job]
        seen.preferred = {self.some(data).name}
        seen.features.prefer(seen.preferred)

    @rule()
    def a_new_job_reads(self) -> None:
        """It finds what lies there whole, the oldest of each content, and removes what does not."""
        features = FeatureSet(self.folder)
        features.refresh()
        broken = set(features.damaged(range(len(features.names))))
        listed = {shard.name for shard in self.stored.values() if shard.manifest and shard.file}
        assert broken == {name for name in listed if not (self.stored[name].right_manifest and self.stored[name].whole)}
        self.gone(broken)
        readable = sorted((self.stored[name] for name in listed - broken), key=lambda shard: shard.number)
        assert features.names == [shard.name for shard in readable]
        oldest = {n: shard for shard in reversed(readable) for n in shard.contents}
        found, row = features.find(ids_of(list(range(10))))
        values = [
            tuple(features.values(int(number))[at].tolist()) if number >= 0 else None
            for number, at in zip(found, row, strict=True)
        ]
        assert values == [(oldest[n].number, n) if n in oldest else None for n in range(10)]
        assert features.num_samples == len(oldest)
        opened_alone = FeatureSet(self.folder).open(features.names)
        assert [array[:, 0].tolist() for array in opened_alone] == [[s.number] * len(s.contents) for s in readable]

    @precondition(lambda self: self.stored)
    @rule(data=st.data())
    def open_one(self, data: st.DataObject) -> None:
        shard = self.some(data)
        if shard.whole and shard.manifest and shard.right_manifest:
            (values,) = FeatureSet(self.folder).open([shard.name])
            assert values[:, 1].tolist() == shard.contents
        else:
            with pytest.raises(TrainingError, match="gone or damaged"):
                FeatureSet(self.folder).open([shard.name])

    # --- what happens to a folder ---

    @precondition(lambda self: any(shard.file for shard in self.stored.values()))
    @rule(data=st.data(), cut=st.booleans(), at=st.integers(0, 10**6))
    def damage(self, data: st.DataObject, cut: bool, at: int) -> None:
        """Cut a shard, or flip one of its bits."""
        shard = self.stored[data.draw(st.sampled_from([n for n, one in self.stored.items() if one.file]))]
        file = self.folder / f"{shard.name}.safetensors"
        content = bytearray(file.read_bytes())
        if cut:
            content = content[: at % len(content)] if content else content
            shard.right_size = False
        elif content and shard.right_bytes:
            content[at % len(content)] ^= 1
            shard.right_bytes = False
        beside = file.with_suffix(".other")  # not in place: whoever has it mapped would read past its end
        beside.write_bytes(content)
        os.replace(beside, file)

    @precondition(lambda self: any(shard.manifest for shard in self.stored.values()))
    @rule(data=st.data(), removed=st.booleans())
    def damage_manifest(self, data: st.DataObject, removed: bool) -> None:
        shard = self.stored[data.draw(st.sampled_from([n for n, one in self.stored.items() if one.manifest]))]
        manifest = self.folder / f"{shard.name}.json"
        if removed:
            manifest.unlink()
            shard.manifest = False
        else:
            manifest.write_bytes(manifest.read_bytes()[:-9])
            shard.right_manifest = False

    @rule(hours=st.sampled_from([0, 2]))
    def sweep(self, hours: int) -> None:
        """Shards without a manifest go, once they are old enough."""
        partial = self.folder / "begun.partial"
        if self.folder.exists():
            partial.touch()
            for file in self.folder.iterdir():
                os.utime(file, (time.time() - hours * 3600,) * 2)
        FeatureSet(self.folder).sweep()
        if hours:
            assert not partial.exists()
            for shard in self.stored.values():
                shard.file &= shard.manifest
        else:
            partial.unlink(missing_ok=True)

    @precondition(lambda self: any(shard.manifest or shard.file for shard in self.stored.values()))
    @rule(in_use=st.booleans())
    def prune(self, in_use: bool) -> None:
        """Nothing that a job uses goes, and everything else."""
        if in_use:
            with opened(FeatureSet(self.folder), KEY):
                assert inventory.prune(self.root, 0) == []
            return
        with opened(FeatureSet(self.folder), KEY):  # a set that no job ever opened has no lock, and is left alone
            pass
        assert [one.name for one in inventory.prune(self.root, 0)] == [f"{self.folder.parent.name}/float32"]
        assert not self.folder.exists()
        self.gone(self.stored)

    def gone(self, names: object) -> None:
        for name in list(names):  # type: ignore[call-overload]
            assert not list(self.folder.glob(f"{name}.*"))
            self.stored[name].file = self.stored[name].manifest = False

    # --- what holds at every moment ---

    @invariant()
    def each_finds_what_it_has_seen(self) -> None:
        for seen in self.jobs:
            shards = sorted(
                (self.stored[name] for name in seen.shards),
                key=lambda shard: (shard.name not in seen.preferred, shard.number),  # used at once
            )
            assert seen.features.names == [shard.name for shard in shards]
            first = {n: shard for shard in reversed(shards) for n in shard.contents}
            found, row = seen.features.find(ids_of(list(range(10))))
            places = [
                (seen.features.names[number], at) if number >= 0 else None
                for number, at in zip(found.tolist(), row.tolist(), strict=True)
            ]
            expected = [(first[n].name, first[n].contents.index(n)) if n in first else None for n in range(10)]
            assert places == expected

    @invariant()
    def no_file_is_left_half_written(self) -> None:
        assert not list(self.folder.glob("*.partial"))


TestFeatureStore = FeatureStore.TestCase
TestFeatureStore.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
