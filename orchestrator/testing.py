"""`check_modality`: the one line of a plugin's test. It holds a modality against the contract, and trains with it.

Here stands what can be seen without torch; `testing_network.py` builds the network, takes steps and runs jobs.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import ValidationError

from orchestrator import gate, hub, registry
from orchestrator.errors import BadSampleError, ContractError, PluginError, RefusedError
from orchestrator.modality import Fit, Modality, Profile, Sample
from orchestrator.plans import FIGURES, Adaptation, BackboneCard

NUM_TOYS = 32
_LEAST_OF_A_CLASS = 8  # splits of a tenth, and something left to learn from
_HEAVY = ("torch", "ray", "transformers", "timm", "torchvision")
_CALLED = ("decode", "measure", "fit", "build", "batch", "toy")


@dataclass(frozen=True)
class Toys:
    """The plugin's toy samples, as it gave them and decoded."""

    samples: Sequence[Sample]
    labels: Sequence[str]
    decoded: Sequence[Any]


def check_modality(
    modality: Modality,
    backbone: str | Path | Mapping[str, Any],
    *,
    settings: Mapping[str, Any] | None = None,
    shares: Sequence[str] = (),
) -> None:
    """Return if the modality keeps the contract and trains; raise `ContractError`, naming the field, if not.

        check_modality(modality, backbone={"model_type": "sensor-cnn", "channels": 3, "width": 16})

    `backbone` is a directory in Hub layout, or what its config.json holds; one without weights is pretrained on
    the toy samples first. `settings` are the plugin's own. `shares` names the modalities whose backbones
    fit this one too, on purpose. Takes seconds, works in a temporary directory and downloads nothing.
    """
    _check_declaration(modality)
    _check_name(modality)
    _check_rules(modality, shares)
    toys = _check_toys(modality)
    _check_garbage(modality, toys)
    _check_pickle(modality)
    with TemporaryDirectory(prefix="orchestrator-check-") as folder, _registered(modality):
        directory = _lay_out(Path(folder), backbone)
        card = _check_gate(modality, directory, toys, settings or {})
        _check_in_another_process(modality, card, toys, settings or {})
        from orchestrator.testing_network import check_network  # noqa: PLC0415  # torch

        check_network(modality, directory, Path(folder), toys, settings or {})


@contextlib.contextmanager
def calling(field: str, what: str, expected: str = "") -> Iterator[None]:
    """What the plugin raises becomes a `ContractError` of that field, with the trace behind it."""
    try:
        yield
    except ContractError:
        raise
    except Exception as error:
        raise ContractError(
            field, f"{what} raises {type(error).__name__}: {error}", expected=expected,
            mend=getattr(error, "mend", "") or "the trace above shows where",
        ) from error  # fmt: skip


def _check_declaration(modality: Modality) -> None:
    try:
        registry.validate(modality, "modality")
    except PluginError as error:
        raise ContractError(
            "declaration", error.message, expected=error.expected, mend="correct that field of your Modality"
        ) from None
    for field in _CALLED:
        if getattr(modality, field) is None:
            what = "a modality without toy samples cannot be checked" if field == "toy" else "nothing can be trained"
            raise ContractError(
                field, f"is None: {what}", expected="a function",
                mend=f"write it: orchestrator.modality.{'FitFunction' if field == 'fit' else field.capitalize()} "
                "is its signature",
            )  # fmt: skip
    for task in modality.tasks:
        if task.name not in FIGURES:
            raise ContractError("tasks", f"names {task.name!r}", expected="some of " + ", ".join(FIGURES))
    for one in modality.sample:
        if one.kind == "file" and not all(s.startswith(".") and s == s.lower() for s in one.suffixes or ("",)):
            raise ContractError(
                "sample", f"the field {one.name!r} is of files with the suffixes {list(one.suffixes)}",
                expected='one or more such as ".npy", in lower case', mend="without one no folder can be read",
            )  # fmt: skip
    # Whatever model_config says: a validator of the model's own may still swallow what it does not know.
    with contextlib.suppress(ValidationError):
        modality.settings.model_validate({"no_such_setting": 1})
        raise ContractError(
            "settings", "takes the unknown key 'no_such_setting' in silence", expected="ValidationError",
            mend='model_config = ConfigDict(extra="forbid"), and no validator that drops keys',
        )  # fmt: skip


def _check_name(modality: Modality) -> None:
    points = registry.claims(modality.name)
    mend = f"give yours another name, or uninstall what claims it; taken are {', '.join(registry.names())}"
    if len(points) > 1:
        raise ContractError(
            "name", f"{len(points)} distributions claim {modality.name!r}: {registry.owners(points)}", mend=mend
        )
    if points:
        with calling("name", f"the entry point of {registry.owners(points)}", expected="an import that works"):
            installed = points[0].load()
        if installed is not modality:
            raise ContractError(
                "name", f"{modality.name!r} is taken by {registry.owners(points)}, which gives another modality",
                expected="a name that no installed distribution has", mend=mend,
            )  # fmt: skip


def _check_rules(modality: Modality, shares: Sequence[str]) -> None:
    """No backbone of another modality is let through, and none of a type that nobody knows."""
    cards = [("a type that nobody knows", _bare("transformers", "no-such-type"))]
    cards += [("an architecture that nobody knows", _bare("timm", "no_such_architecture"))]
    for name, other in registry.available().items():
        if name != modality.name and name not in shares:
            cards += [(f"of the modality {name}", _bare("transformers", key)) for key in other.rules.accepts]
            cards += [(f"of the modality {name}", _bare("timm", key)) for key in other.rules.timm]
    for whose, card in cards:
        with calling("rules", f"looking {card.model_type!r} up"):
            if _is_refused(card, modality):
                continue
        raise ContractError(
            "rules", f"accept {card.model_type!r} ({card.library}), {whose}",
            expected="rows of the plugin's own model types alone",
            mend="take the row out; where both modalities are meant to take it: check_modality(..., shares=[...])",
        )  # fmt: skip


def _is_refused(card: BackboneCard, modality: Modality) -> bool:
    try:
        gate.match(card, modality, {})
    except RefusedError:
        return True
    return False


def _bare(library: str, model_type: str) -> BackboneCard:
    return BackboneCard(
        source=model_type, kind="directory", name=model_type, library=library,
        model_type=model_type, config={"model_type": model_type},
    )  # fmt: skip


def _check_toys(modality: Modality) -> Toys:
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


def _check_garbage(modality: Modality, toys: Toys) -> None:
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


def _check_pickle(modality: Modality) -> None:
    """A registered modality travels to the workers."""
    for part in fields(modality):
        try:
            pickle.loads(pickle.dumps(getattr(modality, part.name)))
        except Exception as error:
            raise ContractError(
                part.name, f"cannot cross to another process by pickle: {error}",
                expected="functions and classes that stand at the top of a module",
                mend="no lambda, no function inside of another, no open file or lock in a default",
            ) from error  # fmt: skip


@contextlib.contextmanager
def _registered(modality: Modality) -> Iterator[None]:
    """The modality can be asked for by its name, installed or not."""
    if registry.claims(modality.name):
        yield
        return
    before = registry.get(modality.name) if registry.is_registered(modality.name) else None
    registry.register(modality)
    try:
        yield
    finally:
        registry.unregister(modality.name)
        if before is not None:
            registry.register(before)


def _lay_out(folder: Path, backbone: str | Path | Mapping[str, Any]) -> Path:
    if not isinstance(backbone, Mapping):
        return Path(backbone).expanduser().absolute()
    directory = folder / "backbone"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(dict(backbone)), encoding="utf-8")
    return directory


def _check_gate(modality: Modality, directory: Path, toys: Toys, chosen: Mapping[str, Any]) -> BackboneCard:
    """The backbone is let through, the toys are measured and held against it, and nothing is changed by that."""
    assert modality.measure is not None
    assert modality.fit is not None
    with calling("rules", f"looking the backbone {directory.name} up", "a row for its type"):
        card = hub.read_card(str(directory))
        row = gate.match(card, modality, registry.available())
    with calling("settings", f"settings = {dict(chosen)}", "settings that can be left out, or give them to the check"):
        settings = gate.parse_settings(modality, chosen)
    facts = []
    for decoded in toys.decoded:
        with calling("measure", "measuring a toy sample"):
            found = modality.measure(decoded, card)
        _check_facts(found)
        facts.append(found)
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
    return card


def _as_text(*values: Any) -> str:
    return repr([value.model_dump() if hasattr(value, "model_dump") else value for value in values])


def _check_facts(found: Any) -> None:
    problem = f"is a {type(found).__name__}" if not isinstance(found, Mapping) else ""
    for key, value in found.items() if not problem else ():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not isinstance(key, str) or not (is_number or isinstance(value, str)):
            problem = f"holds {key!r}: {value!r} ({type(value).__name__})"
    if problem:
        raise ContractError(
            "measure", f"what it gives {problem}", expected="{name: a finite int or float, or a word}",
            mend="int(...) or float(...) around numbers of numpy",
        )  # fmt: skip


def _check_fit(found: Any) -> None:
    if not isinstance(found, Fit):
        raise ContractError("fit", f"gives a {type(found).__name__}", expected="orchestrator.modality.Fit")
    try:
        same = json.loads(json.dumps(dict(found.input))) == dict(found.input)
    except (TypeError, ValueError) as error:
        raise ContractError("fit", f"Fit.input is no JSON: {error}", expected="what can stand in plan.json") from None
    if not same:
        raise ContractError(
            "fit", f"Fit.input = {dict(found.input)} is something else when it comes back from JSON",
            expected="strings as keys; lists, not tuples",
        )  # fmt: skip
    for what, of, kind in (("adaptations", found.adaptations, Adaptation), ("warnings", found.warnings, str)):
        wrong = [one for one in of if not isinstance(one, kind)]
        if wrong:
            raise ContractError("fit", f"Fit.{what} holds {wrong[0]!r}", expected=f"a sequence of {kind.__name__}")


def _check_in_another_process(
    modality: Modality, card: BackboneCard, toys: Toys, settings: Mapping[str, Any]
) -> None:  # fmt: skip
    """What the gate calls works after a pickle, and imports nothing heavy: a laptop asks it."""
    given = pickle.dumps((modality, card, toys.samples[0], dict(settings)))
    modules = sorted({getattr(getattr(modality, part), "__module__", "") for part in (*_CALLED, "settings")} - {""})
    done = subprocess.run(
        [sys.executable, "-c", _ANOTHER_PROCESS, json.dumps([modules, _HEAVY])],
        input=given, capture_output=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ContractError(
            "the top module", f"does not work in another process: {' '.join(last)}",
            expected="that the modality can be unpickled and asked where only its package is installed",
        )  # fmt: skip
    field, heavy = json.loads(done.stdout.decode().splitlines()[-1])
    if heavy:
        where = f"importing {field}" if field in modules else f"{field}()"
        raise ContractError(
            "the top module" if field in modules else field, f"{where} imports {', '.join(heavy)}",
            expected="neither torch nor ray nor transformers: the gate runs on any laptop, at once",
            mend="import them inside build and batch",
        )  # fmt: skip


_ANOTHER_PROCESS = """
import importlib, json, pickle, sys
modules, heavy = json.loads(sys.argv[1])
def done(step):
    found = [name for name in heavy if name in sys.modules]
    if found:
        print(json.dumps([step, found]))
        sys.exit()
for name in modules:
    importlib.import_module(name)
    done(name)
modality, card, sample, settings = pickle.loads(sys.stdin.buffer.read())
from orchestrator import gate
from orchestrator.modality import Profile
decoded = modality.decode(sample)
done("decode")
facts = modality.measure(decoded, card)
done("measure")
row = gate.match(card, modality, {})
modality.fit(card, row, modality.settings.model_validate(settings), Profile.of([facts]))
done("fit")
print(json.dumps(["", []]))
"""
