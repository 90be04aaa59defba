"""What is known of a trained network before it is loaded: its card, and its weights' shapes, digest and files.

In: `org/name[@revision]`, a directory in Hub layout, or an earlier run. Out: a `BackboneCard` from metadata files;
later the directory that holds all files, downloaded at the pinned commit. A card is our own record of that metadata,
not the README that the Hub calls a model card. Imports neither torch nor Ray.

    cards      repository, directory or run -> BackboneCard
    stored     a run in an object store as a backbone
    untrusted  what its JSON files may set: nothing that opens, loads or runs anything else
    timm_settings  the settings that timm's architectures take
    hub_cache  files of the Hub on this machine
    hub        questions to the Hub, asked again where that helps
    hub_search  what the Hub's own search gives: a task, a number of parameters
    weights    are there any, their shapes and digest, and the files themselves
"""

from orchestrator.backbone.cards import (
    metadata_file as metadata_file,
    read_card as read_card,
)
from orchestrator.backbone.hub import ask_hub as ask_hub, offline as offline
from orchestrator.backbone.hub_cache import place_for as place_for
from orchestrator.backbone.hub_search import HubCandidate as HubCandidate, find_on_hub as find_on_hub
from orchestrator.backbone.untrusted import require_harmless as require_harmless
from orchestrator.backbone.weights import (
    Tensors as Tensors,
    fetch as fetch,
    files_of as files_of,
    read_tensors as read_tensors,
    require_weights as require_weights,
    with_digest as with_digest,
)
