"""A plugin's network on its toy samples: steps, an export, and jobs from end to end, for each task. Needs torch."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.backbone import fetch, read_card
from orchestrator.errors import ContractError, calling
from orchestrator.gate import planned
from orchestrator.job import Plan, Run, make_job
from orchestrator.modality import Modality
from orchestrator.network import Network, freeze, make_optimizer, set_mode
from orchestrator.predictor import predict
from orchestrator.tasks import make_objective
from orchestrator.testing.batch import Trial, check_mixes, check_seeded, check_told, collated, logits_of
from orchestrator.testing.samples import Toys
from orchestrator.train import finetune

_NUM_STEPS = 3
_NUM_EPOCHS = 3
_NUM_IN_BATCH = 8
_TOLERANCE = 1e-4
"""Between logits of the same weights: relative to the largest, or absolute where that is below 1."""


def check_network(modality: Modality, backbone: Path, folder: Path, toys: Toys, settings: Mapping[str, Any]) -> None:
    """Build, batch, step, export; pretrain, where there are no weights; and for every task fine-tune the head."""
    source = str(backbone)
    for task in (one.name for one in modality.tasks):
        (folder / task).mkdir()
        fields = {
            "modality": modality.name, "settings": dict(settings), "storage": str(folder / task / "runs"),
            "data": {"path": str(_write(modality, toys, folder / task, task))}, "task": task,
            "training": {"epochs": _NUM_EPOCHS, "batch_size": _NUM_IN_BATCH, "learning_rate": 1e-2},
            "scaling": {"threads_per_worker": 1},
        }  # fmt: skip
        with _named(task, modality):
            if not read_card(source).weight_files:
                job = {**fields, "backbone": source, "method": "scratch", "name": "check-scratch"}
                trial = _trial(modality, job, toys)
                _check_steps(trial, modality)
                _check_export(trial, modality, folder / "export-scratch")
                source = str(_run("a job from random weights", job).path)
            job = {**fields, "backbone": source, "method": "head", "name": "check-head"}
            trial = _trial(modality, job, toys)
            _check_steps(trial, modality)
            check_told(trial)
            check_seeded(trial)
            if modality.augments and task == modality.tasks[0].name:
                check_seeded(_with_augments(trial, modality, job))
            _check_export(trial, modality, folder / task / "export")
            _check_run(_run("a job with a frozen body", job), trial, modality, toys)


@contextlib.contextmanager
def _named(task: str, modality: Modality) -> Iterator[None]:
    """What is found in one task of several says in which."""
    try:
        yield
    except ContractError as error:
        if len(modality.tasks) == 1:
            raise
        found = f"for the task {task}, {error.found}"
        raise ContractError(error.field, found, expected=error.expected, mend=error.mend) from error


def _check_run(run: Run, trial: Trial, modality: Modality, toys: Toys) -> None:
    """A finished run has the body that it began with, and predicts."""
    _check_frozen(run, trial, modality)
    with calling("build", "predicting with the finished run"):
        (prediction,) = predict(run, [toys.samples[0][modality.sample[0].name]])
    single = run.plan.job.task == "single-label"
    if prediction.problem or (single and prediction.label not in run.plan.classes):
        raise ContractError("decode", f"predicting for a toy sample gives {prediction.label!r} {prediction.problem!r}")


def _write(modality: Modality, toys: Toys, folder: Path, task: str) -> Path:
    """The toys as a user has data: files and a table of their paths, or a table of texts."""
    numbers = {label: i for i, label in enumerate(sorted(set(toys.labels)))}
    cell: dict[str, Callable[[str], Any]] = {
        "single-label": str, "multi-label": lambda label: [label], "regression": lambda label: float(numbers[label])
    }  # fmt: skip
    first, lines = modality.sample[0], []
    (folder / "data").mkdir()
    for i, (sample, label) in enumerate(zip(toys.samples, toys.labels, strict=True)):
        row: dict[str, Any] = {"label": cell[task](label)}
        if first.kind == "file":
            row["path"] = f"{i}{first.suffixes[0]}"
            (folder / "data" / row["path"]).write_bytes(sample[first.name])
        else:
            texts = [sample[one.name].decode() for one in modality.sample if one.name in sample]
            row |= dict(zip(("text", "text_pair"), texts, strict=False))
        lines.append(json.dumps(row, ensure_ascii=False))
    table = folder / "data" / "toys.jsonl"
    table.write_text("\n".join(lines), encoding="utf-8")
    return table


def _trial(modality: Modality, job: Mapping[str, Any], toys: Toys) -> Trial:
    assert modality.build is not None
    assert modality.batch is not None
    with calling("fit", "planning a job on the toy samples"):
        plan = planned(make_job(job), {})[0]
        directory = fetch(plan.backbone, plan.weights != "random")
    with calling("build", f"from {plan.weights} weights"):
        network = modality.build(plan, directory)
    if not isinstance(network, Network):
        raise ContractError(
            "build", f"gives a {type(network).__name__}", expected="orchestrator.network.Network",
            mend="build_module or build_transformers of orchestrator.network make one",
        )  # fmt: skip
    modules = dict(network.module.named_modules())
    wrong = [name for name in network.head if name not in modules]
    if wrong or not network.head:
        raise ContractError(
            "build", f"the head {wrong[0]!r} is no module of the network" if wrong else "names no head",
            expected=f"some of {', '.join(list(modules)[1:9])}, ...",
        )  # fmt: skip
    with calling("batch", "making the collate function"):
        collate = modality.batch(plan, directory)
    names = sorted(set(toys.labels))
    chosen = [i for name in names[:2] for i in [j for j, label in enumerate(toys.labels) if label == name][:4]]
    labels = [toys.labels[i] for i in chosen]
    return Trial(
        plan, directory, network, collate, [toys.decoded[i] for i in chosen],
        _targets(plan, labels, {name: float(i) for i, name in enumerate(names)}),
    )  # fmt: skip


def _with_augments(trial: Trial, modality: Modality, job: Mapping[str, Any]) -> Trial:
    """The trial with the settings that change samples at random."""
    assert modality.batch is not None
    settings = {**job["settings"], **modality.augments}
    with calling("augments", f"planning a job with settings = {settings}"):
        plan = planned(make_job({**job, "settings": settings}), {})[0]
    with calling("batch", f"making the collate function with settings = {settings}"):
        return replace(trial, plan=plan, collate=modality.batch(plan, trial.directory))


def _targets(plan: Plan, labels: Sequence[str], numbers: Mapping[str, float]) -> Tensor:
    if plan.job.task == "regression":
        return torch.tensor([[numbers[label]] for label in labels])
    index = torch.tensor([plan.classes.index(label) for label in labels])
    return index if plan.job.task == "single-label" else torch.nn.functional.one_hot(index, len(plan.classes)).float()


def _state(network: Network) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.module.state_dict().items()}


def _in_head(name: str, network: Network) -> bool:
    return any(name.startswith(f"{module}.") for module in network.head)


def _moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    return [name for name, value in before.items() if name not in after or not torch.equal(value, after[name])]


def _check_steps(trial: Trial, modality: Modality) -> None:
    """Some steps on one batch: the loss is finite, the head moves, and what is frozen stays as it was."""
    network, plan = trial.network, trial.plan
    freeze(network, plan.recipe.phases[0])
    set_mode(network, plan.recipe.phases[0], training=False)
    inputs = collated(trial, modality, train=False)
    again = collated(trial, modality, train=False)
    if set(again) != set(inputs) or any(not torch.equal(inputs[key], again[key]) for key in inputs):
        raise ContractError(
            "batch", "collate(decoded, False) gives something else the second time",
            expected="randomness in training alone: collate(decoded, True)",
        )  # fmt: skip
    with torch.no_grad():
        logits = logits_of(trial, inputs)
    if torch.equal(logits, logits[:1].expand_as(logits)):
        raise ContractError(
            "batch", "samples of both classes give the same logits: what is in them does not reach the network",
            expected="logits that depend on the sample",
        )  # fmt: skip
    if not plan.row.fp32_only:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), _in_bfloat16():
            logits_of(trial, inputs)
    before = _state(network)
    objective = make_objective(plan, network)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        set_mode(network, plan.recipe.phases[0], training=True)
        optimizer, _ = make_optimizer(network, plan.job.training, plan.recipe.phases[0])
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"]
        inputs = collated(trial, modality, train=True)
        if trial.plan.job.task != "regression":
            check_mixes(trial, modality, inputs)
        for _ in range(_NUM_STEPS):
            total, weight = objective.loss(logits_of(trial, inputs).float(), trial.targets)
            loss = total / weight
            if not math.isfinite(loss.item()):
                raise ContractError("build", f"the loss is {loss.item()}", expected="a finite loss on toy samples")
            optimizer.zero_grad(set_to_none=True)
            with calling("build", "the backward pass", "logits that come from the head's parameters"):
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    _check_moved(network, before)


@contextlib.contextmanager
def _in_bfloat16() -> Iterator[None]:
    """Name what fails there: on a GPU, `precision` auto is bfloat16."""
    try:
        yield
    except ContractError as error:
        raise ContractError(
            "build", f"in bfloat16, which is what a GPU trains in unless it is told otherwise: {error.message}",
            expected="a network that runs under torch.autocast",
            mend="cast what is written into tensors to their dtype, or say fp32_only=True in the type's BackboneRow",
        ) from error  # fmt: skip


def _check_moved(network: Network, before: Mapping[str, Tensor]) -> None:
    for name in network.head:
        parameters = list(network.module.get_submodule(name).parameters())
        # The optimizer's weight decay moves parameters that have no part in the loss too: gradients tell.
        if not any(one.grad is not None and bool(one.grad.any()) for one in parameters):
            raise ContractError(
                "build", f"a step changes nothing: no gradient reaches the head {name!r}",
                expected="every module of the head between the features and the logits",
                mend="name the layers that give the logits, and detach nothing behind them",
            )  # fmt: skip
    moved = _moved(before, network.module.state_dict())
    still = [name for name in network.head if not any(one.startswith(f"{name}.") for one in moved)]
    if still:
        raise ContractError(
            "build", f"a step changes nothing in the head {still[0]!r}", expected="parameters that move"
        )
    frozen = {name for name, one in network.module.named_parameters() if not one.requires_grad}
    if frozen:  # buffers stand still with them
        _refuse_moved([name for name in moved if not _in_head(name, network)], "steps with method head")


def _refuse_moved(names: Sequence[str], what: str) -> None:
    if names:
        raise ContractError(
            "build",
            f"{what} change {names[0]}, which is frozen" + (f" (and {len(names) - 1} more)" if names[1:] else ""),
            expected="a body that is the same, to the byte, statistics of BatchNorm among it",
            mend="change nothing in forward; keep running statistics in eval mode as they are",
        )  # fmt: skip


def _trained(modality: Modality, plan: Plan, directory: Path) -> Network:
    """What `build` makes of an exported directory."""
    assert modality.build is not None
    with calling("build", "loading what Network.save wrote, with weights='trained'", "the network that was saved"):
        card = read_card(str(directory))
        network: Network = modality.build(plan.model_copy(update={"backbone": card, "weights": "trained"}), directory)
    set_mode(network, plan.recipe.phases[0], training=False)
    return network


def _check_export(trial: Trial, modality: Modality, folder: Path) -> None:
    """What `save` writes gives the same logits, by the collate function of the saved directory too.

    It is given the tensors while the network holds others, as where each worker holds a part of them.
    """
    assert modality.batch is not None
    set_mode(trial.network, trial.plan.recipe.phases[0], training=False)
    folder.mkdir()
    state = _state(trial.network)
    _require_state_dict(trial.network, folder, state)
    try:
        with calling("build", "Network.save"), torch.no_grad():
            for tensor in trial.network.module.state_dict().values():
                tensor.zero_()
            trial.network.save(folder, state)
    finally:
        trial.network.module.load_state_dict(state)
    again = _trained(modality, trial.plan, folder)
    with calling("batch", "making the collate function of the exported directory"):
        collate = modality.batch(trial.plan.model_copy(update={"backbone": read_card(str(folder))}), folder)
    saved = Trial(trial.plan, folder, again, collate, trial.decoded, trial.targets)
    with torch.no_grad():
        ours = logits_of(trial, collated(trial, modality, train=False))
        theirs = logits_of(saved, collated(saved, modality, train=False))
    error = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1.0))
    if not error <= _TOLERANCE:
        raise ContractError(
            "build", f"the exported network gives other logits than the one in memory, by {error:.2g}",
            expected=f"the same within {_TOLERANCE:g}",
            mend="save every tensor of the state_dict that save is given, and load every tensor where plan.weights is "
            "'trained'",
        )  # fmt: skip


def _require_state_dict(network: Network, folder: Path, state: Mapping[str, Tensor]) -> None:
    try:
        inspect.signature(network.save).bind(folder, state)
    except TypeError as error:
        raise ContractError(
            "build", f"its Network.save does not take a folder and the tensors to write: {error}",
            expected="save(folder, state_dict), with the names of module.state_dict()",
            mend="write the tensors that it is given, not those of the module, which may hold a part of them alone",
        ) from error  # fmt: skip


def _run(what: str, job: Mapping[str, Any]) -> Run:
    with calling("build", what, "a finished run"):
        return finetune(job, report=lambda _event: None)


def _check_frozen(run: Run, trial: Trial, modality: Modality) -> None:
    """The body that the finished run exported is the one that it began with."""
    assert modality.build is not None
    with calling("build", "from the same weights again"):
        start = modality.build(trial.plan, trial.directory)
    end = _trained(modality, trial.plan, run.model)
    moved = _moved(_state(start), end.module.state_dict())
    _refuse_moved([name for name in moved if not _in_head(name, start)], "a job with method head and its export")
