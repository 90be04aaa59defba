"""Run a frozen body over samples, each once, and keep what it gives in the feature store.

A worker computes its share of what the store lacks and writes it down in shards, so that what was computed is never
computed again, whatever dies. While some batches are in the body, the next are read and decoded (pipeline.py).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator.compiling import WORTH_S, Compiled, can_be_compiled, compiled, seconds_of
from orchestrator.contents import Catalog, Ids, known
from orchestrator.cut import Body
from orchestrator.errors import BadSampleError, InterruptedRunError, TrainingError
from orchestrator.features import SampleSource, StoredView, part_of
from orchestrator.model import Inputs
from orchestrator.pipeline import Bodies, bodies_for, passed, with_threads
from orchestrator.samples import Samples
from orchestrator.store import FeatureSet, Format, Values
from orchestrator.worker import Worker, channels_last, on_device, seed_for

FLUSH_S = 10.0
"""A shard is written at least so often, at first: what is lost when a job is killed."""
_FLUSH_SHARE = 0.02
"""Later this share of the time that was worked, so that long work does not end in thousands of shards."""
_FLUSH_BYTES = 64 * 2**20
_MOST_ROUNDS = 5
_LEAST_BATCHES = 50
"""Of fewer it is not even looked how long they take."""
_VIEW = 3  # what a random number is for, beside those of the loop

Ints = npt.NDArray[np.int64]


@dataclass
class Extraction:
    """A body, and what it is run on."""

    body: Body
    source: SampleSource
    worker: Worker
    catalog: Catalog
    format: Format
    by_length: bool
    seed: int
    advance: Callable[[int], None]
    """Called with the number of samples that were done."""
    note: Callable[[str], None]
    should_stop: Callable[[], bool]
    verify: bool = False
    """Read every sample to find out what its content is, whatever is remembered of its file."""
    num_computed: int = 0
    """Samples that went through the body, in this worker."""
    used: dict[str, list[str]] = field(default_factory=dict)
    """Set -> the shards of it that were read."""
    compiled: Compiled | None = None
    """The body as machine code, where that pays back."""
    _new: list[tuple[Ints, Ids]] = field(default_factory=list)
    """(rows, the ids of their contents), as they were read."""
    _collating: threading.Lock = field(default_factory=threading.Lock)
    """Tokenizers of transformers are for one thread at a time, and torch's random numbers are one sequence."""

    def run(self, features: FeatureSet, rows: Ints, view: int | None = None) -> StoredView:
        """The features of these rows, as they lie in the store; `view`: of so many random changes of the samples.

        All workers call this, each with all of the rows. Raises `InterruptedRunError` when asked to stop, and
        `TrainingError` where a sample cannot be read or the storage does not keep what is written.
        """
        worker = self.worker
        ids = self._known(rows)
        written: list[str] = []
        counted = False
        if worker.rank == 0:
            features.bring(ids)
        for _ in range(_MOST_ROUNDS):
            features.refresh(written)
            # What one worker sees on a shared file system another one may not see yet: rank 0's shards are named, and
            # what any worker misses is missing.
            features.refresh(worker.gather(features.names if worker.rank == 0 else None)[0])
            missing = np.unique(np.concatenate(worker.gather(self._missing(features, rows, ids))))
            if not counted:
                self.advance(len(rows) - len(missing))
                counted = True
            if len(missing):
                names = self._fill(features, part_of(missing, worker.rank, worker.num_workers), rows, ids, view)
                written = [name for part in worker.gather(names) for name in part]
                ids = self._learn(rows, ids)
                continue
            shard, at = features.find(ids)
            used = {features.names[number] for number in np.unique(shard[shard >= 0]).tolist()}
            everybodys = sorted(set().union(*worker.gather(used)))
            broken = self._damaged(features, everybodys[worker.rank :: worker.num_workers])
            if not broken:
                self._remember(rows, ids)
                features.settle(whole=worker.rank == 0)
                there = shard >= 0
                values = [features.values(number).view(np.ndarray) if name in used else _NOTHING
                          for number, name in enumerate(features.names)]  # fmt: skip
                self.used[features.folder.name] = everybodys
                return StoredView(rows[there], shard[there], at[there], values)
            self.note(f"{len(broken)} stored shards of features were damaged: they are made again")
            if worker.rank == 0:
                features.bring(ids)
        raise TrainingError(
            f"the features in {features.folder} do not stay as they are written",
            expected="storage that keeps its bytes, and nobody who prunes it meanwhile",
            mend="look at that storage; the same command goes on",
        )

    def _damaged(self, features: FeatureSet, names: list[str]) -> list[str]:
        """Which shards any worker has found damaged, each looking at some; all forget them."""
        mine = set(names)
        numbers = [number for number, name in enumerate(features.names) if name in mine]
        broken = [name for part in self.worker.gather(features.damaged(numbers)) for name in part]
        features.forget(broken)
        return broken

    def _known(self, rows: Ints) -> Ids:
        """The ids of the rows' contents, as far as they need not be read for it."""
        if self.verify:
            return np.zeros((len(rows), 2), np.uint64)
        return known_contents(self.source.samples, self.catalog, rows)

    def _missing(self, features: FeatureSet, rows: Ints, ids: Ids) -> Ints:
        shard, _ = features.find(ids)
        left_out = np.array(sorted(self.source.skipped), np.int64)
        return rows[(shard < 0) & ~np.isin(rows, left_out)]

    def _learn(self, rows: Ints, ids: Ids) -> Ids:
        """The ids with what any worker has read meanwhile; all workers know of all that was left out."""
        ids = ids.copy()
        for new, skipped in self.worker.gather((self._new, self.source.skipped)):
            self.source.skipped.update(skipped)
            for some, found in new:
                ids[np.searchsorted(rows, some)] = found
        self._new = []
        return ids

    def _remember(self, rows: Ints, ids: Ids) -> None:
        if self.worker.rank == 0:
            places, marks = self.source.samples.files(rows)
            new = (marks != 0) & known(ids) & (self.catalog.find(places, marks) != ids).any(axis=1)
            self.catalog.add(places[new], marks[new], ids[new])

    # --- one worker's share ---

    def _fill(self, features: FeatureSet, mine: Ints, rows: Ints, ids: Ids, view: int | None) -> list[str]:
        """Compute what is missing of `mine` and write it down; the names of the shards."""
        names: list[str] = []
        stopped = False
        features.sweep()
        # One lock a job: the other workers' shares are their own.
        with features.filling() if self.worker.rank == 0 else contextlib.nullcontext(False) as lock:
            alone = self.worker.gather(lock)[0]
            if self.by_length:
                mine = self.source.samples.by_length(mine)
            # A sample is changed at random by torch's one generator: a body may draw from it as well (vit_mae does).
            bodies = bodies_for(self.body, self.worker.device, most=1 if view is not None else None)
            batches = list(self.source.samples.batches(mine, bodies.batch_size, len(bodies.copies)))
            self._compile(features, bodies, batches, view)
            if not alone:  # another job begins at the other end: so the two meet, and do not do the same
                batches.reverse()
            waiting, started = _Waiting(), time.monotonic()

            def load(some: Ints) -> _Loaded:
                return self._load(features, some, ids[np.searchsorted(rows, some)], view)

            def run(body: Body, loaded: _Loaded) -> list[tuple[Ids, Values]]:
                return self._through(body, loaded, view)

            try:
                for some, loaded, found in passed(batches, load, run, bodies):
                    self._new.append(loaded.new)
                    for computed, values in found:
                        _refuse_other_shape(features.shape or waiting.shape or values.shape[1:], values)
                        waiting.add(computed, values)
                        self.num_computed += len(computed)
                    self.advance(len(some) * self.worker.num_workers)
                    if waiting.is_due(max(FLUSH_S, _FLUSH_SHARE * (time.monotonic() - started))):
                        names.append(waiting.write(features, self.format))
                        features.refresh()  # what another job has done meanwhile need not be done here
                    if self.should_stop():
                        stopped = True
                        break
            finally:  # whatever ended it: what was computed is kept
                if waiting.ids:
                    names.append(waiting.write(features, self.format))
        if any(self.worker.gather(stopped)):
            raise InterruptedRunError("stopped while the body ran", mend="the same command goes on")
        return names

    def _load(self, features: FeatureSet, some: Ints, ids: Ids, view: int | None) -> _Loaded:
        """What the body takes of a batch: read, held against the store, decoded, collated."""
        shard, _ = features.find(ids)
        some = some[shard < 0]
        looked = list(zip(some.tolist(), self.source.pool.map(lambda row: self._look(features, row), some.tolist()),
                          strict=True))  # fmt: skip
        read: dict[int, tuple[int, int]] = {}
        found: list[tuple[tuple[int, int], object]] = []
        for row, (key, decoded) in looked:
            if isinstance(decoded, BadSampleError):
                self.source.leave_out(row, decoded)
                continue
            assert key is not None
            read[row] = key
            if decoded is not None:
                found.append((key, decoded))
        # The same content twice in a batch need not be computed twice; nor written.
        unique = list(dict(found).items())
        kept = np.array([key for key, _ in unique], np.uint64).reshape(-1, 2)
        new = (np.fromiter(read, np.int64, len(read)), np.array(list(read.values()), np.uint64).reshape(-1, 2))
        # On a CPU the bodies have all cores: another set of OpenMP threads, for the collate function, cost them 11 %.
        if self.worker.device.type == "cpu":
            return _Loaded(new, kept, unique, None)
        collated = self._collated(unique, view)
        if self.worker.device.type == "cuda":  # from pinned memory a copy need not be waited for
            collated = [({name: value.pin_memory() for name, value in inputs.items()}, at) for inputs, at in collated]
        return _Loaded(new, kept, [], collated)

    def _look(self, features: FeatureSet, row: int) -> tuple[tuple[int, int] | None, object]:
        """(id of the content, the decoded sample); None for one whose features are there, or the error."""
        try:
            sample = self.source.samples.read(row)
            key = self.source.samples.id_of(sample)
            if features.find(np.array([key], np.uint64))[0][0] >= 0:
                return key, None
            return key, self.source.decode(sample)
        except BadSampleError as error:
            return None, error

    def _collated(self, found: Sequence[tuple[tuple[int, int], Any]], view: int | None) -> list[tuple[Inputs, Ints]]:
        """[(inputs, which of `found` they are)]."""
        if not found:
            return []
        if view is None:
            return [(self.source.collate([decoded for _, decoded in found], False), np.arange(len(found)))]
        # How a sample is changed depends on its content alone, not on those beside it: so it is the same for every job.
        groups: dict[Any, list[tuple[int, Inputs]]] = {}
        for i, (key, decoded) in enumerate(found):
            seed_for(_VIEW, self.seed, view, *key)
            one = self.source.collate([decoded], True)
            groups.setdefault(tuple((name, value.shape) for name, value in one.items()), []).append((i, one))
        return [
            ({name: torch.cat([one[name] for _, one in group]) for name in group[0][1]},
             np.array([i for i, _ in group]))
            for group in groups.values()
        ]  # fmt: skip

    def _through(self, body: Body, loaded: _Loaded, view: int | None) -> list[tuple[Ids, Values]]:
        """What the body gives for a batch: [(ids, [samples, ...] as float32 or the bits of bfloat16)]."""
        collated = loaded.inputs
        if collated is None:
            with self._collating:
                collated = self._collated(loaded.found, view)
        return [
            (loaded.ids[at], compute(body, on_device(inputs, self.worker.device), self.format, self.compiled))
            for inputs, at in collated
        ]

    def _compile(self, features: FeatureSet, bodies: Bodies, batches: Sequence[Ints], view: int | None) -> None:
        """Make the body machine code, if the samples are so many that it pays back."""
        whole = [batch for batch in batches if len(batch) == bodies.batch_size]
        if self.compiled is not None or len(batches) < _LEAST_BATCHES or 2 * len(whole) < len(batches):
            return
        loaded = self._load(features, whole[0], np.zeros((len(whole[0]), 2), np.uint64), view)
        for inputs, at in loaded.inputs or self._collated(loaded.found, view):
            inputs = channels_last(on_device(inputs, self.worker.device))
            if len(at) < bodies.batch_size or not can_be_compiled(inputs):
                return
            with with_threads(bodies.cores), number_format(inputs, self.format):
                for repeats in (1, 2):  # the first pass is slower than the others, and mostly tells enough
                    expected = seconds_of(self.body, inputs, repeats) * len(batches) / len(bodies.copies)
                    if expected < WORTH_S:
                        return
                self.note(f"the body would run for {expected / 60:.0f} min: it is compiled first")
                found = compiled(self.body, inputs)
            if isinstance(found, str):
                self.note(f"it runs as it is, for compiled {found}")
            else:
                self.compiled = found
                self.note(f"compiled, it is {found.gain:.2f} times as fast")
            return


def _refuse_other_shape(there: tuple[int, ...], values: Values) -> None:
    if values.shape[1:] != there:
        raise TrainingError(
            f"the body gives features of the shape {list(values.shape[1:])} for some samples, and {list(there)} "
            "for others",
            expected="one shape, whatever the sample's size",
            mend="prepare all to one size, or run the body in every step: --set training.features='every step'",
        )


def known_contents(samples: Samples, catalog: Catalog, rows: Ints) -> Ids:
    """The ids of the rows' contents, as far as they are known without reading: from the start, or from before."""
    ids = samples.contents(rows)
    open_ = np.flatnonzero(~known(ids))
    if len(open_):
        ids[open_] = catalog.find(*samples.files(rows[open_]))
    return ids


_NOTHING: npt.NDArray[np.float32] = np.zeros((0, 1), np.float32)


@contextlib.contextmanager
def number_format(inputs: Inputs, format: Format) -> Iterator[None]:
    """Compute in it, without gradients."""
    device = next(iter(inputs.values())).device
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=format == "bfloat16"):
        yield


def compute(body: Body, inputs: Inputs, format: Format, compiled: Compiled | None = None) -> Values:
    """The body's output, [samples, ...]: float32, or the bits of bfloat16, computed in it."""
    inputs = channels_last(inputs)
    with number_format(inputs, format):
        found = compiled(inputs) if compiled is not None and compiled.fits(inputs) else body(inputs)
    return as_values(found, format)


def as_values(features: Tensor, format: Format) -> Values:
    """A tensor as the store keeps it."""
    if format == "bfloat16":
        return features.to(torch.bfloat16).cpu().contiguous().view(torch.uint16).numpy()
    return features.float().cpu().contiguous().numpy()


@dataclass
class _Loaded:
    """A batch on its way into the body."""

    new: tuple[Ints, Ids]
    """(rows, the ids of their contents)."""
    ids: Ids
    """Of those to compute."""
    found: list[tuple[tuple[int, int], Any]]
    """These, decoded."""
    inputs: list[tuple[Inputs, Ints]] | None
    """These as the body takes them, in pieces with the places of their samples in `ids`; None if that is yet to do."""


@dataclass
class _Waiting:
    """What was computed, and is not written down yet."""

    ids: list[Ids] = field(default_factory=list)
    values: list[Values] = field(default_factory=list)
    num_bytes: int = 0
    since: float = field(default_factory=time.monotonic)

    def add(self, ids: Ids, values: Values) -> None:
        self.ids.append(ids)
        self.values.append(values)
        self.num_bytes += values.nbytes

    @property
    def shape(self) -> tuple[int, ...] | None:
        return self.values[0].shape[1:] if self.values else None

    def is_due(self, after_s: float) -> bool:
        late = time.monotonic() - self.since > after_s
        return bool(self.ids) and (late or self.num_bytes > _FLUSH_BYTES)

    def write(self, features: FeatureSet, format: Format) -> str:
        name = features.add(np.concatenate(self.ids), np.concatenate(self.values), format)
        self.ids, self.values, self.num_bytes, self.since = [], [], 0, time.monotonic()
        return name
