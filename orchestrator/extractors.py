"""Extractors: processes of a cluster that run a frozen body for the workers of a job, an actor pool of Ray Data.

For where there is more hardware than the head, or what can be trained at once, needs: the pool works with those of its
processes that have a place, and grows when nodes come. Each has the network for itself and writes shards into the same
set of features. One that dies is started again by Ray and goes on from its last shard; the others do not notice.
"""

from __future__ import annotations

import itertools
import logging
import math
import pickle
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from orchestrator import registry
from orchestrator.assembly import assembled
from orchestrator.contents import Catalog, Ids
from orchestrator.cut import Body
from orchestrator.errors import OrchestratorError
from orchestrator.extraction import Extraction, Share
from orchestrator.frozen import Kept
from orchestrator.plans import Plan
from orchestrator.runs import SAMPLES
from orchestrator.samples import Samples
from orchestrator.sets import CONTENTS, opened
from orchestrator.sink import Line
from orchestrator.store import FeatureSet, Format
from orchestrator.worker import start_worker

_PIECES_EACH = 4
"""Of the samples, for each extractor at least: so that all end at about the same time."""
_MOST_OF_PIECE = 16384
"""Samples; what one that dies for good leaves to others."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Extractors:
    """The pool of a job; see `frozen.Extractors`."""

    config: Mapping[str, Any]
    """What its workers got."""
    line: Line
    num: int
    use_gpu: bool
    """One each."""

    def __call__(self, kept: Kept, format: Format) -> _Pool:
        return _Pool(self, kept, format)


@dataclass(frozen=True)
class _Pool:
    """See `extraction.Elsewhere`."""

    of: Extractors
    kept: Kept
    format: Format

    def __call__(
        self, features: FeatureSet, rows: Ints, ids: Ids, view: int | None, backwards: bool
    ) -> Iterator[Share]:
        """Compute all of these rows, each piece in one extractor. Raises what one of ours raised there."""
        import ray.data  # noqa: PLC0415  # a second, for those jobs alone that want it

        plan = Plan.model_validate_json(self.of.config["plan"])
        num_pieces = max(math.ceil(len(rows) / _MOST_OF_PIECE), min(_PIECES_EACH * self.of.num, len(rows)))
        work = _Work(
            self.of.config, self.of.line, self.kept, self.format, features.folder.name, view, backwards,
            times=num_pieces / self.of.num,
        )  # fmt: skip
        # Pieces of like length where samples are batched by it; each goes through the body in an order of its own.
        order = _by_length(self.of.config, plan, rows)
        todo = ray.put((rows[order], ids[order]))
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ends = [len(rows) * number // num_pieces for number in range(num_pieces + 1)]
        pieces = [{"start": start, "stop": stop} for start, stop in itertools.pairwise(ends)]
        done = ray.data.from_items(pieces, override_num_blocks=num_pieces).map(
            Extractor,
            fn_constructor_args=(work, [todo]),  # in a list: the reference itself, not what it stands for
            compute=ray.data.ActorPoolStrategy(size=self.of.num, max_tasks_in_flight_per_actor=1),
            num_cpus=plan.threads_per_worker,
            num_gpus=1 if self.of.use_gpu else None,
        )
        for row in done.iter_rows():
            found: Share | OrchestratorError = pickle.loads(row["found"])
            if isinstance(found, OrchestratorError):
                raise found
            yield found


def _by_length(config: Mapping[str, Any], plan: Plan, rows: Ints) -> Ints:
    """The places of `rows` by the lengths of their samples, where the modality is batched by them."""
    modality = config.get("modality") or registry.get(plan.job.modality)
    if not modality.by_length:
        return np.arange(len(rows))
    samples = Samples(Path(config["run"]) / SAMPLES, tuple(field.name for field in modality.sample))
    found: Ints = np.searchsorted(rows, samples.by_length(rows))
    return found


@dataclass(frozen=True)
class _Work:
    """What an extractor has to know."""

    config: Mapping[str, Any]
    line: Line
    kept: Kept
    format: Format
    name: str
    """Of the set."""
    view: int | None
    backwards: bool
    times: float
    """So many pieces are for one extractor."""


class Extractor:
    """A process of the pool: a body that is loaded once, and run over one piece after the other."""

    def __init__(self, work: _Work, todo: list[Any]) -> None:
        """`todo`: the reference to all (rows, ids) that are to be computed, of which a piece is a part."""
        plan, run = Plan.model_validate_json(work.config["plan"]), Path(work.config["run"])
        modality = work.config.get("modality") or registry.get(plan.job.modality)
        self._work = work
        self._rows, self._ids = ray.get(todo[0])
        held = ExitStack()  # as long as this process lives
        worker = start_worker(plan)
        network, source = assembled(plan, run, worker, modality, held)

        def note(text: str) -> None:
            work.line.tell({"kind": "note", "text": text})

        self._extraction = Extraction(
            Body(network, work.kept.cut), source, worker, Catalog(work.kept.family.parent / CONTENTS), work.format,
            modality.by_length, plan.job.training.seed,
            advance=lambda num: work.line.tell({"kind": "advance", "num": num}),
            note=note, should_stop=work.line.should_stop,
        )  # fmt: skip
        self._features = held.enter_context(opened(work.kept.set(work.name, note), work.kept.key))
        self._held = held

    def __call__(self, piece: dict[str, Any]) -> dict[str, Any]:
        """{"found": a pickled `Share`, or the error that ends the job}."""
        rows, ids = (some[piece["start"] : piece["stop"]] for some in (self._rows, self._ids))
        order = np.argsort(rows)
        found: Share | OrchestratorError
        try:
            self._features.refresh()  # one that died may have done a part of it
            found = self._extraction.compute(
                self._features, rows[order], ids[order], self._work.view, self._work.backwards, self._work.times
            )
            self._features.settle(whole=False)
            found.skipped = dict(self._extraction.source.skipped)
        except OrchestratorError as error:
            found = error
        self._work.line.flush()
        return {"found": pickle.dumps(found)}
