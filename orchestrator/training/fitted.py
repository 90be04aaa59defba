"""A head of one linear layer that is fitted at once, by the probe, instead of in steps: to stored features, or to what
a body that is trained gives by now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.data import Ints, Samples
from orchestrator.features import Batch, split_evenly
from orchestrator.network import TOLERANCE, Body, Cut, Head, autocast, set_mode
from orchestrator.probing import STRENGTHS, fit_probe
from orchestrator.training.evaluate import evaluate_batch
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
    found: _Found | None = None
    if session.worker.rank == 0:
        batch = session.sources["features"]["train"].batch(_some(session), train=False)
        assert batch is not None
        found = _fitted(session, batch.inputs["features"].flatten(1), batch.targets, batch.rows)
    return _put_into_head(session, found)


def fit_head_anew(session: Session) -> Fitted | None:
    """The same, to what the body gives for them by now; None if somebody asked to stop meanwhile.

    Of no strength but one: of samples that the body has learnt, cross-validation has all right at any, and takes the
    least, which is much too sure of others.
    """
    worker = session.worker
    set_mode(session.network, session.phase, training=False)
    body, parts, stopped = Body(session.network, cut_of(session)), [], False
    own = split_evenly(_some(session), worker.rank, worker.num_workers)
    if session.length_bucketing:
        own = session.samples.order_by_length(own)
    for batch in session.loader.each(session.sources["samples"]["train"], session.samples.batches(own)):
        stopped = session.should_stop()
        if stopped:
            break
        if batch is not None:
            features = evaluate_batch(body, batch.inputs, autocast(session.plan, worker))
            parts.append((features.flatten(1), batch.targets.cpu(), torch.from_numpy(batch.rows)))
    everybodys = worker.all_gather((parts, stopped))
    if any(stopped for _, stopped in everybodys):
        return None
    found: _Found | None = None
    if worker.rank == 0:
        columns = zip(*(one for parts, _ in everybodys for one in parts), strict=True)
        features, targets, rows = (torch.cat(column) for column in columns)
        order = rows.argsort()
        found = _fitted(session, features[order], targets[order], rows[order].numpy(), (_STRENGTH_ANEW,))
    return _put_into_head(session, found)


def cut_of(session: Session) -> Cut:
    """Where the network is cut, of a session whose head can be fitted."""
    head = session.forwards["features"]
    assert isinstance(head, Head)
    return head.cut


_Found = tuple[Tensor, Tensor, Fitted]


def _put_into_head(session: Session, found: _Found | None) -> Fitted:
    """What rank 0 has found, into all workers' heads."""
    weight, bias, fitted = session.worker.all_gather(found)[0]
    layer = _layer(session)
    assert layer is not None
    assert layer.bias is not None
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    answer: Fitted = fitted
    return answer


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


def _fitted(
    session: Session, features: Tensor, given: Tensor, rows: Ints, strengths: Sequence[float] = STRENGTHS
) -> _Found:
    """features: float32 [samples, features]; given: targets as batches have them; rows: int64 [samples]."""
    plan, objective, samples = session.plan, session.objective, session.samples
    alive = varying(features)
    features = features if bool(alive.all()) else features * alive
    targets = given
    if plan.job.task == "regression":  # as the network learns them, whatever their unit
        targets = (targets - objective.mean.cpu()) / objective.std.cpu()
    probe = fit_probe(
        features, targets, plan.job.task, num_classes=len(plan.classes),
        groups=_groups(samples, rows), class_weights=plan.class_weights, seed=plan.job.training.seed,
        strengths=strengths,
    )  # fmt: skip
    device = session.worker.device
    outputs = functional.linear(features, probe.weight, probe.bias).to(device)
    loss, weight = objective.loss(outputs, given.to(device))
    fitted = Fitted(
        len(features), probe.strength, probe.figure, probe.score, probe.interval, float(loss), float(weight),
        float(objective.num_right(outputs, given.to(device))), probe.temperature,
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


def _some(session: Session) -> Ints:
    """The training samples' rows; of more than memory takes, as many as it does, at even distances."""
    rows: Ints = session.samples.rows("train")
    layer = _layer(session)
    assert layer is not None
    most = max(1, _MOST_FLOATS // layer.in_features)
    return rows[:: -(-len(rows) // most)] if len(rows) > most else rows
