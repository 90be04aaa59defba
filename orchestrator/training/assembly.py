"""What a process that trains, or that runs a frozen body, stands on: the network with its weights, and the samples."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch

from orchestrator.backbone.weights import fetch
from orchestrator.data.samples import Samples
from orchestrator.features.sources import SampleSource
from orchestrator.job.plans import Plan
from orchestrator.job.runs import SAMPLES
from orchestrator.modality.contract import Modality
from orchestrator.network.model import Network, freeze, set_mode
from orchestrator.network.worker import Worker


def assembled(
    plan: Plan, run: Path, worker: Worker, modality: Modality, held: ExitStack
) -> tuple[Network, SampleSource]:
    """The plan's network on the worker's device, as for evaluation, and the run's samples; `held` ends their threads.

    Raises `WeightsError` and what the plugin raises.
    """
    assert modality.build is not None
    assert modality.batch is not None
    assert modality.decode is not None
    directory = _fetch(plan, worker)
    network = modality.build(plan, directory)
    freeze(network, plan)
    network.module.to(worker.device)
    network.module.to(memory_format=torch.channels_last)
    set_mode(network, plan, training=False)
    source = SampleSource(
        Samples(run / SAMPLES, tuple(field.name for field in modality.sample)),
        modality.decode,
        modality.batch(plan, directory),
        skip=plan.job.data.on_bad_sample == "skip",
        pool=held.enter_context(ThreadPoolExecutor(max_workers=plan.threads_per_worker)),
    )
    return network, source


def _fetch(plan: Plan, worker: Worker) -> Path:
    """The backbone's files; on each node one worker downloads, the others wait for it."""
    with_weights = plan.weights != "random"
    if worker.local_rank == 0:
        fetch(plan.backbone, with_weights)
    worker.wait()
    return fetch(plan.backbone, with_weights)
