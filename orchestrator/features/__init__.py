"""A frozen body over samples, each content once: features instead of samples for every epoch.

In: a network, samples, a place to keep features. Out: for each split a source of features that the loop reads
instead of samples; or the samples themselves, where the body has to run in every step.

    sources     what the loop trains on: samples decoded in every step, or stored features
    readers     processes that read samples where a GPU would wait for them, as their worker sees them
    reading     such a process: what it is asked for, and how it answers
    mixing      mixup and CutMix: a modality mixes samples of a batch, and their labels
    stage       the features of a plan: computed, opened as sources
    key         what features depend on, and the place that it stands for
    extraction  what the store lacks is computed, in rounds that survive whatever dies
    body_pass   one worker's pass: samples into a frozen body, features into shards
    loading     samples on their way into the body
    bodies      copies of a body for several threads, and torch.compile
    formats     float32 or bfloat16 features
"""

from orchestrator.features.body_pass import BodyPass as BodyPass, ExtractionResult as ExtractionResult
from orchestrator.features.key import FeatureCacheRef as FeatureCacheRef
from orchestrator.features.mixing import make_mix as make_mix
from orchestrator.features.readers import (
    Read as Read,
    Readers as Readers,
    ReadersLostError as ReadersLostError,
    ready_readers as ready_readers,
)
from orchestrator.features.reading import STEP as STEP, Key as Key, Request as Request, read as read
from orchestrator.features.sources import (
    Batch as Batch,
    FeatureSource as FeatureSource,
    SampleSource as SampleSource,
    Source as Source,
    SourceSpec as SourceSpec,
    collated as collated,
    split_evenly as split_evenly,
)
from orchestrator.features.stage import (
    FeatureRef as FeatureRef,
    MakeRemoteExtractor as MakeRemoteExtractor,
    NoCut as NoCut,
    compute_features as compute_features,
    open_features as open_features,
    run_body_once as run_body_once,
)
