"""What the loop trains on: samples that are decoded in every step, or features that a frozen body gave once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from orchestrator.data import PATIENCE_S, Asker, Ids, Ints, Samples, UnansweredError
from orchestrator.errors import BadSampleError, TrainingError, fault_of_sample
from orchestrator.job import Plan
from orchestrator.modality import Collate, Decode, Modality, registry
from orchestrator.network import Inputs, on_device
from orchestrator.store import Values

if TYPE_CHECKING:
    from orchestrator.features.readers import Readers

T = TypeVar("T")

Ask = Callable[[str, str, Callable[[], Any]], Any]
"""(a store, a place there, what asks for it) -> what it answers, asked again while the store fails."""


def ask_for_a_minute(store: str, place: str, call: Callable[[], Any]) -> Any:
    """An `Ask` that raises `RefusedError` then."""
    return Asker(store, PATIENCE_S)(place, call)


@dataclass
class Batch:
    """What one forward pass takes. Samples that could not be read are not in it."""

    inputs: Inputs
    targets: Tensor
    """int64 [samples], the class; multi-label and regression: float32 [samples, classes]."""
    rows: Ints
    """Of the sample table, int64 [samples]."""
    contents: Ids | None = None
    """Of each sample's content, where they were asked for: uint64 [samples, 2]."""

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        return Batch(on_device(self.inputs, device), self.targets.to(device), self.rows, self.contents)


@dataclass(frozen=True)
class SourceSpec:
    """What another process of this machine makes the same source of samples from."""

    plan: Plan
    table: Path
    """The directory of the sample table."""
    backbone: Path
    """The directory of the backbone's files."""
    modality: Modality | None
    """Where no other process could look it up."""

    def find_modality(self) -> Modality:
        """The plan's. Raises `PluginError`."""
        return self.modality or registry.get(self.plan.job.modality)

    def opened(self, pool: ThreadPoolExecutor, ask: Ask = ask_for_a_minute) -> SampleSource:
        """The source; `ask` is that of `SampleSource`. Raises what the plugin raises."""
        modality = self.find_modality()
        assert modality.decode is not None
        assert modality.batch is not None
        return SampleSource(
            Samples(self.table, tuple(field.name for field in modality.sample)),
            modality.decode,
            modality.batch(self.plan, self.backbone),
            skip=self.plan.job.data.on_bad_sample == "skip",
            pool=pool,
            spec=self,
            ask=ask,
        )


@dataclass
class SampleSource:
    """Samples, read, decoded and collated when they are asked for."""

    samples: Samples
    decode: Decode
    collate: Collate
    skip: bool
    """Whether a sample that cannot be read is left out, or ends the run."""
    pool: ThreadPoolExecutor
    skipped: dict[int, str] = field(default_factory=dict)
    """Row -> why it was left out."""
    spec: SourceSpec | None = None
    readers: Readers | None = None
    """Processes that read instead, once that is worth it; None where they never are."""
    ask: Ask = ask_for_a_minute
    """Asks the store of the samples again that does not answer: what it raises is raised whatever `skip` says."""

    def batch(self, rows: Ints, train: bool, with_contents: bool = False) -> Batch | None:
        """The rows that can be read, None if there is none. Raises `TrainingError` unless `skip`."""
        contents: dict[int, tuple[int, int]] | None = {} if with_contents else None
        decoded, readable = self.decoded(rows, contents)
        inputs, faults = collated(self.collate, decoded, train)
        for place, error in faults.items():
            self.leave_out(int(readable[place]), error)
        if inputs is None:
            return None
        readable = np.delete(readable, list(faults))
        ids = None if contents is None else np.array([contents[row] for row in readable.tolist()], np.uint64)
        return Batch(inputs, self.targets(readable), readable, ids)

    def targets(self, rows: Ints) -> Tensor:
        """Of these rows."""
        return torch.from_numpy(self.samples.targets[rows])

    def decoded(self, rows: Ints, contents: dict[int, tuple[int, int]] | None = None) -> tuple[list[object], Ints]:
        """(the samples in memory, the rows that could be read). Raises `TrainingError` unless `skip`.

        `contents` gets the ids of what was read, by row.
        """
        decoded, readable = [], []
        for row, one in self.each(rows, partial(self._decode, contents=contents)):
            if isinstance(one, BadSampleError):
                self.leave_out(row, one)
                continue
            decoded.append(one)
            readable.append(row)
        return decoded, np.array(readable, dtype=np.int64)

    def each(self, rows: Ints, read: Callable[[int], T]) -> Iterator[tuple[int, T]]:
        """(row, what `read` gives for it in a thread), one after the other; who calls asks a store again that is away.

        Raises what `ask` does.
        """
        reading = [(row, self.pool.submit(read, row)) for row in rows.tolist()]
        try:
            for row, future in reading:
                try:
                    answer = future.result()
                except UnansweredError:
                    answer = self.ask(self.samples.store_of(row), self.samples.place(row), partial(read, row))
                yield row, answer
        finally:
            for _, future in reading:
                future.cancel()

    def leave_out(self, row: int, error: BadSampleError) -> None:
        """Note a row that cannot be read; raises `TrainingError` unless `skip`."""
        if not self.skip:
            raise TrainingError(
                f"{self.samples.place(row)}: {error.message}",
                expected="samples that can all be read",
                mend="mend or remove it and start with --fresh, or leave such out: --on-bad-sample skip",
            )
        self.skipped[row] = error.message

    def _decode(self, row: int, contents: dict[int, tuple[int, int]] | None) -> object:
        try:
            sample = self.samples.read(row)
            if contents is not None:
                contents[row] = self.samples.id_of(sample)
            return self.decode(sample)
        except BadSampleError as error:
            return error


def collated(collate: Collate, decoded: Sequence[Any], train: bool) -> tuple[Inputs | None, dict[int, BadSampleError]]:
    """What a batch of decoded samples becomes, and those that are not in it: place in `decoded` -> why.

    Where the samples together raise something, each is tried alone; those that raise it then are at fault. None where
    all are. What is no sample's fault is raised again.
    """
    if not decoded:
        return None, {}
    try:
        return collate(decoded, train), {}
    except Exception as error:
        if fault_of_sample(error) is None:
            raise
        faults: dict[int, BadSampleError] = {}
        for place, one in enumerate(decoded):
            try:
                collate([one], train)
            except Exception as alone:
                fault = fault_of_sample(alone)
                if fault is None:
                    raise
                faults[place] = fault
        if not faults:
            raise
    good = [one for place, one in enumerate(decoded) if place not in faults]
    return (collate(good, train) if good else None), faults


@dataclass(frozen=True)
class StoredRows:
    """Where the features of some samples lie: in which shards of which set. Numbers and names alone."""

    set: str
    """Its name in the cache group."""
    shards: tuple[str, ...]
    """File names of the shards, without the suffix."""
    rows: Ints
    """Of the sample table, int64 [samples], ascending. Those without features are not in it."""
    shard: Ints
    """Each row's shard, int64 [samples], a number in `shards`."""
    at: Ints
    """Each row's place in its shard, int64 [samples]."""


@dataclass(frozen=True)
class StoredView:
    """Features of some rows, read from the shards of a feature set when they are asked for."""

    rows: Ints
    """As those of `StoredRows`, and so the next two."""
    shard: Ints
    at: Ints
    values: Sequence[Values]
    """Of each shard [samples, ...], memory-mapped."""

    def batch(self, rows: Ints) -> tuple[Tensor, Ints]:
        """(features, float32 [samples, ...]; the rows that they are of: those that have any)."""
        if not len(self.rows):
            return torch.zeros(0, 1), rows[:0]
        at = np.searchsorted(self.rows, rows)
        stored = (at < len(self.rows)) & (self.rows[np.minimum(at, len(self.rows) - 1)] == rows)
        if not stored.all():
            rows, at = rows[stored], at[stored]
        shard, at = self.shard[at], self.at[at]
        numbers = np.unique(shard)
        if len(numbers) == 1:
            return as_float32(self.values[numbers[0]][at]), rows
        first = self.values[numbers[0]] if len(numbers) else np.zeros((0, 1), np.float32)
        values = np.empty((len(rows), *first.shape[1:]), first.dtype)
        for number in numbers:
            here = shard == number
            values[here] = self.values[number][at[here]]
        return as_float32(values), rows


def as_float32(values: Values) -> Tensor:
    """float32 of what a shard holds: float32, or the bits of bfloat16 as uint16."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor if tensor.dtype == torch.float32 else tensor.view(torch.bfloat16).float()


@dataclass
class FeatureSource:
    """Features of a split, one view or several: an epoch's are those of one view, and then of the next."""

    samples: Samples
    views: Sequence[StoredView]
    epoch: int = 0

    def batch(self, rows: Ints, train: bool) -> Batch | None:  # noqa: ARG002  # as SampleSource's
        """The rows that have features, None if there is none."""
        features, rows = self.views[self.epoch % len(self.views)].batch(rows)
        if not len(rows):
            return None
        return Batch({"features": features}, torch.from_numpy(self.samples.targets[rows]), rows)


Source = SampleSource | FeatureSource


def split_evenly(rows: Ints, number: int, num_parts: int) -> Ints:
    """One of `num_parts` pieces whose lengths differ by one at most."""
    return rows[number * len(rows) // num_parts : (number + 1) * len(rows) // num_parts]
