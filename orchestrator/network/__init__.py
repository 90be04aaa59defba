"""Torch modules: body and head, how they are built, cut, frozen and run by one worker.

In: a Plan and the backbone's directory. Out: a `Network` with its new head, cut where a proof on real samples holds;
a `Worker`, which knows its rank and device and exchanges tensors with the others.

    worker     one worker: rank, device, threads, what it sums up with the others
    model      body and head: build, load, freeze, parameter groups
    pooled     a head of our own on bodies that transformers has no head for
    cut        where a network is cut into body and head, and the proof
    batchnorm  running statistics over microbatches, the same on any number of workers
"""

from orchestrator.network.batchnorm import MicrobatchStatistics as MicrobatchStatistics
from orchestrator.network.cut import Body as Body, Cut as Cut, Head as Head, find_cut as find_cut
from orchestrator.network.model import (
    Inputs as Inputs,
    Network as Network,
    build_module as build_module,
    build_transformers as build_transformers,
    freeze as freeze,
    load_body as load_body,
    make_config as make_config,
    make_optimizer as make_optimizer,
    new_layer as new_layer,
    quiet as quiet,
    set_mode as set_mode,
)
from orchestrator.network.pooled import build_pooled as build_pooled
from orchestrator.network.worker import (
    Worker as Worker,
    autocast as autocast,
    channels_last as channels_last,
    find_device as find_device,
    on_device as on_device,
    seed_for as seed_for,
    start_worker as start_worker,
    with_threads as with_threads,
)
