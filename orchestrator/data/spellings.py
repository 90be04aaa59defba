"""One label under several spellings: True and true, 2 and 2.0. Which it has is a matter of the file's type.

Parquet has booleans, of which CSV makes words; pandas makes 2.0 of a 2 where a cell of the column is empty.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from orchestrator.data.contents import digest64
from orchestrator.data.ingested import IngestedRows, view
from orchestrator.data.rows import Source

_WHOLE = re.compile(r"\+?(-?\d+)(?:\.0*)?", re.ASCII)


def meaning(name: str) -> str:
    """The same for all spellings of a label: `true` of True, `2` of 2.0; of most labels themselves."""
    if name.lower() in ("true", "false"):
        return name.lower()
    whole = _WHOLE.fullmatch(name)
    return whole[1] if whole else name


def unify_spellings(ingested: IngestedRows, source: Source) -> list[str]:
    """Make one label of those that mean the same, and say of which; a label of one spelling stays as it is written."""
    spellings: dict[str, list[str]] = defaultdict(list)
    for name in ingested.names:
        spellings[meaning(name)].append(name)
    several = {one: names for one, names in spellings.items() if len(names) > 1}
    if not several:
        return []
    chosen = {name: one if one in names else min(names) for one, names in spellings.items() for name in names}
    names: dict[str, int] = {}
    numbers = np.array([names.setdefault(chosen[name], len(names)) for name in ingested.names], dtype=np.intc)
    ingested.label = array("i", numbers[view(ingested.label)].tobytes())
    if not ingested.num_labels:
        ingested.label_id = array("Q", [digest64(name) for name in names])
    ingested.names = names
    source.classes = {chosen.get(name, name) for name in source.classes}
    return [f"the labels {listed(names)} are one class: {chosen[names[0]]!r}" for names in several.values()]


def numbers_by_meaning(names: Sequence[str]) -> dict[str, int]:
    """{meaning: number} of a model's classes, without those that mean the same as another."""
    means = [meaning(name) for name in names]
    times = Counter(means)
    return {one: number for number, one in enumerate(means) if times[one] == 1}


def listed(names: Sequence[str]) -> str:
    """`'a', 'b' and 'c'`"""
    return ", ".join(repr(name) for name in names[:-1]) + f" and {names[-1]!r}"
