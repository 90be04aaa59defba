"""Mutated metadata files of backbones: `check` and `plan` accept, or refuse with an error of ours.

FUZZ_NUM=500 FUZZ_SEED=7 python -m pytest tests/gate/test_fuzz_backbones.py    # more of them, and others
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.errors import OrchestratorError
from orchestrator.modality import registry
from tests.data.test_fuzz import mutate
from tests.tiny import make_bert, make_encoder_decoder, make_wav2vec2

NUM = int(os.environ.get("FUZZ_NUM", "40"))
SEED = os.environ.get("FUZZ_SEED", "0")
SLOWEST_S = 20.0
MOST_KIB = 1_500_000

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e30, float("nan"), float("inf"), 2**31 - 1, 2**63, -(2**31), "", "x",
    "\ud800", "0", "é" * 300, [], [0], [1, 2, 3], ["x"], [[]], [None], {}, {"x": 1}, {"height": -1, "width": 10**6},
]  # fmt: skip

CASES = [
    ("bert", "text", "tokenizer.json"), ("bert", "text", "tokenizer_config.json"), ("bert", "text", "config.json"),
    ("bart", "text", "tokenizer.json"), ("bart", "text", "config.json"),
    ("t5", "text", "tokenizer.json"), ("t5", "text", "tokenizer_config.json"),
    ("vit", "image", "preprocessor_config.json"), ("vit", "image", "config.json"),
    ("resnet", "image", "preprocessor_config.json"), ("resnet", "image", "config.json"),
    ("wav2vec2", "audio", "preprocessor_config.json"), ("wav2vec2", "audio", "config.json"),
]  # fmt: skip


def places(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*above, key)
        yield from places(value, (*above, key))


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Values replaced, taken out, renamed or put elsewhere; now and then bytes that are no JSON any more."""
    if chance.random() < 0.1:
        return mutate(content, content, chance)
    tree = json.loads(content)
    for _ in range(chance.choice((1, 1, 2, 3))):
        ways = list(places(tree))
        way = chance.choice(ways)
        if len(way) > 3 and chance.random() < 0.7:  # most of a tokenizer.json is its vocabulary
            way = chance.choice([one for one in ways if len(one) <= 2])
        inner = tree
        for key in way[:-1]:
            inner = inner[key]
        kind = chance.randrange(6)
        if kind <= 2:
            inner[way[-1]] = copy.deepcopy(chance.choice(ODD))
        elif kind == 3:
            del inner[way[-1]]
        elif kind == 4 and isinstance(inner, dict):
            inner[f"{way[-1]}_"] = inner.pop(way[-1])
        else:
            other = tree
            for key in chance.choice(ways):
                other = other[key] if not isinstance(other, (int, float, str, type(None))) else other
            inner[way[-1]] = copy.deepcopy(other)
        if not list(places(tree)):
            break
    return json.dumps(tree).encode()


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_resnet: Path) -> Callable[[str], Path]:
    made: dict[str, Path] = {"vit": tiny_vit, "resnet": tiny_resnet}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "b"
            makers = {"bert": make_bert, "wav2vec2": make_wav2vec2}
            made[name] = makers[name](folder) if name in makers else make_encoder_decoder(folder, name)
        return made[name]

    return make


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(modality: str) -> Path:
        if modality not in made:
            made[modality], plugin = tmp_path_factory.mktemp(modality), registry.get(modality)
            assert plugin.toy is not None
            for i, (sample, label) in enumerate(plugin.toy(24)):
                (made[modality] / label).mkdir(exist_ok=True)
                (made[modality] / label / f"{i}{plugin.sample[0].suffixes[0]}").write_bytes(sample[modality])
        return made[modality]

    return make


@pytest.mark.slow
@pytest.mark.parametrize(("name", "modality", "file"), CASES, ids=[f"{name}-{file}" for name, _, file in CASES])
@pytest.mark.filterwarnings("ignore")
def test_mutated_metadata_is_accepted_or_refused(
    name: str, modality: str, file: str, backbones: Callable[[str], Path], data: Callable[[str], Path], tmp_path: Path
) -> None:
    chance = random.Random(f"{name} {file} {SEED}")
    whole = (backbones(name) / file).read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    backbone, outcomes = tmp_path / "backbone", {"accepted": 0, "refused": 0}
    mends: list[str] = []
    shutil.copytree(backbones(name), backbone)
    for number in range(NUM):
        (backbone / file).write_bytes(content := mutated(whole, chance))
        started = time.perf_counter()
        for ask in (
            lambda: orchestrator.check(str(backbone), modality),
            lambda: orchestrator.plan(modality=modality, backbone=str(backbone), data=str(data(modality))),
        ):
            try:
                ask()
                outcomes["accepted"] += 1
            except OrchestratorError as error:
                outcomes["refused"] += 1
                mends.append(error.mend)
            except BaseException:
                (tmp_path / f"find-{number}").write_bytes(content)  # pytest keeps the folder
                raise
        assert time.perf_counter() - started < SLOWEST_S, number
    assert min(outcomes.values()) > 0
    assert all(mends)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KIB
