"""A job that was let through, and its data -> the Plan: every default resolved. Pure, as `decide`."""

from __future__ import annotations

import math
import re

from orchestrator.backbone import Tensors, require_weights
from orchestrator.errors import JobError, RefusedError
from orchestrator.gate.adapters import num_adapted
from orchestrator.gate.combinations import refuse_senseless
from orchestrator.gate.decide import fit, not_built
from orchestrator.gate.recipes import first_weights, kind_of, make_recipe, may_keep_features, num_views, settings_of
from orchestrator.job import BackboneCard, BackboneRow, DataSummary, Job, Parameters, Plan, Recipe
from orchestrator.modality import Modality, Profile

_BUFFERS = ("running_mean", "running_var", "norm_mean", "norm_std")  # and all integers: counters, positions


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
        names = ", ".join(t.name for t in modality.tasks)
        raise JobError(
            f"task = {job.task!r}, which {modality.name} has not", expected=f"one of {names}",
            mend="choose another task (--task), or a modality that has it",
        )  # fmt: skip
    if job.task == "regression" and (job.training.class_weights != "none" or job.training.label_smoothing):
        raise JobError(
            "training.class_weights and training.label_smoothing are for classes, and the task is regression",
            mend="leave them out",
        )
    weights = first_weights(job)
    if weights == "pretrained":
        require_weights(card)
    threads = _threads(job, job.scaling.num_workers, "workers", num_cores)
    adapted = fit(card, row, modality, settings_of(job, modality), profile)
    views = num_views(job, adapted)
    if views and job.training.refit:
        raise JobError(
            "training.refit trains on validation samples too, of which there are no random views (training.views)",
            mend="leave one of the two out",
        )
    recipe = make_recipe(
        job, data, keeps_features=may_keep_features(job) and (views > 0 or not adapted.augmented),
        kind=kind_of(tensors),
    )  # fmt: skip
    refuse_senseless(job, modality, row, data, recipe)
    num_extractors = (job.scaling.num_extractors or 0) if recipe.needs_features else 0
    extractor_threads = _threads(job, num_extractors, "extractors", num_cores)
    return Plan(
        name=job.name or run_name(job, card),
        job=job.at_whole_paths(),
        backbone=card,
        row=row,
        weights=weights,
        classes=classes,
        class_weights=_class_weights(job, data),
        data=data,
        input=dict(adapted.input),
        augmentation=tuple(adapted.augmentation),
        views=views,
        adaptations=tuple(adapted.adaptations),
        warnings=(*job.notes, *adapted.warnings, *_unused(job, recipe)),
        recipe=recipe,
        parameters=_parameters(job, recipe, row, tensors, len(classes)) if tensors else None,
        num_workers=job.scaling.num_workers,
        num_extractors=num_extractors,
        threads_per_worker=threads,
        extractor_threads=extractor_threads,
        ray=job.scaling.num_workers > 1 or num_extractors > 0 or job.scaling.address is not None,
    )


def run_name(job: Job, card: BackboneCard) -> str:
    """modality-backbone-method-(8 hex digits of the job)."""
    name = re.sub(r"[^\w.]+", "-", card.name).strip("-.").lower()
    return f"{job.modality}-{name}-{job.method}-{job.digest()}"


def _threads(job: Job, num: int, what: str, num_cores: int) -> int:
    """Of each of `num` processes. Raises `RefusedError` where that is more than this machine's cores, and it has to do.

    Extractors and workers count apart: while the ones work, the others wait.
    """
    own_cluster = job.scaling.address in (None, "local")
    threads = job.scaling.threads_per_worker
    if threads is None:
        threads = max(1, num_cores // max(1, num)) if own_cluster else 0  # what the nodes have, only the cluster tells
    if own_cluster and num * threads > num_cores:
        raise RefusedError(
            "resources",
            f"{num} {what} x {threads} threads are more than the {num_cores} cores here",
            expected=f"at most {num_cores} in all; beyond the cores everything gets many times slower",
            mend=f"lower scaling.num_{what}, or name a cluster: scaling.address",
        )
    return threads


def _unused(job: Job, recipe: Recipe) -> list[str]:
    """What the job asks for that is for a frozen body alone, and there is none that runs once."""
    asked = {"feature_store": job.feature_store, "scaling.num_extractors": job.scaling.num_extractors}
    lines = [
        f"{name} is not used: no features are kept where the body runs in every step"
        for name, value in asked.items() if value is not None and not recipe.needs_features
    ]  # fmt: skip
    if job.training.refit and not any(phase.refits for phase in recipe.phases):
        lines.append(
            "training.refit is not used: there is no validation split, so that all samples are trained on anyway"
        )
    if any(phase.loss == "contrastive" for phase in recipe.phases):
        lines += [
            f"training.{name} is not used, unless no head can be fitted to features"
            for name in ("label_smoothing", "head_learning_rate") if getattr(job.training, name)
        ]  # fmt: skip
    if recipe.adapter is None and {"lora_rank", "lora_alpha"} & job.training.model_fields_set:
        lines.append(f"training.lora_rank and training.lora_alpha are not used: the method is {job.method}")
    return lines


def _class_weights(job: Job, data: DataSummary) -> tuple[float, ...]:
    """Inverse proportions: samples / (classes x samples of the class); multi-label: negatives / positives."""
    if job.training.class_weights == "none":
        return ()
    counts, total = data.per_class["train"], data.num_samples["train"]
    if job.task == "multi-label":
        return tuple((total - count) / count for count in counts)
    return tuple(total / (len(counts) * count) for count in counts)


def _parameters(job: Job, recipe: Recipe, row: BackboneRow, tensors: Tensors, num_classes: int) -> Parameters:
    body = head = 0
    whole = bool(row.prefix) and any(name.startswith(row.prefix) for name in tensors)
    for name, (dtype, shape) in tensors.items():
        if name.endswith(_BUFFERS) or dtype.startswith(("I", "U", "BOOL")):
            continue
        if in_head(name, row):
            head += math.prod((num_classes, *shape[1:]))
        elif not whole or name.startswith(row.prefix):  # a text tower beside the image tower is not loaded
            body += math.prod(shape)
    trained = body + head if recipe.trains_everything else head
    if recipe.adapter is not None:
        trained += num_adapted(recipe.adapter, {name: one for name, one in tensors.items() if not in_head(name, row)})
    states = 2 if job.training.optimizer == "adamw" else 1
    return Parameters(
        head_known=head > 0,
        total=body + head,
        trained=trained,
        frozen=body if recipe.adapter is not None else body + head - trained,
        weights_bytes=4 * max(body + head, trained + body if recipe.adapter is not None else 0),
        gradients_bytes=4 * trained,
        optimizer_bytes=4 * states * trained,
    )


def in_head(tensor: str, row: BackboneRow) -> bool:
    """Whether a tensor of a checkpoint belongs to the modules that depend on the number of classes."""
    return any(tensor.startswith((f"{module}.", f"{module.removeprefix('timm_model.')}.")) for module in row.head)
