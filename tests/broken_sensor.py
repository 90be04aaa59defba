"""Parts of a sensor plugin that each break the contract once; imports no torch, and neither may a plugin."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from orchestrator_sensor import batch, build, decode, fit, toy  # type: ignore[import-not-found]
from pydantic import BaseModel, ConfigDict, model_validator

from orchestrator.errors import BadSampleError, RefusedError
from orchestrator.job.plans import BackboneRow
from orchestrator.modality.contract import Fit

_number = itertools.count()


class Lax(BaseModel):
    steps: int = 128


class Dropping(BaseModel):
    model_config = ConfigDict(extra="forbid")

    steps: int = 128

    @model_validator(mode="before")
    @classmethod
    def _drop(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key in cls.model_fields}


class Needy(BaseModel):
    model_config = ConfigDict(extra="forbid")

    steps: int


class Everything(Mapping[str, BackboneRow]):
    """A rule that takes whatever it is asked for."""

    def __getitem__(self, key: str) -> BackboneRow:
        return BackboneRow(head=("8",))

    def __iter__(self) -> Iterator[str]:
        return iter(("sensor-cnn",))

    def __len__(self) -> int:
        return 1


# --- toy ---


def one_class(n: int) -> Any:
    return [(sample, "slow") for sample, _ in toy(n)]


def at_random(n: int) -> Any:
    start = next(_number)
    return toy(n + start)[start:]


def too_few(n: int) -> Any:
    return toy(n)[:3]


def not_apart(n: int) -> Any:
    return [(toy(1)[0][0], label) for _, label in toy(n)]


def numbers_as_labels(n: int) -> Any:
    return [(sample, i % 2) for i, (sample, _) in enumerate(toy(n))]


def undeclared_field(n: int) -> Any:
    return [({**sample, "weather": b"rain"}, label) for sample, label in toy(n)]


def without_field(n: int) -> Any:
    return [({}, label) for _, label in toy(n)]


def not_bytes(n: int) -> Any:
    return [({"sensor": list(sample["sensor"])}, label) for sample, label in toy(n)]


# --- decode, measure, fit ---


def decode_unguarded(sample: Any) -> Any:
    import io

    return np.load(io.BytesIO(sample["sensor"]), allow_pickle=False).astype(np.float32)


def decode_saying_nothing(sample: Any) -> Any:
    try:
        return decode(sample)
    except BadSampleError:
        raise BadSampleError("") from None


def decode_with_torch(sample: Any) -> Any:
    import torch

    return torch.from_numpy(decode(sample)).numpy()


def measure_list(signal: Any, card: Any) -> Any:
    return {"channels": len(signal), "shape": signal.shape}


def measure_infinite(signal: Any, card: Any) -> Any:
    return {"channels": len(signal), "loudest": float("inf")}


def measure_numpy(signal: Any, card: Any) -> Any:
    return {"channels": np.int64(len(signal))}


def fit_changing(card: Any, row: Any, settings: Any, profile: Any) -> Fit:
    card.config.setdefault("steps", settings.steps)
    return fit(card, row, settings, profile)  # type: ignore[no-any-return]


def fit_counting(card: Any, row: Any, settings: Any, profile: Any) -> Fit:
    return Fit(input={**fit(card, row, settings, profile).input, "number": next(_number)})


def fit_tuple(card: Any, row: Any, settings: Any, profile: Any) -> Fit:
    return Fit(input={**fit(card, row, settings, profile).input, "size": (3, 128)})


def fit_object(card: Any, row: Any, settings: Any, profile: Any) -> Fit:
    return Fit(input={**fit(card, row, settings, profile).input, "of": {1, 2}})


def fit_dict(card: Any, row: Any, settings: Any, profile: Any) -> Any:
    return dict(fit(card, row, settings, profile).input)


def fit_refusing(card: Any, row: Any, settings: Any, profile: Any) -> Fit:
    if profile is not None:
        raise RefusedError("channels", "too many")
    return fit(card, row, settings, profile)  # type: ignore[no-any-return]


def fit_with_torch(card: Any, row: Any, settings: Any, profile: Any) -> Fit:
    import torch

    assert torch.__version__
    return fit(card, row, settings, profile)  # type: ignore[no-any-return]


# --- batch: what is done to the right one ---


def batch_of_more_keys(plan: Any, directory: Any) -> Any:
    return lambda rows, train: {**(given := batch(plan, directory)(rows, train)), "weather": given["input"]}


def _changed(change: Any) -> Any:
    return lambda plan, directory: lambda rows, train: {"input": change(batch(plan, directory)(rows, train)["input"])}


def batch_double(plan: Any, directory: Any) -> Any:
    return _changed(lambda given: given.double())(plan, directory)


def batch_whole_numbers(plan: Any, directory: Any) -> Any:
    return _changed(lambda given: given.long())(plan, directory)


def batch_flat(plan: Any, directory: Any) -> Any:
    return _changed(lambda given: given.flatten(1))(plan, directory)


def batch_transposed(plan: Any, directory: Any) -> Any:
    return _changed(lambda given: given.transpose(0, 2))(plan, directory)


def batch_lists(plan: Any, directory: Any) -> Any:
    return _changed(lambda given: given.tolist())(plan, directory)


def batch_at_random(plan: Any, directory: Any) -> Any:
    return _changed(lambda given: given + next(_number))(plan, directory)


def batch_of_numpy(plan: Any, directory: Any) -> Any:
    """Its random changes are numpy's, which nobody seeds."""
    collate = batch(plan, directory)
    return lambda rows, train: {"input": collate(rows, train)["input"] + train * np.random.randint(9)}


class Shaken(BaseModel):
    model_config = ConfigDict(extra="forbid")

    steps: int = 128
    shake: bool = False


def fit_shaken(card: Any, row: Any, settings: Any, profile: Any) -> Fit:
    told = fit(card, row, settings, profile)
    return Fit(
        input={**told.input, "shake": settings.shake}, adaptations=told.adaptations, augmented=settings.shake,
        augmentation=("shake",),
    )  # fmt: skip


def batch_shaken(plan: Any, directory: Any) -> Any:
    return (batch_of_numpy if plan.input["shake"] else batch)(plan, directory)


def fit_silent(card: Any, row: Any, settings: Any, profile: Any) -> Fit:
    return Fit(input=fit(card, row, settings, profile).input)


def batch_not_finite(plan: Any, directory: Any) -> Any:
    return _changed(lambda given: given / 0)(plan, directory)


def batch_blind(plan: Any, directory: Any) -> Any:
    return _changed(lambda given: given * 0)(plan, directory)


# --- mixes ---


def mix_of_more_keys(inputs: Any, targets: Any) -> Any:
    return {**inputs, "share": targets[:, 0]}, targets


def mix_without_labels(inputs: Any, targets: Any) -> Any:
    return {key: value.roll(1, 0) for key, value in inputs.items()}, targets * 0.5


def mix_in_place(inputs: Any, targets: Any) -> Any:
    inputs["input"].mul_(0.5)
    return inputs, targets


def mix_raising(inputs: Any, targets: Any) -> Any:
    raise ValueError("cannot be mixed")


# --- build: what is done to the right network ---


def build_nothing(plan: Any, directory: Any) -> Any:
    return None


def build_head_of_no_name(plan: Any, directory: Any) -> Any:
    network = build(plan, directory)
    network.head = ("last",)
    return network


def build_wide(plan: Any, directory: Any) -> Any:
    return build(plan.model_copy(update={"classes": tuple("abcdefghi")}), directory)


def build_wide_for_numbers(plan: Any, directory: Any) -> Any:
    return build_wide(plan, directory) if plan.job.task == "regression" else build(plan, directory)


def _after(plan: Any, directory: Any, change: Any) -> Any:
    """The right network, its output changed."""
    network = build(plan, directory)
    network.module.register_forward_hook(lambda _module, _inputs, output: change(output))
    return network


def build_infinite(plan: Any, directory: Any) -> Any:
    return _after(plan, directory, lambda output: output * float("nan"))


def _into_float32(output: Any) -> Any:
    import torch

    logits = torch.zeros(output.shape)
    logits[torch.arange(len(output))] = output
    return logits


def build_for_float32(plan: Any, directory: Any) -> Any:
    return _after(plan, directory, _into_float32)


def build_detached(plan: Any, directory: Any) -> Any:
    return _after(plan, directory, lambda output: output.detach())


def build_still(plan: Any, directory: Any) -> Any:
    """Its head is named, and has no part in the logits."""
    from torch import nn

    network = build(plan, directory)
    network.module.add_module("spare", nn.Identity())
    network.module[8].register_forward_hook(lambda _module, inputs, _output: inputs[0][:, : len(plan.classes)] * 1.0)
    for parameter in network.module.parameters():  # so that a frozen body does not stop the backward pass first
        parameter.requires_grad_(True)
    return network


def _warm(module: Any, _inputs: Any) -> None:
    module.running_mean.add_(0.01)


def build_thawed(plan: Any, directory: Any) -> Any:
    """Its BatchNorm counts samples in eval mode too."""
    network = build(plan, directory)
    network.module[1].register_forward_pre_hook(_warm)
    return network


def build_saving_nothing(plan: Any, directory: Any) -> Any:
    network = build(plan, directory)
    network.save = lambda folder, _tensors: (folder / "config.json").write_text('{"model_type": "sensor-cnn"}')
    return network


def build_saving_noise(plan: Any, directory: Any) -> Any:
    """What it saves has another head."""
    network = build(plan, directory)
    save = network.save
    network.save = lambda folder, tensors: save(folder, {**tensors, "8.bias": tensors["8.bias"] + 1.0})
    return network


def build_saving_its_own(plan: Any, directory: Any) -> Any:
    """It writes what the module holds, whatever it is given."""
    network = build(plan, directory)
    save = network.save
    network.save = lambda folder, _tensors: save(folder, network.module.state_dict())
    return network


def build_saving_the_old_way(plan: Any, directory: Any) -> Any:
    """Its save takes the folder alone, as it did once."""
    network = build(plan, directory)
    save = network.save
    network.save = lambda folder: save(folder, network.module.state_dict())
    return network
