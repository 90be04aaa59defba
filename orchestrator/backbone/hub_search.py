"""Candidates of the Hub's own search: "image-classification, < 100M", the most downloaded first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.errors import JobError, RefusedError, first_line

_CONDITION = re.compile(r"([<>])\s*(\d+(?:\.\d+)?)\s*([KMB]?)", re.IGNORECASE)
_TASK = re.compile(r"[a-z]+(-[a-z0-9]+)*")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_LOOKED_AT = 10
"""Times as many models as are wanted: some are gated, of some the size is another one than the Hub filters by."""


@dataclass(frozen=True)
class HubCandidate:
    """A repository that the Hub's search gives."""

    name: str
    """org/name"""
    parameters: int | None
    """By the headers of its safetensors files, as the Hub counts them; None where it has none."""
    refusal: RefusedError | None = None
    """Why it is skipped."""


@dataclass(frozen=True)
class _Query:
    task: str
    least: float
    most: float

    @property
    def num_parameters(self) -> str | None:
        """As the Hub writes it: `min:10M,max:100M`."""
        edges = [("min", self.least)] * (self.least > 0) + [("max", self.most)] * (self.most < float("inf"))
        return ",".join(f"{name}:{int(value)}" for name, value in edges) or None

    def holds(self, parameters: int | None) -> bool:
        """Of an unknown size too: the gate will say."""
        return parameters is None or self.least < parameters < self.most


def find_on_hub(query: str, num: int) -> list[HubCandidate]:
    """Up to `num` repositories that answer the query, and before them in the list those gated ones that were skipped.

    `query`: a task of the Hub, and bounds of the number of parameters: "text-classification, > 10M, < 200M". Raises
    `JobError` for what is no such query, `RefusedError` where the Hub does not answer or has none.
    """
    parsed = _parse(query)
    if num < 1:
        raise JobError(f"{num} candidates of the Hub", expected="1 or more", mend="leave num_from_hub out")
    found: list[HubCandidate] = []
    for one in _listed(query, parsed, num):
        found.append(one)
        if sum(candidate.refusal is None for candidate in found) == num:
            break
    if not found:
        raise RefusedError(
            "not_found", f"the Hub has no model for {query!r}", expected="a task of the Hub that models have",
            mend="widen the bounds, or name the backbones",
        )  # fmt: skip
    return found


def _listed(query: str, parsed: _Query, num: int) -> Iterator[HubCandidate]:
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:  # the client itself asks again where a page does not come
        models = list(HfApi().list_models(
            pipeline_tag=parsed.task, num_parameters=parsed.num_parameters, sort="downloads",
            limit=_LOOKED_AT * num, expand=["safetensors", "gated"],
        ))  # fmt: skip
    except (HTTPError, OfflineModeIsEnabled) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        if status in (401, 403):
            raise RefusedError(
                "unauthorised", f"the Hub did not accept the token (status {status})", mend="run: hf auth login"
            ) from error
        if 400 <= status < 500:
            raise JobError(
                f"the Hub does not answer {query!r}: {first_line(error)}", expected="a task of the Hub",
                mend="look at huggingface.co/tasks for its name, or name the backbones",
            ) from error  # fmt: skip
        raise RefusedError(
            "offline", f"the Hub cannot be asked for {query!r}: {type(error).__name__}: {first_line(error)}",
            mend="check the connection and HF_ENDPOINT, or name the backbones",
        ) from error  # fmt: skip
    for model in models:
        parameters = model.safetensors.total if model.safetensors is not None else None
        if not parsed.holds(parameters):
            continue
        refusal = None
        if model.gated:
            refusal = RefusedError(
                "gated", f"{model.id} asks for its licence to be accepted first",
                mend="accept it on the repository's page, run: hf auth login, and name it among the backbones",
            )  # fmt: skip
        yield HubCandidate(model.id, parameters, refusal)


def _parse(query: str) -> _Query:
    task, *conditions = (part.strip() for part in query.split(","))
    bounds = {">": 0.0, "<": float("inf")}
    for condition in conditions:
        match = _CONDITION.fullmatch(condition)
        if match is None:
            raise _no_query(query, condition)
        bounds[match[1]] = float(match[2]) * _UNITS[match[3].upper()]
    if not _TASK.fullmatch(task):
        raise _no_query(query, task)
    return _Query(task, bounds[">"], bounds["<"])


def _no_query(query: str, part: str) -> JobError:
    return JobError(
        f"from_hub = {query!r}: {part!r} is neither a task nor a bound",
        expected="a task of the Hub, and bounds of the number of parameters behind commas",
        mend="write it like this: image-classification, > 5M, < 100M",
    )
