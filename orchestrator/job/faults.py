"""What pydantic found wrong with a job -> a `JobError`: the place, what would do, and what may be meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from orchestrator.errors import JobError, did_you_mean
from orchestrator.job.keys import all_keys, by_name, meant
from orchestrator.job.places import holds_secret
from orchestrator.job.spec import Job

_ELSEWHERE: Mapping[str, str] = {
    "search": "it is for orchestrator search; take it out, or use that command",
    "rank": "it is for orchestrator submit --kind rank; take it out, or use that command",
}
"""Keys of a job file that another command takes."""


@dataclass(frozen=True)
class Faults:
    """Of a job as it was written."""

    source: str
    """The YAML file, '' where there is none."""
    lines: Mapping[str, int]
    """Dotted key -> its line there."""
    of_plugin: tuple[str, ...]
    """Names of the modality's own settings."""

    def as_job_error(self, error: ValidationError) -> JobError:
        """The first fault, with its place and the values that would do."""
        source, lines = self.source, self.lines
        faults = error.errors(include_url=False)
        # What is misspelt comes before what is missing: the one is mostly the reason of the other.
        unknown = [one["loc"] for one in faults if one["type"] == "extra_forbidden"]
        if unknown:
            return self._unknown(unknown)
        fault = faults[0]
        place = ".".join(str(part) for part in fault["loc"]) or "the job"
        where = f"{source}:{lines[place]}: " if place in lines else (f"{source}: " if source else "")
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        given = fault.get("input")
        if fault["type"] == "missing":
            flag = f", or --{place}" if place in ("backbone", "data") else ""
            return JobError(
                f"{where}{place} is missing{more}", expected=_meaning(fault["loc"]),
                mend=f"give it: {place}=...{flag}; in a job file {place}: ...",
            )  # fmt: skip
        message = str(fault["msg"]).removeprefix("Value error, ")
        if fault["type"] == "model_type":
            message = "is a group of settings, not one value"
        if fault["type"] == "string_type":
            message += "; put it in quotes"
        secret = isinstance(given, dict) or (isinstance(given, str) and holds_secret(given))
        shown = "" if secret else f" = {given!r}"
        return JobError(f"{where}{place}{shown}: {message[:1].lower()}{message[1:]}{more}", mend=nearest_value(fault))

    def _unknown(self, places: Sequence[tuple[int | str, ...]]) -> JobError:
        """Of keys that there are not: each with its line, and the one that may be meant."""
        of_plugin = {one: f"settings.{one}" for one in self.of_plugin}
        named, near, mends = [], [], []
        for loc in places:
            *group, name = map(str, loc)
            place = ".".join(map(str, loc))
            named.append(f"{place} (line {self.lines[place]})" if place in self.lines and len(places) > 1 else place)
            near += _keys_beside(loc) if group else _nearest(name, of_plugin)
            mends.append(
                _ELSEWHERE.get(place)
                or meant(name, ".".join(group), of_plugin)
                or "take it out (orchestrator settings lists those that there are)"
            )
        first = ".".join(map(str, places[0]))
        line = f":{self.lines[first]}" if first in self.lines and len(places) == 1 else ""
        return JobError(
            f"{self.source}{line}: " * bool(self.source) + f"unknown key{'s' * (len(places) > 1)} {', '.join(named)}",
            expected="one of "
            + ", ".join(dict.fromkeys(near or [*Job.model_fields, *all_keys(), *of_plugin.values()])),
            mend=mends[0] if len(places) == 1 else "; ".join(map(": ".join, zip(named, mends, strict=True))),
        )


def _nearest(name: str, of_plugin: Mapping[str, str]) -> list[str]:
    """The few keys of a job that are like the name: nobody reads all of them."""
    keys = by_name(of_plugin)
    return [keys[near] for near in difflib.get_close_matches(name, keys, n=5)]


def nearest_value(fault: Mapping[str, Any]) -> str:
    """The mend of a value that cannot be: its bound, or the nearest of those that there are; `fault` is pydantic's."""
    bounds = {"ge": "{} or more", "gt": "more than {}", "le": "{} or less", "lt": "less than {}"}
    for key, words in bounds.items():
        if key in fault.get("ctx", {}):
            return words.format(fault["ctx"][key])
    if "mend" in fault.get("ctx", {}):
        return str(fault["ctx"]["mend"])
    if fault["type"] != "literal_error":
        return "correct the value"
    return did_you_mean(fault["input"], re.findall(r"'([^']*)'", fault["ctx"]["expected"])) or "choose one of these"


def _owner(loc: tuple[int | str, ...]) -> type[BaseModel]:
    model: type[BaseModel] = Job
    for part in loc[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        model = field.annotation
    return model


def _keys_beside(loc: tuple[int | str, ...]) -> list[str]:
    return list(_owner(loc).model_fields)


def _meaning(loc: tuple[int | str, ...]) -> str:
    field = _owner(loc).model_fields.get(str(loc[-1])) if loc else None
    return (field.description or "") if field else ""
