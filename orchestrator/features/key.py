"""Under which key the features of a frozen body are kept: all that they depend on, and the place that it stands for.

The key is made by every worker of what is installed beside it, and that of rank 0 holds: one that would compute other
features raises.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from orchestrator.data import Location, cached
from orchestrator.errors import TrainingError
from orchestrator.features.body_pass import Note
from orchestrator.job import HeldRun, Plan, is_uri
from orchestrator.modality import Modality, registry
from orchestrator.network import Cut, Worker
from orchestrator.store import CONTENTS, FOLDER, FeatureSet, MirroredSet, cache_group_folder, share_note

_OF_RUN = "features"
_LIBRARIES = ("torch", "transformers", "timm", "torchvision", "pillow", "soundfile", "soxr", "tokenizers")
"""What decodes, prepares and computes: other versions may give other features."""


@dataclass(frozen=True)
class FeatureCacheRef:
    """Where the features of a frozen body are kept, and what they are: all that a process needs to compute more."""

    cut: Cut
    key: Mapping[str, Any]
    group: Path
    """The cache group's folder on the storage."""
    object_store: str | None
    """A place in an object store that has them too."""
    apart: bool = False
    """Whether each machine has a folder of its own, so that only the object store has what others have computed."""

    @property
    def contents(self) -> Path:
        """The folder of what is remembered of files."""
        return self.group.parent / CONTENTS

    def set(self, name: str, note: Note) -> FeatureSet:
        """One of the cache group's sets."""
        place, folder = self._place(), self.group / name
        return FeatureSet(folder) if place is None else MirroredSet(folder, place.join(name), note)

    def share(self, *names: str) -> None:
        """Make these notes of the cache group the same here and in the object store, where there is one."""
        place = self._place()
        if place is not None:
            for name in names:
                share_note(self.group / name, place)

    def require_same(self, plan: Plan, modality: Modality) -> None:
        """Raise `TrainingError` where this process would compute other features than those of the key."""
        _require_same("this process", feature_key(plan, self.cut, code_digest(modality)), self.key)

    def _place(self) -> Location | None:
        return cached(self.object_store).join(self.group.name) if self.object_store else None


def agreed_cache(plan: Plan, run: HeldRun, cut: Cut, modality: Modality, worker: Worker) -> FeatureCacheRef:
    """Where all workers keep the features of this cut, as rank 0 says; its folder is made.

    Raises `TrainingError`, on all workers, where one of them would compute other features than rank 0.
    """
    keys = worker.all_gather(feature_key(plan, cut, code_digest(modality)))
    for rank, key in enumerate(keys):
        _require_same(f"the worker of rank {rank}", key, keys[0])
    key = keys[0]
    # What a notebook's cell computes, nobody can tell from what it computed before: kept for this run alone.
    shared = key["code"] is not None
    root = run.folder.parent / FOLDER if shared else run.folder / _OF_RUN
    # Where the storage is no directory each machine has its own folder, and the object store what all of them need.
    apart = is_uri(run.storage.place)
    store = plan.job.feature_store or (run.storage.place_of(FOLDER) if apart else None)
    return FeatureCacheRef(
        cut, key, cache_group_folder(root, plan.backbone.name, key), store if shared else None, shared and apart
    )


def feature_key(plan: Plan, cut: Cut, code: str | None) -> dict[str, Any]:
    """All that features depend on, but their number format and how a sample was changed at random."""
    plain = {name: value for name, value in plan.input.items() if name not in plan.augmentation}
    settings = {name: value for name, value in plan.job.settings.items() if name not in plan.augmentation}
    return {
        "backbone": plan.backbone.name, "commit": plan.backbone.commit, "modality": plan.job.modality,
        "row": plan.row.model_dump(mode="json"), "cut": cut.point, "input": plain, "settings": settings, "code": code,
        "libraries": {name: number for name in _LIBRARIES if (number := _version(name))},
    }  # fmt: skip


def _require_same(who: str, key: Mapping[str, Any], agreed: Mapping[str, Any]) -> None:
    if key == agreed:
        return
    parts = [f"{name}: {_short(key[name])} for {_short(agreed[name])}" for name in agreed if key[name] != agreed[name]]
    raise TrainingError(
        f"{who} would compute other features than the worker of rank 0 ({'; '.join(parts)})",
        expected="the same libraries and the same plugin on all machines",
        mend="install on all what one of them has (one image, one runtime_env); the same command goes on",
    )


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def _version(library: str) -> str | None:
    """Without its build: a head has torch's of the CPU (+cpu) where its workers have one of CUDA (+cu126)."""
    try:
        return version(library).partition("+")[0]
    except PackageNotFoundError:
        return None


def view_name(plan: Plan, number: int) -> str:
    """`view-0-1f2e3d4c`: of the number, the seed, and how samples are changed."""
    how = [(name, plan.input.get(name), plan.job.settings.get(name)) for name in sorted(plan.augmentation)]
    digest = hashlib.sha256(repr((how, plan.job.training.seed)).encode()).hexdigest()[:8]
    return f"view-{number}-{digest}"


def code_digest(modality: Modality) -> str | None:
    """16 hex digits of a plugin's source, so that features of other code are other features.

    None where nobody could compare it: it was registered in a program, or its functions are of no file.
    """
    if registry.is_registered(modality.name) or not registry.claims(modality.name):
        return None  # the second: in the program that started this process
    digest = hashlib.sha256()
    try:
        files: set[Path] = set()
        for function in (modality.decode, modality.fit, modality.build, modality.batch):
            file = _file_of(function)
            files |= set(file.parent.rglob("*.py")) if (file.parent / "__init__.py").exists() else {file}
        for file in sorted(files):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    except (TypeError, OSError):  # built in, typed into an interpreter, or out of an archive
        return None
    return digest.hexdigest()[:16]


def _file_of(function: Any) -> Path:
    """The source of what a modality calls. Raises `TypeError` or `OSError` where there is none."""
    while isinstance(function, functools.partial):
        function = function.func
    return Path(inspect.getfile(inspect.unwrap(function) if inspect.isroutine(function) else type(function)))
