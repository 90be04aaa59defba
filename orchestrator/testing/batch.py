"""What a plugin's collate function gives, held against its declaration and against what the network takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.errors import ContractError, calling
from orchestrator.job import Plan
from orchestrator.modality import Collate, Modality
from orchestrator.network import Network

_NUM_DRAWS = 4
"""So many batches with one seed: what draws a coin elsewhere may give the same twice."""


@dataclass(frozen=True)
class Trial:
    """A plan, and what the plugin made of it."""

    plan: Plan
    directory: Path
    network: Network
    collate: Collate
    decoded: Sequence[Any]
    targets: Tensor


def collated(trial: Trial, modality: Modality, train: bool) -> dict[str, Tensor]:
    """The trial's samples as one batch, {name: tensor [batch, ...]}; `ContractError` where it cannot be used."""
    num, what = len(trial.decoded), f"collate(decoded, {train})"
    with calling("batch", what), torch.random.fork_rng():
        inputs = trial.collate(trial.decoded, train)
    if not isinstance(inputs, Mapping) or not all(isinstance(value, Tensor) for value in inputs.values()):
        raise ContractError("batch", f"{what} gives {_kinds(inputs)}", expected="{name: tensor}")
    for key, value in inputs.items():
        if value.ndim == 0 or len(value) != num:
            raise ContractError(
                "batch", f"{key!r} is {list(value.shape)} for {num} samples",
                expected=f"[{num}, ...]: the batch comes first", mend="stack the samples",
            )  # fmt: skip
        if value.dtype == torch.float64 or (value.is_floating_point() and not bool(value.isfinite().all())):
            problem = "float64, and weights are float32" if value.dtype == torch.float64 else "not finite"
            raise ContractError("batch", f"{key!r} is {problem}", expected="finite float32, or integers")
    first = modality.sample[0]
    as_declared = [value for value in inputs.values() if str(value.dtype).removeprefix("torch.") == first.dtype]
    if not as_declared:
        raise ContractError(
            "batch", f"gives {_kinds(inputs)}", expected=f"{first.dtype}, as the field {first.name!r} is declared",
            mend="convert it, or declare what the network takes",
        )  # fmt: skip
    if not any(_fits(value, first.shape) for value in as_declared):
        raise ContractError(
            "batch", f"gives {_kinds(inputs)}", mend="correct the collate function or the declaration",
            expected=f"[batch, {', '.join(map(str, first.shape))}], as the field {first.name!r} is declared",
        )  # fmt: skip
    _check_keys(trial.network, inputs)
    return dict(inputs)


def check_seeded(trial: Trial) -> None:
    """Random changes of training samples are those of torch's generator, whatever the others stand at."""
    batches = []
    for _ in range(_NUM_DRAWS):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            batches.append(_drawn(trial))
    if any(not torch.equal(batches[0][key], other[key]) for other in batches for key in batches[0]):
        raise ContractError(
            "batch", "collate(decoded, True) gives something else with the same seed of torch",
            expected="random changes that draw from torch's global generator on the CPU alone",
            mend="torch.rand and the like; or numpy.random.default_rng(int(torch.randint(2**63 - 1, ())))",
        )  # fmt: skip


def _drawn(trial: Trial) -> Mapping[str, Tensor]:
    """A batch of training, drawn from the generators as they stand."""
    with calling("batch", "collate(decoded, True)"):
        return trial.collate(trial.decoded, True)


def check_told(trial: Trial) -> None:
    """A sample that alone in its batch has another length than decoded was adapted, and `Fit.adaptations` says so.

    It is seen where samples are decoded to arrays of as many dimensions as the batch has of each.
    """
    if trial.plan.adaptations:
        return
    for one in trial.decoded:
        shape = tuple(getattr(one, "shape", ()))
        with calling("batch", "collate(decoded[:1], False)"), torch.random.fork_rng():
            inputs = trial.collate([one], False)
        alike = [tuple(value.shape[1:]) for value in inputs.values() if value.ndim == len(shape) + 1]
        if shape and alike and shape not in alike:
            raise ContractError(
                "adaptations", f"is empty, and batch makes {list(alike[0])} of a sample of {list(shape)}",
                expected="everything that batch changes in a sample so that it fits",
                mend="name it in Fit.adaptations: profile.adapted('length', FACT, USED), of what measure gives",
            )  # fmt: skip


def check_mixes(trial: Trial, modality: Modality, inputs: Mapping[str, Tensor]) -> None:
    """Each way to mix a batch gives one of the same form, with shares of classes, and leaves what it is given alone."""
    num_classes = len(trial.plan.classes)
    targets = torch.eye(num_classes)[torch.arange(len(trial.decoded)) % num_classes]
    given = {key: value.clone() for key, value in inputs.items()}
    for name, mix in modality.mixes.items():
        what = f"mixes[{name!r}]"
        with calling("mixes", what), torch.random.fork_rng():
            mixed, shares = mix(given, targets)
        wrong = [key for key in given.keys() | mixed.keys() if not _alike(given.get(key), mixed.get(key))]
        if wrong:
            raise ContractError(
                "mixes", f"{what} gives {_kinds(mixed)}", expected=f"as it is given: {_kinds(given)}, finite",
                mend="mix the samples of the batch, and leave the rest as it is",
            )  # fmt: skip
        if not _alike(targets, shares) or not torch.allclose(shares.sum(dim=1), torch.ones(len(targets))):
            raise ContractError(
                "mixes", f"{what} gives targets that are no shares of the classes",
                expected=f"float32 {list(targets.shape)}, 1 in each row", mend="mix the targets as the samples",
            )  # fmt: skip
        if any(not torch.equal(given[key], inputs[key]) for key in given):
            raise ContractError("mixes", f"{what} changes the batch that it is given", expected="tensors of its own")


def _alike(one: Any, other: Any) -> bool:
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    return both and one.shape == other.shape and one.dtype == other.dtype and bool(other.isfinite().all())


def _kinds(inputs: Any) -> str:
    if not isinstance(inputs, Mapping):
        return f"a {type(inputs).__name__}"
    shown = (
        f"{key!r} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}" if isinstance(value, Tensor)
        else f"{key!r} a {type(value).__name__}" for key, value in inputs.items()
    )  # fmt: skip
    return ", ".join(shown) or "nothing"


def _fits(value: Tensor, shape: Sequence[int | str]) -> bool:
    return value.ndim == len(shape) + 1 and all(
        isinstance(wanted, str) or wanted == size for wanted, size in zip(shape, value.shape[1:], strict=True)
    )


def _check_keys(network: Network, inputs: Mapping[str, Tensor]) -> None:
    """The keys are parameters of `forward`; those that `parts` takes out are its own."""
    parameters = inspect.signature(network.module.forward).parameters
    parts: Sequence[Mapping[str, Tensor]] = [inputs]
    if network.parts is not None:
        with calling("build", "Network.parts"):
            parts = [part for _, part in network.parts(inputs)]
    undeclared = sorted({key for part in parts for key in part} - set(parameters))
    if undeclared and not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        raise ContractError(
            "batch", f"gives {undeclared[0]!r}, which the network's forward does not take",
            expected="some of " + ", ".join(parameters), mend="leave the key out, or name it as forward does",
        )  # fmt: skip


def logits_of(trial: Trial, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the network makes of a batch: floating point [batch, classes], or a `ContractError`."""
    with calling("build", "calling the network with the batch"):
        logits = trial.network.logits(inputs)
    wanted = [len(trial.decoded), len(trial.plan.classes)]
    if list(logits.shape) != wanted or not logits.is_floating_point():
        raise ContractError(
            "build", f"the network gives logits {str(logits.dtype).removeprefix('torch.')} {list(logits.shape)}",
            expected=f"floating point {wanted}: [batch, classes]", mend="give the last layer len(plan.classes) outputs",
        )  # fmt: skip
    return logits
