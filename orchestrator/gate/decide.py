"""(Modality, BackboneCard, Profile, Job) -> Plan, or a refusal. Pure: it reads nothing and downloads nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from orchestrator.backbone import Tensors, require_weights
from orchestrator.errors import JobError, RefusedError, did_you_mean
from orchestrator.job import BackboneCard, BackboneRow, DataSummary, Job, Parameters, Plan, Schedule, nearest_value
from orchestrator.modality import BackboneRule, Fit, Modality, Profile

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    # Rates for AdamW; docs/methods.md has the runs that they were chosen by.
    "head": {"epochs": 40, "batch_size": 32, "learning_rate": 3e-3, "head_learning_rate": 3e-3},
    "full": {"epochs": 20, "batch_size": 32, "learning_rate": 1e-3, "head_learning_rate": 1e-3},
    "scratch": {"epochs": 40, "batch_size": 32, "learning_rate": 1e-3, "head_learning_rate": 1e-3},
}
_SGD_FACTOR = 10.0
_FEW_SAMPLES = 50
"""Below, full fine-tuning keeps the pretrained BatchNorm statistics: those of so few samples are worse."""
_BUFFERS = ("running_mean", "running_var", "norm_mean", "norm_std")  # and all integers: counters, positions


def match(card: BackboneCard, modality: Modality, known: Mapping[str, Modality]) -> BackboneRow:
    """The row of the backbone's type in the modality's rules. Raises `RefusedError`.

    `known` are all modalities, to say which one would take it.
    """
    if card.config.get("quantization_config"):
        raise RefusedError(
            "quantised",
            f"{card.source} is quantised, and quantised weights cannot be trained",
            expected="weights in float32, float16 or bfloat16",
            mend="use the repository that it was quantised from",
        )
    row = _row(card, modality)
    if row is not None:
        return row
    rule = _rule(card, modality)
    if rule is not None:
        raise RefusedError(
            rule.reason,
            f"{card.source} ({card.model_type}): {rule.message}",
            expected=_takes(modality),
            mend=rule.mend or _another(modality),
        )
    for name, other in known.items():
        if name == modality.name:
            continue
        theirs = _rule(card, other)
        if _row(card, other) is not None or (theirs is not None and theirs.reason != "two_modalities"):
            raise RefusedError(
                "wrong_modality",
                f"{card.source} ({card.model_type}) was trained on {other.title}: its features mean nothing "
                f"for {modality.title}",
                expected=_takes(modality),
                mend=f"{_another(modality)}; or use --modality {name}, if that is what your data is",
            )
        if theirs is not None:
            raise RefusedError(
                theirs.reason,
                f"{card.source} ({card.model_type}): {theirs.message}",
                expected=_takes(modality),
                mend=theirs.mend or _another(modality),
            )
    code = "; code that comes with a repository is never run" if card.config.get("auto_map") else ""
    raise RefusedError(
        "unknown_type",
        f"{card.source} is of the type {card.model_type!r}, which this version does not know{code}",
        expected=f"a type of {modality.rules.generated_from}: orchestrator plugins --types {modality.name}",
        mend=_another(modality) + ", or a newer version of this package",
    )


def _row(card: BackboneCard, modality: Modality) -> BackboneRow | None:
    if card.library == "timm":
        return modality.rules.timm.get(card.model_type.split(".")[0])
    return modality.rules.accepts.get(card.model_type)


def _rule(card: BackboneCard, modality: Modality) -> BackboneRule | None:
    if card.library == "timm":
        return modality.rules.timm_refuses.get(card.model_type.split(".")[0])
    return modality.rules.refuses.get(card.model_type)


def _takes(modality: Modality) -> str:
    return f"a backbone trained on {modality.title}"


def _another(modality: Modality) -> str:
    examples = list(modality.rules.accepts)[:4]
    return f"choose a backbone trained on {modality.title} (types such as {', '.join(examples)})"


def parse_settings(
    modality: Modality, settings: Mapping[str, Any], place_of: Callable[[str], str] | None = None
) -> BaseModel:
    """The plugin's settings, checked by its own model. Raises `JobError`; `place_of` tells the place of a key."""
    try:
        return modality.settings.model_validate(dict(settings))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in fault["loc"])
        where = place_of(f"settings.{place}") if place_of else ""
        fields = modality.settings.model_fields
        if fault["type"] == "extra_forbidden":
            raise JobError(
                f"{where}unknown key settings.{place} for {modality.name}",
                expected="one of " + ", ".join(fields) if fields else "no settings at all",
                mend=did_you_mean(place, fields),
            ) from None
        about = fields[str(fault["loc"][0])].description if fault["loc"] else ""
        message = str(fault["msg"]).removeprefix("Value error, ")
        raise JobError(
            f"{where}settings.{place} = {fault.get('input')!r}: {message[:1].lower()}{message[1:]}",
            expected=about or "",
            mend=nearest_value(fault),
        ) from None


def fit(card: BackboneCard, row: BackboneRow, modality: Modality, job_settings: Mapping[str, Any],
        profile: Profile | None) -> Fit:  # fmt: skip
    """How the data becomes the backbone's input. Raises `RefusedError`."""
    if modality.fit is None:
        raise not_built(modality)
    settings = parse_settings(modality, job_settings)
    try:
        return modality.fit(card, row, settings, profile)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise RefusedError(
            "bad_config",
            f"{card.source}: its metadata files hold values that cannot be understood: {error}",
            mend="fetch or save the backbone again",
        ) from error


def not_built(modality: Modality) -> RefusedError:
    """The refusal of a modality that is declared, and cannot be trained with yet."""
    return RefusedError(
        "not_built",
        f"training on {modality.name} is not built yet in this version; the gate knows its backbones, no more",
        expected="a modality that `orchestrator plugins` lists as trainable",
        mend="use --modality image",
    )


def make_plan(
    job: Job,
    modality: Modality,
    card: BackboneCard,
    row: BackboneRow,
    tensors: Tensors | None,
    classes: tuple[str, ...],
    data: DataSummary,
    profile: Profile,
    num_cores: int,
) -> Plan:
    """The Plan. Raises `RefusedError` or `JobError`.

    `tensors` are the headers of the weights, None where there are none to start from.
    """
    if not modality.trainable:
        raise not_built(modality)
    if job.task not in {task.name for task in modality.tasks}:
        raise JobError(
            f"task = {job.task!r}, which {modality.name} has not",
            expected="one of " + ", ".join(t.name for t in modality.tasks),
        )
    if job.method != "scratch":
        require_weights(card)
    found = fit(card, row, modality, job.settings, profile)
    views = _views(job, found)
    once = job.method == "head" and job.training.features == "once" and (views > 0 or not found.augmented)
    num_extractors = (job.scaling.num_extractors or 0) if once else 0
    threads = _threads(job, job.scaling.num_workers, "workers", num_cores)
    extractor_threads = _threads(job, num_extractors, "extractors", num_cores)
    if job.task == "regression" and (job.training.class_weights != "none" or job.training.label_smoothing):
        raise JobError(
            "training.class_weights and training.label_smoothing are for classes, and the task is regression",
            mend="leave them out",
        )
    schedule = _schedule(job, data.num_samples["train"])
    return Plan(
        name=job.name or run_name(job, card),
        job=job.at_whole_paths(),
        backbone=card,
        row=row,
        weights="random" if job.method == "scratch" else "pretrained",
        classes=classes,
        class_weights=_class_weights(job, data),
        data=data,
        input=dict(found.input),
        augmentation=tuple(found.augmentation),
        views=views,
        adaptations=tuple(found.adaptations),
        warnings=(*found.warnings, *_unused(job, once)),
        schedule=schedule,
        parameters=_parameters(job, row, tensors, len(classes)) if tensors else None,
        num_workers=job.scaling.num_workers,
        num_extractors=num_extractors,
        threads_per_worker=threads,
        extractor_threads=extractor_threads,
        features="once" if once else "every step",
        ray=job.scaling.num_workers > 1 or num_extractors > 0 or job.scaling.address is not None,
    )


def _threads(job: Job, num: int, what: str, num_cores: int) -> int:
    """Of each of `num` processes. Raises `RefusedError` where that is more than this machine's cores, and it has to do.

    Extractors and workers count apart: while the ones work, the others wait.
    """
    own_cluster = job.scaling.address in (None, "local")
    threads = job.scaling.threads_per_worker
    if threads is None:
        threads = max(1, num_cores // max(1, num)) if own_cluster else 1
    if own_cluster and num * threads > num_cores:
        raise RefusedError(
            "resources",
            f"{num} {what} x {threads} threads are more than the {num_cores} cores here",
            expected=f"at most {num_cores} in all; beyond the cores everything gets many times slower",
            mend=f"lower scaling.num_{what}, or name a cluster: scaling.address",
        )
    return threads


def _unused(job: Job, once: bool) -> list[str]:
    """What the job asks for that is for a frozen body alone, and there is none that runs once."""
    asked = {"feature_store": job.feature_store, "scaling.num_extractors": job.scaling.num_extractors}
    return [
        f"{name} is not used: no features are kept where the body runs in every step"
        for name, value in asked.items() if value is not None and not once
    ]  # fmt: skip


def _views(job: Job, found: Fit) -> int:
    views = job.training.views
    if views is None:
        return 0
    if job.method != "head" or not found.augmented or job.training.features != "once":
        what = "the samples are not augmented" if job.method == "head" and not found.augmented else (
            f"the method is {job.method}" if job.method != "head" else "the body runs in every step")  # fmt: skip
        raise JobError(
            f"training.views = {views} keeps random views of each sample, and {what}",
            expected="method head, with augmentation",
            mend="leave training.views out, or set settings.augment",
        )
    return views


def run_name(job: Job, card: BackboneCard) -> str:
    """modality-backbone-method-(8 hex digits of the job)."""
    name = re.sub(r"[^\w.]+", "-", card.name).strip("-.").lower()
    return f"{job.modality}-{name}-{job.method}-{job.digest()}"


def _schedule(job: Job, num_train: int) -> Schedule:
    asked, defaults = job.training, _DEFAULTS[job.method]
    factor = _SGD_FACTOR if asked.optimizer == "sgd" else 1.0
    rate = asked.learning_rate or defaults["learning_rate"] * factor
    head_rate = asked.head_learning_rate or asked.learning_rate or defaults["head_learning_rate"] * factor
    epochs = asked.epochs or defaults["epochs"]
    batch_size = min(asked.batch_size or defaults["batch_size"], num_train)
    num_microbatches = asked.num_microbatches or job.scaling.num_workers
    if num_microbatches < job.scaling.num_workers:
        raise JobError(
            f"training.num_microbatches = {num_microbatches} leaves workers idle",
            expected=f"{job.scaling.num_workers} or more",
        )
    if job.method == "head":
        batch_norm: Literal["train", "frozen"] = "frozen"
        if asked.batch_norm == "train":
            raise JobError("training.batch_norm = 'train' would change a frozen body", expected="frozen or auto")
    elif asked.batch_norm == "auto":
        batch_norm = "frozen" if job.method == "full" and num_train < _FEW_SAMPLES else "train"
    else:
        batch_norm = asked.batch_norm
    steps_per_epoch = math.ceil(num_train / batch_size)
    smallest = num_train // steps_per_epoch // num_microbatches
    if smallest < (2 if batch_norm == "train" else 1):
        raise JobError(
            f"{num_train} training samples in batches of {batch_size} leave microbatches of {smallest}",
            expected="2 samples a microbatch for BatchNorm in train mode, 1 otherwise",
            mend="raise training.batch_size, or lower training.num_microbatches or scaling.num_workers",
        )
    return Schedule(
        epochs=epochs,
        batch_size=batch_size,
        num_microbatches=num_microbatches,
        learning_rate=rate,
        head_learning_rate=head_rate,
        batch_norm=batch_norm,
        steps_per_epoch=steps_per_epoch,
        num_steps=steps_per_epoch * epochs,
    )


def _class_weights(job: Job, data: DataSummary) -> tuple[float, ...]:
    """Inverse proportions: samples / (classes x samples of the class); multi-label: negatives / positives."""
    if job.training.class_weights == "none":
        return ()
    counts, total = data.per_class["train"], data.num_samples["train"]
    if job.task == "multi-label":
        return tuple((total - count) / count for count in counts)
    return tuple(total / (len(counts) * count) for count in counts)


def _parameters(job: Job, row: BackboneRow, tensors: Tensors, num_classes: int) -> Parameters:
    body = head = 0
    whole = bool(row.prefix) and any(name.startswith(row.prefix) for name in tensors)
    for name, (dtype, shape) in tensors.items():
        if name.endswith(_BUFFERS) or dtype.startswith(("I", "U", "BOOL")):
            continue
        if in_head(name, row):
            head += math.prod((num_classes, *shape[1:]))
        elif not whole or name.startswith(row.prefix):  # a text tower beside the image tower is not loaded
            body += math.prod(shape)
    trained = head if job.method == "head" else body + head
    states = 2 if job.training.optimizer == "adamw" else 1
    return Parameters(
        head_known=head > 0,
        total=body + head,
        trained=trained,
        frozen=body + head - trained,
        weights_bytes=4 * (body + head),
        gradients_bytes=4 * trained,
        optimizer_bytes=4 * states * trained,
    )


def in_head(tensor: str, row: BackboneRow) -> bool:
    """Whether a tensor of a checkpoint belongs to the modules that depend on the number of classes."""
    return any(tensor.startswith((f"{module}.", f"{module.removeprefix('timm_model.')}.")) for module in row.head)
