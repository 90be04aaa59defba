"""A backbone's checkpoint -> a network with a new head: through transformers, or into a module that a plugin makes.

What has no place in the network, or is missing outside of the head, is a `WeightsError`; what is new is named.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from orchestrator.errors import WeightsError
from orchestrator.job import Plan
from orchestrator.network.config import make_config
from orchestrator.network.headers import held_tensors
from orchestrator.network.network import Network, StateDict, within

_HEAD_STD = 0.02
_MAY_BE_MISSING = ("num_batches_tracked", "position_ids", "masked_spec_embed")  # the last is for pretraining alone
_MAY_BE_UNUSED = ("pooler", "mask_token", "position_ids", "num_batches_tracked")


def build_transformers(
    plan: Plan,
    directory: Path,
    model_class: Any,
    changes: Mapping[str, Any],
    processor: Any | None,
    fresh: Callable[[Any], nn.Module] | None = None,
) -> Network:
    """The default `build` for what transformers loads, timm's networks included.

    `changes` are put into the config. `fresh(config)` makes the model from random weights, where the
    library's own way is not the right one. Raises `WeightsError` where anything but the head does not match.
    """
    config = make_config(plan, changes)
    torch.manual_seed(plan.job.training.seed)
    if plan.weights == "random":
        module = fresh(config) if fresh else model_class.from_config(config)
        names = tuple(module.state_dict())
        return Network(module, plan.row.head, names, (), _saver(module, processor), plan.row.head)
    module, info = _load(plan, directory, model_class, config)
    missing = {name for name in info["missing_keys"] if not name.endswith(_MAY_BE_MISSING)}
    mismatched = {entry[0] for entry in info["mismatched_keys"]}
    unused = set(info["unexpected_keys"])
    head = _head(plan, missing, mismatched)
    base = f"{getattr(module, 'base_model_prefix', '')}."
    # Whisper's classifier has the encoder as its own child, without the base model around it: a decoder is no loss.
    there = base if hasattr(module, base[:-1]) else tuple(f"{base}{name}." for name, _ in module.named_children())
    lost = sorted(name for name in unused if name.startswith(there) and not _any(_MAY_BE_UNUSED, name))
    if lost:
        raise _mismatch(plan, f"it holds {lost[0]}, which the architecture has no place for", len(lost))
    if plan.weights == "pretrained":
        _renew(module, plan.row.head)
    new = tuple(name for name in module.state_dict() if within(name, plan.row.head) or name in missing)
    new = () if plan.weights == "trained" else new
    return Network(module, head, new, tuple(sorted(unused)), _saver(module, processor), plan.row.head)


def build_module(plan: Plan, directory: Path, make: Callable[[], nn.Module], head: str, usage: str = "") -> Network:
    """The default `build` for a network that is neither transformers' nor timm's.

    `make()` gives the module with random weights and its last layer, named `head`, for `plan.classes`; it is
    called under the job's seed. Weights come from `model.safetensors` in `directory`, by the module's own names.
    Saved are config.json, with the classes in it, and model.safetensors; `usage` is Python that loads them,
    for the model card. Raises `WeightsError` where anything but the last layer does not match.
    """
    torch.manual_seed(plan.job.training.seed)
    module = make()
    random = module.state_dict()
    new = tuple(name for name in random if plan.weights == "random" or within(name, (head,)))
    if plan.weights != "random":
        tensors = {
            name: value for file in plan.backbone.weight_files for name, value in load_file(directory / file).items()
        }
        wanted = {name for name in random if plan.weights == "trained" or not within(name, (head,))}
        wrong = sorted(name for name in wanted if name not in tensors or tensors[name].shape != random[name].shape)
        lost = sorted(name for name in tensors if name not in random)
        if wrong or lost:
            problem = (
                f"{wrong[0]} is missing or has another shape" if wrong else f"it holds {lost[0]}, which has no place"
            )
            raise _mismatch(plan, problem, len(wrong) + len(lost))
        module.load_state_dict({name: tensors[name] for name in wanted}, strict=False)
        if plan.weights == "trained":
            new = ()

    def save(folder: Path, state_dict: StateDict) -> None:
        names = dict(enumerate(plan.classes))
        config = {**plan.backbone.config, "id2label": names, "label2id": {name: i for i, name in names.items()}}
        (folder / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
        tensors = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return Network(module, (head,), new, (), save, usage=usage, library=plan.backbone.model_type)


def load_body(
    plan: Plan, directory: Path, model_class: Any, config: Any, more: Mapping[str, Any]
) -> tuple[Any, tuple[str, ...]]:
    """A body without a head from the checkpoint: (the model, unused tensors).

    Raises `WeightsError` where the checkpoint lacks a parameter of it.
    """
    module, info = _load(plan, directory, model_class, config, **more)
    if info["missing_keys"] and plan.row.prefix:
        # transformers finds only some towers in the checkpoint of their whole model (clip's, not align's).
        tower = _tower(plan, directory)
        if tower:
            module, info = _load(plan, None, model_class, config, state_dict=tower, **more)
    missing = {name for name in info["missing_keys"] if not name.endswith(_MAY_BE_MISSING)}
    wrong = sorted(missing | {entry[0] for entry in info["mismatched_keys"]})
    if wrong:
        raise _mismatch(plan, f"{wrong[0]} is missing or has another shape", len(wrong))
    return module, tuple(sorted(info["unexpected_keys"]))


def _tower(plan: Plan, directory: Path) -> dict[str, Tensor]:
    """The tensors of one part of a larger model, by the names that they have in the part."""
    held = held_tensors()
    if held is not None:
        return part_of(held, plan.row.prefix.removesuffix("."))
    in_tower = {}
    for file in plan.backbone.weight_files:
        with safe_open(directory / file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # no mapping, and not iterable
                if name.startswith(plan.row.prefix):
                    in_tower[name.removeprefix(plan.row.prefix)] = tensors.get_tensor(name)
    return in_tower


def _load(plan: Plan, directory: Path | None, model_class: Any, config: Any, **more: Any) -> tuple[Any, dict[str, Any]]:
    """transformers' model in float32, and what it tells of the loading; without a directory from `state_dict`."""
    held = held_tensors()
    if held is not None and directory is not None:
        directory, more = None, {**more, "state_dict": held}
    with ExitStack() as resources:
        resources.enter_context(quiet())
        place = None if directory is None else resources.enter_context(_weights_alone(plan, directory))
        module, info = model_class.from_pretrained(
            place,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **more,
        )
    return module, info


@contextlib.contextmanager
def _weights_alone(plan: Plan, directory: Path) -> Iterator[Path]:
    """A folder of links to the weights, by the names that transformers looks for, and nothing else that it would read.

    So files of other names are found, and an index of shards is ours: theirs could name files that lie elsewhere.
    """
    files = plan.backbone.weight_files
    with TemporaryDirectory(prefix="orchestrator-weights-") as folder:
        place = Path(folder)
        if len(files) == 1:
            (place / "model.safetensors").symlink_to((directory / files[0]).resolve())
        else:
            shards: dict[str, str] = {}
            for file in files:
                (place / file).symlink_to((directory / file).resolve())
                with safe_open(place / file, "pt") as tensors:
                    shards |= dict.fromkeys(tensors.keys(), file)
            index = {"metadata": {}, "weight_map": shards}
            (place / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        yield place


def part_of(state_dict: StateDict, name: str) -> dict[str, Tensor]:
    """The tensors of one submodule, by the names that they have in it."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def new_layer(width: int, num_classes: int) -> nn.Linear:
    """A last layer with small random weights."""
    layer = nn.Linear(width, num_classes)
    nn.init.normal_(layer.weight, std=_HEAD_STD)
    nn.init.zeros_(layer.bias)
    return layer


def _head(plan: Plan, missing: set[str], mismatched: set[str]) -> tuple[str, ...]:
    """The modules of the head; raises `WeightsError` where something outside of it is missing."""
    row = plan.row
    extended = []
    for name in sorted(missing | mismatched):
        if within(name, row.head) and plan.weights == "pretrained":
            continue
        owner = next((module for module in row.may_be_new if within(name, (module,))), _pooler(name))
        if owner is None or name in mismatched or plan.weights == "trained":
            what = "has another shape" if name in mismatched else "is missing"
            raise _mismatch(plan, f"{name} {what}", len(missing | mismatched))
        extended.append(owner)
    poolers = [module for module in dict.fromkeys(extended) if module not in row.may_be_new]
    owners = poolers + [module for module in row.may_be_new if module in extended]
    return tuple(owners + [name for name in row.head if not within(name, owners)])


def _pooler(name: str) -> str | None:
    """`beit.pooler` of `beit.pooler.layernorm.weight`: what comes after the last layer is no part of many bases."""
    parts = name.split(".")
    return ".".join(parts[: parts.index("pooler") + 1]) if "pooler" in parts[:-1] else None


def _mismatch(plan: Plan, problem: str, num: int) -> WeightsError:
    more = f" (and {num - 1} more)" if num > 1 else ""
    return WeightsError(
        f"the weights of {plan.backbone.source} do not fit its config.json: {problem}{more}",
        expected=f"every tensor of {plan.row.architecture}, but those of {', '.join(plan.row.head)}",
        mend="fetch or save the backbone again",
    )


def _any(parts: tuple[str, ...], name: str) -> bool:
    return any(part in name for part in parts)


def _renew(module: nn.Module, head: tuple[str, ...]) -> None:
    """Random values for the last layer, also where the old one had the same number of classes."""
    for name in head:
        for layer in module.get_submodule(name).modules():
            if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                nn.init.normal_(layer.weight, std=_HEAD_STD)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


def _saver(module: Any, processor: Any | None) -> Callable[[Path, StateDict], None]:
    def save(directory: Path, state_dict: StateDict) -> None:
        with quiet():
            module.save_pretrained(directory, state_dict=dict(state_dict))  # a copy: it takes them out one by one
            if processor is not None:
                processor.save_pretrained(directory)

    return save


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bar and its report of the loading: ours tells what is going on."""
    shown, verbosity = transformers.logging.is_progress_bar_enabled(), transformers.logging.get_verbosity()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if shown:
            transformers.logging.enable_progress_bar()
