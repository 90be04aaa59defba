"""Samples on their way into a frozen body: read, held against the features that there are, decoded, collated."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from orchestrator.data import Ids, Ints
from orchestrator.errors import BadSampleError, OrchestratorError, RefusedError, TrainingError
from orchestrator.features.bodies import Compiled
from orchestrator.features.formats import compute
from orchestrator.features.readers import Readers, ReadersLostError
from orchestrator.features.reading import Request
from orchestrator.features.sources import Batch, SampleSource, collated
from orchestrator.network import Body, Inputs, on_device, seed_for
from orchestrator.store import FeatureSet, Format, Values

_VIEW = 3  # what a random number is for, beside those of the loop

Content = tuple[int, int]
"""(low, high) of a content's id."""


@dataclass
class Loaded:
    """A batch on its way into the body."""

    read: tuple[Ints, Ids]
    """(the rows that were read, the ids of their contents)."""
    ids: Ids
    """The contents that have no features yet, uint64 [samples, 2], each once."""
    decoded: list[tuple[Content, Any]]
    """(content, decoded sample) of each of them; empty where `inputs` are made already."""
    inputs: list[tuple[Inputs, Ints]] | None
    """What the body takes, in pieces: (tensors [samples, ...], the places of their samples in `ids`). None while they
    are not made."""


@dataclass
class Loading:
    """Samples of one view, on their way to a set of features. `load` is for `num_loads` threads, `through` for more."""

    source: SampleSource
    features: FeatureSet
    device: torch.device
    seed: int
    view: int | None
    """Which random view of the samples, from 0; None: as they are."""
    _reading: threading.Lock = field(default_factory=threading.Lock)
    """Threads wait for readers side by side; what reads here, reads alone."""
    _away: OrchestratorError | None = None
    """What was raised where a store did not answer: nobody waits for it once more."""
    _collating: threading.Lock = field(default_factory=threading.Lock)
    """Tokenizers of transformers are for one thread at a time, and torch's random numbers are one sequence."""

    def load(self, rows: Ints, ids: Ids) -> Loaded:
        """What the body has to compute for these rows: read, held against the features there are, decoded, collated.

        `ids`, uint64 [samples, 2]: of their contents, as far as they are known without reading.
        """
        shard, _ = self.features.find(ids)
        rows = rows[shard < 0]
        readers = self._readers
        if readers is not None and readers.ready and len(rows):
            with contextlib.suppress(ReadersLostError, TrainingError, RefusedError):
                batch, skipped = readers.begin(Request(rows, with_contents=True)).result()
                # On a sample that cannot be read, and on a store that is away, the worker has the last word.
                if not skipped:
                    return self._unless_stored(batch)
        with self._reading:
            if self._away is not None:
                raise self._away
            began = time.monotonic()
            try:
                loaded = self._load(rows)
            except OrchestratorError as error:
                self._away = None if isinstance(error, TrainingError) else error
                raise
            if readers is not None:
                readers.was_read(time.monotonic() - began)
        return loaded

    @property
    def num_loads(self) -> int:
        """Threads that `load` is called in: each waits for a reader, while there are readers."""
        return 1 if self._readers is None else self._readers.num

    def loads_ahead(self) -> int:
        """Batches that are worth to be loaded before a body is free."""
        return self._readers.num_ahead if self._readers is not None and self._readers.ready else 0

    @property
    def _readers(self) -> Readers | None:
        """Random changes depend on each content, which readers know nothing of."""
        return self.source.readers if self.view is None else None

    def _unless_stored(self, batch: Batch | None) -> Loaded:
        """What a reader gave, less what has features by now, or is there twice."""
        if batch is None or batch.contents is None:
            nothing = np.zeros((0, 2), np.uint64)
            return Loaded((np.zeros(0, np.int64), nothing), nothing, [], [])
        at = np.sort(np.unique(batch.contents, axis=0, return_index=True)[1])
        at = at[self.features.find(batch.contents[at])[0] < 0]
        ids, inputs = batch.contents[at], batch.inputs
        if len(at) < len(batch.rows):
            inputs = {name: tensor[torch.from_numpy(at)] for name, tensor in inputs.items()}
        return Loaded((batch.rows, batch.contents), ids, [], [(inputs, np.arange(len(ids)))] if len(ids) else [])

    def _load(self, rows: Ints) -> Loaded:
        contents: dict[int, Content] = {}
        decoded: dict[Content, object] = {}  # the same content twice need not be computed twice; nor written
        for row, answer in self.source.each(rows, self._read):
            if isinstance(answer, BadSampleError):
                self.source.leave_out(row, answer)
                continue
            contents[row], sample = answer
            if sample is not None:
                decoded[contents[row]] = sample
        missing = np.array(list(decoded), np.uint64).reshape(-1, 2)
        read = (np.fromiter(contents, np.int64, len(contents)),
                np.array(list(contents.values()), np.uint64).reshape(-1, 2))  # fmt: skip
        # On a CPU the bodies have all cores: another set of OpenMP threads, for the collate function, cost them 11 %.
        loaded = Loaded(read, missing, list(decoded.items()), None)
        if self.device.type == "cpu":
            return loaded
        pieces = self._collate(loaded)
        if self.device.type == "cuda":  # from pinned memory a copy need not be waited for
            pieces = [({name: value.pin_memory() for name, value in inputs.items()}, at) for inputs, at in pieces]
        return Loaded(loaded.read, missing, [], pieces)

    def _read(self, row: int) -> tuple[Content, object] | BadSampleError:
        """(the content's id, the decoded sample; None for one whose features are stored), or why it cannot be read."""
        try:
            sample = self.source.samples.read(row)
            content = self.source.samples.id_of(sample)
            if self.features.find(np.array([content], np.uint64))[0][0] >= 0:
                return content, None
            return content, self.source.decode(sample)
        except BadSampleError as error:
            return error

    def _collate(self, loaded: Loaded) -> list[tuple[Inputs, Ints]]:
        """What the body takes of a batch, in pieces; samples that cannot be collated are left out of it."""
        pieces, faults = self.collated(loaded.decoded)
        for content, error in faults.items():
            rows, ids = loaded.read
            is_it = (ids == np.array(content, np.uint64)).all(axis=1)
            for row in rows[is_it].tolist():
                self.source.leave_out(row, error)
            loaded.read = rows[~is_it], ids[~is_it]
        return pieces

    def collated(
        self, decoded: Sequence[tuple[Content, Any]]
    ) -> tuple[list[tuple[Inputs, Ints]], dict[Content, BadSampleError]]:
        """What the body takes of these samples, in pieces, and those that it cannot take: content -> why.

        A piece is (tensors [samples, ...], which of the samples they are).
        """
        faults: dict[Content, BadSampleError] = {}
        if self.view is None:
            inputs, wrong = collated(self.source.collate, [sample for _, sample in decoded], False)
            faults = {decoded[place][0]: error for place, error in wrong.items()}
            at = np.delete(np.arange(len(decoded)), list(wrong))
            return ([(inputs, at)] if inputs is not None else []), faults
        # How a sample is changed depends on its content alone, not on those beside it: so it is the same for every job.
        groups: dict[Any, list[tuple[int, Inputs]]] = {}
        for i, (content, sample) in enumerate(decoded):
            seed_for(_VIEW, self.seed, self.view, *content)
            one, wrong = collated(self.source.collate, [sample], True)
            if one is None:
                faults[content] = wrong[0]
                continue
            groups.setdefault(tuple((name, value.shape) for name, value in one.items()), []).append((i, one))
        pieces: list[tuple[Inputs, Ints]] = [
            ({name: torch.cat([one[name] for _, one in group]) for name in group[0][1]},
             np.array([i for i, _ in group]))
            for group in groups.values()
        ]  # fmt: skip
        return pieces, faults

    def through(
        self, body: Body, loaded: Loaded, format: Format, compiled: Compiled | None
    ) -> list[tuple[Ids, Values]]:
        """What the body gives for a batch: [(ids, [samples, ...] as float32 or the bits of bfloat16)]."""
        pieces = loaded.inputs
        if pieces is None:
            with self._collating:
                pieces = self._collate(loaded)
        return [
            (loaded.ids[at], compute(body, on_device(inputs, self.device), format, compiled)) for inputs, at in pieces
        ]
