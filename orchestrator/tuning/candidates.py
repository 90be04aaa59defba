"""Each candidate through the gate, all of them on data that is read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.data import Prepared, tables_in
from orchestrator.errors import RefusedError
from orchestrator.gate import ResolvedBackbone, measures_alike, parse_settings, plan_on, read_data, resolve_backbone
from orchestrator.job import BackboneCard, HeldRun, Job, PhaseBegan, Plan, Report
from orchestrator.modality import registry
from orchestrator.rehearsal import rehearsed
from orchestrator.tuning.standings import RankRow, Standing


@dataclass
class Candidate:
    """A backbone in the race, and what was found of it so far."""

    source: str
    """As it was given."""
    plan: Plan
    """Of a new head on it."""
    full: Plan | None
    """Of full fine-tuning; None where that is refused."""
    standings: dict[int, Standing] = field(default_factory=dict)
    """Number of samples -> what it reached on them."""
    seconds: float = 0.0
    samples_per_s: float | None = None
    full_minutes: float | None = None
    full_is_measured: bool = False
    problem: Mapping[str, str] | None = None
    """What it failed of."""

    @property
    def name(self) -> str:
        """Short."""
        return self.plan.backbone.name

    @property
    def num_samples(self) -> int:
        """Of the largest sample that it was measured on."""
        return max(self.standings, default=0)


@dataclass
class Gate:
    """What candidates have in common: the job but for its backbone, and the data, which is looked at once."""

    job: Job
    held: HeldRun
    report: Report
    _data: list[tuple[BackboneCard, Prepared]] = field(default_factory=list)
    """What the data is to each kind of backbone, the one whose table is used first."""

    def admit(self, source: str, resolved: ResolvedBackbone) -> Candidate:
        """The candidate. Raises `RefusedError` where it cannot be trained on this data."""
        job = self._job(source)
        prepared = self._data_for(job, resolved)
        plan = rehearsed(plan_on(job, resolved, prepared), prepared, resolved)
        try:
            full = plan_on(job.model_copy(update={"method": "full"}), resolved, prepared)
        except RefusedError:
            full = None
        return Candidate(source, plan, full)

    def resolved(self, source: str) -> ResolvedBackbone:
        """What is known of the backbone without the data. Raises `RefusedError` where it does not fit the modality."""
        self.report(PhaseBegan(f"looking at {source}"))
        return resolve_backbone(self._job(source))

    def _job(self, source: str) -> Job:
        return self.job.model_copy(update={"backbone": source})

    def _data_for(self, job: Job, resolved: ResolvedBackbone) -> Prepared:
        """What the data is to this backbone: where that is the same as to an earlier one, that. Raises `DataError`."""
        for card, prepared in self._data:
            if measures_alike(prepared, card, resolved):
                return prepared
        self.report(PhaseBegan("reading the data"))
        with self.held.scratch() as folder:
            prepared = read_data(job, resolved, folder)
            if not self._data:
                tables_in(self.held.storage).put(folder, self.held)
        self._data.append((resolved.card, prepared))
        return prepared


def require_meant(job: Job) -> None:
    """Raise `RefusedError` for what is wrong with the job itself, whatever the backbone."""
    parse_settings(registry.get(job.modality), job.settings, job.place_of)


def refused_row(source: str, error: RefusedError) -> RankRow:
    """The row of a candidate that the gate does not let through."""
    return RankRow(source, _short(source), "refused", problem=error.as_dict())


def failed_row(candidate: Candidate) -> RankRow:
    """The row of one that failed while it was measured."""
    return RankRow(
        candidate.source, candidate.name, "failed", parameters=num_parameters(candidate.plan),
        seconds=round(candidate.seconds, 2), problem=candidate.problem,
    )  # fmt: skip


def num_parameters(plan: Plan) -> int | None:
    """Of body and new head."""
    return plan.parameters.total if plan.parameters is not None else None


def _short(source: str) -> str:
    """`org/name@revision` -> `name`; the Hub is not asked once more about what it refused."""
    return source.rstrip("/").rpartition("/")[2].partition("@")[0] or source
