"""Which samples each step took, on which worker: `training.audit` has a run write it down, as proof that none was lost.

A file for each stretch between two checkpoints, written before the checkpoint that ends it. Where a run goes on from an
earlier one, the files of the steps that come again are removed; so each step stands there once, as the weights have it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

from orchestrator.job import HeldRun, Run
from orchestrator.network import Worker
from orchestrator.training.outbox import Outbox

_FOLDER = "audit"
_FILE = re.compile(r"steps-(\d{8})-(\d{8})\.jsonl")


@dataclass(frozen=True)
class Taken:
    """What one worker took for one microbatch of a step."""

    epoch: int
    """Of all phases, from 1."""
    step: int
    """Of all phases, from 0."""
    microbatch: int
    worker: int
    rows: tuple[int, ...]
    """Of the sample table; those that could not be read are not among them."""


class Audit:
    """What a worker has taken since the newest checkpoint. Rank 0 writes down what all have."""

    def __init__(self, run: HeldRun, worker: Worker, step: int) -> None:
        """`step`: how many are done; files of later ones are removed."""
        self._worker, self._taken, self._from = worker, list[Taken](), step
        if worker.rank == 0:
            for name in run.children(_FOLDER):
                match = _FILE.fullmatch(name)
                if match is None or int(match[2]) > step:
                    run.delete(f"{_FOLDER}/{name}")

    def took(self, epoch: int, step: int, microbatch: int, rows: Sequence[int]) -> None:
        """A microbatch went through the network."""
        self._taken.append(Taken(epoch, step, microbatch, self._worker.rank, tuple(int(row) for row in rows)))

    def forget(self) -> None:
        """What was taken since the newest checkpoint is taken back, and comes again."""
        self._taken = []

    def publish(self, step: int, outbox: Outbox | None) -> None:
        """Have it written, before a checkpoint of that many steps. All workers call this; rank 0 has an outbox."""
        taken = [one for part in self._worker.all_gather(self._taken) for one in part]
        begin, self._from, self._taken = self._from, step, []
        if outbox is not None and taken:
            lines = [json.dumps(asdict(one)) for one in sorted(taken, key=lambda one: (one.step, one.microbatch))]
            name = f"{_FOLDER}/steps-{begin:08d}-{step:08d}.jsonl"
            outbox.put(partial(outbox.run.write, name, "".join(f"{line}\n" for line in lines)))


def read_audit(run: Run) -> list[Taken]:
    """All that a run's steps took, in their order; [] where `training.audit` was not set."""
    names = sorted(run.storage.children(f"{run.name}/{_FOLDER}"))
    texts = [run.read(f"{_FOLDER}/{name}") or "" for name in names]
    entries = [json.loads(line) for text in texts for line in text.splitlines()]
    return [Taken(**{**entry, "rows": tuple(entry["rows"])}) for entry in entries]
