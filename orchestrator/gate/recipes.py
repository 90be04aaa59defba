"""A method -> its recipe: which phases, at which rates, for how long. The one place where a method becomes phases."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.backbone import Tensors
from orchestrator.errors import JobError
from orchestrator.gate.adapters import adapter_of, require_transformer
from orchestrator.job import DataSummary, Job, Method, Phase, Recipe
from orchestrator.modality import Fit, Modality

_SGD_FACTOR = 10.0
_LEAST_STEPS = 400
"""Where the body moves: of few samples a phase takes as many epochs as give these steps."""
_LEAST_STEPS_OF_TRANSFORMERS, _MOST_EPOCHS_OF_TRANSFORMERS = 200, 100
"""A transformer takes fewer, and no more epochs for them than this."""
_BATCH_SIZE, _BATCH_SIZE_OF_FEW, _FEW_FOR_A_BATCH = 32, 16, 500
"""Where the body moves, fewer samples than the last come in smaller batches: more steps of the same work."""
_FEW_A_CLASS, _FEWEST_COMPARED = 12, 4
"""Fewer samples of a class are learnt by what is alike; so many have to be in a microbatch to be compared."""
_FEWEST_ALIKE, _KERNELS = 4, 4
"""Of what tells a transformer: matrices of one shape; how many times as many matrices as kernels it has."""
Kind = Literal["batch_norm", "transformer", "other", "unknown"]
_FEW_SAMPLES = 50
"""Below, training from pretrained weights keeps their BatchNorm statistics: those of so few samples are worse."""
_FEW_AFTER_A_HEAD = 2_000
"""The same where the head was trained on features under these statistics, and would have to be learnt anew."""


@dataclass(frozen=True)
class _OfTransformers:
    """What a transformer wants instead: its body moves at a tenth of the rate, and overfits sooner."""

    epochs: int
    rate: float
    head_rate: float
    """The new layer begins at random, and has further to go."""


@dataclass(frozen=True)
class _PhaseRow:
    trains: Literal["head", "adapter", "everything"]
    epochs: int
    rate: float
    """For AdamW."""
    of_transformers: _OfTransformers | None = None
    is_first: bool = False
    """Whether it makes ready what follows: the job's epochs and rates are those of the phases after it."""
    solver: Literal["steps", "probe"] = "steps"
    """probe: on stored features of the samples as they are; in `epochs` of steps where there are none."""
    least_steps: int = 0
    """Of few samples it takes more epochs, until there are as many steps."""
    must_win: bool = False
    may_contrast: bool = False
    """Whether few samples may be learnt by what is alike: the head behind a fitted one can be fitted anew."""


@dataclass(frozen=True)
class _MethodRow:
    weights: Literal["pretrained", "random"]
    """What it begins with."""
    phases: tuple[_PhaseRow, ...]
    budget_min: float | None = None
    """By default."""
    fewest_validation: int = 0
    """A validation split of fewer samples tells less than they are worth in training: by default there is none then."""


# docs/methods.md has the runs that these were chosen by.
_METHODS: Mapping[Method, _MethodRow] = {
    "head": _MethodRow("pretrained", (_PhaseRow("head", 40, 3e-3),)),
    "full": _MethodRow(
        "pretrained", (_PhaseRow("everything", 20, 1e-3, _OfTransformers(6, 1e-4, 3e-3), least_steps=_LEAST_STEPS),)
    ),
    "auto": _MethodRow(
        "pretrained",
        (
            _PhaseRow("head", 40, 3e-3, is_first=True, solver="probe"),
            _PhaseRow(
                "everything",
                20,
                3e-4,
                _OfTransformers(6, 1e-4, 1e-3),
                least_steps=_LEAST_STEPS,
                must_win=True,
                may_contrast=True,
            ),
        ),
        budget_min=60.0,
        fewest_validation=10,
    ),
    # Kumar et al. 2022 (arXiv 2202.10054): a converged head spares the body the large gradients of a random one.
    "lp-ft": _MethodRow(
        "pretrained",
        (
            _PhaseRow("head", 40, 3e-3, is_first=True, solver="probe"),
            _PhaseRow(
                "everything", 20, 3e-4, _OfTransformers(6, 1e-4, 1e-3), least_steps=_LEAST_STEPS, may_contrast=True
            ),
        ),
    ),
    # Ten times the rate of `full`, whatever the rank (Schulman et al. 2025, LoRA Without Regret).
    "lora": _MethodRow(
        "pretrained", (_PhaseRow("adapter", 20, 1e-3, _OfTransformers(6, 1e-3, 3e-3), least_steps=_LEAST_STEPS),)
    ),
    "scratch": _MethodRow("random", (_PhaseRow("everything", 40, 1e-3, least_steps=_LEAST_STEPS),)),
}


def first_weights(job: Job) -> Literal["pretrained", "random"]:
    """What the job's method begins with."""
    return _METHODS[job.method].weights


def may_keep_features(job: Job) -> bool:
    """Whether the job has a phase with a frozen body, whose features may be kept."""
    return job.training.features == "once" and any(phase.trains == "head" for phase in _METHODS[job.method].phases)


def fewest_validation(job: Job) -> int:
    """A validation split that is smaller is not taken, unless the job asks for it."""
    return _METHODS[job.method].fewest_validation


def settings_of(job: Job, modality: Modality) -> dict[str, Any]:
    """The plugin's settings as the job has them, with random changes of samples where the method is better for them.

    Numbers may be of what such a change moves, places and angles, so that a regression has none by default.
    """
    moves = any(phase.trains == "everything" for phase in _METHODS[job.method].phases)
    asked = any(job.settings.get(name) is not None for name in modality.augments)
    by_default = modality.augments if moves and not asked and job.task != "regression" else {}
    return {**job.settings, **by_default}


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
            expected="a method with a frozen body, with augmentation",
            mend="leave training.views out, or set method head (--method head) and settings.augment",
        )
    return views


def kind_of(tensors: Tensors | None) -> Kind:
    """What kind of network has these weights, by their shapes: it decides the rates that suit it.

    A transformer is told by its square matrices (queries, keys, values, or the three in one), four and more of one
    shape, beside hardly any kernel of a convolution; BatchNorm by its statistics.
    """
    if tensors is None:
        return "unknown"
    if any(name.endswith("running_mean") for name in tensors):
        return "batch_norm"
    shapes = [shape for _, shape in tensors.values()]
    matrices = Counter(tuple(shape) for shape in shapes if len(shape) == 2)
    num_kernels = sum(len(shape) > 2 and max(shape[2:]) > 1 for shape in shapes)
    attends = any(num >= _FEWEST_ALIKE and rows in (columns, 3 * columns) for (rows, columns), num in matrices.items())
    return "transformer" if attends and _KERNELS * num_kernels < matrices.total() else "other"


def make_recipe(job: Job, data: DataSummary, keeps_features: bool, kind: Kind) -> Recipe:
    """The recipe of the job's method with every default resolved. Raises `JobError`.

    `keeps_features`: a frozen body gives the same for a sample in every epoch, so that it has to run once alone.
    `kind`: of the network, as far as its weights tell. BatchNorm wants two samples in a microbatch.
    """
    training, method = job.training, _METHODS[job.method]
    num_train, num_validation = data.num_samples["train"], data.num_samples["validation"]
    num_microbatches = job.num_microbatches
    batch_size = min(training.batch_size or _batch_size(method, num_train, num_microbatches), num_train)
    if num_microbatches < job.scaling.num_workers:
        raise JobError(
            f"training.num_microbatches = {num_microbatches} leaves workers idle",
            expected=f"{job.scaling.num_workers} or more",
            mend="leave it out, or lower scaling.num_workers",
        )
    steps_per_epoch = math.ceil(num_train / batch_size)
    phases = tuple(_phase(job, method, row, num_train, steps_per_epoch, keeps_features, kind) for row in method.phases)
    if any(phase.trains == "adapter" for phase in phases):
        require_transformer(kind)
    smallest = num_train // steps_per_epoch // num_microbatches
    if _contrasts(job, method, data, 2 * (num_train // 2 // steps_per_epoch // num_microbatches)):
        phases = tuple(
            phase.model_copy(update={"loss": "contrastive"}) if row.may_contrast else phase
            for row, phase in zip(method.phases, phases, strict=True)
        )
    if smallest < (2 if any(phase.batch_norm == "train" for phase in phases) else 1):
        raise JobError(
            f"{num_train} training samples in batches of {batch_size} leave microbatches of {smallest}",
            expected="2 samples a microbatch for BatchNorm in train mode, 1 otherwise",
            mend="raise training.batch_size, or lower training.num_microbatches or scaling.num_workers",
        )
    if training.refit and num_validation:
        phases += tuple(_refitted(phase, math.ceil((num_train + num_validation) / batch_size)) for phase in phases)
    return Recipe(
        phases=phases, batch_size=batch_size, num_microbatches=num_microbatches, steps_per_epoch=steps_per_epoch,
        budget_s=_budget_s(job, method),
    )  # fmt: skip


def _batch_size(method: _MethodRow, num_train: int, num_microbatches: int) -> int:
    """By default. More than two parts of a small batch would leave BatchNorm too few samples to see."""
    moves = any(row.trains != "head" for row in method.phases)
    few = moves and num_train < _FEW_FOR_A_BATCH and num_microbatches <= 2
    return _BATCH_SIZE_OF_FEW if few else _BATCH_SIZE


def _contrasts(job: Job, method: _MethodRow, data: DataSummary, smallest: int) -> bool:
    """Whether the body learns by what is alike. Raises `JobError` where that is asked for and cannot be.

    `smallest`: samples of a microbatch, in which they are compared. By default few samples a class are learnt so, but
    not groups: those of one class would be brought together by what their few speakers or patients have in common.
    """
    training, per_class = job.training, data.per_class.get("train", ())
    if training.loss == "task":
        return False
    why_not = ""
    if not any(row.may_contrast for row in method.phases):
        why_not = f"method {job.method} has no head that is fitted to features"
    elif job.task != "single-label":
        why_not = f"with the task {job.task} samples have no single class to be alike by"
    elif training.mix != "none":
        why_not = f"training.mix = {training.mix!r} makes samples of several classes"
    elif training.ema is not None:
        why_not = f"training.ema = {training.ema:g} averages weights that no head is fitted to"
    elif training.features != "once":
        why_not = "training.features = 'every step' keeps no features that a head is fitted to"
    elif training.views is not None:
        why_not = "training.views keeps random views of each sample, from which a head learns in steps"
    elif smallest < _FEWEST_COMPARED:
        why_not = f"a microbatch of {smallest} samples is too small to compare them"
    elif max(per_class, default=0) < 2:
        why_not = "no class has two training samples"
    if training.loss == "contrastive":
        if why_not:
            raise JobError(
                f"training.loss = 'contrastive', and {why_not}", expected="auto, or task",
                mend="leave training.loss out",
            )  # fmt: skip
        return True
    is_asked_otherwise = training.label_smoothing > 0 or training.head_learning_rate is not None
    num, paired = sum(per_class), sum(num for num in per_class if num > 1)
    is_few = num < _FEW_A_CLASS * len(per_class) and 2 * paired > num
    return not why_not and is_few and job.data.group_column is None and not is_asked_otherwise


def _refitted(phase: Phase, steps_per_epoch: int) -> Phase:
    num_steps = phase.num_steps if phase.solver == "probe" else phase.epochs * steps_per_epoch
    return phase.model_copy(update={"refits": True, "must_win": False, "num_steps": num_steps})


def _budget_s(job: Job, method: _MethodRow) -> float | None:
    asked = job.training.budget_min
    if asked is not None and all(phase.trains == "head" for phase in method.phases):
        raise JobError(
            f"training.budget_min = {asked:g} makes the epochs fit in which the body is trained, and method "
            f"{job.method} has none",
            expected="a method that moves the body: auto, full, lp-ft, lora, scratch",
            mend="leave training.budget_min (--budget) out: a head on stored features takes seconds",
        )
    minutes = asked or (None if job.training.epochs else method.budget_min)
    return None if minutes is None else 60 * minutes


def _phase(
    job: Job, method: _MethodRow, row: _PhaseRow, num_train: int, steps_per_epoch: int, keeps_features: bool, kind: Kind
) -> Phase:
    training, other = job.training, row.of_transformers
    factor = _SGD_FACTOR if training.optimizer == "sgd" else 1.0
    default_rate, default_head_rate, default_epochs = factor * row.rate, factor * row.rate, row.epochs
    least_epochs = math.ceil(row.least_steps / steps_per_epoch)
    if other is not None and kind == "transformer":
        default_rate, default_head_rate, default_epochs = factor * other.rate, factor * other.head_rate, other.epochs
        few = math.ceil(min(row.least_steps, _LEAST_STEPS_OF_TRANSFORMERS) / steps_per_epoch)
        least_epochs = min(_MOST_EPOCHS_OF_TRANSFORMERS, few)
    default_epochs = max(default_epochs, least_epochs)
    epochs = default_epochs if row.is_first else training.epochs or default_epochs
    rate = None if row.is_first else training.learning_rate
    # A probe wants each sample once: those that are changed at random are taken as they are.
    is_probe = row.solver == "probe" and training.features == "once" and training.views is None
    return Phase(
        trains=row.trains,
        source="features" if row.trains == "head" and (keeps_features or is_probe) else "samples",
        solver="probe" if is_probe else "steps",
        epochs=1 if is_probe else epochs,
        num_steps=1 if is_probe else steps_per_epoch * epochs,
        epochs_in_steps=epochs if is_probe else 0,
        must_win=row.must_win,
        learning_rate=rate or default_rate,
        head_learning_rate=(None if row.is_first else training.head_learning_rate) or rate or default_head_rate,
        batch_norm=_batch_norm(job, method, row, num_train, kind),
        layer_decay=1.0 if row.trains == "head" else training.layer_decay,
        adapter=adapter_of(training) if row.trains == "adapter" else None,
    )


def _batch_norm(
    job: Job, method: _MethodRow, row: _PhaseRow, num_train: int, kind: Kind
) -> Literal["train", "frozen", "none"]:
    asked = job.training.batch_norm
    if asked == "train" and not any(phase.trains == "everything" for phase in method.phases):
        raise JobError(
            "training.batch_norm = 'train' would change a frozen body", expected="frozen or auto",
            mend="leave it out, or train everything: method full",
        )  # fmt: skip
    if kind not in ("batch_norm", "unknown"):
        return "none"
    if row.trains != "everything":
        return "frozen"
    if asked != "auto":
        return asked
    few = _FEW_AFTER_A_HEAD if method.phases[0].is_first else _FEW_SAMPLES
    return "frozen" if method.weights == "pretrained" and num_train < few else "train"
