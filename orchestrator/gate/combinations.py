"""Settings of the training that mean nothing beside others of the job, refused before the start."""

from __future__ import annotations

from orchestrator.errors import JobError
from orchestrator.job import BackboneRow, DataSummary, Job, Recipe
from orchestrator.modality import Modality


def refuse_senseless(job: Job, modality: Modality, row: BackboneRow, data: DataSummary, recipe: Recipe) -> None:
    """Raise `JobError` for what cannot be meant together."""
    if job.training.patience is not None and not data.num_samples.get("validation"):
        raise JobError(
            "training.patience waits for a better validation, and there are no validation samples",
            expected="a validation split", mend="set data.validation_fraction = 0.1, or leave training.patience out",
        )  # fmt: skip
    if job.training.precision == "bf16" and row.fp32_only:
        raise JobError(
            f"training.precision = 'bf16', and {row.architecture} has layers that fail on bfloat16",
            expected="auto, which is fp32 for it, or fp32", mend="leave training.precision out",
        )  # fmt: skip
    if job.training.mix != "none":
        refuse_unknown_mix(job, modality)
        _refuse_senseless_mixing(job, recipe)


def refuse_unknown_mix(job: Job, modality: Modality) -> None:
    """Raise `JobError` for a way to mix that the modality does not name."""
    mix = job.training.mix
    if mix != "none" and mix not in modality.mixes:
        can = ", ".join(sorted(modality.mixes))
        raise JobError(
            f"training.mix = {mix!r}, which {modality.title} cannot be mixed by",
            expected=f"one of none, {can}" if can else "none",
            mend=f"set training.mix to one of {can}, or leave it out" if can else "leave training.mix out",
        )


def _refuse_senseless_mixing(job: Job, recipe: Recipe) -> None:
    mix = job.training.mix
    if job.task == "regression":
        raise JobError(
            f"training.mix = {mix!r} mixes classes, and the task is regression", expected="a task with classes",
            mend="leave training.mix out",
        )  # fmt: skip
    if all(phase.source == "features" for phase in recipe.phases):
        raise JobError(
            f"training.mix = {mix!r} mixes samples, and the body runs once for each, on samples as they are",
            expected="a body that runs in every step",
            mend="leave training.mix out, or set training.features = 'every step', or train everything: method full",
        )
