"""The keys of a job: every setting under its dotted name, and what a name without its group stands for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

from orchestrator.errors import JobError, did_you_mean
from orchestrator.job.spec import Job


def groups() -> dict[str, type[BaseModel]]:
    """Name -> model of each group of settings: data, training, scaling."""
    kinds = {name: field.annotation for name, field in Job.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


def all_keys() -> list[str]:
    """Every key of a job, those of groups dotted; the plugin's own stand below `settings`."""
    inner = groups()
    return [
        key for name in Job.model_fields
        for key in ((f"{name}.{one}" for one in inner[name].model_fields) if name in inner else (name,))
    ]  # fmt: skip


_ALSO = {"workers": "num_workers"}
"""By what other name a setting is known, as its flag is."""


def homes(name: str) -> list[str]:
    """The dotted keys that end in the name: `training.seed` and `data.seed` of `seed`."""
    name = _ALSO.get(name, name)
    return [key for key in all_keys() if key.partition(".")[2] == name]


def only_home(name: str, said: str) -> str | None:
    """The one dotted key that ends in the name, None where there is none. Raises `JobError` where there are several.

    `said`: what a message calls the name.
    """
    found = homes(name)
    if len(found) > 1:
        raise JobError(
            f"{said} may be {' or '.join(found)}", expected="its name with the group",
            mend=f"did you mean {found[-1]}?",
        )  # fmt: skip
    return found[0] if found else None


def at_home(tree: Mapping[str, Any], where: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """(the tree, with top-level names that stand for one setting of a group put there; name -> the key it became).

    Raises `JobError` for one that several groups have, and where it is set in its group as well. `where` are the places
    of keys, for messages.
    """
    moved: dict[str, str] = {}
    kept = dict(tree)
    for name in [name for name in tree if name not in Job.model_fields]:
        home = only_home(name, f"{where.get(name, '')}{name}")
        if home is not None:
            group, _, inner = home.partition(".")
            there = tree.get(group)
            if isinstance(there, Mapping) and inner in there:
                raise JobError(f"{where.get(name, '')}{name} is {home}, and both are set", mend=f"leave out {name}")
            moved[name] = home
            del kept[name]
    return kept, moved


def by_name(of_plugin: Mapping[str, str]) -> dict[str, str]:
    """{name: the key that may be meant by it}: fields of the job, then settings of its groups, then the plugin's."""
    inner = {key.rpartition(".")[2]: key for key in reversed(all_keys())}
    return {**of_plugin, **inner, **{name: name for name in Job.model_fields}}


def meant(name: str, group: str, of_plugin: Mapping[str, str] = MappingProxyType({})) -> str:
    """`did you mean training.epochs?` of a key that the group lacks, "" for the job itself; "" if none is near.

    `of_plugin`: name -> key of the modality's own settings.
    """
    inner = by_name(of_plugin)
    beside = [key.partition(".")[2] for key in all_keys() if group and key.startswith(f"{group}.")]
    near = did_you_mean(name, beside)
    if near:
        return near
    same = homes(name)
    if same:
        return f"did you mean {same[0]}?"
    words = did_you_mean(name, inner)
    found = words.removeprefix("did you mean ").removesuffix("?")
    return f"did you mean {inner[found]}?" if words else ""
