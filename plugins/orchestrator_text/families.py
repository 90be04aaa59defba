"""What differs between families of language models, as data; `tests/gate/test_padding.py` holds it over all types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Their position table begins behind the padding token: two entries are no positions.
OFFSET_BY_2 = {
    "roberta", "xlm-roberta", "xlm-roberta-xl", "xmod", "camembert", "longformer", "data2vec-text",
    "roberta-prelayernorm", "mpnet", "ibert", "luke",
}  # fmt: skip
# Their head stands on the last place of the sequence, whatever is there: padding goes to the left of a text.
PADS_LEFT = {"xlnet"}
# A text beside longer ones is another than alone, on whichever side it is padded: texts of one length are computed
# together, without padding.
APART = {
    "canine": "makes one place of four characters, padding among them",
    "convbert": "its convolutions take in padding",
    "fnet": "mixes all places, and takes no mask",
    "mobilebert": "each token is read with its neighbours, padding among them",
    "nystromformer": "its landmarks are means over all places",
    "t5gemma": "its decoder reads the text without a mask",
    "yoso": "its hashes are drawn for all places at once",
}
# Their head reads the last end token, and fails where texts side by side have not the same number of them.
READS_ENDS = {"bart", "bigbird_pegasus", "mbart", "mt5", "mvp", "plbart", "t5", "umt5"}
# They attend to blocks, until they meet a text of fewer than some 700 tokens: from then on to all places, whatever
# comes. So what a text gives would depend on those before it; they attend to all places from the start.
CHANGES: dict[str, dict[str, object]] = {
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
}
# So many tokens make one place, and fewer make none.
LEAST_TOKENS = {"canine": 4}


def axial_shape(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Of reformer's table of positions, () where it has none. While its body is trained, all texts are to fill it."""
    if not config.get("axial_pos_embds", True):
        return ()
    return tuple(int(size) for size in config.get("axial_pos_shape") or (64, 64))
