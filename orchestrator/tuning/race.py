"""The race: features, probes and neighbours of each candidate, on a sample that grows for those still in it.

Successive halving (Jamieson and Talwalkar 2016) on nested samples: what was computed for a small one is stored, and is
part of the next. A linear probe on features that are there takes a second, so that it is the ranking, and no formula
that stands for one.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from orchestrator.data import Ints, Samples, num_seen_by_backbone, table_of
from orchestrator.errors import InterruptedRunError, OrchestratorError, TrainingError, first_line
from orchestrator.features import NoCut, SampleSource, compute_features, open_features
from orchestrator.job import Event, HeldRun, Noted, PhaseBegan, Report, Stop, figure
from orchestrator.modality import Modality
from orchestrator.network import Network, Worker
from orchestrator.probing import assign_folds, fit_probe
from orchestrator.training import assembled
from orchestrator.tuning.candidates import Candidate
from orchestrator.tuning.neighbours import score_of_neighbours
from orchestrator.tuning.standings import Standing, leaving, sample_sizes
from orchestrator.tuning.steps import measured_minutes, minutes_by_throughput

_NUM_FOLDS = 5
_USED = "features.json"
"""What `compute_features` notes for a run that goes on; each candidate has features of its own."""


@dataclass
class Race:
    """Candidates, and what they are measured with."""

    held: HeldRun
    worker: Worker
    modality: Modality
    seed: int
    report: Report
    should_stop: Stop

    def run(self, candidates: Sequence[Candidate], most: int) -> list[Candidate]:
        """Measure all, on up to `most` samples; those that were still in the race at its end, the best first.

        Of the best the features of all splits are stored afterwards, unless there are more samples than that. What
        fails has a `problem`. Raises `InterruptedRunError` when asked to stop.
        """
        samples = self._samples()
        pool = stratified(samples, np.sort(np.concatenate([samples.rows("train"), samples.rows("validation")])), 0)
        num_classes = len(candidates[0].plan.classes)
        sizes = sample_sizes(len(pool), num_classes, most)
        self._warn_of_seen(candidates, samples, np.sort(pool[: sizes[-1]]))
        racing = list(candidates)
        for size in sizes if len(racing) > 1 else sizes[-1:]:
            for candidate in racing:
                self._measure(candidate, np.sort(pool[:size]))
            racing = [one for one in racing if one.problem is None]
            if not racing:
                return []
            racing.sort(key=lambda one: one.standings[size].key, reverse=True)
            self._tell(racing, size)
            if size != sizes[-1]:
                gone = leaving({one.source: one.standings[size] for one in racing})
                racing = [one for one in racing if one.source not in gone]
        self._finish(racing, candidates, completes=len(pool) <= most)
        return racing

    def _warn_of_seen(self, candidates: Sequence[Candidate], samples: Samples, rows: Ints) -> None:
        """Say which candidates were trained on what they are ranked by."""
        fields = [field.name for field in self.modality.sample]
        for candidate in candidates:
            card = candidate.plan.backbone
            num = num_seen_by_backbone(card, samples, rows, fields, "train", "validation")
            if num:
                what = f"{card.name} was trained on {num:,} of the {len(rows):,} samples that it is ranked by"
                self.report(Noted(f"{what}: its figures are too good", is_warning=True))

    def _measure(self, candidate: Candidate, rows: Ints) -> None:
        """Features of the rows, and what they are worth."""
        with self._at_work(candidate), ExitStack() as resources:
            network, source = self._loaded(candidate, resources)
            features, there = self._features(candidate, network, source, rows, resources)
            del network
            self.report(PhaseBegan(f"{candidate.name}: a probe on {len(there):,} samples"))
            candidate.standings[len(rows)] = self._standing(candidate, features, source.samples, there, len(rows))

    def _finish(self, racing: Sequence[Candidate], candidates: Sequence[Candidate], completes: bool) -> None:
        """Steps of full fine-tuning are timed for those that are left; with `completes`, the best's features stored."""
        for candidate in racing:
            with self._at_work(candidate), ExitStack() as resources:
                network, source = self._loaded(candidate, resources)
                if completes and candidate is racing[0]:
                    rows = np.concatenate([source.samples.rows(name) for name in ("train", "validation", "test")])
                    self._features(candidate, network, source, np.sort(rows), resources)
                if candidate.full is not None:
                    self.report(PhaseBegan(f"{candidate.name}: some steps of full fine-tuning"))
                    candidate.full_minutes = measured_minutes(
                        candidate.full, network, source, self.worker, self.modality.length_bucketing
                    )
                    candidate.full_is_measured = True
        for candidate in candidates:
            if candidate.full_minutes is None and candidate.full is not None and candidate.samples_per_s:
                candidate.full_minutes = minutes_by_throughput(candidate.full, candidate.samples_per_s)

    @contextmanager
    def _at_work(self, candidate: Candidate) -> Iterator[None]:
        """Count the time; what is raised is the candidate's problem alone, unless somebody asked to stop."""
        if self.should_stop():
            raise InterruptedRunError(
                "stopped; the features that were computed are kept", mend="the same command goes on"
            )
        started = time.monotonic()
        try:
            yield
        except InterruptedRunError:
            raise
        except OrchestratorError as error:
            if self.held.storage.has_failed(error):
                raise
            candidate.problem = error.as_dict()
        except Exception as error:  # what a library makes of this network
            candidate.problem = TrainingError(f"{type(error).__name__}: {first_line(error)}").as_dict()
        finally:
            candidate.seconds += time.monotonic() - started
        if candidate.problem is not None:
            self.report(Noted(f"{candidate.name} failed: {candidate.problem['message']}", is_warning=True))

    def _samples(self) -> Samples:
        table = table_of(self.held)
        assert table is not None
        return Samples(table, tuple(field.name for field in self.modality.sample))

    def _loaded(self, candidate: Candidate, resources: ExitStack) -> tuple[Network, SampleSource]:
        self.report(PhaseBegan(f"{candidate.name}: loading"))
        return assembled(
            candidate.plan, self.held, self.worker, self.modality, resources, lambda text: self.report(Noted(text)),
            self.should_stop,
        )  # fmt: skip

    def _features(
        self, candidate: Candidate, network: Network, source: SampleSource, rows: Ints, resources: ExitStack
    ) -> tuple[Tensor, Ints]:
        """(features, float32 [samples, width]; the rows that they are of). Raises `TrainingError`."""
        some = dataclasses.replace(source, samples=source.samples.only(rows))
        self.held.delete(_USED)
        started = time.monotonic()
        ref = compute_features(
            candidate.plan, self.held, network, self.modality, some, self.worker, self._named(candidate),
            self.should_stop, resources,
        )  # fmt: skip
        seconds = time.monotonic() - started
        if isinstance(ref, NoCut):
            finite = "" if math.isfinite(ref.cut_error) else "what it gives is not finite, or "
            raise TrainingError(
                f"{finite}no cut into body and head holds for this network, so that it has no features to compare",
                expected="a network whose head reads what its body gives",
                mend="train it as it is, with --set training.features='every step', and compare the runs",
            )
        num_computed = int(ref.lineage["num_computed"])
        if num_computed > len(rows) // 2:
            candidate.samples_per_s = num_computed / seconds
        sources = open_features(ref, some.samples, resources, lambda _: None, verified=True)
        batch = sources["train"].batch(rows, train=False)
        if batch is None:
            raise TrainingError("none of the samples can be read", mend="look at the first: orchestrator check --data")
        return flat(batch.inputs["features"]), batch.rows

    def _standing(
        self, candidate: Candidate, features: Tensor, samples: Samples, rows: Ints, num_samples: int
    ) -> Standing:
        plan, targets = candidate.plan, samples.targets[rows]
        task, num_classes = plan.job.task, len(plan.classes)
        groups = None if samples.groups is None else samples.groups[rows]
        probe = fit_probe(
            features, targets, task, num_classes=num_classes, groups=groups, class_weights=plan.class_weights,
            folds=_NUM_FOLDS, seed=self.seed,
        )  # fmt: skip
        fold = assign_folds(targets, task, groups, _NUM_FOLDS, self.seed)
        near = score_of_neighbours(features, targets, fold, task, num_classes)
        return Standing(num_samples, probe.score, probe.interval, probe.loss, probe.fold_scores, near)

    def _named(self, candidate: Candidate) -> Report:
        """Tells what happens as this candidate's; notes on what is stored, of each round, are nobody's concern."""

        def tell(event: Event) -> None:
            if isinstance(event, PhaseBegan):
                self.report(dataclasses.replace(event, text=f"{candidate.name}: {event.text}"))
            elif not isinstance(event, Noted) or event.is_warning:
                self.report(event)

        return tell

    def _tell(self, racing: Sequence[Candidate], size: int) -> None:
        shown = ", ".join(f"{one.name} {figure(one.standings[size].score)}" for one in racing[:3])
        more = f" and {len(racing) - 3} more" if len(racing) > 3 else ""
        self.report(Noted(f"on {size:,} samples: {shown}{more}"))


def flat(features: Tensor) -> Tensor:
    """float32 [samples, width]: of features with places (pixels, tokens) their mean over these."""
    if features.ndim == 4:  # channels first, as convolutions give them
        return features.mean(dim=(2, 3))
    if features.ndim == 3:
        return features.mean(dim=1)
    return features.flatten(1)


def stratified(samples: Samples, rows: Ints, seed: int) -> Ints:
    """The rows in an order whose every beginning holds the classes in about the proportions of all; mixed by `seed`."""
    mixed = rows[np.random.default_rng(seed).permutation(len(rows))]
    targets = samples.targets[mixed]
    if targets.ndim > 1:
        return mixed
    place = np.empty(len(mixed))
    for label in np.unique(targets):
        of_class = np.flatnonzero(targets == label)
        place[of_class] = (np.arange(len(of_class)) + 0.5) / len(of_class)
    return mixed[np.argsort(place, kind="stable")]
