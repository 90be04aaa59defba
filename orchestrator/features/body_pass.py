"""One worker's pass: samples are read, decoded and collated, a frozen body runs over them, shards are written.

While some batches are in the body, the next are read (bodies.py). A content that is in the set already, or twice in a
batch, is not computed; what was computed is in the store before the pass ends, whatever ends it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from orchestrator.data import Ids, Ints
from orchestrator.errors import TrainingError
from orchestrator.features.bodies import (
    WORTH_S,
    Bodies,
    Compiled,
    bodies_for,
    can_be_compiled,
    compiled,
    passed,
    seconds_of,
)
from orchestrator.features.formats import number_format
from orchestrator.features.loading import Loaded, Loading
from orchestrator.features.sources import SampleSource
from orchestrator.network import Body, Worker, channels_last, on_device, with_threads
from orchestrator.store import FeatureSet, Format, Values

FLUSH_S = 10.0
"""A shard is written at least so often in the first minutes: what is lost when a job is killed."""
FIRST_FLUSH_S = 1.0
"""And so soon at first, so that another job which began at the same time need not compute the same."""
_FLUSH_SHARE_AT_FIRST = 0.25
_FLUSH_SHARE = 0.02
"""Later this share of the time that was worked, so that long work does not end in thousands of shards."""
_FLUSH_BYTES = 64 * 2**20
_LEAST_BATCHES = 50
"""Of fewer it is not even looked how long they take."""

Note = Callable[[str], None]
"""Takes a line for whoever watches the job."""


@dataclass
class ExtractionResult:
    """What came of a pass over some rows."""

    names: list[str] = field(default_factory=list)
    """Of the shards that were written."""
    read: list[tuple[Ints, Ids]] = field(default_factory=list)
    """(rows that were read, the ids of their contents)."""
    skipped: dict[int, str] = field(default_factory=dict)
    """Row -> why it could not be read."""
    num_computed: int = 0
    gain: float | None = None
    """How many times as fast the compiled body is, where it was compiled."""
    stopped: bool = False
    """Somebody asked to stop before all was done."""


@dataclass
class BodyPass:
    """A body, and what it is run on."""

    body: Body
    source: SampleSource
    worker: Worker
    format: Format
    length_bucketing: bool
    seed: int
    advance: Callable[[int], None]
    """Called with the number of samples that were done."""
    note: Note
    should_stop: Callable[[], bool]
    _compiled: Compiled | None = None
    """The body compiled, where that pays back."""
    _compile_tried: bool = False
    _started: float = 0.0

    def compute(
        self, features: FeatureSet, rows: Ints, ids: Ids, view: int | None, backwards: bool, to_come: int = 0
    ) -> ExtractionResult:
        """Run the body over these rows (ascending), and add what it gives to the set.

        `ids`, uint64 [samples, 2]: of the rows' contents, as far as they are known. `view`: which random view of the
        samples, from 0; None: as they are. `backwards`: begin with the last rows. `to_come`: rows that this process
        will do in all, this call's among them, where that is more. Raises `TrainingError`; what was computed is kept.
        """
        result = ExtractionResult()
        self._started = self._started or time.monotonic()
        ordered = self.source.samples.order_by_length(rows) if self.length_bucketing else rows
        # A sample is changed at random by torch's one generator: a body may draw from it as well (vit_mae does).
        bodies = bodies_for(
            self.body, self.worker.device, most=1 if view is not None else None, format=self.format
        )  # fmt: skip
        batches = list(self.source.samples.batches(ordered, bodies.batch_size, len(bodies.copies)))
        loading = Loading(self.source, features, self.worker.device, self.seed, view)
        self._compile(loading, bodies, batches, max(1.0, to_come / max(1, len(rows))))
        if backwards:
            batches.reverse()
        unwritten = _Unwritten()

        def load(batch: Ints) -> Loaded:
            return loading.load(batch, ids[np.searchsorted(rows, batch)])

        def run(body: Body, loaded: Loaded) -> list[tuple[Ids, Values]]:
            return loading.through(body, loaded, self.format, self._compiled)

        try:
            for batch, loaded, outputs in passed(batches, load, run, bodies, loading.num_loads, loading.loads_ahead):
                result.read.append(loaded.read)
                for computed, values in outputs:
                    refuse_other_shape(features.shape or unwritten.shape or values.shape[1:], values)
                    unwritten.add(computed, values)
                    result.num_computed += len(computed)
                self.advance(len(batch) * self.worker.num_workers)
                if unwritten.is_due(flush_interval_s(time.monotonic() - self._started)):
                    result.names.append(unwritten.write(features, self.format))
                    features.refresh()  # what another job has done meanwhile need not be done here
                if self.should_stop():
                    result.stopped = True
                    break
        finally:  # whatever ended it: what was computed is kept
            if unwritten.ids:
                result.names.append(unwritten.write(features, self.format))
        result.gain = self._compiled.gain if self._compiled is not None else None
        return result

    def _compile(self, loading: Loading, bodies: Bodies, batches: Sequence[Ints], times: float) -> None:
        """Compile the body, if the samples are so many that it pays back.

        `times`: so many times these batches are to come.
        """
        whole = [batch for batch in batches if len(batch) == bodies.batch_size]
        if self._compile_tried or len(batches) * times < _LEAST_BATCHES or 2 * len(whole) < len(batches):
            return
        loaded = loading.load(whole[0], np.zeros((len(whole[0]), 2), np.uint64))
        pieces = loaded.inputs or loading.collated(loaded.decoded)[0]
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
            answer = compiled(self.body, inputs)
        if isinstance(answer, str):
            self.note(f"it runs as it is, for compiled {answer}")
        else:
            self._compiled = answer
            self.note(f"compiled, it is {answer.gain:.2f} times as fast")


def refuse_other_shape(expected: tuple[int, ...], values: Values) -> None:
    """Raise `TrainingError` unless one sample's features have that shape. `values`: [samples, ...]."""
    if values.shape[1:] != expected:
        raise TrainingError(
            f"the body gives features of the shape {list(values.shape[1:])} for some samples, and {list(expected)} "
            "for others",
            expected="one shape, whatever the sample's size",
            mend="prepare all to one size, or run the body in every step: --set training.features='every step'",
        )


def flush_interval_s(worked_s: float) -> float:
    """How long what was computed may wait to be written, after so much work: 1 s, 10 s after 40 s, later 2 % of it."""
    at_first = min(FLUSH_S, max(FIRST_FLUSH_S, _FLUSH_SHARE_AT_FIRST * worked_s))
    return max(at_first, _FLUSH_SHARE * worked_s)


@dataclass
class _Unwritten:
    """What was computed, and is in no shard yet."""

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
        """Of one sample's features."""
        return self.values[0].shape[1:] if self.values else None

    def is_due(self, after_s: float) -> bool:
        late = time.monotonic() - self.since > after_s
        return bool(self.ids) and (late or self.num_bytes > _FLUSH_BYTES)

    def write(self, features: FeatureSet, format: Format) -> str:
        """The name of the shard."""
        name = features.add(np.concatenate(self.ids), np.concatenate(self.values), format)
        self.ids, self.values, self.num_bytes, self.since = [], [], 0, time.monotonic()
        return name
