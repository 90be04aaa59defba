"""What can be set: each setting of a pydantic model, with what it takes, its default and its meaning."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from orchestrator.job.keys import groups
from orchestrator.job.spec import Job

_BOUNDS = (("ge", "{} or more"), ("gt", "above {}"), ("le", "at most {}"), ("lt", "below {}"))
_KINDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Setting:
    """One line of the reference."""

    key: str
    """Dotted."""
    takes: str
    """`head | full | scratch`, `whole number, 1 or more`, `text`."""
    default: str
    """As it is written; '' where there is none, or the meaning says it."""
    meaning: str
    choices: tuple[str, ...] = ()
    value: Any = None
    """The default itself; None where there is none, or the meaning says it."""


def settings_of(model: type[BaseModel], prefix: str = "") -> list[Setting]:
    """The settings of a model, in its order; groups of settings are left out."""
    inner = groups() if model is Job else {}
    return [_setting(f"{prefix}{name}", field) for name, field in model.model_fields.items() if name not in inner]


def job_reference() -> Mapping[str, list[Setting]]:
    """`job` and each group of settings -> its settings."""
    return {"job": settings_of(Job)} | {name: settings_of(model, f"{name}.") for name, model in groups().items()}


def setting_of(key: str) -> Setting | None:
    """The setting of a job with that key; None where there is none, as of `settings.size`."""
    return next((one for several in job_reference().values() for one in several if one.key == key), None)


def _setting(key: str, field: FieldInfo) -> Setting:
    value = None if field.is_required() or field.default_factory or field.default in (None, ()) else field.default
    default = "" if value is None else str(value)
    choices = _choices(field.annotation)
    required = "required; " if field.is_required() else ""
    return Setting(key, _takes(field, choices), default, required + (field.description or ""), choices, value)


def _takes(field: FieldInfo, choices: tuple[str, ...]) -> str:
    if choices:
        return " | ".join(choices)
    if field.examples:  # the names that built-in modalities give; another one may have more
        return " | ".join(map(str, field.examples))
    kinds = [_kind(one) for one in _members(field.annotation)]
    bounds = [
        words.format(getattr(limit, name))
        for limit in field.metadata
        for name, words in _BOUNDS
        if hasattr(limit, name)
    ]
    return ", ".join([" or ".join(dict.fromkeys(kinds)), *bounds])


def _kind(one: Any) -> str:
    if typing.get_origin(one) is tuple:
        return "list of texts"
    return "settings" if typing.get_origin(one) is dict else _KINDS[one]


def _choices(annotation: Any) -> tuple[str, ...]:
    members = _members(annotation)
    return typing.get_args(members[0]) if len(members) == 1 and typing.get_origin(members[0]) is Literal else ()


def _members(annotation: Any) -> list[Any]:
    """What a type may be, None left out."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return [one for one in typing.get_args(annotation) if one is not types.NoneType]
    return [annotation]
