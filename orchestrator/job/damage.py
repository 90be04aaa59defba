"""What is gone of a run, by the names and the sizes of its files: none of them is read whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from orchestrator.job.held import CHECKPOINTS, METRICS_FILE, MODEL, foreign_in
from orchestrator.job.manifests import GONE
from orchestrator.job.storage import Storage

_FILES = {"job.yaml", "results.json", "lineage.json", METRICS_FILE}
_WEIGHTS = ".safetensors"
_FOR_PEOPLE = (f"{MODEL}/README.md", f"{MODEL}/lineage.json", "lineage.json")
"""What nothing is built from."""


def is_run(names: Collection[str]) -> bool:
    """Whether a directory that holds these is a run; one that has lost its plan.json is, by the rest of it."""
    there = set(names)
    left = there & (_FILES | {CHECKPOINTS, MODEL})
    return "plan.json" in there or (len(left) > 1 and bool(left & _FILES) and not foreign_in(there))


def damage_of(storage: Storage, name: str, there: Collection[str]) -> dict[str, str]:
    """{file: what is wrong with it} of a run that has its figures, {} if nothing is. `there`: what its folder holds.

    The model's card may have been edited, so that its size says nothing.
    """
    if "results.json" not in there:
        return {}
    if MODEL not in there:
        return {MODEL: GONE}
    found = storage.problems_of(f"{name}/{MODEL}")
    if found is None:  # its manifest is gone too
        files = storage.children(f"{name}/{MODEL}")
        found = {} if "config.json" in files else {"config.json": GONE}
        found |= {} if any(file.endswith(_WEIGHTS) for file in files) else {f"model{_WEIGHTS}": GONE}
    wrong = {f"{MODEL}/{file}": what for file, what in found.items() if what == GONE or not file.endswith(".md")}
    return wrong if "lineage.json" in there else {**wrong, "lineage.json": GONE}


def no_edit_in(damage: Mapping[str, str]) -> dict[str, str]:
    """Of the damage that which is nobody's edit: what is gone, and weights; a text of another size may be one."""
    return {file: what for file, what in damage.items() if what == GONE or file.endswith(_WEIGHTS)}


def lost_in(damage: Mapping[str, str]) -> dict[str, str]:
    """Of that the part without which the model cannot be built."""
    return explaining(no_edit_in(damage))


def explaining(damage: Mapping[str, str]) -> dict[str, str]:
    """Of the damage that which may be why a model cannot be built."""
    return {file: what for file, what in damage.items() if file not in _FOR_PEOPLE}
