"""What a kind of input is: the contract that a plugin keeps, and how plugins are found.

In: entry points of installed distributions, or `register(modality)`. Out: `Modality` objects, each looked at before
it is used. A plugin needs this wing and `orchestrator.errors`, for its network `orchestrator.network`, and for the
backbone's small files `orchestrator.backbone.metadata_file`.

    contract  Modality and its parts: sample fields, backbone rules, decode, measure, fit, build, batch
    registry  entry points -> modalities, loaded when asked for
"""

from orchestrator.job import (  # what a plugin's `fit`, `build` and rules are made of
    Adaptation as Adaptation,
    BackboneCard as BackboneCard,
    BackboneRow as BackboneRow,
    Plan as Plan,
)
from orchestrator.modality.contract import (
    BackboneRule as BackboneRule,
    BackboneRules as BackboneRules,
    Build as Build,
    Collate as Collate,
    Decode as Decode,
    Facts as Facts,
    Fit as Fit,
    FitFunction as FitFunction,
    MakeCollate as MakeCollate,
    Measure as Measure,
    Mix as Mix,
    Modality as Modality,
    Profile as Profile,
    Sample as Sample,
    SampleField as SampleField,
    Task as Task,
    Toy as Toy,
)
from orchestrator.modality.registry import Listing as Listing, register as register
