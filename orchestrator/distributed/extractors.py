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
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from orchestrator.data import Ids, Ints
from orchestrator.distributed.between_nodes import require_backbone
from orchestrator.distributed.events import DriverChannel, watch_driver
from orchestrator.distributed.shared_storage import require_seen
from orchestrator.errors import OrchestratorError, TrainingError, first_line
from orchestrator.features import BodyPass, ExtractionResult, FeatureCacheRef
from orchestrator.job import ERROR_FILE, Advanced, Noted, Plan
from orchestrator.network import Body, start_worker
from orchestrator.store import FeatureSet, Format, opened
from orchestrator.training import WorkerSpec, assembled

_PIECES_EACH = 4
"""For each extractor, where there are samples enough: so that all end at about the same time."""
_LEAST_OF_PIECE, _MOST_OF_PIECE = 128, 16384
"""Samples. The most is what has to be gone through again where one dies for good."""
_ASK_EVERY_S = 0.5
_STOP_GRACE_S = 20.0
"""How long extractors may take to end their batches once somebody asked to stop."""


@dataclass(frozen=True)
class Extractors:
    """Makes the pools of a job; see `features.MakeRemoteExtractor`."""

    spec: WorkerSpec
    channel: DriverChannel
    num: int
    threads: int
    """CPU threads of one extractor."""
    use_gpu: bool
    """Whether each has a GPU."""

    def __call__(self, cache: FeatureCacheRef, format: Format) -> _Pool:
        return _Pool(self, cache, format)


@dataclass(frozen=True)
class _Pool:
    """See `extraction.RemoteExtractor`. It is started anew for each set of features."""

    of: Extractors
    cache: FeatureCacheRef
    format: Format

    def __call__(
        self, features: FeatureSet, rows: Ints, ids: Ids, sizes: Ints | None, view: int | None, backwards: bool
    ) -> Iterator[ExtractionResult]:
        """Compute all of these rows, each piece in one extractor. Raises what one of ours raised there."""
        plan = self.of.spec.read_plan()
        order, ends = pieces_of(len(rows), sizes, self.of.num)
        work = _Work(self.of, self.cache, self.format, features.folder.name, view, backwards)  # fmt: skip
        todo = ray.put((rows[order], ids[order]))
        pieces = [{"start": start, "stop": stop} for start, stop in itertools.pairwise(ends)]
        if backwards:
            pieces.reverse()
        answers: queue.SimpleQueue[ExtractionResult | Exception | None] = queue.SimpleQueue()
        # In a thread, which may wait for a place on the cluster as long as it takes.
        threading.Thread(target=self._run, args=(plan, work, todo, pieces, answers), daemon=True).start()
        asked_at = 0.0
        while True:
            try:
                answer = answers.get(timeout=_ASK_EVERY_S)
            except queue.Empty:
                asked_at = asked_at or (time.monotonic() if self.of.channel.should_stop() else 0.0)
                if asked_at and time.monotonic() - asked_at > _STOP_GRACE_S:
                    yield ExtractionResult(stopped=True)
                    return
                continue
            if answer is None:
                return
            if isinstance(answer, Exception):
                raise answer
            yield answer

    def _run(
        self, plan: Plan, work: _Work, todo: Any, pieces: list[dict[str, int]],
        answers: queue.SimpleQueue[ExtractionResult | Exception | None],
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
                num_cpus=self.of.threads,
                num_gpus=plan.job.scaling.gpus_per_worker if self.of.use_gpu else None,
                # Where a sample kills whoever decodes it, it would else be tried for ever.
                max_task_retries=plan.job.scaling.max_failures,
            )
            for row in done.iter_rows():
                answers.put(pickle.loads(row["result"]))
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

    of: Extractors
    cache: FeatureCacheRef
    format: Format
    name: str
    """Of the set."""
    view: int | None
    backwards: bool


class Extractor:
    """A process of the pool: a body that is loaded once, and run over one piece after the other."""

    def __init__(self, work: _Work, todo: list[Any]) -> None:
        """`todo`: the reference to all (rows, ids) that are to be computed, of which a piece is a part."""
        self._work = work
        self._rows, self._ids = ray.get(todo[0])
        self._resources = ExitStack()  # as long as this process lives
        self._error: OrchestratorError | None = None
        self._notes = False
        watch_driver(work.of.channel.queue, trains=False)
        try:
            self._prepare()
        except Exception as error:  # the driver's error, once there is somebody to tell it to
            self._error = self._as_ours(error)

    def _prepare(self) -> None:
        work = self._work
        spec = work.of.spec
        require_seen(spec.held_run(), ray.util.get_node_ip_address())
        plan = spec.read_plan()
        modality = spec.find_modality(plan)
        device = torch.device("cuda", 0) if work.of.use_gpu else torch.device("cpu")  # Ray shows it the one it has
        worker = self._resources.enter_context(
            start_worker(work.of.threads, device, deterministic=plan.job.training.deterministic)
        )
        require_backbone(plan)
        network, source = assembled(
            plan, spec.held_run(), worker, modality, self._resources, self._note, work.of.channel.should_stop
        )
        work.cache.require_same(plan, modality)
        self._body_pass = BodyPass(
            Body(network, work.cache.cut), source, worker, work.format, modality.length_bucketing,
            plan.job.training.seed,
            advance=lambda num: work.of.channel.tell(Advanced(num)),
            note=self._note, should_stop=work.of.channel.should_stop,
        )  # fmt: skip
        self._features = self._resources.enter_context(opened(work.cache.set(work.name, self._note), work.cache.key))
        if work.cache.apart:  # what an earlier pool has computed here, and could not send
            self._features.refresh()
            self._features.send(self._features.names)

    def _note(self, text: str) -> None:
        if self._notes:  # all of them would say the same
            self._work.of.channel.tell(Noted(text))

    def __call__(self, piece: dict[str, Any]) -> dict[str, Any]:
        """{"result": a pickled `ExtractionResult`, or the error that ends the job}."""
        result: ExtractionResult | OrchestratorError
        try:
            result = self._error or self._compute(piece["start"], piece["stop"])
        except Exception as error:
            result = self._as_ours(error)
        self._work.of.channel.flush()
        return {"result": pickle.dumps(result)}

    def _as_ours(self, error: Exception) -> OrchestratorError:
        """An error that the driver understands; of a library's the trace goes into the run."""
        if isinstance(error, OrchestratorError):
            return error
        run = self._work.of.spec.held_run()
        with contextlib.suppress(OrchestratorError):
            run.write(ERROR_FILE, traceback.format_exc())
        return TrainingError(
            f"an extractor failed: {type(error).__name__}: {first_line(error)}",
            mend=f"the whole trace is in {run.place}/{ERROR_FILE}; the same command goes on",
        )

    def _compute(self, start: int, stop: int) -> ExtractionResult:
        work, rows, ids = self._work, self._rows[start:stop], self._ids[start:stop]
        if work.of.channel.should_stop():
            return ExtractionResult(stopped=True)
        self._notes = start == 0
        order = np.argsort(rows)
        self._features.refresh()  # one that died may have done a part of it
        to_come = start + len(rows) if work.backwards else len(self._rows) - start
        result = self._body_pass.compute(
            self._features, rows[order], ids[order], work.view, work.backwards, to_come // work.of.num
        )
        self._features.flush_uploads(whole=False)
        if work.cache.apart:
            self._features.send(result.names)
        result.skipped = dict(self._body_pass.source.skipped)
        return result
