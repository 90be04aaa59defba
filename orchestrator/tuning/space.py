"""A space: keys of a job, and what trials draw their values from; Ray Tune's own domains, or the same in YAML.

What a key cannot be, or a field of the job refuses, is refused here, before anything starts.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray import tune
from ray.tune.search.sample import Categorical, Domain, Float, Function, Integer, LogUniform, Normal, Quantized
from ray.tune.search.variant_generator import generate_variants

from orchestrator.errors import JobError, did_you_mean, first_line
from orchestrator.gate import drafted, parse_settings
from orchestrator.job import Draft, Job, all_keys, groups, meant, only_home
from orchestrator.modality import registry

Config = dict[str, Any]
"""Dotted key of the job -> its value in a trial."""

_WORDS: Mapping[str, Callable[..., Any]] = {
    name: getattr(tune, name)
    for name in (
        "choice", "uniform", "quniform", "loguniform", "qloguniform", "randint", "qrandint", "lograndint",
        "qlograndint", "randn", "qrandn", "grid_search",
    )
}  # fmt: skip
_LISTS = ("choice", "grid_search")
"""Those that take one list; the others take their arguments in one."""
_NOT_SEARCHED: Mapping[str, str] = {
    "task": "trials of several tasks have no score in common",
    "modality": "trials of several modalities have no data in common",
    "data": "trials would be judged on different samples",
    "scaling": "it says where a trial runs, and nothing of what is learnt",
    "storage": "it says where runs lie, and nothing of what is learnt",
    "feature_store": "it says where features lie, and nothing of what is learnt",
    "name": "each trial has a name of its own",
    "training.num_microbatches": "it says in how many parts a batch is computed, as there are workers for",
    "training.checkpoint_every_s": "it changes nothing that is learnt",
    "training.checkpoint_every_steps": "it changes nothing that is learnt",
    "training.deterministic": "it changes nothing that is learnt",
}
_SEARCHED_ALL_THE_SAME = "data.num_train"
_NUM_LOOKED_AT = 8
"""Whole draws that are held against the fields, beside the ends of each domain."""


@dataclass(frozen=True)
class Space:
    """What trials draw from, by the dotted keys of a job."""

    domains: Mapping[str, Any]
    """Domains of Ray Tune, and {"grid_search": [...]}."""

    @property
    def is_grid(self) -> bool:
        """Whether there is nothing to draw: so many trials and no more."""
        return all(is_grid(domain) for domain in self.domains.values())

    @property
    def num_grid_points(self) -> int:
        """The combinations of what is in grids; 1 without one."""
        return math.prod(len(domain["grid_search"]) for domain in self.domains.values() if is_grid(domain))

    def draws(self, seed: int) -> Iterator[Config]:
        """Configurations for ever, the grid's in order and over again; those of one seed are always the same."""
        random = np.random.RandomState(seed)
        state = np.random.RandomState(seed).get_state()  # of numpy's own: what `tune.sample_from` calls draws from it
        while True:
            before = np.random.get_state()
            np.random.set_state(state)
            variants = [
                spec["config"] for _, spec in generate_variants({"config": dict(self.domains)}, random_state=random)
            ]
            state = np.random.get_state()
            np.random.set_state(before)
            for config in variants:
                yield {key: plain(value) for key, value in config.items()}

    def described(self) -> dict[str, Any]:
        """Each domain in words that can be written down; a function's are its name."""
        return {key: _described(domain) for key, domain in sorted(self.domains.items())}

    def digest(self) -> str:
        """Eight hex digits of what it draws from."""
        return hashlib.sha256(json.dumps(self.described(), sort_keys=True).encode()).hexdigest()[:8]


def make_space(given: Mapping[str, Any], draft: Draft) -> Space:
    """The checked space of a job. Raises `JobError` for what is no key of the job, or what a field refuses.

    `draft`: the job, which need not be whole without the space.
    """
    if not isinstance(given, Mapping) or not given:
        raise JobError(
            "the space of a search is empty", expected="keys of the job and what to draw them from",
            mend="for example --space learning_rate='{loguniform: [1e-4, 1e-1]}', a block search: with space: in the "
            "job file, or space={'learning_rate': tune.loguniform(1e-4, 1e-1)} in Python",
        )  # fmt: skip
    modality = str(draft.tree.get("modality", Job.model_fields["modality"].default))
    domains: dict[str, Any] = {}
    for name, value in _flat(given).items():
        key = _key_of(name, modality)
        if key in domains:
            raise JobError(f"the space has {key} twice", mend=f"leave out {name}")
        domains[key] = _domain_of(name, value)
    space = Space(domains)
    _try_values(space, draft)
    return space


def draft_with(draft: Draft, config: Config) -> Draft:
    """The draft with the values of a trial set. Raises `JobError`."""
    made = drafted(draft.tree, config)
    return Draft(made.tree, draft.source, {key: line for key, line in draft.lines.items() if key not in config},
                 draft.notes)  # fmt: skip


def is_grid(domain: Any) -> bool:
    """Whether all of its values are to be tried."""
    return isinstance(domain, Mapping) and "grid_search" in domain


def values_of(domain: Any) -> list[Any] | None:
    """All that it may be; None where that is a range, or a function tells."""
    if is_grid(domain):
        return [plain(value) for value in domain["grid_search"]]
    return [plain(value) for value in domain.categories] if isinstance(domain, Categorical) else None


def is_logarithmic(domain: Any) -> bool:
    """Whether its values are best shown on a logarithmic axis."""
    return isinstance(domain, Domain) and isinstance(_sampler(domain), LogUniform)


def plain(value: Any) -> Any:
    """The same as Python has it: no scalar of numpy's."""
    if isinstance(value, np.generic):
        return value.item()
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value


# --- keys ---


def _flat(given: Mapping[str, Any]) -> dict[str, Any]:
    """With groups of settings as dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in given.items():
        if str(name) in (*groups(), "settings") and isinstance(value, Mapping) and not set(value) & set(_WORDS):
            flat |= {f"{name}.{inner}": one for inner, one in value.items()}
        else:
            flat[str(name)] = value
    return flat


def _key_of(name: str, modality: str) -> str:
    """The dotted key that a name of the space stands for. Raises `JobError`."""
    own = list(registry.get(modality).settings.model_fields) if modality in registry.names() else []
    home = only_home(name, f"{name} of the space")
    keys = [*all_keys(), *(f"settings.{one}" for one in own)]
    key = name if name in keys and name != "settings" else home or f"settings.{name}"
    if key not in keys:
        group, _, last = name.rpartition(".")
        mend = did_you_mean(last, own) or meant(last, group) or "orchestrator settings lists them"
        raise JobError(f"{name} of the space is no setting of a job", expected="a key of a job", mend=mend)
    for where, why in _NOT_SEARCHED.items():
        if (key == where or key.startswith(f"{where}.")) and key != _SEARCHED_ALL_THE_SAME:
            raise JobError(
                f"{name} cannot be searched: {why}", expected="what a network is trained with: backbone, method, "
                "training.…, settings.…, data.num_train", mend="set it for all trials, outside of the space",
            )  # fmt: skip
    return key


# --- domains ---


def _domain_of(name: str, value: Any) -> Any:
    """What Ray Tune draws from. Raises `JobError`."""
    if isinstance(value, (list, tuple)):
        value = {"choice": value}
    if isinstance(value, Mapping) and len(value) == 1:
        ((word, arguments),) = value.items()
        word = {"grid": "grid_search"}.get(str(word), str(word))
        if word in _WORDS:
            return _called(name, word, arguments)
        raise JobError(
            f"the space's {name} = {dict(value)}: there is no {word}", expected="one of " + ", ".join(_WORDS),
            mend=did_you_mean(word, _WORDS) or "use one of these",
        )  # fmt: skip
    if isinstance(value, Domain):
        if isinstance(value, Categorical) and not value.categories:
            raise JobError(f"the space's {name} is a choice of nothing", mend="give it values")
        return value
    raise JobError(
        f"the space's {name} = {value!r}", expected="a domain of ray.tune, a list of values, or as in YAML "
        "{loguniform: [1e-5, 1e-2]}", mend="a value that is the same in all trials stands in the job itself",
    )  # fmt: skip


def _called(name: str, word: str, arguments: Any) -> Any:
    values = [_number(one) for one in arguments] if isinstance(arguments, (list, tuple)) else None
    if values is None or (word in _LISTS and not values):
        raise JobError(
            f"the space's {name} = {{{word}: {arguments!r}}}", expected="a list", mend=f"for example {word}: [1, 2]"
        )
    try:
        return _WORDS[word](values) if word in _LISTS else _WORDS[word](*values)
    except (ValueError, TypeError) as error:
        raise JobError(
            f"the space's {name} = {{{word}: {arguments!r}}}: {first_line(error)}",
            expected="the arguments of ray.tune's function of that name", mend="correct them",
        ) from None  # fmt: skip


def _number(value: Any) -> Any:
    """YAML takes 1e-5, which has no point, for a text."""
    if isinstance(value, str):
        try:
            return float(value) if math.isfinite(float(value)) else value
        except ValueError:
            return value
    return value


def _sampler(domain: Domain) -> Any:
    sampler = domain.get_sampler()
    return getattr(sampler, "sampler", sampler)  # of one that is quantised


def _described(domain: Any) -> Any:
    values = values_of(domain)
    if values is not None:
        return {"grid_search" if is_grid(domain) else "choice": json.loads(json.dumps(values, default=str))}
    if isinstance(domain, Function):
        return {"sample_from": getattr(domain.func, "__qualname__", type(domain.func).__name__)}
    sampler = domain.get_sampler()
    parts: list[Any] = [type(domain).__name__, type(_sampler(domain)).__name__]
    parts += [getattr(domain, "lower", None), getattr(domain, "upper", None), getattr(sampler, "q", None)]
    normal = _sampler(domain)
    return [*parts, *([normal.mean, normal.sd] if isinstance(normal, Normal) else [])]


# --- values ---


def _try_values(space: Space, draft: Draft) -> None:
    """Raise `JobError` where a field refuses an end of its domain, or one of some draws."""
    draws = space.draws(0)
    try:
        first = next(draws)
        more = [next(draws) for _ in range(_NUM_LOOKED_AT)]
    except JobError:
        raise
    except Exception as error:  # a function of the user's
        raise JobError(
            f"nothing can be drawn from the space: {type(error).__name__}: {first_line(error)}",
            mend="correct what is given to tune.sample_from",
        ) from error  # fmt: skip
    for key, domain in space.domains.items():
        for value in _ends(domain):
            _try(draft_with(draft, {**first, key: value}).job())
    for config in more:
        _try(draft_with(draft, config).job())


def _try(job: Job) -> None:
    parse_settings(registry.get(job.modality), job.settings, job.place_of)


def _ends(domain: Any) -> Sequence[Any]:
    values = values_of(domain)
    if values is not None:
        return values
    if isinstance(domain, Integer):
        return [domain.lower, max(domain.lower, domain.upper - 1)]
    if isinstance(domain, Float) and math.isfinite(domain.lower):
        upper = domain.upper if isinstance(domain.get_sampler(), Quantized) else math.nextafter(domain.upper, 0)
        return [domain.lower, upper]
    return []
