"""Before the start: a few real samples become a batch, and the network is built from the headers of its weights.

So what the first batch or the loading would fail on is refused while nothing is downloaded but small files. `plan` does
it, and so does `finetune` before a run begins.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.backbone import fetch
from orchestrator.data import LEAVE_OUT, Prepared
from orchestrator.errors import (
    BadSampleError,
    DataError,
    MissingExtraError,
    OrchestratorError,
    RefusedError,
    first_line,
    missing_extra,
)
from orchestrator.gate import ResolvedBackbone, planned, refuse_own_code
from orchestrator.job import Job, Plan
from orchestrator.modality import Modality

if TYPE_CHECKING:
    from torch import nn

    from orchestrator.modality import Collate
    from orchestrator.network import Inputs, Network

_INSIDE = re.compile(r"[/\\](torch[/\\]_subclasses|safetensors)[/\\]")  # what has a look at values, or reads the files
_SHOWN = 3
_COUNTS_LAYERS = re.compile(r"(layers?|depths?|blocks?|block_sizes|stages?|repeats?)$")
_MANY_LAYERS = 1000


def plan(job: Job | Mapping[str, Any] | str | Path | None = None, /, **fields: Any) -> Plan:
    """The Plan of a job: what would happen, with nothing trained and no weight downloaded.

    Takes what `finetune` takes. A few samples go through the backbone's tokenizer or processor, and `rehearsal` says
    what came of it. Raises `JobError` and `RefusedError`.
    """
    made = rehearsed(*planned(job, fields))
    return made.model_copy(update={"warnings": (*made.warnings, *_without_gpu(made))})


def rehearsed(plan: Plan, prepared: Prepared, resolved: ResolvedBackbone) -> Plan:
    """The plan, with what a rehearsal found. Raises `RefusedError` where the first batch or the weights would fail."""
    plugin = resolved.plugin
    try:
        import torch  # noqa: F401  # before anything of a plugin's that needs it
    except ModuleNotFoundError as error:
        refusal = missing_extra(error, plugin.extra)
        return plan.model_copy(update={"rehearsal": (f"nothing: {refusal or error}",)})
    if plan.recipe.adapter is not None:
        _require_peft()
    directory = _or_refused(plan, lambda: fetch(plan.backbone, with_weights=False), "its small files")
    lines = [_try_batch(plan, prepared, plugin, directory)]
    warnings: list[str] = []
    if plan.weights == "pretrained" and _is_known(plan):
        try:
            network = _built(plan, resolved, directory)
        except _NeedsValuesError as error:
            lines.append(f"the network was not built from its headers: {error}")
        else:
            lost = _lost(network)
            refuse_own_code(plan.backbone, plan.row, lost)
            lines.append("the network from the headers of its weights: they fit")
            lines += _unused(
                [name for name in network.unused if name not in lost], "another task's head, or a part beside"
            )
            warnings += _unused(lost, f"a part that {plan.row.architecture} has not")
    return plan.model_copy(update={"rehearsal": tuple(lines), "warnings": (*plan.warnings, *warnings)})


def _without_gpu(plan: Plan) -> list[str]:
    """That the job wants a GPU, and would not start on this machine: it may be meant for another."""
    if plan.job.scaling.device != "gpu" or plan.job.scaling.address is not None:
        return []
    try:
        from orchestrator.network import find_device

        find_device("gpu")
    except RefusedError as error:
        return [f"{error.message}: finetune is refused on this machine, unless it is told {error.mend}"]
    except ModuleNotFoundError:  # torch, which `rehearsed` has said
        pass
    return []


def _require_peft() -> None:
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "peft", "lora") from None


def _or_refused(plan: Plan, make: Any, what: str) -> Any:
    """What `make()` gives; what it raises becomes a refusal of the backbone."""
    source = plan.backbone.source
    try:
        return make()
    except RefusedError:
        raise
    except OrchestratorError as error:
        raise RefusedError("bad_config", error.message, expected=error.expected, mend=error.mend) from error
    except ModuleNotFoundError as error:
        raise missing_extra(error) or error from None
    except Exception as error:  # what a library makes of files that are not as it expects
        raise RefusedError(
            "bad_config", f"{source}: {what} cannot be used: {type(error).__name__}: {first_line(error)}",
            mend="fetch or save the backbone again, with its tokenizer or processor",
        ) from error  # fmt: skip


# --- a batch ---


def _try_batch(plan: Plan, prepared: Prepared, plugin: Modality, directory: Path) -> str:
    """What a few real samples became, in a line. Raises `RefusedError` where they become nothing."""
    from orchestrator.features import collated

    assert plugin.decode is not None
    assert plugin.batch is not None
    batch = plugin.batch
    collate: Collate = _or_refused(plan, lambda: batch(plan, directory), "its tokenizer or processor")
    decoded, places = [], []
    for example in prepared.examples:
        try:
            decoded.append(plugin.decode(example.sample))
        except BadSampleError as error:  # a plugin whose decoding is not the same each time
            raise DataError(f"{example.place}: {error.message}", mend=f"mend or remove it, or {LEAVE_OUT}") from None
        places.append(example.place)
    inputs, faults = _or_refused(plan, lambda: collated(collate, decoded, False), "its tokenizer or processor")
    if faults:
        place, fault = next(iter(faults.items()))
        if inputs is None:
            raise RefusedError(
                "bad_config",
                f"{plan.backbone.source}: its tokenizer or processor takes none of {len(decoded)} samples, "
                f"{places[place]} among them: {fault.message}",
                mend="fetch or save the backbone again, with its tokenizer or processor",
            )
        if plan.job.data.on_bad_sample == "fail":
            raise DataError(
                f"{places[place]}: {fault.message}", expected="samples that can all be used",
                mend=f"mend or remove them, or {LEAVE_OUT}",
            )  # fmt: skip
    if inputs is None:
        return "no samples"
    _require_inputs(plan, inputs)
    shapes = ", ".join(
        f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for name, tensor in inputs.items()
    )
    left_out = f"; {len(faults)} cannot be taken, and will be left out" if faults else ""
    return f"a batch of {len(decoded) - len(faults)} samples: {shapes}{left_out}"


def _require_inputs(plan: Plan, inputs: Inputs) -> None:
    """Raise `RefusedError` where nothing of the batch is what the network takes."""
    wanted = plan.row.inputs
    if wanted and not set(wanted) & set(inputs):
        raise RefusedError(
            "bad_config",
            f"{plan.backbone.source}: its tokenizer or processor gives {', '.join(inputs)}, and "
            f"{plan.row.architecture} takes {' or '.join(wanted)}",
            mend="save the right tokenizer or processor beside the model",
        )


# --- the weights ---


class _NeedsValuesError(Exception):
    """What builds a network looks at values of its tensors, or reads its files itself."""


def _built(plan: Plan, resolved: ResolvedBackbone, directory: Path) -> Network:
    """The plan's network, whose tensors hold nothing. Raises `_NeedsValuesError` where it cannot be built so."""
    from orchestrator.network import from_headers

    assert resolved.plugin.build is not None
    build, tensors = resolved.plugin.build, resolved.tensors or {}
    _require_layers(plan, plan.backbone.config, len(tensors))
    try:
        with from_headers(tensors):
            network: Network = _or_refused(plan, lambda: build(plan, directory), "its network")
    except RefusedError as error:
        cause = error.__cause__
        if isinstance(cause, Exception) and any(_INSIDE.search(one.filename) for one in traceback.extract_tb(
            cause.__traceback__)):  # fmt: skip
            raise _NeedsValuesError(f"{type(cause).__name__}: {first_line(cause)}") from error
        raise
    return network


def _is_known(plan: Plan) -> bool:
    """Whether transformers or timm makes the network: a plugin's own may want the files."""
    import transformers

    return plan.backbone.library == "timm" or hasattr(transformers, plan.row.architecture or "-")


def _require_layers(plan: Plan, config: Mapping[str, Any], num_tensors: int) -> None:
    """Raise `RefusedError` where config.json asks for more layers than there are tensors: they take all memory."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _require_layers(plan, value, num_tensors)
        each = value if isinstance(value, (list, tuple)) else [value]
        numbers = [one for one in each if isinstance(one, (int, float)) and one > max(_MANY_LAYERS, num_tensors)]
        if numbers and _COUNTS_LAYERS.search(key):
            raise RefusedError(
                "bad_config",
                f"{plan.backbone.source}: config.json sets {key} = {numbers[0]}, and the weights are {num_tensors} "
                "tensors",
                mend="fetch or save the backbone again",
            )


def _lost(network: Network) -> list[str]:
    """Tensors of the checkpoint that belong to the body by their names, and that the body has no place for."""
    module: nn.Module = network.module
    body = getattr(module, getattr(module, "base_model_prefix", "") or "body", None)
    children = {name for name, _ in body.named_children()} if body is not None else set()
    return [name for name in network.unused if name.split(".")[0] in children and "pooler" not in name]


def _unused(names: Sequence[str], why: str) -> list[str]:
    """That tensors of the checkpoint are not used, in a line; without any, none."""
    if not names:
        return []
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    what = "one tensor" if len(names) == 1 else f"{len(names)} tensors"
    return [f"{what} of the checkpoint {'is' if len(names) == 1 else 'are'} not used ({shown}): {why}"]
