"""Features for a plan: the frozen body runs over all samples, each content once, and the loop gets features instead.

`compute_features` needs no training session, only the network and the samples: what it returns says where the features
lie. `open_features` makes sources of that. `run_body_once` is the two one after the other.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.data import Catalog, Ints, Samples
from orchestrator.features.body_pass import BodyPass, Note
from orchestrator.features.extraction import Extraction, RemoteExtractor, known_contents
from orchestrator.features.formats import Choice, choose
from orchestrator.features.key import FeatureCacheRef, agreed_cache, view_name
from orchestrator.features.sources import FeatureSource, SampleSource, StoredRows, StoredView
from orchestrator.job import SPLITS, Advanced, HeldRun, Noted, PhaseBegan, Plan, Report, is_uri
from orchestrator.modality import Modality
from orchestrator.network import Body, Cut, Head, Network, Worker, channels_last, find_cut
from orchestrator.store import FORMAT_FILE, KEY_FILE, FeatureSet, Format, opened

_NUM_PROOF_SAMPLES = 16
_USED = "features.json"
"""Of a run: the number format and the shards that it reads."""

MakeRemoteExtractor = Callable[[FeatureCacheRef, Format], RemoteExtractor]
"""(where features are kept, their number format) -> what has other processes run the body."""


@dataclass(frozen=True)
class FeatureRef:
    """Where the features of a plan's samples lie. Names, numbers and paths: another process may open it."""

    cache: FeatureCacheRef
    format: Format
    splits: Mapping[str, tuple[StoredRows, ...]]
    """Split -> its features: one view of the samples, or several."""
    lineage: Mapping[str, Any]
    """What is noted of them in lineage.json."""


@dataclass(frozen=True)
class NoCut:
    """No cut into body and head holds for the network: the body has to run in every step."""

    cut_error: float
    """The least that a cut was off, relative to the largest logit."""

    @property
    def lineage(self) -> Mapping[str, Any]:
        """What is noted of it in lineage.json."""
        return {
            "features": "every step", "cut_error": self.cut_error if math.isfinite(self.cut_error) else None
        }  # fmt: skip


@dataclass(frozen=True)
class CachedFeatures:
    """What the loop needs instead of the whole network and the samples."""

    forward: Head
    sources: dict[str, FeatureSource]
    """Split -> its features."""


def run_body_once(
    plan: Plan, run: HeldRun, network: Network, modality: Modality, source: SampleSource, worker: Worker,
    report: Report, should_stop: Callable[[], bool], resources: ExitStack, verify: bool = False,
    extractors: MakeRemoteExtractor | None = None,
) -> tuple[CachedFeatures | None, Mapping[str, Any]]:  # fmt: skip
    """(features of all splits, what to note of them); None for the first where the body must run in every step.

    See `compute_features`.
    """
    ref = compute_features(
        plan, run, network, modality, source, worker, report, should_stop, resources, verify, extractors
    )
    if isinstance(ref, NoCut):
        return None, ref.lineage
    sources = open_features(ref, source.samples, resources, lambda text: report(Noted(text)), verified=True)
    return CachedFeatures(Head(network, ref.cache.cut), sources), ref.lineage


def compute_features(
    plan: Plan, run: HeldRun, network: Network, modality: Modality, source: SampleSource, worker: Worker,
    report: Report, should_stop: Callable[[], bool], resources: ExitStack, verify: bool = False,
    extractors: MakeRemoteExtractor | None = None,
) -> FeatureRef | NoCut:  # fmt: skip
    """Where the features of all splits lie, once those that the store lacks are computed. All workers call this.

    `network`: on the worker's device, frozen, in eval mode. `source`: all samples of the plan. `run`: the one
    that wants them; they are kept beside it, so that every run on the same storage reads them.
    `resources` keeps the features from being pruned, until it is closed.
    `verify`: every sample is read to find out what its content is, whatever is remembered of its file.
    `extractors`: what has other processes run the body.

    Raises `InterruptedRunError` where `should_stop` says so, what was computed is kept; and `TrainingError` where a
    sample cannot be read, a worker would compute other features than rank 0, or the storage keeps nothing.
    """
    samples = source.samples
    cut, error = _prove(network, source, samples, worker)
    if cut is None:
        report(Noted("no cut into body and head holds for this network: the body runs in every step"))
        return NoCut(error)
    started = time.monotonic()
    rows = {name: samples.rows(name) for name in SPLITS}
    total = sum(len(some) for some in rows.values()) + max(0, plan.views - 1) * len(rows["train"])
    report(PhaseBegan("running the frozen body once", total, unit="samples"))
    cache = agreed_cache(plan, run, cut, modality, worker)

    def note(text: str) -> None:
        report(Noted(text))

    if (plan.job.feature_store or is_uri(run.storage.place)) and cache.object_store is None:
        note("the plugin's code has no file that other machines could compare: the features stay in this run")
    body = Body(network, cut)
    catalog = Catalog(cache.contents)
    everything = np.concatenate([rows[name] for name in SPLITS])
    set_of = functools.cache(lambda name: cache.set(name, note))
    used_before: _Used | None = worker.all_gather(_Used.of(run) if worker.rank == 0 else None)[0]
    if worker.rank == 0:
        cache.share(KEY_FILE, FORMAT_FILE)  # what another machine has decided holds here too
    if used_before is not None:  # a run that goes on reads what it began with, whatever there is by now
        choice = Choice(used_before.format)
    else:
        choice = choose(
            plan.precision, body, source, rows["train"], worker, cache.group,
            lambda format: _num_missing(set_of(format), samples, catalog, everything),
        )  # fmt: skip
        if worker.rank == 0:
            cache.share(FORMAT_FILE)
    body_pass = BodyPass(
        body, source, worker, choice.format, modality.length_bucketing, plan.job.training.seed,
        advance=lambda num: report(Advanced(num)), note=note, should_stop=should_stop,
    )  # fmt: skip
    remote = extractors(cache, choice.format) if extractors is not None else None
    extraction = Extraction(body_pass, catalog, verify, remote, cache.apart)

    def run_over(name: str, rows: Ints, view: int | None = None) -> StoredRows:
        features = resources.enter_context(opened(set_of(name), cache.key))
        if used_before is not None:
            features.prefer(used_before.shards.get(name, ()))
        return extraction.run(features, rows, view)

    # One pass over all splits that samples are not changed in: one shard for a small job, not three.
    unchanged = everything if not plan.views else np.concatenate([rows["validation"], rows["test"]])
    stored = run_over(choice.format, np.sort(unchanged))
    splits: dict[str, tuple[StoredRows, ...]] = dict.fromkeys(SPLITS, (stored,))
    if plan.views:
        names = [f"{choice.format}-{view_name(plan, number)}" for number in range(plan.views)]
        splits["train"] = tuple(run_over(name, rows["train"], number) for number, name in enumerate(names))
    if worker.rank == 0:
        cache.share(KEY_FILE, FORMAT_FILE)  # pruned meanwhile, perhaps
        if used_before is None:
            shards = {part.set: part.shards for parts in splits.values() for part in parts}
            run.write(_USED, json.dumps({"format": choice.format, "shards": shards}))
    lineage = {
        "features": "once", "cut": cut.point, "cut_error": error, "format": choice.format,
        "features_s": time.monotonic() - started, "num_computed": sum(worker.all_gather(extraction.num_computed)),
    }  # fmt: skip
    if choice.cosine is not None:
        lineage |= {"format_cosine": choice.cosine, "format_gain": choice.gain}
    if extraction.gain is not None:
        lineage["compiled_gain"] = extraction.gain
    return FeatureRef(cache, choice.format, splits, lineage)


def open_features(
    ref: FeatureRef, samples: Samples, resources: ExitStack, note: Note, verified: bool = False
) -> dict[str, FeatureSource]:
    """Split -> a source of its features, memory-mapped, as they were computed.

    `samples`: those that they were computed of. `resources` keeps the features from being pruned, until it is closed.
    `verified`: this process has held the shards against their digests. Raises `TrainingError` where a shard is gone or
    damaged: `compute_features` makes it again.
    """

    @functools.cache
    def view_of(name: str) -> StoredView:
        stored = by_set[name]
        features = resources.enter_context(opened(ref.cache.set(name, note), ref.cache.key))
        return StoredView(stored.rows, stored.shard, stored.at, features.open(stored.shards, verified))

    by_set = {stored.set: stored for parts in ref.splits.values() for stored in parts}
    return {name: FeatureSource(samples, [view_of(part.set) for part in parts]) for name, parts in ref.splits.items()}


@dataclass(frozen=True)
class _Used:
    """What a run's features were read from, so that a run that goes on reads the same."""

    format: Format
    shards: Mapping[str, list[str]]
    """Set -> names of its shards."""

    @classmethod
    def of(cls, run: HeldRun) -> _Used | None:
        try:
            entries = json.loads(run.read(_USED) or "")
            return cls(entries["format"], {name: list(shards) for name, shards in entries["shards"].items()})
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


def _num_missing(features: FeatureSet, samples: Samples, catalog: Catalog, rows: Ints) -> int:
    ids = known_contents(samples, catalog, rows)
    features.refresh()
    features.fetch_missing(ids)
    return int((features.find(ids)[0] < 0).sum())


def _prove(network: Network, source: SampleSource, samples: Samples, worker: Worker) -> tuple[Cut | None, float]:
    """The cut, proved by rank 0 on the shortest samples, the longest ones, and some at even distances; and its error.

    None for the cut where none holds.
    """
    proved: tuple[Cut | None, float] = (None, math.inf)
    if worker.rank == 0:
        rows = np.concatenate([samples.rows(name) for name in SPLITS])
        ordered, third = samples.order_by_length(rows), _NUM_PROOF_SAMPLES // 3
        spread = rows[:: max(1, len(rows) // third)][:third]
        batch = source.batch(np.unique(np.concatenate([ordered[:third], ordered[-third:], spread])), train=False)
        if batch is not None:
            proved = find_cut(network, channels_last(batch.to(worker.device).inputs))
    answer: tuple[Cut | None, float] = worker.all_gather(proved)[0]
    return answer
