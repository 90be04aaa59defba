"""Whether a backbone fits a modality (-> BackboneRow) and its data (-> Fit), or a refusal. Pure: it reads nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ValidationError

from orchestrator.errors import JobError, RefusedError, did_you_mean
from orchestrator.gate.own_code import notes_on_keys
from orchestrator.job import BackboneCard, BackboneRow, nearest_value
from orchestrator.modality import BackboneRule, Fit, Modality, Profile


def match(card: BackboneCard, modality: Modality, known: Mapping[str, Modality]) -> BackboneRow:
    """The row of the backbone's type in the modality's rules. Raises `RefusedError`.

    `known` are all modalities, to say which one would take it.
    """
    if card.config.get("quantization_config"):
        raise RefusedError(
            "quantised",
            f"{card.source} is quantised, and quantised weights cannot be trained",
            expected="weights in float32, float16 or bfloat16",
            mend="use the repository that it was quantised from",
        )
    row = _row(card, modality)
    if row is not None:
        return row
    rule = _rule(card, modality)
    if rule is not None:
        raise RefusedError(
            rule.reason,
            f"{card.source} ({card.model_type}): {rule.message}",
            expected=_takes(modality),
            mend=rule.mend or _another(modality),
        )
    for name, other in known.items():
        if name == modality.name:
            continue
        theirs = _rule(card, other)
        if _row(card, other) is not None or (theirs is not None and theirs.reason != "two_modalities"):
            raise RefusedError(
                "wrong_modality",
                f"{card.source} ({card.model_type}) was trained on {other.title}: its features mean nothing "
                f"for {modality.title}",
                expected=_takes(modality),
                mend=f"{_another(modality)}; or use --modality {name}, if that is what your data is",
            )
        if theirs is not None:
            raise RefusedError(
                theirs.reason,
                f"{card.source} ({card.model_type}): {theirs.message}",
                expected=_takes(modality),
                mend=theirs.mend or _another(modality),
            )
    code = "; code that comes with a repository is never run" if card.config.get("auto_map") else ""
    raise RefusedError(
        "unknown_type",
        f"{card.source} is of the type {card.model_type!r}, which this version does not know{code}",
        expected=f"a type of {modality.rules.generated_from}: orchestrator plugins --types {modality.name}",
        mend=_another(modality) + ", or a newer version of this package",
    )


def _row(card: BackboneCard, modality: Modality) -> BackboneRow | None:
    if card.library == "timm":
        return modality.rules.timm.get(card.model_type.split(".")[0])
    return modality.rules.accepts.get(card.model_type)


def _rule(card: BackboneCard, modality: Modality) -> BackboneRule | None:
    if card.library == "timm":
        return modality.rules.timm_refuses.get(card.model_type.split(".")[0])
    return modality.rules.refuses.get(card.model_type)


def _takes(modality: Modality) -> str:
    return f"a backbone trained on {modality.title}"


def _another(modality: Modality) -> str:
    examples = list(modality.rules.accepts)[:4]
    return f"choose a backbone trained on {modality.title} (types such as {', '.join(examples)})"


def parse_settings(
    modality: Modality, settings: Mapping[str, Any], place_of: Callable[[str], str] | None = None
) -> BaseModel:
    """The plugin's settings, checked by its own model. Raises `JobError`; `place_of` tells the place of a key."""
    try:
        return modality.settings.model_validate(dict(settings))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in fault["loc"])
        where = place_of(f"settings.{place}") if place_of else ""
        fields = modality.settings.model_fields
        if fault["type"] == "extra_forbidden":
            raise JobError(
                f"{where}unknown key settings.{place} for {modality.name}",
                expected="one of " + ", ".join(fields) if fields else "no settings at all",
                mend=did_you_mean(place, fields) or "take it out",
            ) from None
        about = fields[str(fault["loc"][0])].description if fault["loc"] else ""
        message = str(fault["msg"]).removeprefix("Value error, ")
        raise JobError(
            f"{where}settings.{place} = {fault.get('input')!r}: {message[:1].lower()}{message[1:]}",
            expected=about or "",
            mend=nearest_value(fault),
        ) from None


def fit(card: BackboneCard, row: BackboneRow, modality: Modality, job_settings: Mapping[str, Any],
        profile: Profile | None) -> Fit:  # fmt: skip
    """How the data becomes the backbone's input. Raises `RefusedError`."""
    if modality.fit is None:
        raise not_built(modality)
    settings = parse_settings(modality, job_settings)
    try:
        adapted = modality.fit(card, row, settings, profile)
        return replace(adapted, warnings=(*adapted.warnings, *notes_on_keys(card)))
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise RefusedError(
            "bad_config",
            f"{card.source}: its metadata files hold values that cannot be understood: {error}",
            mend="fetch or save the backbone again",
        ) from error


def not_built(modality: Modality) -> RefusedError:
    """The refusal of a modality that is declared, and cannot be trained with yet."""
    return RefusedError(
        "not_built",
        f"training on {modality.name} is not built yet in this version; the gate knows its backbones, no more",
        expected="a modality that `orchestrator plugins` lists as trainable",
        mend="use --modality image",
    )
