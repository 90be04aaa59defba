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

from orchestrator.job.data_spec import Data, Part
from orchestrator.job.places import local_path, whole

TaskName = Literal["single-label", "multi-label", "regression"]
Method = Literal["auto", "head", "full", "lp-ft", "lora", "scratch"]
METHODS: dict[str, str] = {
    "auto": "the head by a cross-validated probe, then everything from there; what validation prefers is kept",
    "head": "the body is frozen, the new last layer is trained",
    "full": "everything is trained, from the pretrained weights",
    "lora": "the body is frozen, and small matrices beside its own are trained with the head; merged in the end",
    "scratch": "everything is trained, from random weights (supervised pretraining)",
}


_UNICODE_BREAKS = "\x85\u2028\u2029"


class Training(Part):
    """How the weights are moved. `None` means: by the method's default, which the plan shows."""

    epochs: int | None = Field(
        None, ge=1, le=100_000, description="passes over the training samples; default: by method, head 40, full 20, "
        "auto 20 and lp-ft 20 (behind the head's), lora 20, scratch 40; a transformer whose body is trained: 6, or "
        "what 200 steps take"
    )  # fmt: skip
    batch_size: int | None = Field(None, ge=1, description="samples a step, over all workers; default: 32")
    num_microbatches: int | None = Field(
        None,
        ge=1,
        description="parts that a step's batch is computed in, whatever the number of workers; more than "
        "there are workers is gradient accumulation; default: one for each worker, as the run begins",
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="AdamW, or SGD with momentum")
    learning_rate: float | None = Field(
        None, gt=0, description="of the body, and of the head unless given; default: by method, head 0.003, full "
        "0.001, auto 0.0003, lp-ft 0.0003, lora 0.001, scratch 0.001, less for transformers (docs/methods.md); ten "
        "times that for sgd"
    )  # fmt: skip
    head_learning_rate: float | None = Field(None, gt=0, description="of the new head; default: learning_rate")
    weight_decay: float = Field(0.01, ge=0, description="of all weights but vectors: biases, norms")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="of the learning rate after its warm-up: down to 0, or as it is"
    )
    warmup_fraction: float = Field(0.1, ge=0, lt=1, description="of all steps, linear from 0")
    clip_norm: float | None = Field(1.0, gt=0, description="of the gradient over all parameters; null: none")
    class_weights: Literal["none", "auto"] = Field(
        "none", description="auto: rare classes count more, in inverse proportion to their training samples"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="so much of each target is spread evenly over the classes"
    )
    mix: str = Field(
        "none", description="training samples are mixed with others of their batch, and so are their labels: images by "
        "mixup, cutmix, or both, each in half of the batches"
    )  # fmt: skip
    patience: int | None = Field(
        None, ge=1, description="epochs without a better validation after which training ends; default: all epochs"
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of a moving average of the weights, 0.99 or 0.999: validated beside them "
        "in each epoch, and exported where it is better; default: none"
    )  # fmt: skip
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 where a GPU has it; of a frozen body's features where it is faster and as good"
    )
    batch_norm: Literal["auto", "train", "frozen"] = Field(
        "auto", description="frozen: the pretrained statistics; auto: by the number of samples"
    )
    lora_rank: int = Field(
        16, ge=1, le=4096, description="method lora: the rank of what is added to each of the body's matrices"
    )  # fmt: skip
    lora_alpha: float | None = Field(
        None, gt=0, description="method lora: what is added counts alpha / rank times; default: twice the rank"
    )
    features: Literal["once", "every step"] = Field(
        "once", description="method head: the frozen body runs once for each sample, and what it gives is kept on the "
        "storage; or it runs in every step"
    )  # fmt: skip
    views: int | None = Field(
        None, ge=1, le=1000, description="method head with augmentation: so many random views of each sample are kept; "
        "default: the body runs in every step"
    )  # fmt: skip
    refit: bool = Field(
        False, description="in the end train again, on training and validation samples, for as many epochs as were best"
    )
    budget_min: float | None = Field(
        None, gt=0, description="minutes that the job may take: the epochs in which everything is trained are made to "
        "fit, by its first steps; default: 60 with method auto, unless epochs are given; else none"
    )  # fmt: skip
    seed: int = Field(0, ge=0, description="of new weights, the order of samples, augmentation and dropout")
    deterministic: bool = Field(
        False, description="on a GPU: algorithms that give the same to the bit each time, where there are some; slower"
    )
    checkpoint_every_s: float = Field(60.0, gt=0, description="seconds from one checkpoint to the next")
    checkpoint_every_steps: int | None = Field(None, ge=1, description="steps instead of seconds")


class Scaling(Part):
    """Where it runs. One worker without an address needs no cluster and starts none."""

    num_workers: int = Field(1, ge=1, description="processes that train; more than one run on Ray")
    address: str | None = Field(
        None, description="a Ray cluster to join: its address, 'auto', or 'local' to start one here"
    )
    num_extractors: int | None = Field(
        None, ge=1, description="method head: processes on Ray that run the frozen body, before the workers train the "
        "head; default: the workers run it"
    )  # fmt: skip
    threads_per_worker: int | None = Field(
        None,
        ge=1,
        description="default: the cores that the system gives, over the workers; OMP_NUM_THREADS is not looked at",
    )
    device: Literal["auto", "cpu", "gpu"] = Field(
        "auto", description="auto: GPUs where there is one for each process, else CPUs"
    )
    max_failures: int = Field(2, ge=0, description="how often a dead worker group is restarted")


IN_A_STORE = r"[a-zA-Z][\w+.-]*://.*[^/].*"
"""What a place in an object store looks like."""
NOT_LEARNT: Mapping[str, Any] = {
    "storage": True, "feature_store": True, "name": True, "log": True, "scaling": True,
    "training": {"num_microbatches": True, "checkpoint_every_s": True, "checkpoint_every_steps": True},
}  # fmt: skip
"""Fields of a job that say where and on what it runs, and nothing of what is learnt. How many microbatches there are
counts too, but as the number that was resolved."""
_IDENTITY_VERSION = 4
"""Raised when the same fields come to mean something else."""


class Job(Part):
    """All that a user asks for. Frozen; `orchestrator.plan` turns it into a Plan or refuses it."""

    modality: str = Field("image", description="image, audio, text, or another that `orchestrator plugins` lists")
    backbone: str = Field(description="org/name[@revision] on the Hub, a local directory, or an earlier run")
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
    storage: str = Field("runs", description="the directory that holds the runs")
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

    @field_validator("storage")
    @classmethod
    def _local(cls, storage: str) -> str:
        if "://" in storage:
            raise ValueError("storage is a directory, on this machine or shared by the cluster's nodes")
        if storage.startswith("~") and str(local_path(storage)).startswith("~"):
            raise ValueError("there is no user of this name, so no home directory")
        return storage

    @field_validator("feature_store")
    @classmethod
    def _in_a_store(cls, place: str | None) -> str | None:
        if place is not None and not re.fullmatch(IN_A_STORE, place):
            raise ValueError("is no place in a store, as s3://bucket/features is; for a directory there is storage")
        return place

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

        So a new setting changes no job that does not use it, and where or on how many workers it runs changes nothing.
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
