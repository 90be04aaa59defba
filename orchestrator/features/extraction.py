"""The features of some samples: what the store lacks is computed, in rounds that survive whatever dies.

All workers look what is missing, each computes its part of it (body_pass.py), and all look again: what was computed is
never computed again, and what was damaged meanwhile is missing in the next round. Where the job has extractors, they
compute instead, and the worker of rank 0 hands out the work (distributed/extractors.py).
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from orchestrator.data import Catalog, Ids, Ints, Samples, known
from orchestrator.errors import InterruptedRunError, TrainingError
from orchestrator.features.body_pass import BodyPass, ExtractionResult
from orchestrator.features.sources import StoredRows, split_evenly
from orchestrator.store import FeatureSet, filling

_MOST_ROUNDS = 5
_LEAST_REMOTE = 256
"""Fewer samples are computed by the workers themselves, before other processes would have begun."""


class RemoteExtractor(Protocol):
    """Other processes that compute what this one would."""

    def __call__(
        self, features: FeatureSet, rows: Ints, ids: Ids, sizes: Ints | None, view: int | None, backwards: bool
    ) -> Iterable[ExtractionResult]:
        """The features of all of these rows (ascending), written to the set; what came of them, in pieces.

        `ids`, uint64 [samples, 2]: of the rows' contents, as far as they are known. `sizes`: of their samples in
        bytes, where longer ones are more work. `view`, `backwards`: see `BodyPass.compute`.
        """


@dataclass
class Extraction:
    """Features of samples that a body gives, from the store as far as they are there."""

    body_pass: BodyPass
    catalog: Catalog
    verify: bool = False
    """Read every sample to find out what its content is, whatever is remembered of its file."""
    remote: RemoteExtractor | None = None
    """Processes that compute in the workers' stead."""
    apart: bool = False
    """Each machine has a folder of its own: what others have computed comes through the object store."""
    num_computed: int = 0
    """Samples that went through the body, in this worker, or at its order."""
    gain: float | None = None
    """How many times as fast the compiled body is, where it was compiled."""
    _read: list[tuple[Ints, Ids]] = field(default_factory=list)
    """(rows, the ids of their contents), read since the last round."""

    def run(self, features: FeatureSet, rows: Ints, view: int | None = None) -> StoredRows:
        """Where the features of these rows (ascending) lie; `view`: which random view of the samples.

        All workers call this, each with all of the rows; which shards are read is decided by rank 0. Raises
        `InterruptedRunError` when asked to stop, `TrainingError` where a sample cannot be read or the storage does not
        keep what is written, and `OrchestratorError` where machines need the object store and it stays away.
        """
        worker, note = self.body_pass.worker, self.body_pass.note
        ids = self._known(rows)
        written: list[str] = []
        counted = False
        sharers = self._sharers(features)
        fetches = worker.rank == sharers[0]  # one of those that share a folder
        exchanges = self.apart and (self.remote is not None or len(sharers) < worker.num_workers)
        if fetches:
            features.fetch_missing(ids)
        for _ in range(_MOST_ROUNDS):
            missing = self._missing_anywhere(features, rows, ids, written)
            if exchanges and len(missing):
                self._exchange(features, ids, fetches)
                missing = self._missing_anywhere(features, rows, ids, written)
            if not counted:
                self.body_pass.advance(len(rows) - len(missing))
                counted = True
                if len(missing) < len(rows):
                    note(f"features of {len(rows) - len(missing)} of {len(rows)} samples are stored already")
            if len(missing):
                names = self._fill(features, missing, rows, ids, view)
                written = [name for part in worker.all_gather(names) for name in part]
                ids = self._with_read(rows, ids)
                continue
            stored = self._agreed(features, rows, ids)
            in_use = sorted(set().union(*worker.all_gather(set(stored.shards))))
            broken = self._damaged(features, in_use[sharers.index(worker.rank) :: len(sharers)])
            if not broken:
                self._remember(rows, ids)
                features.flush_uploads(whole=worker.rank == 0)
                return stored
            note(f"stored features were damaged, and are replaced ({len(broken)} of {len(in_use)} shards)")
            if fetches:
                features.fetch_missing(ids)
        raise TrainingError(
            f"the features in {features.folder} do not stay as they are written",
            expected="storage that keeps its bytes, and nobody who prunes it meanwhile",
            mend="look at that storage; the same command goes on",
        )

    def _sharers(self, features: FeatureSet) -> list[int]:
        """The ranks of the workers that have the same folder as this one, its own among them."""
        worker = self.body_pass.worker
        if not self.apart:
            return list(range(worker.num_workers))
        status = features.folder.stat()
        own = (socket.gethostname(), status.st_dev, status.st_ino)
        return [rank for rank, folder in enumerate(worker.all_gather(own)) if folder == own]

    def _exchange(self, features: FeatureSet, ids: Ids, fetches: bool) -> None:
        """Bring to the object store what each machine has and it lacks, then to each machine what the others have.

        `fetches`: whether this worker does it for its machine.
        """
        worker = self.body_pass.worker
        features.flush_uploads(whole=False)
        worker.barrier()
        broken = worker.all_gather(features.send(features.names) if fetches else [])
        features.forget([name for part in broken for name in part])
        if fetches:
            features.fetch_missing(ids, needed=True)
        worker.barrier()

    def _agreed(self, features: FeatureSet, rows: Ints, ids: Ids) -> StoredRows:
        """Where the features lie: in the shards that rank 0 reads, where another worker would find a row in two."""
        worker = self.body_pass.worker
        stored = _stored_rows(features, rows, ids)
        chosen = worker.all_gather(stored.shards if worker.rank == 0 else None)[0]
        if set(stored.shards) == set(chosen):
            return stored
        features.prefer(chosen)
        return _stored_rows(features, rows, ids)

    def _damaged(self, features: FeatureSet, names: list[str]) -> list[str]:
        """Which shards are damaged, each worker looking at those that it names; all of them forget these."""
        of_worker = set(names)
        numbers = [number for number, name in enumerate(features.names) if name in of_worker]
        broken = [name for part in self.body_pass.worker.all_gather(features.damaged(numbers)) for name in part]
        features.forget(broken)
        return broken

    def _known(self, rows: Ints) -> Ids:
        """The ids of the rows' contents, as far as they need not be read for it."""
        if self.verify:
            return np.zeros((len(rows), 2), np.uint64)
        return known_contents(self.body_pass.source.samples, self.catalog, rows)

    def _missing_anywhere(self, features: FeatureSet, rows: Ints, ids: Ids, written: list[str]) -> Ints:
        """The rows that any worker misses, `written` being the shards that all of them should see by now.

        What one worker sees on a shared file system another one may not see yet: rank 0's shards are named too.
        """
        worker = self.body_pass.worker
        features.refresh(written)
        features.refresh(worker.all_gather(features.names if worker.rank == 0 else None)[0])
        return np.unique(np.concatenate(worker.all_gather(self._missing(features, rows, ids))))

    def _missing(self, features: FeatureSet, rows: Ints, ids: Ids) -> Ints:
        """The rows that have no features yet, and are not left out."""
        shard, _ = features.find(ids)
        left_out = np.array(sorted(self.body_pass.source.skipped), np.int64)
        return rows[(shard < 0) & ~np.isin(rows, left_out)]

    def _with_read(self, rows: Ints, ids: Ids) -> Ids:
        """The ids with those of what any worker has read meanwhile; all workers know of all that was left out."""
        ids = ids.copy()
        skipped = self.body_pass.source.skipped
        for read, skipped_there in self.body_pass.worker.all_gather((self._read, skipped)):
            skipped.update(skipped_there)
            for some_rows, their_ids in read:
                ids[np.searchsorted(rows, some_rows)] = their_ids
        self._read = []
        return ids

    def _remember(self, rows: Ints, ids: Ids) -> None:
        """Let later jobs know what the rows' files hold, without reading them."""
        if self.body_pass.worker.rank == 0:
            places, marks = self.body_pass.source.samples.files(rows)
            new = (marks != 0) & known(ids) & (self.catalog.find(places, marks) != ids).any(axis=1)
            self.catalog.add(places[new], marks[new], ids[new])

    def _fill(self, features: FeatureSet, missing: Ints, rows: Ints, ids: Ids, view: int | None) -> list[str]:
        """Compute this worker's part of what is missing, or have all of it computed; the names of the shards.

        `missing` is a part of `rows`; `ids` are the rows'.
        """
        names: list[str] = []
        stopped = False
        source, worker = self.body_pass.source, self.body_pass.worker
        features.sweep()
        # One lock a job: its workers have parts of their own.
        with filling(features.folder) if worker.rank == 0 else contextlib.nullcontext(False) as alone:
            # Where another job is at it this one begins at the other end: so the two meet, and do not do the same.
            backwards = not worker.all_gather(alone)[0]
            results: Iterable[ExtractionResult] = ()
            if self.remote is None or len(missing) < _LEAST_REMOTE:
                part = split_evenly(missing, worker.rank, worker.num_workers)
                results = [self.body_pass.compute(features, part, ids[np.searchsorted(rows, part)], view, backwards)]
            elif worker.rank == 0:
                sizes = source.samples.num_bytes[missing] if self.body_pass.length_bucketing else None
                results = self.remote(features, missing, ids[np.searchsorted(rows, missing)], sizes, view, backwards)
            for result in results:
                names += result.names
                self._read += result.read
                source.skipped.update(result.skipped)
                self.num_computed += result.num_computed
                self.gain = result.gain or self.gain
                stopped |= result.stopped
        if any(worker.all_gather(stopped)):
            text = "stopped while the body ran; the features that it gave are kept"
            raise InterruptedRunError(text, mend="the same command goes on")
        return names


def known_contents(samples: Samples, catalog: Catalog, rows: Ints) -> Ids:
    """The ids of the rows' contents, uint64 [samples, 2], as far as they are known without reading.

    From when the data was prepared, or from an earlier job that read the same file.
    """
    ids = samples.contents(rows)
    unknown = np.flatnonzero(~known(ids))
    if len(unknown):
        ids[unknown] = catalog.find(*samples.files(rows[unknown]))
    return ids


def _stored_rows(features: FeatureSet, rows: Ints, ids: Ids) -> StoredRows:
    shard, at = features.find(ids)
    stored = shard >= 0
    numbers, shard = np.unique(shard[stored], return_inverse=True)
    names = tuple(features.names[number] for number in numbers.tolist())
    return StoredRows(features.folder.name, names, rows[stored], shard.astype(np.int64), at[stored])
