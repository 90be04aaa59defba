"""The plain data that travels from the gate to the workers: what a backbone is, and the Plan.

All of it is JSON, never pickle. A Plan holds what can be known before the job runs; what only the running
job can know goes into its `lineage.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.errors import counted
from orchestrator.job.spec import Job

_SHARD = re.compile(r"(.+)-\d+-of-\d+\.safetensors")
_FOREIGN = ("adapter", "consolidated", "open_clip")  # weights of something else, or by the names of another library

SPLITS = ("train", "validation", "test")


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BackboneCard(_Plain):
    """What the metadata files of a backbone say. No weight byte was read to make it."""

    source: str
    """As the user wrote it."""
    kind: Literal["hub", "directory", "run"]
    name: str
    """Short, for a run's name."""
    repo_id: str | None = None
    commit: str | None = None
    """The full commit sha; for a directory the digest of its files, known once a plan is made."""
    path: str | None = None
    """The directory, where it is one."""
    library: Literal["transformers", "timm", ""] = ""
    model_type: str = ""
    """`config.model_type`, or the timm architecture."""
    config: dict[str, Any] = Field(default_factory=dict)
    preprocessor: dict[str, Any] | None = None
    tokenizer: dict[str, Any] | None = None
    """tokenizer_config.json"""
    modules: tuple[dict[str, Any], ...] = ()
    """Of a repository in the layout of sentence-transformers: [{"type": "Pooling", "config": {...}}, ...]."""
    files: dict[str, int] = Field(default_factory=dict)
    """Name -> bytes (-1 where the server does not tell)."""
    lineage: dict[str, Any] | None = None
    """Of the earlier run, where the backbone is one."""

    @property
    def short_commit(self) -> str:
        """The commit as people read it: twelve digits; '' where there is none."""
        return (self.commit or "").removeprefix("sha256:")[:12]

    @property
    def weight_files(self) -> tuple[str, ...]:
        """The safetensors files that hold the weights: the whole one, else its shards in order, else all there are."""
        names = sorted(
            name for name in self.files
            if name.endswith(".safetensors") and "/" not in name and not any(part in name for part in _FOREIGN)
        )  # fmt: skip
        if "model.safetensors" in names:
            return ("model.safetensors",)
        shards: dict[str, list[str]] = {}
        for name in names:
            if match := _SHARD.fullmatch(name):
                shards.setdefault(match[1], []).append(name)
        if "model" in shards or len(shards) == 1:
            return tuple(shards.get("model") or next(iter(shards.values())))
        return tuple(names)


class BackboneRow(_Plain):
    """One known model type: how the model is called and where its head is."""

    architecture: str = ""
    """The class in transformers, or the timm architecture."""
    inputs: tuple[str, ...] = ()
    """What `forward` takes."""
    head: tuple[str, ...] = ()
    """The modules whose shape depends on the number of classes, in forward order."""
    may_be_new: tuple[str, ...] = ()
    """Modules outside the base model that a checkpoint of another task does not hold; then they are head too."""
    pool: Literal["", "first", "mean", "pooler", "summary"] = ""
    """Where transformers has no head for the type, ours stands on the body's `last_hidden_state`, its first
    token or the mean over its tokens; or on its `pooler_output` or `summary`."""
    part: str = ""
    """The part of a larger model's config that describes this body (`vision_config`), where it is a part."""
    prefix: str = ""
    """What the names of the body's tensors begin with in the checkpoint of a larger model (`vision_model.`)."""
    size: Literal["any", "fixed", "larger", "patches"] = "any"
    """Whether the input's size can be chosen: freely, not at all, not below the backbone's own, or in whole
    patches."""
    fp32_only: bool = False
    """Whether its layers fail on bfloat16: `precision` auto means fp32 then, wherever it runs."""


class Adaptation(_Plain):
    """One thing that is done to the input so that it becomes what the backbone was trained on."""

    what: str
    received: str
    used: str
    share: float = 1.0
    """Of the measured samples that it touches."""

    def __str__(self) -> str:
        touched = "" if self.share >= 1 else f" ({self.share:.0%} of samples)"
        return f"{self.what}: {self.received} -> {self.used}{touched}"


class Adapter(_Plain):
    """Low-rank matrices beside those of a frozen body (LoRA, Hu et al. 2021, arXiv 2106.09685): W + alpha / rank x BA.

    They are merged into the body's own before it is exported.
    """

    rank: int
    alpha: float


class Phase(_Plain):
    """A stretch of training in which the same parameters move, with every default resolved."""

    trains: Literal["head", "adapter", "everything"]
    """adapter: the head, and an adapter on the frozen body."""
    source: Literal["features", "samples"]
    """features: what the frozen body gave once for each sample; samples: the body runs in every step."""
    epochs: int
    num_steps: int
    learning_rate: float
    """Of the body; of what is frozen it means nothing."""
    head_learning_rate: float
    batch_norm: Literal["train", "frozen", "none"]
    """none: the weights tell that the network has no such layer."""
    solver: Literal["steps", "probe"] = "steps"
    """steps: gradient descent; probe: a head of one linear layer is fitted to stored features at once, which counts as
    one step."""
    epochs_in_steps: int = 0
    """Epochs of gradient descent instead of a probe, where the network has no such head, or no features are stored."""
    must_win: bool = False
    """Whether it has to beat the phases before it on validation: else what these gave is kept."""
    refits: bool = False
    """Whether it begins anew, on training and validation samples, for as many epochs as turned out best."""
    adapter: Adapter | None = None
    """Where the phase trains one."""
    layer_decay: float = 1.0
    """Of the body's rate, for each block between a parameter and the head."""
    loss: Literal["task", "contrastive"] = "task"
    """contrastive: the body learns to bring samples of one class together, and the head is fitted to what it gives
    where validation looks at it, and at the end; where no head can be fitted, the task's loss after all."""

    @property
    def highest_rate(self) -> float:
        """At which something moves: a new head's, or the body's where the head is fitted."""
        return self.learning_rate if self.loss == "contrastive" else self.head_learning_rate

    @property
    def steps_per_epoch(self) -> int:
        """Of this phase."""
        return self.num_steps // max(1, self.epochs)


class Recipe(_Plain):
    """A method as data: phases, each of which goes on from the best weights of the one before."""

    phases: tuple[Phase, ...]
    batch_size: int
    num_microbatches: int
    """Parts that each batch is computed in."""
    steps_per_epoch: int
    budget_s: float | None = None
    """What the job may take: the epochs in which everything is trained are made to fit, once a step was measured."""

    @property
    def num_steps(self) -> int:
        """Of all phases."""
        return sum(phase.num_steps for phase in self.phases)

    @property
    def num_epochs(self) -> int:
        """Of all phases."""
        return sum(phase.epochs for phase in self.phases)

    @property
    def needs_features(self) -> bool:
        """Whether a frozen body runs once for each sample."""
        return any(phase.source == "features" for phase in self.phases)

    @property
    def adapter(self) -> Adapter | None:
        """The one that the body has from the first phase on, None without one."""
        return next((phase.adapter for phase in self.phases if phase.adapter is not None), None)

    @property
    def trains_everything(self) -> bool:
        """Whether the body moves in some phase."""
        return any(phase.trains == "everything" for phase in self.phases)

    def decided(self, changes: Mapping[int, Mapping[str, Any]]) -> Recipe:
        """The recipe with what only the running job could decide: {number of a phase: {field: value}}."""
        phases = tuple(phase.model_copy(update=changes.get(i, {})) for i, phase in enumerate(self.phases))
        return self.model_copy(update={"phases": phases})


class Parameters(_Plain):
    """Counts from the safetensors header."""

    head_known: bool
    """False where the checkpoint holds no head: how wide the new one is, only the built model tells."""
    total: int
    trained: int
    frozen: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int


class DataSummary(_Plain):
    """What the sample table holds."""

    fingerprint: str
    root: str
    num_samples: dict[str, int]
    """Per split."""
    per_class: dict[str, tuple[int, ...]]
    """Per split, in the order of `classes`; multi-label: the samples that have the label; regression: empty."""
    target_mean: tuple[float, ...] = ()
    """Regression: of each target over the training samples."""
    target_std: tuple[float, ...] = ()
    num_duplicates: int = 0
    num_skipped: int = 0
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """What is hardly meant so."""

    @property
    def left_out(self) -> str:
        """`2 duplicates, 1 bad sample`; '' where all samples are used."""
        left = ((self.num_duplicates, "duplicate"), (self.num_skipped, "bad sample"))
        return ", ".join(counted(number, what) for number, what in left if number)


PLAN_VERSION = 2
"""Of how a plan is written down."""


class Plan(_Plain):
    """A Job that was checked and resolved. Workers get this, and where the run lies."""

    version: int = PLAN_VERSION
    name: str
    job: Job
    backbone: BackboneCard
    row: BackboneRow
    weights: Literal["pretrained", "random", "trained"]
    """trained: everything, the head included, must be in the checkpoint (to predict with a finished run)."""
    classes: tuple[str, ...]
    """Of regression: the names of the targets."""
    class_weights: tuple[float, ...] = ()
    """What a class's samples count in the loss; multi-label: what its positive ones count. Empty: all 1."""
    data: DataSummary
    input: dict[str, Any]
    """The plugin's resolved input settings, for example {"size": [64, 64]}."""
    augmentation: tuple[str, ...] = ()
    """Keys of `input` that matter in training alone."""
    views: int = 0
    """So many random views of each training sample are computed and kept; 0: the samples as they are."""
    adaptations: tuple[Adaptation, ...] = ()
    warnings: tuple[str, ...] = ()
    rehearsal: tuple[str, ...] = ()
    """What was done with a few real samples and with the headers of the weights, before the start."""
    recipe: Recipe
    parameters: Parameters | None = None
    num_workers: int = 1
    num_extractors: int = 0
    """Processes that run a frozen body in the workers' stead; 0: the workers run it."""
    threads_per_worker: int = 1
    """0: as many as the nodes of the cluster have for each."""
    extractor_threads: int = 1
    ray: bool = False
    """Whether workers are processes of a Ray cluster, or this process."""

    @property
    def precision(self) -> Literal["auto", "fp32", "bf16"]:
        """The job's, or fp32 where the network takes nothing else."""
        return "fp32" if self.row.fp32_only else self.job.training.precision

    @property
    def exchange_timeout_s(self) -> int:
        """How long a worker waits for the others: while rank 0 exports the model, say.

        Hours where each runs the frozen body over its share first, and the slowest may have the longest texts.
        """
        return 12 * 3600 if self.recipe.needs_features else 1800


def read_plan_json(text: str) -> Plan:
    """A plan that this version or an earlier one wrote. Raises `ValueError` for anything else."""
    tree = json.loads(text)
    if not isinstance(tree, dict):
        raise ValueError("it is no plan")
    version = tree.get("version", 1)
    if version == 1:
        tree = _from_version_1(tree)
    elif version != PLAN_VERSION:
        raise ValueError(f"it is of version {version}, and this package reads up to {PLAN_VERSION}")
    return Plan.model_validate(tree)


def _from_version_1(tree: dict[str, Any]) -> dict[str, Any]:
    """It had one schedule, and called microbatches shards."""
    tree = {**tree, "version": PLAN_VERSION}
    schedule, once = tree.pop("schedule"), tree.pop("features") == "once"
    training = dict(tree["job"]["training"])
    training["num_microbatches"] = training.pop("num_shards", None)
    tree["job"] = {**tree["job"], "training": training}
    phase = {key: schedule[key] for key in ("epochs", "num_steps", "learning_rate", "head_learning_rate", "batch_norm")}
    phase |= {
        "trains": "head" if tree["job"]["method"] == "head" else "everything",
        "source": "features" if once else "samples",
    }  # fmt: skip
    tree["recipe"] = {
        "phases": [phase], "batch_size": schedule["batch_size"], "num_microbatches": schedule["num_shards"],
        "steps_per_epoch": schedule["steps_per_epoch"],
    }  # fmt: skip
    return tree
