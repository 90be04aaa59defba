"""A finished run in memory: its network on this machine's device, and what goes into it and comes out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.backbone import read_card, read_tensors, require_harmless
from orchestrator.errors import OrchestratorError, RefusedError, fault_of_sample, first_line
from orchestrator.gate import num_cores
from orchestrator.job import MODEL, Plan, Run, open_run
from orchestrator.modality import Collate, Decode, Modality, Sample, registry
from orchestrator.network import Inputs, Network, Worker, autocast, find_device, on_device, start_worker
from orchestrator.tasks import Objective, make_objective
from orchestrator.training.evaluate import evaluate_batch


@dataclass(frozen=True)
class LoadedRun:
    """A run's network, in eval mode, with what its modality does to samples."""

    run: Run
    plan: Plan
    """The run's own, with its exported model as the backbone, and for this machine."""
    modality: Modality
    decode: Decode
    collate: Collate
    network: Network
    objective: Objective
    worker: Worker

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of a sample's fields."""
        return tuple(field.name for field in self.modality.sample)

    def outputs(self, inputs: Inputs) -> Tensor:
        """float32 [samples, classes], on the CPU; in the precision of training, where this device has it."""
        given = on_device(inputs, self.worker.device)
        return evaluate_batch(self.network.logits, given, autocast(self.plan, self.worker))

    def outcomes(self, reads: Sequence[Callable[[], Sample]]) -> list[Tensor | str]:
        """Of each sample its scores, float32 [classes] (probabilities, or the predicted values), or what is wrong.

        `reads` give the samples, which are in memory all at once when they are decoded.
        """
        decoded: dict[int, Any] = {}
        outcomes: dict[int, Tensor | str] = {}
        for i, read in enumerate(reads):
            try:
                decoded[i] = self.decode(read())
            except Exception as error:
                outcomes[i] = _problem_of(error)
        outcomes |= zip(decoded, self._scores(list(decoded.values())), strict=True)
        return [outcomes[i] for i in range(len(reads))]

    def _scores(self, decoded: Sequence[Any]) -> Sequence[Tensor | str]:
        """The same of decoded samples. Where they fail together, each is tried alone."""
        if not decoded:
            return []
        try:
            return list(self.objective.scores(self.outputs(self.collate(decoded, False))))
        except Exception as error:
            problem = _problem_of(error)
        return [problem] if len(decoded) == 1 else [one for sample in decoded for one in self._scores([sample])]


def load_run(run: Run | str | Path, resources: ExitStack) -> LoadedRun:
    """A finished run, on this machine's device and with its cores until `resources` are closed.

    Raises `RefusedError` for one that has not finished, or whose files are damaged.
    """
    run = run if isinstance(run, Run) else open_run(run)
    _ = run.results  # refuses an unfinished one, and one that has lost its model
    with run.explained():
        card = read_card(run.place, with_lineage=False)
        require_harmless(card)
        try:
            read_tensors(card)
        except RefusedError as error:
            raise RefusedError("damaged", error.message, mend=run.over) from None
    began = run.plan
    here = began.job.scaling.model_copy(update={"device": "auto"})  # not where it was trained, but where we are
    changes = {"job": began.job.model_copy(update={"scaling": here}), "threads_per_worker": num_cores()}
    plan = began.model_copy(update={"backbone": card, "weights": "trained", **changes})
    modality = registry.get(plan.job.modality)
    assert modality.decode is not None
    assert modality.build is not None
    assert modality.batch is not None
    worker = resources.enter_context(start_worker(plan.threads_per_worker, find_device("auto")))
    with run.explained(), _built_from_its_files(run):
        network = modality.build(plan, run.model)
        network.module.to(worker.device, memory_format=torch.channels_last)
        network.module.eval().requires_grad_(False)
        collate, objective = modality.batch(plan, run.model), make_objective(plan, network)
    return LoadedRun(run, plan, modality, modality.decode, collate, network, objective, worker)


@contextlib.contextmanager
def _built_from_its_files(run: Run) -> Iterator[None]:
    """What a library raises on values that no run of ours has becomes a `RefusedError`, with its trace behind it."""
    try:
        yield
    except (OrchestratorError, ImportError):
        raise
    except Exception as error:
        why = f"nothing can be built from {run.place}/{MODEL}: {type(error).__name__}: {first_line(error)}"
        raise run.unbuildable(why) from error


def _problem_of(error: Exception) -> str:
    """What is wrong with a sample. Raises the error again where it is no single sample's: a library is missing."""
    fault = fault_of_sample(error)
    if fault is None:
        raise error
    return fault.message
