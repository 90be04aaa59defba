"""A trial's job -> its plan, on data that was read once, and its run, laid out so that any process can train it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from orchestrator.backbone import with_digest
from orchestrator.data import Prepared, key_of, tables_in
from orchestrator.errors import ChangedError, DataError, RefusedError
from orchestrator.gate import ResolvedBackbone, measures_alike, plan_on, read_data, resolve_backbone, texts_of
from orchestrator.job import BackboneCard, Draft, HeldRun, Job, PhaseBegan, Plan, Report, Run, hold, run_in
from orchestrator.rehearsal import rehearsed
from orchestrator.tuning.probes import begin_behind_probe
from orchestrator.tuning.space import Config, draft_with
from orchestrator.tuning.trials import Key

_LEFT_S, _LOOKED_AT_S = 60.0, 0.2
"""How long the processes of a search that was killed are waited for."""


@dataclass(frozen=True)
class _Data:
    prepared: Prepared
    card: BackboneCard
    """Of the backbone that it was read for."""
    table: str
    """Its key in the storage's table store."""


@dataclass
class Layout:
    """What the plans of a search's trials are made of: backbones and data, each looked at once."""

    draft: Draft
    """The job, but for what the trials draw."""
    search: HeldRun
    report: Report
    _backbones: dict[str, ResolvedBackbone] = field(default_factory=dict)
    _data: dict[tuple[str, str], _Data] = field(default_factory=dict)
    _tried: set[str] = field(default_factory=set)

    def run_of(self, key: Key) -> Run:
        """The run of a trial, whether it is there or not."""
        number, repeat = key
        return run_in(self.search.storage, f"{self.search.name}.{number:04}{f'.{repeat}' if repeat else ''}")

    def job_of(self, key: Key, config: Config) -> Job:
        """The job of a trial. Raises `JobError`."""
        return draft_with(self.draft, {**config, "name": self.run_of(key).name}).job()

    def plan_of(self, key: Key, config: Config) -> Plan:
        """The plan of a trial. Raises `RefusedError` where its settings do not go together.

        The first of each backbone and input is rehearsed with real samples.
        """
        job = self.job_of(key, config)
        resolved, data = self._backbone(job), self._data_of(job)
        plan = plan_on(job, resolved, data.prepared)
        looks = json.dumps([plan.backbone.source, plan.input, plan.job.settings, data.table], sort_keys=True)
        if looks not in self._tried:
            rehearsed(plan, data.prepared, resolved)
            self._tried.add(looks)
        if not plan.data.num_samples["validation"]:
            raise DataError(
                "a search chooses by a validation split, and nothing is held back for one",
                mend="set data.validation_fraction above 0, or name a validation split: data.validation",
            )
        return plan

    def lay_out(self, key: Key, config: Config, plan: Plan) -> Run:
        """The run of a trial, as `train_as_planned` goes on with it; one that was begun before is as it was."""
        run, job = self.run_of(key), self.job_of(key, config)
        data = self._data_of(job)
        with _held_once_free(run) as held:
            if held.read("plan.json") is not None and run.plan.job.digest() == plan.job.digest():
                return run
            texts = texts_of(job, plan, data.prepared)
            held.clear()
            tables_in(held.storage).refer(data.table, held)
            begin_behind_probe(held, plan, self.search.name)
            for name, text in texts.items():  # plan.json, written last, says that the run is there
                held.write(name, text)
        return run

    def use_table_of(self, plan: Plan) -> None:
        """Let the search itself use the plan's sample table."""
        tables_in(self.search.storage).refer(self._data_of(plan.job).table, self.search)

    def seen(self) -> dict[str, str]:
        """What data and backbones were looked at, and their digests."""
        data = {f"data {' for '.join(key)}": one.prepared.summary.fingerprint for key, one in self._data.items()}
        return data | {f"backbone {key}": str(one.card.commit) for key, one in self._backbones.items()}

    def _backbone(self, job: Job) -> ResolvedBackbone:
        name = job.at_whole_paths().backbone
        if name not in self._backbones:
            self.report(PhaseBegan(f"looking at {job.backbone}"))
            resolved = resolve_backbone(job)
            self._backbones[name] = replace(resolved, card=with_digest(resolved.card))
        return self._backbones[name]

    def _data_of(self, job: Job) -> _Data:
        """What the job's data is to its backbone: read once for all to which it is the same."""
        whole = job.at_whole_paths()
        data = json.dumps(whole.data.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
        key = (data, whole.backbone)
        if key not in self._data:
            resolved = self._backbone(job)
            alike = (
                one for (of, _), one in self._data.items()
                if of == data and measures_alike(one.prepared, one.card, resolved)
            )  # fmt: skip
            self._data[key] = next(alike, None) or self._read(job, resolved)
        return self._data[key]

    def _read(self, job: Job, resolved: ResolvedBackbone) -> _Data:
        self.report(PhaseBegan("reading the data"))
        with self.search.scratch() as folder:
            prepared = read_data(job, resolved, folder)
            tables_in(self.search.storage).put(folder, self.search)
        return _Data(prepared, resolved.card, key_of(self.search) or "")


@contextlib.contextmanager
def _held_once_free(run: Run) -> Iterator[HeldRun]:
    """A trial's run, which a process of a search that was killed just now may still have for a moment."""
    given_up = time.monotonic() + _LEFT_S
    with contextlib.ExitStack() as holding:
        while True:
            try:
                held = holding.enter_context(hold(run.storage, run.name))
                break
            except RefusedError as error:
                if error.reason != "busy" or time.monotonic() > given_up:
                    raise
            time.sleep(_LOOKED_AT_S)
        yield held


def refuse_changed(what: str, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise `ChangedError` where data or a backbone is no longer what the search began with."""
    for key, value in now.items():
        if before.get(key, value) != value:
            raise ChangedError(
                f"{key.partition(' ')[0]} of the search {what} has changed since it began: {key.partition(' ')[2]}",
                expected=f"as it was: {before[key].removeprefix('sha256:')[:12]}",
                mend="start over with fresh (--fresh), or keep both: name (--name)",
            )
