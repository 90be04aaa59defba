"""A frozen body over samples, each content once: features instead of samples for every epoch.

In: a network, samples, a place to keep features. Out: for each split a source of features that the loop reads
instead of samples; or the samples themselves, where the body has to run in every step.

    sources     what the loop trains on: samples decoded in every step, or stored features
    stage       the stage: cut, key, number format, features of all splits
    extraction  what the store lacks is computed, in rounds that survive whatever dies
    body_pass   samples into a frozen body, and features out of it
    bodies      a body in several threads, samples read ahead
    formats     float32 or bfloat16 features
"""

from orchestrator.features.extraction import Extraction as Extraction, ExtractionResult as ExtractionResult
from orchestrator.features.sources import (
    FeatureSource as FeatureSource,
    SampleSource as SampleSource,
    Source as Source,
    split_evenly as split_evenly,
)
from orchestrator.features.stage import (
    FeatureCacheRef as FeatureCacheRef,
    MakeRemoteExtractor as MakeRemoteExtractor,
    run_body_once as run_body_once,
)
