"""The Job: what a user asks for. The same object from Python, YAML and the command line."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from orchestrator.errors import JobError, did_you_mean
from orchestrator.job.places import whole

TaskName = Literal["single-label", "multi-label", "regression"]
Method = Literal["head", "full", "scratch"]
METHODS: dict[str, str] = {
    "head": "the body is frozen, the new last layer is trained",
    "full": "everything is trained, from the pretrained weights",
    "scratch": "everything is trained, from random weights (supervised pretraining)",
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switches(cls, value: object) -> object:
        if isinstance(value, bool):  # pydantic would take true for 1
            raise ValueError("true and false mean nothing here")
        return value


class Data(_Part):
    """Where the labelled samples are, and how they are split."""

    path: str = Field(
        description="a folder of class folders, a .csv, .parquet or .jsonl table, a data set of the Hub (org/name) or "
        "one that was saved to disk; a path or a URI such as s3://bucket/table.parquet"
    )
    subset: str | None = Field(None, description="of a data set of the Hub that has several")
    validation: str | None = Field(None, description="the validation split, where it stands on its own")
    test: str | None = Field(None, description="the test split, where it stands on its own")
    root: str | None = Field(None, description="what a table's paths are relative to; default: its folder")
    rows_root: str | None = Field(
        None, description="the same for rows of a program, where other splits are places; default: as it runs"
    )
    input_column: str | tuple[str, ...] | None = Field(
        None, description="a table's column of paths, bytes or texts; two columns for pairs of texts"
    )
    label_column: str | tuple[str, ...] = Field(
        "label", description="a table's column of labels; several columns for multi-label (0 or 1) or regression"
    )
    label_separator: str | None = Field(
        None, min_length=1, description="multi-label: what stands between the labels of one cell"
    )
    split_column: str | None = Field(None, description="a table's column that says train, validation or test")
    group_column: str | None = Field(None, description="samples of one group stay on one side of every split")
    validation_fraction: float = Field(0.1, ge=0, lt=1, description="held back to choose the best epoch")
    test_fraction: float = Field(0.1, ge=0, lt=1, description="held back for the final figures")
    num_train: int | None = Field(None, ge=2, description="train on so many samples only, classes balanced")
    seed: int = Field(0, ge=0, description="of the split")
    on_bad_sample: Literal["fail", "skip"] = Field("fail", description="what a broken sample does")

    @field_validator("path", "validation", "test", "root", "rows_root")
    @classmethod
    def _plain_paths(cls, place: str | None) -> str | None:
        """A file:// URI is the path: so that links and runs inside the data are looked at as everywhere here."""
        return place if place is None else re.sub(r"^(file|local)://(localhost(?=/))?", "", place)

    @model_validator(mode="after")
    def _fractions(self) -> Data:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction and test_fraction leave nothing to train on")
        return self


class Training(_Part):
    """How the weights are moved. `None` means: by the method's default, which the plan shows."""

    epochs: int | None = Field(None, ge=1, le=100_000)
    batch_size: int | None = Field(None, ge=1, description="samples a step, over all workers")
    num_microbatches: int | None = Field(
        None,
        ge=1,
        description="parts that a step's batch is computed in, whatever the number of workers; more than "
        "there are workers is gradient accumulation",
    )
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float | None = Field(None, gt=0, description="of the body, and of the head unless given")
    head_learning_rate: float | None = Field(None, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only")
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_fraction: float = Field(0.1, ge=0, lt=1, description="of all steps, linear from 0")
    clip_norm: float | None = Field(1.0, gt=0, description="of the gradient over all parameters")
    class_weights: Literal["none", "auto"] = Field(
        "none", description="auto: rare classes count more, in inverse proportion to their training samples"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 where a GPU has it; of a frozen body's features where it is faster and as good"
    )
    batch_norm: Literal["auto", "train", "frozen"] = Field(
        "auto", description="frozen: the pretrained statistics; auto: by the number of samples"
    )
    features: Literal["once", "every step"] = Field(
        "once", description="method head: the frozen body runs once for each sample, and what it gives is kept on the "
        "storage; or it runs in every step"
    )  # fmt: skip
    views: int | None = Field(
        None, ge=1, le=1000, description="method head with augmentation: so many random views of each sample are kept; "
        "default: the body runs in every step"
    )  # fmt: skip
    seed: int = Field(0, ge=0)
    checkpoint_every_s: float = Field(60.0, gt=0)
    checkpoint_every_steps: int | None = Field(None, ge=1)


class Scaling(_Part):
    """Where it runs. One worker without an address needs no cluster and starts none."""

    num_workers: int = Field(1, ge=1)
    address: str | None = Field(
        None, description="a Ray cluster to join: its address, 'auto', or 'local' to start one here"
    )
    num_extractors: int | None = Field(
        None, ge=1, description="method head: processes on Ray that run the frozen body, before the workers train the "
        "head; default: the workers run it"
    )  # fmt: skip
    threads_per_worker: int | None = Field(None, ge=1, description="default: the cores over the workers")
    device: Literal["auto", "cpu", "gpu"] = "auto"
    max_failures: int = Field(2, ge=0, description="how often a dead worker group is restarted")


IN_A_STORE = r"[a-zA-Z][\w+.-]*://.*[^/].*"
"""What a place in an object store looks like."""
PLACES: Mapping[str, Any] = {
    "storage": True, "feature_store": True, "name": True, "scaling": {"num_extractors": True},
}  # fmt: skip
"""Fields of a job that say where things are put, or where features are computed, and nothing of what is learnt."""


class Job(_Part):
    """All that a user asks for. Frozen; `orchestrator.plan` turns it into a Plan or refuses it."""

    modality: str = "image"
    backbone: str = Field(description="org/name[@revision] on the Hub, a local directory, or an earlier run")
    data: Data
    task: TaskName = "single-label"
    method: Method = "head"
    training: Training = Training()
    scaling: Scaling = Scaling()
    settings: dict[str, Any] = Field(default_factory=dict, description="the modality plugin's own settings")
    storage: str = Field("runs", description="the directory that holds the runs")
    feature_store: str | None = Field(
        None, description="a place such as s3://bucket/features where features of frozen bodies are kept as well, for "
        "the jobs of other machines"
    )  # fmt: skip
    name: str | None = Field(None, description="of the run; default: made from the job")
    _places: dict[str, str] = PrivateAttr(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        """Whether both ask for the same; where they were read from does not count."""
        return isinstance(other, Job) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash(self.digest())

    def place_of(self, key: str) -> str:
        """`job.yaml:3: `, where the job came out of a file and the key stands in it, else ''."""
        return self._places.get(key, "")

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str | None) -> str | None:
        if name is not None and (not name.strip() or "/" in name or "\\" in name or name in (".", "..")):
            raise ValueError("a run's name is one folder name, without slashes")
        return name

    @field_validator("storage")
    @classmethod
    def _local(cls, storage: str) -> str:
        if "://" in storage:
            raise ValueError("storage is a directory, on this machine or shared by the cluster's nodes")
        return storage

    @field_validator("feature_store")
    @classmethod
    def _in_a_store(cls, place: str | None) -> str | None:
        if place is not None and not re.fullmatch(IN_A_STORE, place):
            raise ValueError("is no place in a store, as s3://bucket/features is; for a directory there is storage")
        return place

    @field_validator("data", mode="before")
    @classmethod
    def _path_alone(cls, data: object) -> object:
        return {"path": str(data)} if isinstance(data, (str, Path)) else data

    def digest(self) -> str:
        """Eight hex digits of what is to be learnt: all of the job but where its run is put."""
        what = self.at_whole_paths().model_dump(mode="json", exclude=dict(PLACES))
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]

    def at_whole_paths(self) -> Job:
        """The same job with absolute paths: `photos`, `photos/` and `./photos` are one place."""
        places = {
            key: whole(place)
            for key in ("path", "validation", "test", "root", "rows_root")
            if (place := getattr(self.data, key)) is not None
        }
        backbone = Path(self.backbone).expanduser()
        return self.model_copy(
            update={
                "data": self.data.model_copy(update=places),
                "backbone": os.path.abspath(backbone) if backbone.is_dir() else self.backbone,
            }
        )

    def to_yaml(self) -> str:
        """The job as a YAML file that gives this job again; defaults are left out."""
        text: str = yaml.safe_dump(
            self.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True
        )
        return text


def make_job(job: Job | Mapping[str, Any] | str | Path | None = None, /, **fields: Any) -> Job:
    """A checked Job out of a Job, a dict, the path of a YAML file, or fields alone; fields win.

    A field is a top-level key (`method="full"`), a part (`training={"epochs": 3}`) that is merged into what
    is there, or a dotted key (`**{"training.epochs": 3}`). Raises `JobError` with the place of the fault.
    """
    return make_draft(job, fields).job()


@dataclass(frozen=True)
class Draft:
    """A job before it is checked: settings of whatever type, each where it belongs."""

    tree: dict[str, Any]
    source: str
    """The YAML file, '' where there is none."""
    lines: dict[str, int]
    """Dotted key -> its line there."""

    def job(self) -> Job:
        """The checked job. Raises `JobError`."""
        try:
            made = Job.model_validate(self.tree)
        except ValidationError as error:
            raise _as_job_error(error, self.source, self.lines) from None
        made._places.update({key: f"{self.source}:{line}: " for key, line in self.lines.items()})
        return made


def make_draft(job: Job | Mapping[str, Any] | str | Path | None, fields: Mapping[str, Any]) -> Draft:
    """What `make_job` is asked for, unchecked; fields win. Raises `JobError` for what has no place."""
    lines: dict[str, int] = {}
    source = ""
    if job is None:
        base: dict[str, Any] = {}
    elif isinstance(job, Job):
        base = job.model_dump(mode="json", exclude_unset=True)
    elif isinstance(job, Mapping):
        base = {str(k): v for k, v in job.items()}
    elif isinstance(job, (str, Path)):
        source = str(job)
        base, lines = _read_yaml(Path(job))
    else:
        raise JobError(f"a job cannot be made from a {type(job).__name__}", expected="Job, dict or YAML path")
    for key, value in fields.items():
        _put(base, key, value)
        lines.pop(key, None)
    return Draft(base, source, lines)


def _put(tree: dict[str, Any], dotted: str, value: object) -> None:
    """Set `a.b.c` in a tree of dicts; a dict is merged into the dict that is there."""
    *path, last = dotted.split(".")
    for i, key in enumerate(path):
        here = tree.get(key)
        if isinstance(here, (str, Path)) and key == "data":
            here = {"path": str(here)}
        elif here is None:
            here = {}
        elif not isinstance(here, dict):
            raise JobError(f"{'.'.join(path[: i + 1])} is no group of settings, so {dotted} cannot be set")
        tree[key] = here = dict(here)
        tree = here
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_unset=True)
    old = tree.get(last)
    if isinstance(value, Mapping) and isinstance(old, dict):
        tree[last] = {**old, **value}
    elif last == "data" and isinstance(value, (str, Path)) and isinstance(old, dict):
        tree[last] = {**old, "path": str(value)}
    else:
        tree[last] = value


def parse_setting(text: str) -> tuple[str, Any]:
    """('training.epochs', 3) out of `training.epochs=3`, the value read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise JobError(f"--set {text!r} sets nothing", expected="key=value", mend="for example --set training.epochs=3")
    try:
        found = yaml.safe_load(value)
        # A lone | or > opens a block of text in YAML, an empty one: here it is what was typed.
        return key.strip(), value if found == "" and value.strip() in ("|", ">") else found
    except (yaml.YAMLError, ValueError):
        return key.strip(), value


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The file as a dict, and the line of each dotted key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise JobError(f"there is no job file {path}", mend="check the path") from None
    except IsADirectoryError:
        raise JobError(f"{path} is a directory, not a job file", expected="a YAML file", mend=_meant(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path} cannot be read: {error}", expected="a YAML file in UTF-8", mend=_meant(path)) from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or f"not readable as YAML: {error}"
        raise JobError(f"{where}: {problem}", expected="a YAML file", mend=_meant(path)) from None
    if not isinstance(value, dict):
        raise JobError(
            f"{path} holds no settings", expected="a mapping such as 'backbone: microsoft/resnet-50'",
            mend=_meant(path),
        )  # fmt: skip
    lines: dict[str, int] = {}
    _note_lines(node, "", lines, path)
    return {str(key): item for key, item in value.items()}, lines


def _meant(path: Path) -> str:
    """What a file or a folder that is no job file was given for, as far as it tells; '' where it does not."""
    if (path / "job.yaml").is_file():
        return f"to go on with that run: {path / 'job.yaml'}; as the backbone of another: --backbone {path}"
    if (path / "config.json").is_file():
        return f"if it is the backbone: --backbone {path}"
    if path.is_dir() or path.suffix.lower() in (".csv", ".tsv", ".parquet", ".jsonl"):
        return f"if it is the data: --data {path}"
    return ""


def _note_lines(node: yaml.Node | None, prefix: str, lines: dict[str, int], path: Path) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        line = key.start_mark.line + 1
        if name in lines:
            raise JobError(f"{path}:{line}: {name} stands here a second time (first in line {lines[name]})")
        lines[name] = line
        _note_lines(value, f"{name}.", lines, path)


def _as_job_error(error: ValidationError, source: str, lines: dict[str, int]) -> JobError:
    """The first fault, with its place and the values that would do."""
    faults = error.errors(include_url=False)
    # What is misspelt comes before what is missing: the one is mostly the reason of the other.
    fault = min(faults, key=lambda one: one["type"] != "extra_forbidden")
    place = ".".join(str(part) for part in fault["loc"]) or "the job"
    where = f"{source}:{lines[place]}: " if place in lines else (f"{source}: " if source else "")
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    given = fault.get("input")
    if fault["type"] == "extra_forbidden":
        names = _keys_beside(fault["loc"])
        return JobError(
            f"{where}unknown key {place}{more}",
            expected="one of " + ", ".join(names),
            mend=did_you_mean(fault["loc"][-1], names) or "take it out, or use one of the keys above",
        )
    if fault["type"] == "missing":
        return JobError(f"{where}{place} is missing{more}", expected=_meaning(fault["loc"]))
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "model_type":
        message = "is a group of settings, not one value"
    if fault["type"] == "string_type":
        message += "; put it in quotes"
    shown = "" if isinstance(given, dict) else f" = {given!r}"
    return JobError(f"{where}{place}{shown}: {message[:1].lower()}{message[1:]}{more}", mend=nearest_value(fault))


def nearest_value(fault: Mapping[str, Any]) -> str:
    """The mend of a value that is not among those that there are, '' where none is known; `fault` is pydantic's."""
    bounds = {"ge": "{} or more", "gt": "more than {}", "le": "{} or less", "lt": "less than {}"}
    for key, words in bounds.items():
        if key in fault.get("ctx", {}):
            return words.format(fault["ctx"][key])
    if fault["type"] != "literal_error":
        return ""
    return did_you_mean(fault["input"], re.findall(r"'([^']*)'", fault["ctx"]["expected"]))


def _owner(loc: tuple[int | str, ...]) -> type[BaseModel]:
    model: type[BaseModel] = Job
    for part in loc[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        model = field.annotation
    return model


def _keys_beside(loc: tuple[int | str, ...]) -> list[str]:
    return list(_owner(loc).model_fields)


def _meaning(loc: tuple[int | str, ...]) -> str:
    field = _owner(loc).model_fields.get(str(loc[-1])) if loc else None
    return (field.description or "") if field else ""
