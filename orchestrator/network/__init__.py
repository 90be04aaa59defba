"""Torch modules: body and head, how they are built, cut, frozen and run by one worker.

In: a Plan and the backbone's directory. Out: a `Network` with its new head, cut into body and head where a trial on
real samples shows that the two give the same as the whole; a `Worker`, which knows its rank and device and exchanges
tensors with the others.

    worker     one worker: rank, device, threads, what it exchanges with the others
    network    body and head, what is frozen, train and eval mode
    config     config.json -> what a network is built from
    headers    a network from the headers of its weights alone
    loading    a checkpoint -> a network with its new head: transformers, timm, a plugin's own module
    optimizer  parameter groups and their rates
    adapters   low-rank matrices beside those of a frozen body, and their merging
    pooled     a head of our own on bodies that transformers has no head for
    usage      code for model cards: how an exported model is called, and what its scores say
    strategy   how parameters are distributed over the workers: gradients, checkpoint, export, initial weights
    cut        where a network is cut into body and head, and the trial of it
    batchnorm  running statistics over microbatches, the same on any number of workers
"""

from orchestrator.network.adapters import adapt as adapt, adapted_modules as adapted_modules, merge as merge
from orchestrator.network.batchnorm import MicrobatchStatistics as MicrobatchStatistics
from orchestrator.network.config import make_config as make_config
from orchestrator.network.cut import (
    TOLERANCE as TOLERANCE,
    Body as Body,
    Cut as Cut,
    Head as Head,
    find_cut as find_cut,
)
from orchestrator.network.headers import from_headers as from_headers
from orchestrator.network.loading import (
    build_module as build_module,
    build_transformers as build_transformers,
    load_body as load_body,
    new_layer as new_layer,
    part_of as part_of,
    quiet as quiet,
)
from orchestrator.network.network import (
    Inputs as Inputs,
    Network as Network,
    StateDict as StateDict,
    freeze as freeze,
    is_adapter as is_adapter,
    set_mode as set_mode,
    within as within,
)
from orchestrator.network.optimizer import (
    make_optimizer as make_optimizer,
    take_step as take_step,
)
from orchestrator.network.pooled import build_pooled as build_pooled
from orchestrator.network.strategy import (
    GradientReduction as GradientReduction,
    Replicated as Replicated,
    Strategy as Strategy,
)
from orchestrator.network.usage import from_logits as from_logits, from_pipeline as from_pipeline
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
