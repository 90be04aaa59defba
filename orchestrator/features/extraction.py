"""Run a frozen body over samples, each once, and keep what it gives in the feature store.

A worker computes its share of what the store lacks and writes it down in shards, so that what was computed is never
computed again, whatever dies. While some batches are in the body, the next are read and decoded (bodies.py). Where
the job has extractors, they do it instead, and one worker hands out the work (extractors.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from orchestrator.data import Catalog, Ids, Samples, known
from orchestrator.errors import InterruptedRunError, TrainingError
from orchestrator.features.bodies import Bodies, bodies_for, passed
from orchestrator.features.body_pass import Loaded, Loading, number_format
from orchestrator.features.sources import SampleSource, StoredView, split_evenly
from orchestrator.network import (
    WORTH_S,
    Body,
    Compiled,
    Worker,
    can_be_compiled,
    channels_last,
    compiled,
    on_device,
    seconds_of,
    with_threads,
)
from orchestrator.store import FeatureSet, Format, Values, filling

FLUSH_S = 10.0
"""A shard is written at least so often, at first: what is lost when a job is killed."""
_FLUSH_SHARE = 0.02
"""Later this share of the time that was worked, so that long work does not end in thousands of shards."""
_FLUSH_BYTES = 64 * 2**20
_MOST_ROUNDS = 5
_LEAST_ELSEWHERE = 256
"""Fewer samples are computed by the workers themselves, before other processes would have begun."""
_LEAST_BATCHES = 50
"""Of fewer it is not even looked how long they take."""

Ints = npt.NDArray[np.int64]


@dataclass
class ExtractionResult:
    """What came of some rows."""

    names: list[str] = field(default_factory=list)
    """Of the shards that were written."""
    new: list[tuple[Ints, Ids]] = field(default_factory=list)
    """(rows, the ids of their contents), as they were read."""
    skipped: dict[int, str] = field(default_factory=dict)
    """Row -> why it could not be read."""
    num_computed: int = 0
    gain: float | None = None
    """How many times as fast the compiled body is, where it was compiled."""
    stopped: bool = False
    """Somebody asked to stop before all was done."""


class RemoteExtractor(Protocol):
    """Other processes that compute what this one would."""

    def __call__(
        self, features: FeatureSet, rows: Ints, ids: Ids, sizes: Ints | None, view: int | None, backwards: bool
    ) -> Iterable[ExtractionResult]:
        """All of these rows (ascending), with the ids of their contents as far as they are known; in pieces.

        `sizes`: of their samples in bytes, where longer ones are more work.
        """


@dataclass
class Extraction:
    """A body, and what it is run on."""

    body: Body
    source: SampleSource
    worker: Worker
    catalog: Catalog
    format: Format
    length_bucketing: bool
    seed: int
    advance: Callable[[int], None]
    """Called with the number of samples that were done."""
    note: Callable[[str], None]
    should_stop: Callable[[], bool]
    verify: bool = False
    """Read every sample to find out what its content is, whatever is remembered of its file."""
    remote: RemoteExtractor | None = None
    """Processes that compute in the workers' stead."""
    num_computed: int = 0
    """Samples that went through the body, in this worker, or at its order."""
    gain: float | None = None
    used: dict[str, list[str]] = field(default_factory=dict)
    """Set -> the shards of it that were read."""
    _compiled: Compiled | None = None
    """The body as machine code, where that pays back."""
    _compile_tried: bool = False
    _started: float = 0.0
    _new: list[tuple[Ints, Ids]] = field(default_factory=list)
    """(rows, the ids of their contents), as they were read."""

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
            features.fetch_missing(ids)
        for _ in range(_MOST_ROUNDS):
            features.refresh(written)
            # What one worker sees on a shared file system another one may not see yet: rank 0's shards are named, and
            # what any worker misses is missing.
            features.refresh(worker.gather(features.names if worker.rank == 0 else None)[0])
            missing = np.unique(np.concatenate(worker.gather(self._missing(features, rows, ids))))
            if not counted:
                self.advance(len(rows) - len(missing))
                counted = True
                if len(missing) < len(rows):
                    self.note(f"features of {len(rows) - len(missing)} of {len(rows)} samples are stored already")
            if len(missing):
                names = self._fill(features, missing, rows, ids, view)
                written = [name for part in worker.gather(names) for name in part]
                ids = self._learn(rows, ids)
                continue
            shard, at = features.find(ids)
            used = {features.names[number] for number in np.unique(shard[shard >= 0]).tolist()}
            everybodys = sorted(set().union(*worker.gather(used)))
            broken = self._damaged(features, everybodys[worker.rank :: worker.num_workers])
            if not broken:
                self._remember(rows, ids)
                features.flush_uploads(whole=worker.rank == 0)
                there = shard >= 0
                values = [features.values(number).view(np.ndarray) if name in used else _NOTHING
                          for number, name in enumerate(features.names)]  # fmt: skip
                self.used[features.folder.name] = everybodys
                return StoredView(rows[there], shard[there], at[there], values)
            self.note(f"stored features were damaged, and are replaced ({len(broken)} of {len(everybodys)} shards)")
            if worker.rank == 0:
                features.fetch_missing(ids)
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

    def _fill(self, features: FeatureSet, missing: Ints, rows: Ints, ids: Ids, view: int | None) -> list[str]:
        """Compute this worker's share of what is missing, or have all of it computed; the names of the shards."""
        names: list[str] = []
        stopped = False
        rank, num_workers = self.worker.rank, self.worker.num_workers
        features.sweep()
        # One lock a job: the other workers' shares are their own.
        with filling(features.folder) if rank == 0 else contextlib.nullcontext(False) as lock:
            # Where another job is at it this one begins at the other end: so the two meet, and do not do the same.
            backwards = not self.worker.gather(lock)[0]
            results: Iterable[ExtractionResult] = ()
            if self.remote is None or len(missing) < _LEAST_ELSEWHERE:
                mine = split_evenly(missing, rank, num_workers)
                results = [self.compute(features, mine, ids[np.searchsorted(rows, mine)], view, backwards)]
            elif rank == 0:
                sizes = self.source.samples.num_bytes[missing] if self.length_bucketing else None
                results = self.remote(features, missing, ids[np.searchsorted(rows, missing)], sizes, view, backwards)
            for result in results:
                names += result.names
                self._new += result.new
                self.source.skipped.update(result.skipped)
                self.num_computed += result.num_computed
                self.gain = result.gain or self.gain
                stopped |= result.stopped
        if any(self.worker.gather(stopped)):
            text = "stopped while the body ran; the features that it gave are kept"
            raise InterruptedRunError(text, mend="the same command goes on")
        return names

    def compute(
        self, features: FeatureSet, rows: Ints, ids: Ids, view: int | None, backwards: bool, to_come: int = 0
    ) -> ExtractionResult:
        """Run the body over these rows (ascending), with the ids of their contents as far as they are known.

        `to_come`: so many rows, these included, are for this process yet, if they are more. Raises `TrainingError`;
        what was computed is kept.
        """
        result = ExtractionResult()
        self._started = self._started or time.monotonic()
        ordered = self.source.samples.order_by_length(rows) if self.length_bucketing else rows
        # A sample is changed at random by torch's one generator: a body may draw from it as well (vit_mae does).
        bodies = bodies_for(self.body, self.worker.device, most=1 if view is not None else None)
        batches = list(self.source.samples.batches(ordered, bodies.batch_size, len(bodies.copies)))
        loading = Loading(self.source, features, self.worker.device, self.seed, view)
        self._compile(loading, bodies, batches, max(1.0, to_come / max(1, len(rows))))
        if backwards:
            batches.reverse()
        waiting = _Waiting()

        def load(some: Ints) -> Loaded:
            return loading.load(some, ids[np.searchsorted(rows, some)])

        def run(body: Body, loaded: Loaded) -> list[tuple[Ids, Values]]:
            return loading.through(body, loaded, self.format, self._compiled)

        try:
            for some, loaded, found in passed(batches, load, run, bodies):
                result.new.append(loaded.new)
                for computed, values in found:
                    _refuse_other_shape(features.shape or waiting.shape or values.shape[1:], values)
                    waiting.add(computed, values)
                    result.num_computed += len(computed)
                self.advance(len(some) * self.worker.num_workers)
                if waiting.is_due(max(FLUSH_S, _FLUSH_SHARE * (time.monotonic() - self._started))):
                    result.names.append(waiting.write(features, self.format))
                    features.refresh()  # what another job has done meanwhile need not be done here
                if self.should_stop():
                    result.stopped = True
                    break
        finally:  # whatever ended it: what was computed is kept
            if waiting.ids:
                result.names.append(waiting.write(features, self.format))
        result.gain = self._compiled.gain if self._compiled is not None else None
        return result

    def _compile(self, loading: Loading, bodies: Bodies, batches: Sequence[Ints], times: float) -> None:
        """Make the body machine code, if the samples are so many that it pays back."""
        whole = [batch for batch in batches if len(batch) == bodies.batch_size]
        if self._compile_tried or len(batches) * times < _LEAST_BATCHES or 2 * len(whole) < len(batches):
            return
        loaded = loading.load(whole[0], np.zeros((len(whole[0]), 2), np.uint64))
        pieces = loaded.inputs or loading.collated(loaded.found)
        if not pieces or len(pieces[0][1]) < bodies.batch_size or not can_be_compiled(pieces[0][0]):
            return
        inputs = channels_last(on_device(pieces[0][0], self.worker.device))
        with with_threads(bodies.cores), number_format(inputs, self.format):
            for repeats in (1, 2):  # the first pass is slower than the others, and mostly tells enough
                expected = seconds_of(self.body, inputs, repeats) * times * len(batches) / len(bodies.copies)
                if expected < WORTH_S:
                    return
            self._compile_tried = True
            self.note(f"the body would run for {expected / 60:.0f} min: it is compiled first")
            found = compiled(self.body, inputs)
        if isinstance(found, str):
            self.note(f"it runs as it is, for compiled {found}")
        else:
            self._compiled = found
            self.note(f"compiled, it is {found.gain:.2f} times as fast")


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
