"""What can be said before anything runs: whether a backbone fits, and what a job would do. Without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from orchestrator.backbone import Tensors, read_card, read_tensors, require_harmless, require_weights, with_digest
from orchestrator.errors import BadSampleError, JobError, PluginError, RefusedError, missing_extra
from orchestrator.gate import decide
from orchestrator.gate.combinations import refuse_unknown_mix
from orchestrator.gate.own_code import refuse_own_code
from orchestrator.gate.recipes import fewest_validation, first_weights, may_keep_features
from orchestrator.gate.resolve import make_plan
from orchestrator.job import (
    DATA_FOLDER,
    SPLIT_KEYS,
    BackboneCard,
    BackboneRow,
    Data,
    DataSummary,
    Draft,
    Job,
    Plan,
    TaskName,
    as_settings,
    holds_rows,
    homes,
    is_dataset,
    is_rows,
    is_uri,
    local_path,
    make_draft,
    open_run,
    open_storage,
    whole,
)
from orchestrator.modality import Fit, Modality, Profile, registry

if TYPE_CHECKING:
    from orchestrator.data import Prepared


@dataclass(frozen=True)
class Checked:
    """A backbone that the gate lets through."""

    card: BackboneCard
    row: BackboneRow
    fit: Fit | None
    """None where the modality is declared only."""
    profile: Profile | None
    data: DataSummary | None = None
    """None where no data was given."""


def check(
    backbone: str,
    modality: str,
    data: str | Data | None = None,
    settings: Mapping[str, Any] | None = None,
    task: TaskName = "single-label",
) -> BackboneCard:
    """The backbone's card, if it fits the modality (and the data). Raises `RefusedError` with the mend.

    Reads metadata, and the data where it is given; loads no weights, and imports neither torch nor Ray.
    """
    return inspect(backbone, modality, data, settings, task).card


def inspect(
    backbone: str,
    modality: str,
    data: str | Data | None = None,
    settings: Mapping[str, Any] | None = None,
    task: TaskName = "single-label",
) -> Checked:
    """`check`, with the row that matched and how the data would be adapted."""
    plugin = registry.get(modality)
    card = read_card(backbone)
    row = _match(card, plugin)
    require_weights(card)
    profile, summary = None, None
    if data is not None:
        if not plugin.trainable:
            raise decide.not_built(plugin)
        spec = data if isinstance(data, Data) else Data(path=str(data))
        prepared = _prepare(spec, plugin, card, task)
        profile, summary = prepared.profile, prepared.summary
    fit = decide.fit(card, row, plugin, settings or {}, profile) if plugin.fit is not None else None
    return Checked(card, row, fit, profile, summary)


def planned(
    job: Job | Draft | Mapping[str, Any] | str | Path | None, fields: Mapping[str, Any]
) -> tuple[Plan, Prepared, ResolvedBackbone]:
    """The Plan of a job, what was found in its data, and its backbone."""
    draft = drafted(job, fields)
    resolved = resolve_backbone(without_rows(draft))  # before rows are written
    with TemporaryDirectory(prefix="orchestrator-") as folder:
        return *prepare(materialised(draft, Path(folder) / DATA_FOLDER).job(), resolved), resolved


@dataclass(frozen=True)
class ResolvedBackbone:
    """A job's plugin, and the card and row of its backbone: what is known before the data is read."""

    plugin: Modality
    card: BackboneCard
    row: BackboneRow

    @cached_property
    def tensors(self) -> Tensors | None:
        """The headers of the weights, asked for once; None where there are none. Raises `RefusedError`."""
        return read_tensors(self.card) if self.card.weight_files else None


def resolve_backbone(job: Job) -> ResolvedBackbone:
    """Whether the job's backbone fits its modality and method. Raises `RefusedError`; reads metadata only."""
    plugin = registry.get(job.modality)
    decide.parse_settings(plugin, job.settings, job.place_of)
    refuse_unknown_mix(job, plugin)
    card = read_card(job.backbone)
    row = _match(card, plugin)
    if not plugin.trainable:
        raise decide.not_built(plugin)
    if first_weights(job) == "pretrained":
        require_weights(card)
    if job.feature_store is not None and may_keep_features(job):
        _require_store(job.feature_store)
    open_storage(job.storage).require()
    decide.fit(card, row, plugin, job.settings, None)  # what the backbone alone forbids, before data is read
    return ResolvedBackbone(plugin, card, row)


def prepare(job: Job, resolved: ResolvedBackbone, directory: Path | None = None) -> tuple[Plan, Prepared]:
    """The Plan, and what was found in the data; the sample table is written into `directory`, if there is one."""
    prepared = read_data(job, resolved, directory, fewest_validation(job))
    return plan_on(job, resolved, prepared), prepared


def read_data(
    job: Job, resolved: ResolvedBackbone, directory: Path | None = None, fewest_validation: int = 0
) -> Prepared:
    """What is found in the job's data; the sample table is written into `directory`, if there is one.

    Where nobody asked for a validation split, one of fewer samples than `fewest_validation` is not made.
    """
    return _prepare(job.data, resolved.plugin, resolved.card, job.task, directory, fewest_validation)


def measures_alike(prepared: Prepared, card: BackboneCard, resolved: ResolvedBackbone) -> bool:
    """Whether data that was read for one backbone (`card`) is measured the same for another one (`resolved`).

    A few of the samples that were read (`prepared`) are measured again.
    What is measured depends on the backbone for texts alone, whose tokens it counts.
    """
    decode, measure = resolved.plugin.decode, resolved.plugin.measure
    assert decode is not None
    assert measure is not None
    try:
        decoded = [decode(example.sample) for example in prepared.examples]
        return all(measure(one, card) == measure(one, resolved.card) for one in decoded)
    except BadSampleError:
        return False


def plan_on(job: Job, resolved: ResolvedBackbone, prepared: Prepared) -> Plan:
    """The Plan of a job whose data was read before. Raises `RefusedError` and `JobError`."""
    return make_plan(
        job,
        resolved.plugin,
        with_digest(resolved.card),
        resolved.row,
        resolved.tensors,
        prepared.classes,
        prepared.summary,
        prepared.profile,
        num_cores(),
    )


def drafted(job: Job | Draft | Mapping[str, Any] | str | Path | None, fields: Mapping[str, Any]) -> Draft:
    """What `finetune` and `plan` were asked for, rows that a program holds among it. Raises `JobError`."""
    if isinstance(job, Mapping) and "data" in job:
        job = {**job, "data": as_settings(job["data"])}
    if "data" in fields:
        fields = {**fields, "data": as_settings(fields["data"])}
    # Each by itself: a field wins over a file, by whatever name of the two it stands there.
    base = make_draft(job, {})
    modality = fields.get("modality") or base.tree.get("modality", Job.model_fields["modality"].default)
    draft = make_draft(_with_plugin_settings(base, modality), _of_plugin(fields, modality))
    return replace(draft, of_plugin=tuple(_settings_of_plugin(modality)))


def _settings_of_plugin(modality: object) -> Mapping[str, object]:
    """Those of a modality by name; none of one that nobody has registered, which is refused elsewhere."""
    return registry.get(modality).settings.model_fields if modality in registry.names() else {}


def _of_plugin(fields: Mapping[str, Any], modality: object) -> dict[str, Any]:
    """The fields, with names that are settings of the modality alone under their keys: `size` as `settings.size`.

    Raises `JobError` where `settings` has it as well.
    """
    given, group = dict(fields), fields.get("settings")
    own = _settings_of_plugin(modality)
    for name in [name for name in fields if name not in Job.model_fields and name in own and not homes(name)]:
        if f"settings.{name}" in given or (isinstance(group, Mapping) and name in group):
            raise JobError(f"{name} is settings.{name}, and both are set", mend=f"leave out {name}")
        given[f"settings.{name}"] = given.pop(name)
    return given


def _with_plugin_settings(draft: Draft, modality: object) -> Draft:
    """The draft with the same in its file or dict."""
    group = draft.tree.get("settings") or {}
    if not isinstance(group, Mapping):  # which the job's own check refuses
        return draft
    tree = _of_plugin(draft.tree, modality)
    moved = {key.removeprefix("settings."): key for key in tree if key not in draft.tree}
    if not moved:
        return draft
    settings = {**group, **{name: tree.pop(key) for name, key in moved.items()}}
    lines = {(f"settings.{key}" if key in moved else key): line for key, line in draft.lines.items()}
    return replace(draft, tree={**tree, "settings": settings}, lines=lines)


def without_rows(draft: Draft) -> Job:
    """The draft's job, checked, with a dash where rows are. Raises `JobError`."""
    data = draft.tree.get("data")
    if not isinstance(data, Mapping) or not holds_rows(data):
        return draft.job()
    places = {key: "-" if key in SPLIT_KEYS and is_rows(value) else value for key, value in data.items()}
    return replace(draft, tree={**draft.tree, "data": places}).job()


def materialised(draft: Draft, directory: Path, new: list[Path] | None = None) -> Draft:
    """The draft with rows that a program holds written into `directory`; without any, as it is.

    Files that were not there before are added to `new`. Raises `DataError`.
    """
    data = draft.tree.get("data")
    if not holds_rows(data):
        return draft
    try:
        from orchestrator.data import materialise_rows
    except ModuleNotFoundError as error:
        raise missing_extra(error) or error from None
    return replace(draft, tree={**draft.tree, "data": materialise_rows(data, directory, new)})


def _require_store(place: str) -> None:
    """Raise `RefusedError` where the object store does not answer, or has no such bucket."""
    from orchestrator.data import Location, feature_store

    mend = "correct feature_store (--feature-store)"
    store = feature_store(place)
    bucket = store.path.split("/")[0]
    buckets = place.split("://")[0] in ("s3", "gs", "gcs")  # elsewhere a folder is made where there is none
    if store.kind() == "missing" and buckets and Location(bucket, store.fs, bucket).kind() == "missing":
        raise RefusedError(
            "not_found", f"the feature store {place}: there is no bucket {bucket!r}", expected="a bucket that is there",
            mend=f"make it, or {mend}",
        )  # fmt: skip


def refuse_inside_data(run: str, job: Job) -> None:
    """Raise `RefusedError` where the run's directory lies in the data or around it: one that starts over is removed."""
    for place in (job.data.path, job.data.validation, job.data.test):
        if place is None or is_uri(place) != is_uri(run) or is_dataset(place):
            continue
        here, data = (f"{whole(one) if is_uri(one) else local_path(one).resolve()}/" for one in (run, place))
        if here.startswith(data) or data.startswith(here):
            raise RefusedError(
                "usage",
                f"the run's directory {run} and the data {place} lie in one another",
                mend="give the run another name (--name) or another place (--storage)",
            )


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _match(card: BackboneCard, plugin: Modality) -> BackboneRow:
    known = {plugin.name: plugin}
    try:
        row = decide.match(card, plugin, known)
    except RefusedError as error:
        if error.reason != "unknown_type":
            raise
    else:
        require_harmless(card)
        refuse_own_code(card, row)
        return row
    _require_plugin_of(card)
    return decide.match(card, plugin, registry.available())  # only a refusal asks what the others take


def _require_plugin_of(card: BackboneCard) -> None:
    """Raise `PluginError` where the backbone is a run of a modality that nothing here brings."""
    if card.kind != "run":
        return
    run = open_run(card.source)
    try:
        registry.get(run.plan.job.modality)
    except PluginError as error:
        raise PluginError(f"the run {card.source}: {error.message}", expected=error.expected, mend=error.mend) from None


def _prepare(
    spec: Data, plugin: Modality, card: BackboneCard, task: TaskName, directory: Path | None = None,
    fewest: int = 0,
) -> Prepared:  # fmt: skip
    try:
        from orchestrator.data import prepare_data
    except ModuleNotFoundError as error:
        raise missing_extra(error, plugin.extra) or error from None
    return prepare_data(spec, plugin, card, task, directory=directory, fewest_validation=fewest)
