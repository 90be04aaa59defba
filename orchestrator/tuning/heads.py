"""Heads of many trials on the same features, trained side by side: each matrix product is one of all of them.

What each of them learns is what a run of its own would: the same first weights, the same order of samples, the same
optimizer (AdamW, or SGD with momentum), warm-up, schedule and clipped gradient as `training.phase`, but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from orchestrator.data import Ints, Samples
from orchestrator.features import FeatureSource
from orchestrator.job import Plan
from orchestrator.network import Cut, Head, Network
from orchestrator.tasks import Objective
from orchestrator.training import epoch_batches, rate_factor
from orchestrator.tuning.arithmetic import adamw, losses_of_heads, settings_of_heads, sgd

_MOST_NUMBERS = 4_000_000
"""Weights of the heads that are trained at once: more, and they leave the processor's caches."""
_CLIP_EPS = 1e-6  # torch's clip_grad_norm_

Weights = dict[str, Tensor]
"""Name -> float32 [heads, ...]."""
Decide = Callable[[int, Mapping[str, Any]], bool]
"""(which head, its line of the epoch) -> whether it goes on."""


@dataclass
class Outcome:
    """What came of one head."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    """One an epoch: `epoch` (from 1), `train_loss`, and what its validation gave."""
    failed_at: int | None = None
    """The step at which its loss was no longer a number."""


@dataclass(frozen=True)
class HeadInputs:
    """What all heads of a stack read."""

    samples: Samples
    train: FeatureSource
    validation: FeatureSource
    objective: Objective
    """Of a plan without class weights and smoothing, which are each head's own."""
    device: torch.device
    precision: Callable[[], AbstractContextManager[Any]]
    """That of training, and of validation."""


def can_be_stacked(network: Network, cut: Cut) -> bool:
    """Whether the head is a plain function of its weights: neither dropout nor statistics that move."""
    layers = [layer for name in cut.modules for layer in network.module.get_submodule(name).modules()]
    drops = any(isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0 for layer in layers)
    return not drops and not any(True for layer in layers for _ in layer.buffers(recurse=False))


def head_weights(network: Network, cut: Cut) -> Weights:
    """A copy in main memory of the weights behind the cut, by their names in the network: float32, before training."""
    return {
        f"{name}.{inner}": parameter.detach().to("cpu", copy=True)
        for name in cut.modules for inner, parameter in network.module.get_submodule(name).named_parameters()
    }  # fmt: skip


def in_pieces(num_heads: int, num_numbers: int) -> list[range]:
    """The heads that are trained at once; `num_numbers`: weights of one head."""
    at_once = max(1, _MOST_NUMBERS // max(1, num_numbers))
    num = math.ceil(num_heads / at_once)
    return [range(i * num_heads // num, (i + 1) * num_heads // num) for i in range(num)]


class HeadStack:
    """Heads of several plans with one batch size and one number of steps, that differ in anything else of training."""

    def __init__(
        self, network: Network, cut: Cut, plans: Sequence[Plan], first: Sequence[Weights], inputs: HeadInputs
    ) -> None:
        """`first`: the weights of each head before training."""
        self._plans, self._inputs = list(plans), inputs
        self._phase, self._recipe = plans[0].recipe.phases[0], plans[0].recipe
        self._behind = _Behind(network, cut)
        self._weights = {name: torch.stack([one[name] for one in first]).to(inputs.device) for name in first[0]}
        for weight in self._weights.values():
            weight.requires_grad_()
        self._moments: list[Weights] = []
        self._alive = list(range(len(plans)))
        """Which heads these are, by their number in `plans`."""
        self._of_heads = settings_of_heads(plans, inputs.device)
        self.outcomes = [Outcome() for _ in plans]

    def train(self, decide: Decide, tick: Callable[[int], bool]) -> list[Outcome]:
        """Train to the end; what came of each head.

        `decide`: whether a head goes on, asked after each epoch. `tick` hears after each epoch how many heads there
        were; once it returns true, training ends where it is.
        """
        step = 0
        for epoch in range(self._phase.epochs):
            losses: list[Tensor] = []
            for rows in self._epoch_batches(epoch):
                losses.append(self._step(rows, step))
                step += 1
            self._end_epoch(epoch + 1, losses, decide)
            if tick(len(self._alive)) or not self._alive:
                break
        return self.outcomes

    # --- a step ---

    def _epoch_batches(self, epoch: int) -> Iterator[list[Ints]]:
        """Of each step the rows, for all heads or, where their seeds differ, for each of them."""
        self._inputs.train.epoch = epoch
        samples, num = self._inputs.samples, self._recipe.steps_per_epoch
        rows = samples.rows("train")
        seeds = [self._plans[head].job.training.seed for head in self._alive]
        orders = {seed: epoch_batches(samples, rows, seed, epoch, num, False) for seed in dict.fromkeys(seeds)}
        for number in range(num):
            yield [orders[seed][number] for seed in (seeds if len(orders) > 1 else seeds[:1])]

    def _step(self, rows: Sequence[Ints], step: int) -> Tensor:
        """One step of all heads; float32 [2, heads]: the sum of its losses, and what to divide it by."""
        batch = _batch(self._inputs, rows)
        if batch is None:  # of samples that nobody could read there is nothing to learn
            return torch.zeros(2, len(self._alive), device=self._inputs.device)
        features, targets, counts = batch
        outputs = self._outputs(features, shared=len(rows) == 1)
        each, weight = losses_of_heads(self._inputs.objective, outputs, targets, self._of_heads)
        sums, weights = (each * counts).sum(dim=1), (weight * counts).sum(dim=1)
        losses: Tensor = sums / weights
        gradients = torch.autograd.grad(losses.sum(), list(self._weights.values()))
        self._move(dict(zip(self._weights, gradients, strict=True)), step)
        return torch.stack([sums, weights]).detach()

    def _outputs(self, features: Tensor, shared: bool) -> Tensor:
        """float32 [heads, batch, classes]. features: `shared` [batch, ...], or [heads, batch, ...]"""
        with self._inputs.precision():
            outputs: Tensor = vmap(self._behind.of, in_dims=(0, None if shared else 0))(self._weights, features)
        return outputs.float()

    @torch.no_grad()
    def _move(self, gradients: Weights, step: int) -> None:
        of = self._of_heads
        norms = torch.stack([g.flatten(1).square().sum(dim=1) for g in gradients.values()]).sum(dim=0).sqrt()
        scale = (of.clip_norm / (norms + _CLIP_EPS)).clamp(max=1.0)
        factors = [rate_factor(self._plans[head], self._phase.num_steps, step) for head in self._alive]
        rates = of.peak_rates * torch.tensor(factors, device=norms.device)
        if not self._moments:
            num = 1 if self._plans[0].job.training.optimizer == "sgd" else 2
            self._moments = [{name: torch.zeros_like(g) for name, g in gradients.items()} for _ in range(num)]
        for name, gradient in gradients.items():
            weight = self._weights[name]
            shape = (-1, *[1] * (weight.ndim - 1))
            rate = rates.view(shape)
            gradient = gradient * scale.view(shape)
            decay = of.weight_decay.view(shape) if weight.ndim > 2 else torch.zeros_like(rate)  # vectors have none
            if len(self._moments) == 1:
                sgd(weight, gradient, self._moments[0][name], rate, decay, of.momentum.view(shape), step)
            else:
                adamw(weight, gradient, self._moments[0][name], self._moments[1][name], rate, decay, step)

    # --- the end of an epoch ---

    @torch.no_grad()
    def _end_epoch(self, epoch: int, losses: Sequence[Tensor], decide: Decide) -> None:
        by_step = torch.stack(list(losses)).cpu().double()
        figures = self._validate()
        staying = []
        for place, head in enumerate(self._alive):
            outcome, own = self.outcomes[head], by_step[:, :, place]
            odd = (~own[:, 0].isfinite()).nonzero()
            if len(odd):
                outcome.failed_at = (epoch - 1) * len(losses) + int(odd[0])
                continue
            sums, weights = own.sum(dim=0).tolist()
            line = {"epoch": epoch, "train_loss": sums / (weights or 1.0), **{k: v[place] for k, v in figures.items()}}
            outcome.lines.append(line)
            if epoch == self._phase.epochs or decide(head, line):
                staying.append(place)
        if len(staying) < len(self._alive):
            self._keep(staying)

    def _validate(self) -> dict[str, list[float]]:
        """Figure -> its value of each head."""
        objective, device = self._inputs.objective, self._inputs.device
        sums = torch.zeros(2, len(self._alive), dtype=torch.float64)
        num = 0
        for rows in self._inputs.samples.batches(self._inputs.samples.rows("validation")):
            batch = self._inputs.validation.batch(rows, train=False)
            if batch is None:
                continue
            outputs, targets = self._outputs(batch.inputs["features"].to(device), shared=True), batch.targets.to(device)
            flat = outputs.flatten(0, 1)
            repeated = targets.repeat(len(outputs), *[1] * (targets.ndim - 1))
            each = objective.each_loss(flat, repeated).view(len(outputs), -1)
            sums[0] += each.double().sum(dim=1).cpu()
            if objective.task != "regression":
                right = objective.predict(flat) == repeated
                right = right if right.ndim == 1 else right.all(dim=-1)
                sums[1] += right.view(len(outputs), -1).double().sum(dim=1).cpu()
            num += len(batch.rows)
        if not num:
            return {}
        found = {"validation_loss": (sums[0] / num).tolist()}
        return found if objective.task == "regression" else {**found, "validation_accuracy": (sums[1] / num).tolist()}

    def _keep(self, places: Sequence[int]) -> None:
        """Go on with these of the heads alone."""
        chosen = torch.tensor(list(places), dtype=torch.long, device=self._inputs.device)
        self._alive = [self._alive[place] for place in places]
        self._weights = {
            name: weight.detach()[chosen].clone().requires_grad_() for name, weight in self._weights.items()
        }
        self._moments = [{name: value[chosen] for name, value in moment.items()} for moment in self._moments]
        self._of_heads = self._of_heads.of(chosen)


# --- the layers, and what goes into them ---


class _Behind:
    """The layers behind a cut, alone, as a function of their weights."""

    def __init__(self, network: Network, cut: Cut) -> None:
        alone = nn.Module()
        for name in cut.modules:
            *path, last = name.split(".")
            place = alone
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.add_module(last, network.module.get_submodule(name))
        alone.train()
        self._called = _Called(alone, Head(replace(network, module=alone), cut))

    def of(self, weights: Weights, features: Tensor) -> Tensor:
        """float [batch, classes]. features: float32 [batch, ...]"""
        named = {f"alone.{name}": weight for name, weight in weights.items()}
        outputs: Tensor = functional_call(self._called, named, (features,))
        return outputs


class _Called(nn.Module):
    """A head as a module, so that torch can put other weights into it for a call."""

    def __init__(self, alone: nn.Module, head: Head) -> None:
        super().__init__()
        self.alone, self._head = alone, head

    def forward(self, features: Tensor) -> Tensor:
        """Logits, float [batch, classes]."""
        return self._head({"features": features})


def _batch(inputs: HeadInputs, rows: Sequence[Ints]) -> tuple[Tensor, Tensor, Tensor] | None:
    """(features, targets, which of them count: float32 [1 or heads, batch]); None where there are no features.

    features: [batch, ...] where all heads have the same rows, else [heads, batch, ...]; targets alike.
    """
    of_seeds = {id(one): inputs.train.batch(one, train=True) for one in {id(one): one for one in rows}.values()}
    found = [of_seeds[id(one)] for one in rows]
    there = [one for one in found if one is not None]
    if not there:
        return None
    device = inputs.device
    if len(rows) == 1:
        features, targets = there[0].inputs["features"].to(device), there[0].targets.to(device)
        return features, targets, torch.ones(1, len(targets), device=device)
    # Where some samples could not be read, batches are of several lengths: filled up with samples that do not count.
    longest = max(len(one.rows) for one in there)
    filled = [there[0] if one is None else one for one in found]
    places = [np.resize(np.arange(len(one.rows)), longest) for one in filled]
    features = torch.stack([one.inputs["features"][at] for one, at in zip(filled, places, strict=True)])
    targets = torch.stack([one.targets[at] for one, at in zip(filled, places, strict=True)])
    counts = torch.stack([
        (torch.arange(longest) < (0 if one is None else len(one.rows))).float() for one in found
    ])  # fmt: skip
    return features.to(device), targets.to(device), counts.to(device)
