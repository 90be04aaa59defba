"""The Job: what a user asks for. The same object from Python, YAML and the command line."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PrivateAttr, field_validator
from pydantic_core import to_jsonable_python

from orchestrator.job.data_spec import Data
from orchestrator.job.part import Part
from orchestrator.job.places import is_uri, local_path, plain_path, require_no_secret, whole
from orchestrator.job.scaling_spec import Scaling as Scaling
from orchestrator.job.training_spec import Training as Training

TaskName = Literal["single-label", "multi-label", "regression"]
Method = Literal["auto", "head", "full", "lp-ft", "lora", "scratch"]


_UNICODE_BREAKS = "\x85\u2028\u2029"


IN_A_STORE = r"[a-zA-Z][\w+.-]*://.*[^/].*"
"""What a place in an object store looks like."""
NOT_LEARNT: Mapping[str, Any] = {
    "storage": True, "feature_store": True, "name": True, "log": True, "scaling": True,
    "training": {"num_microbatches": True, "checkpoint_every_s": True, "checkpoint_every_steps": True,
                 "audit": True},
}  # fmt: skip
"""Fields of a job that say where and on what it runs, and nothing of what is learnt. How many microbatches there are
counts too, but as the number that was resolved."""
_IDENTITY_VERSION = 4
"""Raised when the same fields come to mean something else."""


class Job(Part):
    """All that a user asks for. Frozen; `orchestrator.plan` turns it into a Plan or refuses it."""

    modality: str = Field("image", description="image, audio, text, or another that `orchestrator plugins` lists")
    backbone: str = Field(
        description="org/name[@revision] on the Hub, a local directory, or an earlier run (s3://bucket/runs/NAME too)"
    )
    data: Data
    task: TaskName = Field("single-label", description="one class a sample, any number of them, or numbers")
    method: Method = Field(
        "auto", description="auto: the new last layer by a cross-validated probe, then everything from there, and what "
        "validation prefers is kept; head: the body is frozen, the new last layer is trained; full: everything, from "
        "the pretrained weights; lp-ft: the one, then the other; lora: the head, and small matrices beside those of a "
        "frozen transformer; scratch: everything, from random weights"
    )  # fmt: skip
    training: Training = Training()
    scaling: Scaling = Scaling()
    settings: dict[str, Any] = Field(default_factory=dict, description="the modality plugin's own settings")
    storage: str = Field(
        "runs", description="where the runs lie: a directory, or a place in a store such as s3://bucket/runs"
    )
    feature_store: str | None = Field(
        None, description="a place such as s3://bucket/features where features of frozen bodies are kept as well, for "
        "the jobs of other machines"
    )  # fmt: skip
    name: str | None = Field(None, description="of the run; default: made from the job")
    log: tuple[Literal["mlflow", "wandb"], ...] = Field(
        (), description="where epochs and figures are sent as well: mlflow, wandb, or both; default: nowhere"
    )
    _places: dict[str, str] = PrivateAttr(default_factory=dict)
    _notes: tuple[str, ...] = PrivateAttr(())

    def __eq__(self, other: object) -> bool:
        """Whether both ask for the same; where they were read from does not count."""
        return isinstance(other, Job) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash(self.digest())

    def place_of(self, key: str) -> str:
        """`job.yaml:3: `, where the job came out of a file and the key stands in it, else ''."""
        return self._places.get(key, "")

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of how the job was written."""
        return self._notes

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str | None) -> str | None:
        if name is not None and (not name.strip() or "/" in name or "\\" in name or name.startswith(".")):
            raise ValueError("a run's name is one folder name, without slashes, that does not begin with a dot")
        return name

    @field_validator("backbone")
    @classmethod
    def _plain_backbone(cls, backbone: str) -> str:
        return require_no_secret(plain_path(backbone)).rstrip("/") if is_uri(backbone) else backbone

    @field_validator("storage")
    @classmethod
    def _holds_runs(cls, storage: str) -> str:
        storage = require_no_secret(plain_path(storage))
        if is_uri(storage):
            if not re.fullmatch(IN_A_STORE, storage) or "?" in storage or storage.startswith("hf://"):
                raise ValueError(
                    "is no place that runs can lie at, as s3://bucket/runs or a directory is; an endpoint comes from "
                    "the environment (AWS_ENDPOINT_URL)"
                )
            return storage.rstrip("/")
        if storage.startswith("~") and str(local_path(storage)).startswith("~"):
            raise ValueError("there is no user of this name, so no home directory")
        return storage

    @field_validator("feature_store")
    @classmethod
    def _in_a_store(cls, place: str | None) -> str | None:
        if place is not None and not re.fullmatch(IN_A_STORE, place):
            raise ValueError("is no place in a store, as s3://bucket/features is; for a directory there is storage")
        return place if place is None else require_no_secret(place)

    @field_validator("log", mode="before")
    @classmethod
    def _one_alone(cls, log: object) -> object:
        """One of them without brackets; none is twice there."""
        log = [log] if isinstance(log, str) else log
        return list(dict.fromkeys(log)) if isinstance(log, (list, tuple)) else log

    @field_validator("data", mode="before")
    @classmethod
    def _path_alone(cls, data: object) -> object:
        return {"path": str(data)} if isinstance(data, (str, Path)) else data

    @field_validator("settings")
    @classmethod
    def _as_in_a_file(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """As a YAML file and the plan hold them: a tuple is a list, a path or a date a text, a number finite."""
        plain: dict[str, Any] = to_jsonable_python(settings)
        json.dumps(plain, allow_nan=False)
        return plain

    @property
    def num_microbatches(self) -> int:
        """Parts that a step's batch is computed in: as asked, else one for each worker."""
        return self.training.num_microbatches or self.scaling.num_workers

    def identity(self) -> dict[str, Any]:
        """What is to be learnt, as plain data: the settings that differ from their defaults.

        So a new setting changes no job that does not use it, and where it runs changes nothing. On how many workers
        counts only where `num_microbatches` is not set, which is their number then.
        """
        settings = self.at_whole_paths().model_dump(mode="json", exclude=dict(NOT_LEARNT), exclude_defaults=True)
        # A group of which all that is left are defaults is the same as one that was not given.
        given = {key: value for key, value in settings.items() if value != {}}
        return {"version": _IDENTITY_VERSION, "num_microbatches": self.num_microbatches, **given}

    def digest(self) -> str:
        """Eight hex digits of the `identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:8]

    def at_whole_paths(self) -> Job:
        """The same job with absolute paths: `photos`, `photos/` and `./photos` are one place."""
        places = {
            key: whole(place)
            for key in ("path", "validation", "test", "root", "rows_root")
            if (place := getattr(self.data, key)) is not None
        }
        backbone = local_path(self.backbone)
        return self.model_copy(
            update={
                "data": self.data.model_copy(update=places),
                "backbone": os.path.abspath(backbone) if backbone.is_dir() else self.backbone,
            }
        )

    def to_yaml(self) -> str:
        """The job as a YAML file that gives this job again; defaults are left out."""
        settings = self.model_dump(mode="json", exclude_defaults=True)
        text: str = yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
        return text


class _Dumper(yaml.SafeDumper):
    """Writes every text so that it is read as it was: a reader makes a plain line break of those of Unicode."""


def _as_yaml(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = '"' if any(mark in text for mark in _UNICODE_BREAKS) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _as_yaml)
