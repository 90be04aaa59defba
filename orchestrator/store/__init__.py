"""The feature store: what frozen bodies gave for samples, kept for every later epoch, run and machine.

In: ids of sample contents and arrays of features. Out: the same arrays, memory-mapped, whoever died meanwhile. Knows no
network and no sample; imports neither torch nor Ray.

    shards     files of features that are whole or not there
    sets       the sets of shards: their keys, and the locks of who uses, fills or prunes them
    mirror     the same in an object store, for other machines
    inventory  what a person asks about them: which there are, and to remove those long unused
"""

from orchestrator.store.inventory import Listing as Listing, Root as Root
from orchestrator.store.mirror import MirroredSet as MirroredSet, share_note as share_note
from orchestrator.store.sets import (
    CONTENTS as CONTENTS,
    FOLDER as FOLDER,
    FORMAT_FILE as FORMAT_FILE,
    KEY_FILE as KEY_FILE,
    cache_group_folder as cache_group_folder,
    filling as filling,
    opened as opened,
    write_first as write_first,
)
from orchestrator.store.shards import FeatureSet as FeatureSet, Format as Format, Values as Values
