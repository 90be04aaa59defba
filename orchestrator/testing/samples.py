"""The toy samples through `decode`, `measure` and `fit`, as the gate takes a user's; without torch."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.backbone import read_card
from orchestrator.errors import BadSampleError, ContractError, calling
from orchestrator.gate import match, parse_settings
from orchestrator.job import Adaptation, BackboneCard, BackboneRow
from orchestrator.modality import Fit, Modality, Profile, Sample, registry

NUM_TOYS = 32
_LEAST_OF_A_CLASS = 8  # splits of a tenth, and something left to learn from


@dataclass(frozen=True)
class Toys:
    """The plugin's toy samples, as it gave them and decoded."""

    samples: Sequence[Sample]
    labels: Sequence[str]
    decoded: Sequence[Any]


def check_toys(modality: Modality) -> Toys:
    """Enough samples of two classes or more, with the declared fields, the same each time."""
    assert modality.toy is not None
    assert modality.decode is not None
    mend = "toy(n) gives n pairs ({field: bytes}, label), of two classes in turn, from a generator with a fixed seed"
    with calling("toy", f"toy({NUM_TOYS})"):
        first, again = list(modality.toy(NUM_TOYS)), list(modality.toy(NUM_TOYS))
        pairs = [(dict(sample), label) for sample, label in first]
        same = pairs == [(dict(sample), label) for sample, label in again]
    if len(pairs) != NUM_TOYS:
        raise ContractError("toy", f"toy({NUM_TOYS}) gives {len(pairs)} samples", mend=mend)
    if not same:
        raise ContractError("toy", "gives other samples when it is called again", expected="the same", mend=mend)
    for sample, label in pairs:
        _check_sample(modality, sample)
        if not isinstance(label, str) or not label:
            raise ContractError("toy", f"gives the label {label!r}", expected="a word", mend=mend)
    labels = [label for _, label in pairs]
    counts = {label: labels.count(label) for label in sorted(set(labels))}
    if len(counts) < 2 or min(counts.values()) < _LEAST_OF_A_CLASS:
        raise ContractError(
            "toy", f"toy({NUM_TOYS}) gives the classes {counts}",
            expected=f"two or more, with {_LEAST_OF_A_CLASS} samples each", mend=mend,
        )  # fmt: skip
    owner: dict[tuple[tuple[str, bytes], ...], str] = {}
    for sample, label in pairs:
        other = owner.setdefault(tuple(sorted(sample.items())), label)
        if other != label:
            raise ContractError(
                "toy", f"gives one and the same sample the labels {other!r} and {label!r}",
                expected="classes that can be told apart", mend=mend,
            )  # fmt: skip
    with calling("decode", "decoding a toy sample", "the sample in memory"):
        decoded = [modality.decode(sample) for sample, _ in pairs]
    return Toys([sample for sample, _ in pairs], labels, decoded)


def _check_sample(modality: Modality, sample: Sample) -> None:
    declared = {one.name: one for one in modality.sample}
    for key, value in sample.items():
        if key not in declared:
            raise ContractError(
                "sample", f"a toy sample has the field {key!r}, which is not declared",
                expected="some of " + ", ".join(declared), mend="declare it as a SampleField, or leave it out",
            )  # fmt: skip
        if not isinstance(value, bytes):
            raise ContractError(
                "sample", f"the field {key!r} of a toy sample is a {type(value).__name__}",
                expected="bytes, as in a file",
                mend="encode it as your files are encoded; text in UTF-8",
            )  # fmt: skip
    missing = [name for name, one in declared.items() if not one.optional and name not in sample]
    if missing:
        raise ContractError(
            "sample", f"a toy sample lacks the field {missing[0]!r}", expected=", ".join(declared),
            mend="put it in, or declare it optional",
        )  # fmt: skip


def check_garbage(modality: Modality, toys: Toys) -> None:
    """Bytes that no sample is made of, and samples that were cut or changed, give a sample or `BadSampleError`."""
    assert modality.decode is not None
    chance = random.Random(0)
    for field in toys.samples[0]:
        for what, content in _garbage(toys.samples[0][field], chance):
            try:
                modality.decode({**toys.samples[0], field: content})
            except BadSampleError as error:
                if not error.message:
                    raise ContractError("decode", f"says nothing about {what}", expected="why it is bad") from None
            except Exception as error:
                raise ContractError(
                    "decode", f"raises {type(error).__name__} on {what}: {error}",
                    expected="BadSampleError, or a sample",
                    mend="catch what the reading library raises, and raise BadSampleError(why) from None",
                ) from error  # fmt: skip


def _garbage(content: bytes, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    yield "an empty file", b""
    yield "zeros", bytes(256)
    for num in (1, 7, 64, 1000):
        yield f"{num} random bytes", chance.randbytes(num)
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        size = int(share * len(content))
        yield f"a toy sample cut to {size} of {len(content)} bytes", content[:size]
    yield "a toy sample without its last byte", content[:-1]
    yield "a toy sample with bytes behind it", content + chance.randbytes(50)
    for _ in range(100):
        changed = bytearray(content)
        for _ in range(chance.choice((1, 3, 10))):
            changed[chance.randrange(min(len(changed), chance.choice((64, len(changed)))))] = chance.randrange(256)
        yield "a toy sample with bytes changed", bytes(changed)


def check_gate(modality: Modality, directory: Path, toys: Toys, chosen: Mapping[str, Any]) -> BackboneCard:
    """The backbone is let through, the toys are measured and held against it, and nothing is changed by that."""
    assert modality.measure is not None
    assert modality.fit is not None
    with calling("rules", f"looking the backbone {directory.name} up", "a row for its type"):
        card = read_card(str(directory))
        row = match(card, modality, registry.available())
    with calling("settings", f"settings = {dict(chosen)}", "settings that can be left out, or give them to the check"):
        settings = parse_settings(modality, chosen)
    facts = []
    for decoded in toys.decoded:
        with calling("measure", "measuring a toy sample"):
            facts.append(modality.measure(decoded, card))
        _check_facts(facts[-1])
    profile = Profile.of(facts)
    expected = "a Fit; RefusedError where the data cannot become the backbone's input, which toy samples can"
    for given in (None, profile):
        what = "without data" if given is None else "with the toys' profile"
        before = _as_text(card, row, settings, given)
        with calling("fit", what, expected):
            fit, again = (
                modality.fit(card, row, settings, given),
                modality.fit(card, row, settings, copy.deepcopy(given)),
            )
        if _as_text(card, row, settings, given) != before:
            raise ContractError(
                "fit", f"{what}, changes its arguments", expected="a pure function", mend="copy what you change"
            )
        if fit != again:
            raise ContractError("fit", f"{what}, gives something else the second time", expected="a pure function")
        _check_fit(fit)
    _check_augments(modality, card, row, chosen)
    return card


def _check_augments(modality: Modality, card: BackboneCard, row: BackboneRow, chosen: Mapping[str, Any]) -> None:
    """What changes samples at random by default is settings that do so, by what `fit` says of them."""
    if not modality.augments:
        return
    assert modality.fit is not None
    with calling("augments", f"settings = {dict(modality.augments)}", "settings that the plugin has"):
        fit = modality.fit(card, row, parse_settings(modality, {**chosen, **modality.augments}), None)
    missing = sorted(set(modality.augments) - set(fit.augmentation))
    if not fit.augmented or missing:
        raise ContractError(
            "augments", f"with {dict(modality.augments)} Fit.augmented is {fit.augmented}, and Fit.augmentation is "
            f"{tuple(fit.augmentation)}",
            expected="Fit.augmented is True, and Fit.augmentation names these settings",
        )  # fmt: skip


def _as_text(*values: Any) -> str:
    return repr([value.model_dump() if hasattr(value, "model_dump") else value for value in values])


def _check_facts(facts: Any) -> None:
    problem = f"is a {type(facts).__name__}" if not isinstance(facts, Mapping) else ""
    for key, value in facts.items() if not problem else ():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not isinstance(key, str) or not (is_number or isinstance(value, str)):
            problem = f"holds {key!r}: {value!r} ({type(value).__name__})"
    if problem:
        raise ContractError(
            "measure", f"what it gives {problem}", expected="{name: a finite int or float, or a word}",
            mend="int(...) or float(...) around numbers of numpy",
        )  # fmt: skip


def _check_fit(fit: Any) -> None:
    if not isinstance(fit, Fit):
        raise ContractError("fit", f"gives a {type(fit).__name__}", expected="orchestrator.modality.Fit")
    try:
        same = json.loads(json.dumps(dict(fit.input))) == dict(fit.input)
    except (TypeError, ValueError) as error:
        raise ContractError("fit", f"Fit.input is no JSON: {error}", expected="what can stand in plan.json") from None
    if not same:
        raise ContractError(
            "fit", f"Fit.input = {dict(fit.input)} is something else when it comes back from JSON",
            expected="strings as keys; lists, not tuples",
        )  # fmt: skip
    for what, of, kind in (("adaptations", fit.adaptations, Adaptation), ("warnings", fit.warnings, str)):
        wrong = [one for one in of if not isinstance(one, kind)]
        if wrong:
            raise ContractError("fit", f"Fit.{what} holds {wrong[0]!r}", expected=f"a sequence of {kind.__name__}")
