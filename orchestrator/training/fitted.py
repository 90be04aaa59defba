"""A head of one linear layer that is fitted at once, by the probe, instead of in steps: to stored features, or to what
a body that is trained gives by now.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.data import Ints, Samples
from orchestrator.features import Batch
from orchestrator.network import TOLERANCE, Body, Cut, Head, autocast, set_mode
from orchestrator.probing import fit_layer, fit_probe
from orchestrator.training.evaluate import columns_of, evaluate_batch
from orchestrator.training.state import Session

_NUM_TRIED = 16
_MOST_FLOATS = 2**28
"""Of features that are in memory at once: a gigabyte."""
_DEAD = 1e-3
"""A feature that varies by less than this share of the median counts for nothing. The probe would bring it to the
others' scale, by a weight so large that the body's first step changes everything: all-MiniLM-L6-v2 has an output that
varies by 1e-9 where the others do by 0.2, and an optimizer's step moves it by 1e-5."""
_FACTS = ("num_samples", "strength", "figure", "cross_validation", "interval", "temperature")
_STRENGTH_ANEW = 0.01
"""Of 100 glosses the head is then about as sure of others as it is right (docs/methods.md)."""
_AROUND = (nn.Flatten, nn.Identity, nn.Dropout)
"""What may stand beside the layer in its module, and changes no sample in eval mode."""


@dataclass(frozen=True)
class Fitted:
    """What the fit gave, beside the layer's weights."""

    num_samples: int
    strength: float
    """Of the penalty, chosen by cross-validation."""
    figure: str
    """What the score is: accuracy, macro_f1 or r2."""
    cross_validation: float | None
    """The score: of samples that a fold's fit had not seen."""
    interval: tuple[float, float] | None
    """95 %."""
    loss: float
    """Sum over the samples, in training's objective."""
    weight: float
    num_right: float
    temperature: float
    """Of `probing.Probe`: for where the body is trained behind it."""


def can_be_fitted(session: Session) -> bool:
    """Whether there are features, and one linear layer alone stands behind the cut: as rank 0 finds, on all workers."""
    return bool(session.worker.all_gather(_layer(session) is not None if session.worker.rank == 0 else None)[0])


def fit_head(session: Session) -> Fitted:
    """Fit the head to the stored features of the training samples, the same on all workers, which all call this.

    Each sample as it is, without augmentation. Rank 0 alone fits; with several labels or classes weighed as the plan
    says, and groups kept together in the folds. Label smoothing means nothing here: the penalty does its work.
    """
    layer = _layer(session)
    assert layer is not None
    found: tuple[Tensor, Tensor, Fitted] | None = None
    if session.worker.rank == 0:
        found = _fitted(session, layer)
    weight, bias, fitted = session.worker.all_gather(found)[0]
    _put_into(layer, weight, bias)
    answer: Fitted = fitted
    return answer


def fit_head_anew(session: Session) -> tuple[float, int] | None:
    """The same, to what the body gives for them by now: (how many it has right, of how many).

    None if somebody asked to stop meanwhile. (0, 0), and the head as it was, where no sample can be read or the body
    gives what is not finite, of which the next step's loss tells the cause. Of one strength alone: of samples that the
    body has learnt, cross-validation has all right at any, and takes the least, which is much too sure of others.
    """
    set_mode(session.network, session.phase, training=False)
    body, layer = Body(session.network, cut_of(session)), _layer(session)
    assert layer is not None

    def fields_of(batch: Batch) -> list[Any]:
        features = evaluate_batch(body, batch.inputs, autocast(session.plan, session.worker))
        return [batch.rows, features.flatten(1).numpy(), batch.targets.cpu().numpy()]

    columns = columns_of(session, _some(session, layer), session.sources["samples"]["train"], fields_of)
    if columns is None:
        return None
    if not columns or not np.isfinite(columns[1]).all():
        return 0.0, 0
    order = np.argsort(columns[0])
    features, labels = (torch.from_numpy(column[order]) for column in columns[1:])
    found: tuple[Tensor, Tensor, float] | None = None
    if session.worker.rank == 0:
        weight, bias = fit_layer(
            features * varying(features), labels, num_classes=len(session.plan.classes), strength=_STRENGTH_ANEW,
            class_weights=session.plan.class_weights,
        )  # fmt: skip
        outputs = functional.linear(features, weight, bias)
        found = weight, bias, float(session.objective.num_right(outputs, labels))
    weight, bias, num_right = session.worker.all_gather(found)[0]
    _put_into(layer, weight, bias)
    return num_right, len(labels)


def cut_of(session: Session) -> Cut:
    """Where the network is cut, of a session whose head can be fitted."""
    head = session.forwards["features"]
    assert isinstance(head, Head)
    return head.cut


def _put_into(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    assert layer.bias is not None
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)


def facts_of(fitted: Fitted) -> dict[str, Any]:
    """For lineage.json."""
    kept = asdict(fitted)
    return {name: kept[name] for name in _FACTS}


def _layer(session: Session) -> nn.Linear | None:
    """The one linear layer of the head. That it is all that features go through is tried with some of them."""
    head, sources = session.forwards.get("features"), session.sources.get("features")
    if not isinstance(head, Head) or sources is None or head.cut.form != "chain" or len(head.cut.modules) != 1:
        return None
    module = session.network.module.get_submodule(head.cut.modules[0])
    inner = [one for one in module.modules() if not any(True for _ in one.children())]
    layers = [one for one in inner if isinstance(one, nn.Linear)]
    if len(layers) != 1 or not all(isinstance(one, (nn.Linear, *_AROUND)) for one in inner) or layers[0].bias is None:
        return None
    batch = sources["train"].batch(session.samples.rows("train")[:_NUM_TRIED], train=False)
    if batch is None:
        return None
    return layers[0] if _is_all(head, layers[0], batch.to(session.worker.device)) else None


def _is_all(head: Head, layer: nn.Linear, batch: Batch) -> bool:
    features = batch.inputs["features"].flatten(1)
    if features.shape[1] != layer.in_features:
        return False
    with torch.no_grad():
        whole, alone = head(batch.inputs), functional.linear(features, layer.weight, layer.bias)
    return whole.shape == alone.shape and bool((whole - alone).abs().max() <= TOLERANCE * whole.abs().max().clamp(1e-6))


def _fitted(session: Session, layer: nn.Linear) -> tuple[Tensor, Tensor, Fitted]:
    plan, objective, samples = session.plan, session.objective, session.samples
    batch = session.sources["features"]["train"].batch(_some(session, layer), train=False)
    assert batch is not None
    features = batch.inputs["features"].flatten(1)
    alive = varying(features)
    features = features if bool(alive.all()) else features * alive
    targets = batch.targets
    if plan.job.task == "regression":  # as the network learns them, whatever their unit
        targets = (targets - objective.mean.cpu()) / objective.std.cpu()
    probe = fit_probe(
        features, targets, plan.job.task, num_classes=len(plan.classes),
        groups=_groups(samples, batch.rows), class_weights=plan.class_weights, seed=plan.job.training.seed,
    )  # fmt: skip
    device = session.worker.device
    outputs = functional.linear(features, probe.weight, probe.bias).to(device)
    loss, weight = objective.loss(outputs, batch.targets.to(device))
    fitted = Fitted(
        len(features), probe.strength, probe.figure, probe.score, probe.interval, float(loss), float(weight),
        float(objective.num_right(outputs, batch.targets.to(device))), probe.temperature,
    )  # fmt: skip
    return probe.weight, probe.bias, fitted


def varying(features: Tensor) -> Tensor:
    """bool [features]: which vary enough beside the others, for float [samples, features]."""
    std = features.std(dim=0, correction=0)
    return std > _DEAD * std[std > 0].median() if bool((std > 0).any()) else std > 0


def _groups(samples: Samples, rows: Ints) -> Ints | None:
    """Of these samples; None where they have none, or all are of one, which no folds can keep apart."""
    groups = None if samples.groups is None else samples.groups[rows]
    return groups if groups is not None and len(np.unique(groups)) > 1 else None


def _some(session: Session, layer: nn.Linear) -> Ints:
    """The training samples' rows; of more than memory takes, as many as it does, at even distances."""
    rows: Ints = session.samples.rows("train")
    most = max(1, _MOST_FLOATS // layer.in_features)
    return rows[:: -(-len(rows) // most)] if len(rows) > most else rows
