"""`training.mix` (mixup, CutMix, or a plugin's own): samples of a batch are mixed, and labels in the same shares."""

from __future__ import annotations

from collections.abc import Callable

from torch.nn.functional import one_hot

from orchestrator.features.sources import Batch
from orchestrator.job import Plan
from orchestrator.modality import Modality


def make_mix(plan: Plan, modality: Modality) -> Callable[[Batch], Batch] | None:
    """What mixes the samples of a microbatch; None without a mix. Targets are float32 [samples, classes] afterwards."""
    if plan.job.training.mix == "none":
        return None
    mix, num_classes = modality.mixes[plan.job.training.mix], len(plan.classes)

    def mixed(batch: Batch) -> Batch:
        targets = batch.targets
        if not targets.is_floating_point():
            targets = one_hot(targets, num_classes).float()
        inputs, targets = mix(batch.inputs, targets)
        return Batch(inputs, targets, batch.rows)

    return mixed
