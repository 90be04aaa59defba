"""Extractors: processes of a cluster that run a frozen body for the workers of a job, an actor pool of Ray Data.

For where there is more hardware than the head, or what can be trained at once, needs: the pool works with those of its
processes that have a place, and grows when nodes come. Each has the network for itself and writes shards into the same
set of features. One that dies is started again by Ray and goes on from its last shard; the others do not notice.

`Extractors` and `_Pool` are used in the worker of rank 0, which hands out the pieces; `Extractor` is a process of the
pool.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import pickle
import queue
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from orchestrator.data.contents import Catalog, Ids
from orchestrator.distributed.sink import Line
from orchestrator.errors import OrchestratorError, TrainingError, first_line
from orchestrator.features.extraction import Extraction, Share
from orchestrator.features.frozen import Kept
from orchestrator.job.plans import Plan
from orchestrator.job.runs import ERROR_FILE, write_file
from orchestrator.modality import registry
from orchestrator.network.cut import Body
from orchestrator.network.worker import start_worker
from orchestrator.store.sets import CONTENTS, opened
from orchestrator.store.shards import FeatureSet, Format
from orchestrator.training.assembly import assembled

_PIECES_EACH = 4
"""For each extractor, where there are samples enough: so that all end at about the same time."""
_LEAST_OF_PIECE, _MOST_OF_PIECE = 128, 16384
"""Samples. The most is what has to be gone through again where one dies for good."""
_ASK_EVERY_S = 0.5
_STOP_GRACE_S = 20.0
"""How long extractors may take to end their batches once somebody asked to stop."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Extractors:
    """Makes the pools of a job; see `frozen.MakeElsewhere`."""

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
    """See `extraction.Elsewhere`. It is started anew for each set of features."""

    of: Extractors
    kept: Kept
    format: Format

    def __call__(
        self, features: FeatureSet, rows: Ints, ids: Ids, sizes: Ints | None, view: int | None, backwards: bool
    ) -> Iterator[Share]:
        """Compute all of these rows, each piece in one extractor. Raises what one of ours raised there."""
        plan = Plan.model_validate_json(self.of.config["plan"])
        order, ends = pieces_of(len(rows), sizes, self.of.num)
        work = _Work(self.of.config, self.of.line, self.kept, self.format, features.folder.name, view, backwards,
                     self.of.num)  # fmt: skip
        todo = ray.put((rows[order], ids[order]))
        pieces = [{"start": start, "stop": stop} for start, stop in itertools.pairwise(ends)]
        if backwards:
            pieces.reverse()
        answers: queue.SimpleQueue[Share | Exception | None] = queue.SimpleQueue()
        # In a thread, which may wait for a place on the cluster as long as it takes.
        threading.Thread(target=self._run, args=(plan, work, todo, pieces, answers), daemon=True).start()
        asked_at = 0.0
        while True:
            try:
                found = answers.get(timeout=_ASK_EVERY_S)
            except queue.Empty:
                asked_at = asked_at or (time.monotonic() if self.of.line.should_stop() else 0.0)
                if asked_at and time.monotonic() - asked_at > _STOP_GRACE_S:
                    yield Share(stopped=True)
                    return
                continue
            if found is None:
                return
            if isinstance(found, Exception):
                raise found
            yield found

    def _run(
        self, plan: Plan, work: _Work, todo: Any, pieces: list[dict[str, int]],
        answers: queue.SimpleQueue[Share | Exception | None],
    ) -> None:  # fmt: skip
        try:
            import ray.data  # noqa: PLC0415  # a second, for those jobs alone that want it

            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            context.print_on_execution_start = False
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            done = ray.data.from_items(pieces, override_num_blocks=len(pieces)).map(
                Extractor,
                fn_constructor_args=(work, [todo]),  # in a list: the reference itself, not what it stands for
                compute=ray.data.ActorPoolStrategy(size=min(self.of.num, len(pieces)), max_tasks_in_flight_per_actor=1),
                num_cpus=plan.extractor_threads,
                num_gpus=1 if self.of.use_gpu else None,
                # Where a sample kills whoever decodes it, it would else be tried for ever.
                max_task_retries=plan.job.scaling.max_failures,
            )
            for row in done.iter_rows():
                answers.put(pickle.loads(row["found"]))
            answers.put(None)
        except ray.exceptions.RayError as error:
            times = plan.job.scaling.max_failures + 1
            answers.put(TrainingError(
                f"an extractor did not do its piece of the samples, tried {times} times: {first_line(error)}",
                expected="processes that live for some minutes at a time",
                mend="look at its memory, and for a sample that ends whoever decodes it; the same command goes on, and "
                "without scaling.num_extractors the workers run the body",
            ))  # fmt: skip
        except Exception as error:
            answers.put(error)


def pieces_of(num_rows: int, sizes: Ints | None, num_extractors: int) -> tuple[Ints, list[int]]:
    """(an order of the rows, where its pieces end, 0 first): pieces of like work, the longest samples first.

    `sizes` of the rows' samples, int64; None where they say nothing of the work.
    """
    num = max(1, math.ceil(num_rows / _MOST_OF_PIECE),
              min(_PIECES_EACH * num_extractors, num_rows // _LEAST_OF_PIECE))  # fmt: skip
    if sizes is None:
        return np.arange(num_rows), [num_rows * number // num for number in range(num + 1)]
    order = np.argsort(-sizes, kind="stable")
    work = np.cumsum(sizes[order] + 1)  # a sample without a size is some work too
    ends = np.searchsorted(work, work[-1] * np.arange(1, num) / num) + 1
    return order, [0, *(end for end in np.unique(ends).tolist() if end < num_rows), num_rows]


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
    num_extractors: int


class Extractor:
    """A process of the pool: a body that is loaded once, and run over one piece after the other."""

    def __init__(self, work: _Work, todo: list[Any]) -> None:
        """`todo`: the reference to all (rows, ids) that are to be computed, of which a piece is a part."""
        self._work = work
        self._rows, self._ids = ray.get(todo[0])
        self._held = ExitStack()  # as long as this process lives
        self._error: OrchestratorError | None = None
        self._notes = False
        try:
            self._prepare()
        except Exception as error:  # the driver's error, once there is somebody to tell it to
            self._error = self._as_ours(error)

    def _prepare(self) -> None:
        work = self._work
        plan = Plan.model_validate_json(work.config["plan"])
        plan = plan.model_copy(update={"threads_per_worker": plan.extractor_threads})
        modality = work.config.get("modality") or registry.get(plan.job.modality)
        worker = start_worker(plan, use_gpu=work.config["use_gpu"])
        network, source = assembled(plan, Path(work.config["run"]), worker, modality, self._held)
        self._extraction = Extraction(
            Body(network, work.kept.cut), source, worker, Catalog(work.kept.family.parent / CONTENTS), work.format,
            modality.by_length, plan.job.training.seed,
            advance=lambda num: work.line.tell({"kind": "advance", "num": num}),
            note=self._note, should_stop=work.line.should_stop,
        )  # fmt: skip
        self._features = self._held.enter_context(opened(work.kept.set(work.name, self._note), work.kept.key))

    def _note(self, text: str) -> None:
        if self._notes:  # all of them would say the same
            self._work.line.tell({"kind": "note", "text": text})

    def __call__(self, piece: dict[str, Any]) -> dict[str, Any]:
        """{"found": a pickled `Share`, or the error that ends the job}."""
        found: Share | OrchestratorError
        try:
            found = self._error or self._compute(piece["start"], piece["stop"])
        except Exception as error:
            found = self._as_ours(error)
        self._work.line.flush()
        return {"found": pickle.dumps(found)}

    def _as_ours(self, error: Exception) -> OrchestratorError:
        """An error that the driver understands; of a library's the trace goes into the run."""
        if isinstance(error, OrchestratorError):
            return error
        place = Path(self._work.config["run"]) / ERROR_FILE
        with contextlib.suppress(OSError):
            write_file(place, traceback.format_exc())
        return TrainingError(
            f"an extractor failed: {type(error).__name__}: {first_line(error)}", mend=f"the whole trace is in {place}"
        )

    def _compute(self, start: int, stop: int) -> Share:
        work, rows, ids = self._work, self._rows[start:stop], self._ids[start:stop]
        if work.line.should_stop():
            return Share(stopped=True)
        self._notes = start == 0
        order = np.argsort(rows)
        self._features.refresh()  # one that died may have done a part of it
        to_come = start + len(rows) if work.backwards else len(self._rows) - start
        found = self._extraction.compute(
            self._features, rows[order], ids[order], work.view, work.backwards, to_come // work.num_extractors
        )
        self._features.settle(whole=False)
        found.skipped = dict(self._extraction.source.skipped)
        return found
