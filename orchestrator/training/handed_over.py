"""The backbone's files on each node: downloaded once a node, or had from another node where the Hub fails."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch

from orchestrator.backbone import fetch, files_of, place_for
from orchestrator.errors import RefusedError
from orchestrator.job import BackboneCard, Plan, written_whole
from orchestrator.network import Worker

_CHUNK_BYTES = 64 * 2**20


def backbone_files(plan: Plan, worker: Worker) -> Path:
    """The folder with them. All workers call this; one of each node downloads, the others wait for it.

    A job whose files are on some node goes on, whatever the Hub says by now. Raises `RefusedError` on all workers where
    no node has them.
    """
    card, with_weights = plan.backbone, plan.weights != "random"
    problem: RefusedError | None = None
    if worker.local_rank == 0:
        try:
            fetch(card, with_weights)
        except RefusedError as error:
            problem = error
    answers: list[tuple[int, RefusedError | None]] = worker.all_gather((worker.local_rank, problem))
    problems = {rank: error for rank, (_, error) in enumerate(answers) if error is not None}
    having = [rank for rank, (local_rank, error) in enumerate(answers) if local_rank == 0 and error is None]
    if problems:
        if not having or card.kind != "hub":
            raise next(iter(problems.values()))
        _hand_over(card, files_of(card, with_weights), worker, having[0], receives=worker.rank in problems)
    return fetch(card, with_weights)


def _hand_over(card: BackboneCard, names: Sequence[str], worker: Worker, sender: int, receives: bool) -> None:
    """Send files from one worker's node to others, into the folders of the Hub's client. All workers call this."""
    places = [place_for(card, name) for name in names]
    sizes = worker.all_gather([place.stat().st_size for place in places] if worker.rank == sender else None)[sender]
    for place, size in zip(places, sizes, strict=True):
        with contextlib.ExitStack() as files:
            source = files.enter_context(place.open("rb")) if worker.rank == sender else None
            out = files.enter_context(written_whole(place)) if receives else None
            for start in range(0, size, _CHUNK_BYTES):
                chunk = torch.empty(min(_CHUNK_BYTES, size - start), dtype=torch.uint8)
                if source is not None:
                    source.readinto(chunk.numpy().data)
                worker.broadcast(chunk, sender)
                if out is not None:
                    out.write(chunk.numpy().data)
