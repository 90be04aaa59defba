"""A frozen body runs once: where it is cut, under which key its features are kept, and the sources made of them."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.data import Catalog, Location, Samples, cached
from orchestrator.features.extraction import Extraction, RemoteExtractor, known_contents
from orchestrator.features.formats import Choice, choose
from orchestrator.features.sources import FeatureSource, SampleSource, StoredView
from orchestrator.job import SPLITS, Advanced, Noted, PhaseBegan, Plan, Report, write_file
from orchestrator.modality import Modality, registry
from orchestrator.network import Body, Cut, Head, Network, Worker, channels_last, find_cut
from orchestrator.store import (
    CONTENTS,
    FOLDER,
    FORMAT_FILE,
    KEY_FILE,
    FeatureSet,
    Format,
    MirroredSet,
    cache_group_folder,
    opened,
    share,
)

_NUM_PROOF_SAMPLES = 16
_OF_RUN = "features"
_USED = "features.json"
"""Of a run: the number format and the shards that it reads."""

_LIBRARIES = ("torch", "transformers", "timm", "torchvision", "pillow", "soundfile", "soxr", "tokenizers")
"""What decodes, prepares and computes: other versions may give other features."""

Ints = npt.NDArray[np.int64]
Note = Callable[[str], None]


@dataclass(frozen=True)
class FeatureCacheRef:
    """Where the features of a frozen body are kept, and what they are: all that a process needs to compute more."""

    cut: Cut
    key: Mapping[str, Any]
    group: Path
    """The folder on the storage."""
    store: str | None
    """A place in an object store that has them too."""

    def set(self, name: str, note: Note) -> FeatureSet:
        """One of the cache group's sets."""
        place, folder = self._place(), self.group / name
        return FeatureSet(folder) if place is None else MirroredSet(folder, place.join(name), note)

    def share(self, *names: str) -> None:
        """These notes of the cache group, the same on all machines."""
        place = self._place()
        if place is not None:
            for name in names:
                share(self.group / name, place)

    def _place(self) -> Location | None:
        return cached(self.store).join(self.group.name) if self.store else None


MakeRemoteExtractor = Callable[[FeatureCacheRef, Format], RemoteExtractor]
"""Makes what has other processes compute features."""


@dataclass(frozen=True)
class CachedFeatures:
    """What the loop needs instead of the whole network and the samples."""

    forward: Head
    sources: dict[str, FeatureSource]
    """Split -> its features."""


def run_body_once(
    plan: Plan, run: Path, network: Network, modality: Modality, source: SampleSource, worker: Worker,
    report: Report, should_stop: Callable[[], bool], resources: ExitStack, verify: bool = False,
    extractors: MakeRemoteExtractor | None = None,
) -> tuple[CachedFeatures | None, dict[str, Any]]:  # fmt: skip
    """(features of all splits, what to note of them); None for the first where the body must run in every step.

    `resources` keeps the features from being pruned, until it is closed.
    `verify`: every sample is read to find out what its content is, whatever is remembered of its file.
    `extractors`: what has other processes run the body.
    """
    samples = source.samples
    cut, error = _prove(network, source, samples, worker)
    if cut is None:
        text = "no cut into body and head holds for this network: the body runs in every step"
        report(Noted(text))
        return None, {"features": "every step", "split_error": error if math.isfinite(error) else None}
    started = time.monotonic()
    rows = {name: samples.rows(name) for name in SPLITS}
    total = sum(len(some) for some in rows.values()) + max(0, plan.views - 1) * len(rows["train"])
    report(PhaseBegan("running the frozen body once", total, unit="samples"))
    code = code_digest(modality)
    # What a notebook's cell computes, nobody can tell from what it computed before: kept for this run alone.
    root = run / _OF_RUN if code is None else run.parent / FOLDER
    key = feature_key(plan, cut, code)
    cache_group = cache_group_folder(root, plan.backbone.name, key)
    catalog = Catalog(root / CONTENTS)
    body = Body(network, cut)
    everything = np.concatenate([rows[name] for name in SPLITS])

    def note(text: str) -> None:
        report(Noted(text))

    if plan.job.feature_store and code is None:
        note("the plugin's code has no file that other machines could compare: the features stay in this run")
    cache = FeatureCacheRef(cut, key, cache_group, plan.job.feature_store if code is not None else None)
    cache.share(KEY_FILE, FORMAT_FILE)  # what another machine has decided holds here too
    set_of = functools.cache(lambda name: cache.set(name, note))
    before: _Used | None = worker.gather(_Used.of(run) if worker.rank == 0 else None)[0]
    if before is not None:  # a run that goes on reads what it began with, whatever there is by now
        choice = Choice(before.format)
    else:
        choice = choose(
            plan.job.training.precision, body, source, rows["train"], worker, cache_group,
            lambda format: _num_missing(set_of(format), samples, catalog, everything),
        )  # fmt: skip
        cache.share(FORMAT_FILE)
    extraction = Extraction(
        body, source, worker, catalog, choice.format, modality.length_bucketing, plan.job.training.seed,
        advance=lambda num: report(Advanced(num)),
        note=note, should_stop=should_stop, verify=verify,
        remote=extractors(cache, choice.format) if extractors is not None else None,
    )  # fmt: skip

    def run_over(name: str, rows: Ints, view: int | None = None) -> StoredView:
        features = resources.enter_context(opened(set_of(name), key))
        if before is not None:
            features.prefer(before.shards.get(name, ()))
        return extraction.run(features, rows, view)

    # One pass over all splits that samples are not changed in: one shard for a small job, not three.
    whole = everything if not plan.views else np.concatenate([rows["validation"], rows["test"]])
    stored = run_over(choice.format, np.sort(whole))
    sources = {name: FeatureSource(samples, [stored]) for name in SPLITS}
    if plan.views:
        names = [f"{choice.format}-{view_name(plan, number)}" for number in range(plan.views)]
        views = [run_over(name, rows["train"], number) for number, name in enumerate(names)]
        sources["train"] = FeatureSource(samples, views)
    cache.share(KEY_FILE, FORMAT_FILE)  # pruned meanwhile, perhaps
    if worker.rank == 0 and before is None:
        write_file(run / _USED, json.dumps({"format": choice.format, "shards": extraction.used}))
    found = {
        "features": "once", "cut": cut.point, "split_error": error, "format": choice.format,
        "features_s": time.monotonic() - started, "num_computed": sum(worker.gather(extraction.num_computed)),
    }  # fmt: skip
    if choice.cosine is not None:
        found |= {"format_cosine": choice.cosine, "format_gain": choice.gain}
    if extraction.gain is not None:
        found["compiled_gain"] = extraction.gain
    return CachedFeatures(Head(network, cut), sources), found


@dataclass(frozen=True)
class _Used:
    """What a run's features were read from, so that a run that goes on reads the same."""

    format: Format
    shards: Mapping[str, list[str]]
    """Set -> names of its shards."""

    @classmethod
    def of(cls, run: Path) -> _Used | None:
        try:
            found = json.loads((run / _USED).read_text(encoding="utf-8"))
            return cls(found["format"], {name: list(shards) for name, shards in found["shards"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def _num_missing(features: FeatureSet, samples: Samples, catalog: Catalog, rows: Ints) -> int:
    ids = known_contents(samples, catalog, rows)
    features.refresh()
    features.fetch_missing(ids)
    return int((features.find(ids)[0] < 0).sum())


def _prove(network: Network, source: SampleSource, samples: Samples, worker: Worker) -> tuple[Cut | None, float]:
    """The cut, proved on the shortest samples, the longest ones, and some at even distances; one answer for all."""
    found: tuple[Cut | None, float] = (None, math.inf)
    if worker.rank == 0:
        rows = np.concatenate([samples.rows(name) for name in SPLITS])
        ordered, third = samples.order_by_length(rows), _NUM_PROOF_SAMPLES // 3
        some = rows[:: max(1, len(rows) // third)][:third]
        batch = source.batch(np.unique(np.concatenate([ordered[:third], ordered[-third:], some])), train=False)
        if batch is not None:
            found = find_cut(network, channels_last(batch.to(worker.device).inputs))
    answer: tuple[Cut | None, float] = worker.gather(found)[0]
    return answer


# --- the key ---


def feature_key(plan: Plan, cut: Cut, code: str | None) -> dict[str, Any]:
    """All that features depend on, but their number format and how a sample was changed at random."""
    plain = {key: value for key, value in plan.input.items() if key not in plan.augmentation}
    settings = {key: value for key, value in plan.job.settings.items() if key not in plan.augmentation}
    return {
        "backbone": plan.backbone.name, "commit": plan.backbone.commit, "modality": plan.job.modality,
        "row": plan.row.model_dump(mode="json"), "cut": cut.point, "input": plain, "settings": settings, "code": code,
        "libraries": {name: found for name in _LIBRARIES if (found := _version(name))},
    }  # fmt: skip


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def view_name(plan: Plan, number: int) -> str:
    """`view-0-1f2e3d4c`: of the number, the seed, and how samples are changed."""
    how = [(key, plan.input.get(key), plan.job.settings.get(key)) for key in sorted(plan.augmentation)]
    digest = hashlib.sha256(repr((how, plan.job.training.seed)).encode()).hexdigest()[:8]
    return f"view-{number}-{digest}"


def code_digest(modality: Modality) -> str | None:
    """Of the source of a plugin, so that features of other code are other features; None where it has no files."""
    if registry.is_registered(modality.name):
        return None
    files: set[Path] = set()
    for function in (modality.decode, modality.fit, modality.build, modality.batch):
        what: Any = function
        while isinstance(what, functools.partial):
            what = what.func
        try:
            file = Path(inspect.getfile(inspect.unwrap(what) if inspect.isroutine(what) else type(what)))
        except (TypeError, OSError):  # built in, or typed into an interpreter
            return None
        files |= set(file.parent.rglob("*.py")) if (file.parent / "__init__.py").exists() else {file}
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
