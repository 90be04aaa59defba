"""What a process that trains, or that runs a frozen body, stands on: the network with its weights, and the samples."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orchestrator.data import Asker, open_storage, table_of
from orchestrator.errors import RefusedError, TrainingError, storage_failed
from orchestrator.features import Readers, SampleSource, SourceSpec
from orchestrator.job import AWAY_S, HeldRun, Lease, Plan
from orchestrator.modality import Modality, registry
from orchestrator.network import Network, Worker
from orchestrator.training.handed_over import backbone_files

_MOST_READERS = 32


@dataclass(frozen=True)
class WorkerSpec:
    """What a process gets that works on a run, on this machine or another one."""

    plan_json: str
    storage: str
    """The place where the runs lie, as any machine finds it."""
    lease: Lease
    """Of the run that is worked on."""
    verify_content: bool = False
    """Read every sample to find out which features are stored, whatever is remembered of its file."""
    modality: Modality | None = None
    """Where it was registered in the driver's process, so that no other one could look it up."""

    def read_plan(self) -> Plan:
        """The plan."""
        return Plan.model_validate_json(self.plan_json)

    def held_run(self) -> HeldRun:
        """The run, to write."""
        return HeldRun(open_storage(self.storage), self.lease)

    def find_modality(self, plan: Plan) -> Modality:
        """The plan's modality. Raises `PluginError`."""
        return self.modality or registry.get(plan.job.modality)


def assembled(
    plan: Plan, run: HeldRun, worker: Worker, modality: Modality, resources: ExitStack,
    note: Callable[[str], None] = lambda _: None, should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Network, SampleSource]:  # fmt: skip
    """The plan's network on the worker's device, as for evaluation, and the run's samples.

    Samples are decoded in threads, which end with `resources`, as do the processes that read for a GPU. Where their
    store does not answer it is asked again for minutes, `note` is told so, and `should_stop` says when to end.

    Raises `WeightsError` and what the plugin raises.
    """
    assert modality.build is not None
    assert modality.batch is not None
    assert modality.decode is not None
    directory = backbone_files(plan, worker)
    network = modality.build(plan, directory)
    network.module.to(worker.device)
    network.module.to(memory_format=torch.channels_last)
    network.module.eval()
    table = _table(run, worker)
    if table is None:
        raise TrainingError(
            f"the run {run.name} has lost its sample table", expected="the storage as the driver sees it, on each node",
            mend="see that all nodes have the same storage, or start over with --fresh",
        )  # fmt: skip
    name = modality.name
    is_installed = not registry.is_registered(name) and registry.claims(name) and registry.get(name) is modality
    spec = SourceSpec(plan, table, directory, None if is_installed else modality)

    def ask(store: str, place: str, call: Callable[[], Any]) -> Any:
        try:
            return Asker(store, AWAY_S, note, lambda _away_s: should_stop())(place, call)
        except RefusedError as error:
            raise storage_failed(error) from None

    source = spec.opened(resources.enter_context(ThreadPoolExecutor(max_workers=worker.threads)), ask)
    source.readers = _readers(spec, worker, note)
    if source.readers is not None:
        resources.callback(source.readers.close)
    return network, source


def _readers(spec: SourceSpec, worker: Worker, note: Callable[[str], None]) -> Readers | None:
    """Processes that read samples beside a GPU, on all cores of this worker but one, which it needs itself."""
    num = min(worker.threads - 1, _MOST_READERS)
    if worker.device.type == "cpu" or num < 2 or not hasattr(os, "memfd_create"):
        return None
    return Readers(spec, num, worker.device.type == "cuda", note)


def _table(run: HeldRun, worker: Worker) -> Path | None:
    """The run's sample table; of an object store one worker of each node fetches it, the others wait."""
    if worker.local_rank == 0:
        table_of(run)
    worker.barrier()
    return table_of(run)
