"""What a plugin author reads: a Modality, and the parts that it is made of.

A plugin is one `Modality` value in a package's top module, named by an entry point:

    [project.entry-points."orchestrator.modalities"]
    image = "orchestrator_image:modality"

The top module must import neither torch nor ray: the gate reads what is declared here on a laptop, at once.
Heavy imports belong inside the functions (`decode`, `build`, `batch`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import BaseModel

from orchestrator.job import Adaptation, BackboneCard, BackboneRow, Plan

if TYPE_CHECKING:
    import torch

Sample = Mapping[str, bytes]
"""One sample as it was read: field name -> the file's bytes, or the text in UTF-8."""
Facts = Mapping[str, int | float | str]
"""What was measured on one sample, for example {"width": 28, "height": 28, "mode": "L"}."""


@dataclass(frozen=True, kw_only=True)
class SampleField:
    """One field of a sample, as the model will see it."""

    name: str
    """Its key in a `Sample`, and the column of a table that holds it."""
    kind: Literal["file", "text"]
    """How the source holds it: as a file's bytes, or as text in a cell."""
    dtype: str
    """Of the model's input, as torch names it without `torch.`: "float32"."""
    shape: tuple[int | str, ...]
    """Of one sample's input, without the batch; a str names a size that varies."""
    unit: str
    """Of the values, for people: "RGB, normalised", "amplitude"."""
    suffixes: tuple[str, ...] = ()
    """Of the files that hold it, lower case: (".png", ".jpg")."""
    optional: bool = False
    """Whether a sample may lack it: the second text of a pair."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is predicted."""

    name: str
    title: str


@dataclass(frozen=True, kw_only=True)
class BackboneRule:
    """Why a known model type is refused: a reason of the published list, and what to do instead."""

    reason: str
    message: str
    mend: str = ""


@dataclass(frozen=True, kw_only=True)
class BackboneRules:
    """Which backbones fit, as data. `generated_from` names the library versions that the rows know."""

    generated_from: str
    accepts: Mapping[str, BackboneRow]
    """`config.model_type` -> row."""
    refuses: Mapping[str, BackboneRule] = field(default_factory=dict)
    timm: Mapping[str, BackboneRow] = field(default_factory=dict)
    """timm architecture -> row."""
    timm_refuses: Mapping[str, BackboneRule] = field(default_factory=dict)

    @classmethod
    def from_json(cls, path: Path) -> BackboneRules:
        """The rules out of a generated `rows.json`."""
        rows = json.loads(path.read_text(encoding="utf-8"))
        accepts = {**rows["accepts"], **rows.get("pooled", {})}
        return cls(
            generated_from=rows["generated_from"],
            accepts={key: BackboneRow.model_construct(**_tuples(row)) for key, row in accepts.items()},
            refuses={key: BackboneRule(**rule) for key, rule in rows.get("refuses", {}).items()},
            timm=_TimmRows(rows.get("timm", {})),
            timm_refuses={key: BackboneRule(**rule) for key, rule in rows.get("timm_refuses", {}).items()},
        )


class _TimmRows(Mapping[str, BackboneRow]):
    """Some 1,400 rows, built when looked at: {architecture: [classifier, ...]} in the file."""

    def __init__(self, heads: Mapping[str, Sequence[str]]) -> None:
        self._heads = heads

    def __getitem__(self, architecture: str) -> BackboneRow:
        return BackboneRow(
            architecture=architecture,
            inputs=("pixel_values",),
            head=tuple(f"timm_model.{name}" for name in self._heads[architecture]),
        )

    def __iter__(self) -> Any:
        return iter(self._heads)

    def __len__(self) -> int:
        return len(self._heads)


def _tuples(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}


@dataclass(frozen=True)
class Range:
    """Smallest, median and largest of a measured number."""

    min: float
    median: float
    max: float

    def __str__(self) -> str:
        if self.min == self.max:
            return f"{self.min:g}"
        return f"{self.min:g} to {self.max:g} (median {self.median:g})"


@dataclass(frozen=True)
class Profile:
    """What the data is, measured on `num_measured` samples."""

    num_measured: int
    ranges: Mapping[str, Range] = field(default_factory=dict)
    """Fact -> range of its numbers."""
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Fact -> {word: how many samples have it}."""
    facts: Sequence[Facts] = ()
    """One entry a measured sample, for shares of samples."""

    @classmethod
    def of(cls, facts: Iterable[Facts]) -> Profile:
        """Numbers become ranges, words become counts."""
        facts = list(facts)
        ranges: dict[str, Range] = {}
        counts: dict[str, dict[str, int]] = {}
        for key in sorted({key for one in facts for key in one}):
            values = [one[key] for one in facts if key in one]
            numbers = sorted(value for value in values if not isinstance(value, str))
            if numbers:
                ranges[key] = Range(numbers[0], numbers[len(numbers) // 2], numbers[-1])
            words = [value for value in values if isinstance(value, str)]
            if words:
                counts[key] = {word: words.count(word) for word in sorted(set(words))}
        return cls(num_measured=len(facts), ranges=ranges, counts=counts, facts=facts)

    def adapted(self, what: str, fact: str, used: float) -> tuple[Adaptation, ...]:
        """For `Fit.adaptations`: that the measured `fact` becomes `used`, with the share of samples where it differs.

        () where it differs in none. `what` is the word for it that a person reads.
        """
        share = self.share(lambda one: one[fact] != used)
        return (Adaptation(what=what, received=str(self.ranges[fact]), used=f"{used:g}", share=share),) if share else ()

    def share(self, test: Any) -> float:
        """The share of measured samples whose facts pass `test`."""
        return sum(bool(test(one)) for one in self.facts) / max(1, len(self.facts))


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How the data becomes the backbone's input: the resolved settings, and what that changes."""

    input: Mapping[str, Any]
    """The resolved settings, as JSON gives them back (keys are str, lists and no tuples); becomes `Plan.input`."""
    adaptations: Sequence[Adaptation] = ()
    warnings: Sequence[str] = ()
    augmented: bool = False
    """Whether training samples are changed at random, so that a frozen body must run in every step, or on several
    views of each sample (`training.views`)."""
    augmentation: tuple[str, ...] = ()
    """Keys of `input` and of the settings that say how, and change nothing else: what a frozen body gives for
    unchanged samples is kept for jobs that differ in them."""


class Decode(Protocol):
    def __call__(self, sample: Sample) -> Any:
        """The sample in memory, from bytes; called from several threads at once.

        Raises `BadSampleError`, and nothing else, for bytes that are no sample. Imports no torch.
        """


class Measure(Protocol):
    def __call__(self, decoded: Any, card: BackboneCard) -> Facts:
        """The facts of one decoded sample: rate, size, channels, length; str, or finite int or float. Imports no torch.

        `card` is for what only the backbone can count, tokens for one; `orchestrator.backbone.metadata_file` has its
        tokenizer.
        """


class FitFunction(Protocol):
    def __call__(self, card: BackboneCard, row: BackboneRow, settings: Any, profile: Profile | None) -> Fit:
        """Decide how the data is adapted to the input that the backbone demands; no training.

        Raises `RefusedError`, naming the mend, where it cannot be. Pure, without torch. `profile` is None where
        there is no data to look at (`check` alone).
        """


class Collate(Protocol):
    def __call__(self, decoded: Sequence[Any], train: bool) -> dict[str, torch.Tensor]:
        """Decoded samples -> the model's inputs, first dimension the batch; float32 or integers, finite.

        `train` asks for augmentation, whose randomness comes from torch's global generator: the loop seeds
        it by (seed, step, microbatch), so that a sample is changed the same way on any number of workers.
        What it raises on one sample alone is that sample's fault, as `BadSampleError` is.
        """


class MakeCollate(Protocol):
    def __call__(self, plan: Plan, directory: Path) -> Collate:
        """The collate function, built once a worker, and before the start to try a few samples.

        `directory` holds the backbone's files; before the start those of a repository but for its weights.
        """


class Mix(Protocol):
    def __call__(
        self, inputs: Mapping[str, torch.Tensor], targets: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """A batch in which each sample is mixed with another one of it, and the targets in the same shares.

        `inputs`: what `Collate` gave, on the CPU; `targets`: float32 [batch, classes], shares of the classes. Nothing
        that is given is changed. Randomness comes from torch's global generator, as in `Collate`.
        """


class Build(Protocol):
    def __call__(self, plan: Plan, directory: Path) -> Any:
        """An `orchestrator.network.Network`: the model with its weights and its head for `plan.classes`."""


class Toy(Protocol):
    def __call__(self, n: int) -> Sequence[tuple[Sample, str]]:
        """`n` small samples with labels, for tests: the same at each call, two classes or more in turn, which
        differ visibly.
        """


@dataclass(frozen=True, kw_only=True)
class Modality:
    """A kind of input. Every field must be given, so that a forgotten one fails at import; but for `mixes` and
    `augments`, which not every kind of input has.
    """

    name: str
    title: str
    """What it takes, in a few words, for listings."""
    sample: tuple[SampleField, ...]
    settings: type[BaseModel]
    """The plugin's own settings (`job.settings`), a pydantic model that forbids unknown keys."""
    rules: BackboneRules
    tasks: tuple[Task, ...]
    length_bucketing: bool
    """Whether samples differ in length, so that batches of like lengths waste less: the core makes them so."""
    extra: str
    """What to install for training with it: `pip install 'orchestrator[extra]'`; '' if nothing more."""
    decode: Decode | None
    measure: Measure | None
    fit: FitFunction | None
    build: Build | None
    batch: MakeCollate | None
    toy: Toy | None
    mixes: Mapping[str, Mix] = field(default_factory=dict)
    """Ways to mix samples of a batch with each other that `training.mix` may name: {"mixup": ..., "cutmix": ...}."""
    augments: Mapping[str, Any] = field(default_factory=dict)
    """Settings that change training samples at random, and never the class of one: {"augment": "light"}. They are taken
    where everything is trained to tell classes and the job sets none of them."""

    @property
    def trainable(self) -> bool:
        """False for a declaration alone: the gate knows it, training with it is not built yet."""
        return None not in (self.decode, self.measure, self.fit, self.build, self.batch)
