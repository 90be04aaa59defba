"""What a plugin declares: its name, its rules, and whether it can travel to another process."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from pydantic import ValidationError

from orchestrator.errors import ContractError, PluginError, RefusedError, calling
from orchestrator.gate import match
from orchestrator.job import FIGURES, BackboneCard
from orchestrator.modality import Modality, Sample, registry

_HEAVY = ("torch", "ray", "transformers", "timm", "torchvision")
LONGEST_S = 120.0
"""How long a process of the check may take."""
_OF_A_CHECK = "ORCHESTRATOR_CHECK_MODALITY"
"""A variable of the environment of such processes, and of those that they start."""
_CALLED = {
    "decode": "Decode", "measure": "Measure", "fit": "FitFunction", "build": "Build", "batch": "MakeCollate",
    "toy": "Toy",
}  # fmt: skip
"""Fields that are functions -> the name of its signature in `orchestrator.modality`."""


def check_declaration(modality: Modality) -> None:
    """The fields that a registry needs are right, nothing is left out, and files and settings can be told apart."""
    try:
        registry.validate(modality, "modality")
    except PluginError as error:
        raise ContractError(
            "declaration", error.message, expected=error.expected, mend="correct that field of your Modality"
        ) from None
    for field, signature in _CALLED.items():
        if getattr(modality, field) is None:
            what = "a modality without toy samples cannot be checked" if field == "toy" else "nothing can be trained"
            raise ContractError(
                field, f"is None: {what}", expected="a function",
                mend=f"write it: orchestrator.modality.{signature} is its signature",
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


def check_name(modality: Modality) -> None:
    """No installed distribution has the name, but the one that this modality comes from."""
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


def check_rules(modality: Modality, shares: Sequence[str]) -> None:
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
        match(card, modality, {})
    except RefusedError:
        return True
    return False


def _bare(library: str, model_type: str) -> BackboneCard:
    return BackboneCard(
        source=model_type, kind="directory", name=model_type, library=library,
        model_type=model_type, config={"model_type": model_type},
    )  # fmt: skip


def check_pickle(modality: Modality) -> None:
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


def refuse_while_imported() -> None:
    """Raise `ContractError` in a process that a check started: it would start another one, and that one the next."""
    if _OF_A_CHECK in os.environ:
        raise ContractError(
            "the top module", "calls check_modality when it is imported",
            expected="a module that only declares: every process that reads the plugin imports it, those of the check "
            "among them",
            mend="put the call into a test, def test_it_keeps_the_contract(): check_modality(...), or another file",
        )  # fmt: skip


def check_in_another_process(
    modality: Modality, card: BackboneCard, sample: Sample, settings: Mapping[str, Any]
) -> None:  # fmt: skip
    """What the gate calls works after a pickle, and imports nothing heavy: a laptop asks it."""
    modules = sorted({getattr(getattr(modality, part), "__module__", "") for part in (*_CALLED, "settings")} - {""})
    if "__main__" in modules:
        raise ContractError(
            "the top module", "stands in the script that is run, which no other process can import",
            expected="a module of the plugin's own, as the entry point names it",
            mend="call check_modality in another file, which imports the modality from its module",
        )  # fmt: skip
    status, answer, complaint = _in_another_process(
        [json.dumps([modules, _HEAVY])], pickle.dumps((modality, card, sample, dict(settings)))
    )
    if status:
        raise ContractError(
            "the top module", f"does not work in another process: {' '.join(complaint.strip().splitlines()[-1:])}",
            expected="that the modality can be unpickled and asked where only its package is installed",
            mend="let the module import what it needs, and read nothing that this process alone has set",
        )  # fmt: skip
    step, heavy, refused = json.loads(answer.splitlines()[-1])
    if refused:
        raise ContractError(**refused)
    if heavy:
        where = f"importing {step}" if step in modules else f"{step}()"
        raise ContractError(
            "the top module" if step in modules else step, f"{where} imports {', '.join(heavy)}",
            expected="neither torch nor ray nor transformers: the gate runs on any laptop, at once",
            mend="import them inside build and batch",
        )  # fmt: skip


def _in_another_process(arguments: Sequence[str], given: bytes) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of a fresh interpreter; what it started ends with it."""
    process = subprocess.Popen(
        [sys.executable, "-c", _ANOTHER_PROCESS, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), _OF_A_CHECK: "1"},
    )  # fmt: skip
    try:
        out, err = process.communicate(given, timeout=LONGEST_S)
    except subprocess.TimeoutExpired:
        raise ContractError(
            "the top module", f"is not imported and asked within {LONGEST_S:g} s in another process",
            expected="decode, measure and fit of one toy sample, in seconds",
            mend="wait for nothing there: no server, no lock, no input, no process that is not ended",
        ) from None  # fmt: skip
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
    return process.returncode, out.decode(errors="replace"), err.decode(errors="replace")


_ANOTHER_PROCESS = """
import importlib, json, pickle, sys
modules, heavy = json.loads(sys.argv[1])
from orchestrator.errors import ContractError
def done(step):
    found = [name for name in heavy if name in sys.modules]
    if found:
        print(json.dumps([step, found, None]))
        sys.exit()
for name in modules:
    try:
        importlib.import_module(name)
    except ContractError as error:
        print(json.dumps([name, [], {k: getattr(error, k) for k in ("field", "found", "expected", "mend")}]))
        sys.exit()
    done(name)
modality, card, sample, settings = pickle.loads(sys.stdin.buffer.read())
from orchestrator.gate import match
from orchestrator.modality import Profile
decoded = modality.decode(sample)
done("decode")
facts = modality.measure(decoded, card)
done("measure")
row = match(card, modality, {})
modality.fit(card, row, modality.settings.model_validate(settings), Profile.of([facts]))
done("fit")
print(json.dumps(["", [], None]))
"""
