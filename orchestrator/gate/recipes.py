"""A method -> its recipe: which phases, at which rates, for how long. The one place that knows methods by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from orchestrator.errors import JobError
from orchestrator.job import Job, Method, Phase, Recipe
from orchestrator.modality import Fit

_SGD_FACTOR = 10.0
_FEW_SAMPLES = 50
"""Below, training from pretrained weights keeps their BatchNorm statistics: those of so few samples are worse."""
_FEW_AFTER_A_HEAD = 2_000
"""The same where the head was trained on features under these statistics, and would have to be learnt anew."""


@dataclass(frozen=True)
class _PhaseRow:
    trains: Literal["head", "everything"]
    epochs: int
    rate: float
    """For AdamW."""
    is_first: bool = False
    """Whether it makes ready what follows: the job's epochs and rates are those of the phases after it."""


@dataclass(frozen=True)
class _MethodRow:
    weights: Literal["pretrained", "random"]
    """What it begins with."""
    phases: tuple[_PhaseRow, ...]
    batch_size: int = 32


# docs/methods.md has the runs that these were chosen by.
_METHODS: Mapping[Method, _MethodRow] = {
    "head": _MethodRow("pretrained", (_PhaseRow("head", 40, 3e-3),)),
    "full": _MethodRow("pretrained", (_PhaseRow("everything", 20, 1e-3),)),
    # Kumar et al. 2022 (arXiv 2202.10054): a converged head spares the body the large gradients of a random one.
    "lp-ft": _MethodRow("pretrained", (_PhaseRow("head", 40, 3e-3, is_first=True), _PhaseRow("everything", 20, 3e-4))),
    "scratch": _MethodRow("random", (_PhaseRow("everything", 40, 1e-3),)),
}


def first_weights(job: Job) -> Literal["pretrained", "random"]:
    """What the job's method begins with."""
    return _METHODS[job.method].weights


def may_keep_features(job: Job) -> bool:
    """Whether the job has a phase with a frozen body, whose features may be kept."""
    return job.training.features == "once" and any(phase.trains == "head" for phase in _METHODS[job.method].phases)


def num_views(job: Job, adapted: Fit) -> int:
    """How many random views of each training sample are kept; 0: the samples as they are. Raises `JobError`."""
    views = job.training.views
    if views is None:
        return 0
    if not may_keep_features(job) or not adapted.augmented:
        if job.training.features != "once":
            why = "the body runs in every step"
        else:
            why = "the samples are not augmented" if may_keep_features(job) else f"the method is {job.method}"
        raise JobError(
            f"training.views = {views} keeps random views of each sample, and {why}",
            expected="method head, with augmentation",
            mend="leave training.views out, or set settings.augment",
        )
    return views


def make_recipe(job: Job, num_train: int, keeps_features: bool, has_batch_norm: bool = True) -> Recipe:
    """The recipe of the job's method with every default resolved. Raises `JobError`.

    `keeps_features`: a frozen body gives the same for a sample in every epoch, so that it has to run once alone.
    `has_batch_norm`: whether the network may have layers of it, which want two samples in a microbatch.
    """
    training, method = job.training, _METHODS[job.method]
    batch_size = min(training.batch_size or method.batch_size, num_train)
    num_microbatches = job.num_microbatches
    if num_microbatches < job.scaling.num_workers:
        raise JobError(
            f"training.num_microbatches = {num_microbatches} leaves workers idle",
            expected=f"{job.scaling.num_workers} or more",
            mend="leave it out, or lower scaling.num_workers",
        )
    steps_per_epoch = math.ceil(num_train / batch_size)
    phases = tuple(_phase(job, method, row, num_train, steps_per_epoch, keeps_features) for row in method.phases)
    if not has_batch_norm:
        phases = tuple(phase.model_copy(update={"batch_norm": "none"}) for phase in phases)
    smallest = num_train // steps_per_epoch // num_microbatches
    if smallest < (2 if any(phase.batch_norm == "train" for phase in phases) else 1):
        raise JobError(
            f"{num_train} training samples in batches of {batch_size} leave microbatches of {smallest}",
            expected="2 samples a microbatch for BatchNorm in train mode, 1 otherwise",
            mend="raise training.batch_size, or lower training.num_microbatches or scaling.num_workers",
        )
    return Recipe(
        phases=phases, batch_size=batch_size, num_microbatches=num_microbatches, steps_per_epoch=steps_per_epoch
    )


def _phase(
    job: Job, method: _MethodRow, row: _PhaseRow, num_train: int, steps_per_epoch: int, keeps_features: bool
) -> Phase:
    training = job.training
    default_rate = row.rate * (_SGD_FACTOR if training.optimizer == "sgd" else 1.0)
    epochs = row.epochs if row.is_first else training.epochs or row.epochs
    rate = None if row.is_first else training.learning_rate
    return Phase(
        trains=row.trains,
        source="features" if row.trains == "head" and keeps_features else "samples",
        epochs=epochs,
        num_steps=steps_per_epoch * epochs,
        learning_rate=rate or default_rate,
        head_learning_rate=(None if row.is_first else training.head_learning_rate) or rate or default_rate,
        batch_norm=_batch_norm(job, method, row, num_train),
    )


def _batch_norm(job: Job, method: _MethodRow, row: _PhaseRow, num_train: int) -> Literal["train", "frozen"]:
    asked = job.training.batch_norm
    if row.trains == "head":
        if asked == "train" and all(phase.trains == "head" for phase in method.phases):
            raise JobError(
                "training.batch_norm = 'train' would change a frozen body", expected="frozen or auto",
                mend="leave it out, or train everything: method full",
            )  # fmt: skip
        return "frozen"
    if asked != "auto":
        return asked
    few = _FEW_AFTER_A_HEAD if method.phases[0].is_first else _FEW_SAMPLES
    return "frozen" if method.weights == "pretrained" and num_train < few else "train"
