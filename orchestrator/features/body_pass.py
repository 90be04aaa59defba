"""How samples get into a frozen body, and its features out of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator.data import Ids
from orchestrator.errors import BadSampleError
from orchestrator.features.sources import SampleSource
from orchestrator.network import Body, Compiled, Inputs, channels_last, on_device, seed_for
from orchestrator.store import FeatureSet, Format, Values

_VIEW = 3  # what a random number is for, beside those of the loop

Ints = npt.NDArray[np.int64]


@dataclass
class Loaded:
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
class Loading:
    """Samples of one view, on their way to a set of features. `load` is for one thread, `through` for several."""

    source: SampleSource
    features: FeatureSet
    device: torch.device
    seed: int
    view: int | None
    """Of so many random changes of the samples; None: as they are."""
    _collating: threading.Lock = field(default_factory=threading.Lock)
    """Tokenizers of transformers are for one thread at a time, and torch's random numbers are one sequence."""

    def load(self, some: Ints, ids: Ids) -> Loaded:
        """What the body takes of these rows: read, held against the features there are, decoded, collated.

        `ids`: of their contents, as far as they are known without reading.
        """
        shard, _ = self.features.find(ids)
        some = some[shard < 0]
        looked = list(zip(some.tolist(), self.source.pool.map(self._look, some.tolist()),
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
        if self.device.type == "cpu":
            return Loaded(new, kept, unique, None)
        collated = self.collated(unique)
        if self.device.type == "cuda":  # from pinned memory a copy need not be waited for
            collated = [({name: value.pin_memory() for name, value in inputs.items()}, at) for inputs, at in collated]
        return Loaded(new, kept, [], collated)

    def _look(self, row: int) -> tuple[tuple[int, int] | None, object]:
        """(id of the content, the decoded sample); None for one whose features are there, or the error."""
        try:
            sample = self.source.samples.read(row)
            key = self.source.samples.id_of(sample)
            if self.features.find(np.array([key], np.uint64))[0][0] >= 0:
                return key, None
            return key, self.source.decode(sample)
        except BadSampleError as error:
            return None, error

    def collated(self, found: Sequence[tuple[tuple[int, int], Any]]) -> list[tuple[Inputs, Ints]]:
        """[(inputs, which of `found` they are)]."""
        if not found:
            return []
        if self.view is None:
            return [(self.source.collate([decoded for _, decoded in found], False), np.arange(len(found)))]
        # How a sample is changed depends on its content alone, not on those beside it: so it is the same for every job.
        groups: dict[Any, list[tuple[int, Inputs]]] = {}
        for i, (key, decoded) in enumerate(found):
            seed_for(_VIEW, self.seed, self.view, *key)
            one = self.source.collate([decoded], True)
            groups.setdefault(tuple((name, value.shape) for name, value in one.items()), []).append((i, one))
        return [
            ({name: torch.cat([one[name] for _, one in group]) for name in group[0][1]},
             np.array([i for i, _ in group]))
            for group in groups.values()
        ]  # fmt: skip

    def through(
        self, body: Body, loaded: Loaded, format: Format, compiled: Compiled | None
    ) -> list[tuple[Ids, Values]]:
        """What the body gives for a batch: [(ids, [samples, ...] as float32 or the bits of bfloat16)]."""
        collated = loaded.inputs
        if collated is None:
            with self._collating:
                collated = self.collated(loaded.found)
        return [
            (loaded.ids[at], compute(body, on_device(inputs, self.device), format, compiled)) for inputs, at in collated
        ]


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
