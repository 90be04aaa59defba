"""A body in several threads, and compiled."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import orchestrator
from orchestrator.features import bodies as body_module, body_pass
from orchestrator.features.bodies import bodies_for, passed
from orchestrator.job import Event, Noted
from orchestrator.network.cut import Body, Cut
from orchestrator.network.network import Network
from tests.features.conftest import FORMATS

CUT = Cut(("1",), "chain")


class Keeping(nn.Module):
    """Keeps its input on itself for a while, as some models do with what they have computed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.kept: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = x
        time.sleep(0.002)
        return self.linear(self.kept)


class Whole(nn.Sequential):
    def forward(self, values: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(values)


def a_body(first: nn.Module | None = None) -> Body:
    module = Whole(first or Keeping(), nn.Linear(4, 2)).eval()
    return Body(Network(module, ("1",), (), (), lambda *_: None), CUT)


def test_in_threads_the_body_gives_what_it_gives_alone() -> None:
    body = a_body()
    batches = [torch.randn(3, 4) for _ in range(40)]
    with torch.no_grad():
        alone = [body({"values": batch}) for batch in batches]

    def run(one: Body, batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return one({"values": batch})

    bodies = bodies_for(body, torch.device("cpu"), threads=4)
    assert len(bodies.copies) == 4
    found = [result for _, _, result in passed(range(40), lambda i: batches[i], run, bodies)]
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))


def test_the_copies_have_the_weights_in_common() -> None:
    body = a_body()
    other = bodies_for(body, torch.device("cpu"), threads=2).copies[1]
    pairs = zip(body.network.module.parameters(), other.network.module.parameters(), strict=True)
    assert all(one is two for one, two in pairs)
    assert other.network.module is not body.network.module


class Tied(nn.Module):
    """Layers that autocast runs in bfloat16, one of which has its weights from an embedding, which it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.back = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.back.weight = self.words.weight
        self.conv, self.norm, self.linear = nn.Conv1d(8, 8, 3, padding=1), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        found = self.conv(self.words(values.long()).transpose(1, 2)).transpose(1, 2)
        outputs: torch.Tensor = self.back(self.linear(self.norm(found))).mean(dim=1)
        return outputs


@pytest.mark.parametrize("attention", [False, True])
def test_in_bfloat16_weights_are_rounded_once_and_give_the_same(attention: bool) -> None:
    torch.manual_seed(0)
    module = Tied()
    if attention:  # whose fast path wants all weights in one format
        module.linear = nn.TransformerEncoderLayer(8, 2, batch_first=True)  # type: ignore[assignment]
    body = a_body(module.eval())
    copies = bodies_for(body, torch.device("cpu"), threads=2, format="bfloat16").copies
    formats = {name: one.dtype for name, one in copies[0].network.module.named_parameters()}
    in_bfloat16 = {name for name, dtype in formats.items() if dtype == torch.bfloat16}
    assert in_bfloat16 == (set() if attention else {"0.conv.weight", "0.linear.weight", "1.weight"})
    assert all(one.dtype == torch.float32 for one in module.parameters())
    values = {"values": torch.randint(20, (4, 6)).float()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(one(values), body(values)) for one in copies)


def test_what_cannot_be_copied_runs_in_one_thread() -> None:
    first = Keeping()
    first.lock = threading.Lock()  # type: ignore[assignment]
    bodies = bodies_for(a_body(first), torch.device("cpu"), threads=2)
    assert (len(bodies.copies), bodies.cores) == (1, 2)


@pytest.mark.parametrize("where", ["load", "run"])
def test_an_error_comes_at_its_items_turn(where: str) -> None:
    def fails(name: str, item: int) -> int:
        if name == where and item == 5:
            raise ValueError("the sixth")
        return item

    before = torch.get_num_threads()
    done = []
    bodies = bodies_for(a_body(), torch.device("cpu"), threads=3)
    with pytest.raises(ValueError, match="the sixth"):
        done += [
            item
            for item, _, _ in passed(
                range(100), lambda i: fails("load", i), lambda _, i: (done.append(i), fails("run", i))[1], bodies
            )
        ]
    assert set(range(5)) <= set(done)
    assert len(done) < 20  # what was ahead is left
    assert torch.get_num_threads() == before


def test_one_who_stops_leaves_no_thread() -> None:
    num = threading.active_count()
    for item, _, _ in passed(range(100), lambda i: i, lambda _, i: i, bodies_for(a_body(), torch.device("cpu"), 2)):
        if item == 3:
            break
    for _ in range(100):
        if threading.active_count() <= num:
            break
        time.sleep(0.05)
    assert threading.active_count() <= num


# --- compiled ---


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")


class Pictures(nn.Sequential):
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(pixel_values)


def a_convnet() -> Body:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(width, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6()) for width in (3, 16)]
    module = Pictures(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)).eval()
    return Body(Network(module, ("4",), (), (), lambda *_: None), Cut(("4",), "chain"))


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What torch compiles goes into this test's folder; compiled in this process, so that none is left."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


@needs_compiler
@pytest.mark.usefixtures("own_cache")
def test_a_compiled_body_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "LEAST_GAIN", 0.0)  # that it is faster is for the benchmarks to say
    body = a_convnet()
    with torch.no_grad():
        found = body_module.compiled(body, {"pixel_values": torch.randn(8, 3, 32, 32)})
        assert isinstance(found, body_module.Compiled), found
        other = {"pixel_values": torch.randn(8, 3, 32, 32)}
        assert found.fits(other)
        assert torch.allclose(found(other), body(other), atol=1e-5)
        assert not found.fits({"pixel_values": torch.randn(5, 3, 32, 32)})


def test_what_cannot_be_compiled_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    with torch.no_grad():
        found = body_module.compiled(a_convnet(), {"pixel_values": torch.randn(2, 3, 32, 32)})
    assert found == "RuntimeError: no compiler"


def test_tokens_are_not_compiled() -> None:
    assert body_module.can_be_compiled({"pixel_values": torch.zeros(1, 3, 8, 8)})
    assert not body_module.can_be_compiled({"input_ids": torch.zeros(1, 4, dtype=torch.long)})


@pytest.mark.long
@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("precision", FORMATS)
def test_a_long_pass_is_compiled_and_gives_the_same_head(
    precision: str, tiny_resnet: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, Noted):
            notes.append(event.text)

    def train(storage: str) -> orchestrator.Run:
        return orchestrator.finetune(
            backbone=str(tiny_resnet), data=str(digits), method="head", storage=storage, report=note,
            training={"epochs": 1, "precision": precision}, scaling={"device": "cpu"},
        )  # fmt: skip

    plain = train("plain")
    assert plain.lineage["format"] == FORMATS[precision]
    assert "compiled_gain" not in plain.lineage
    monkeypatch.setattr(body_pass, "_LEAST_BATCHES", 2)
    monkeypatch.setattr(body_pass, "WORTH_S", 0.0)
    monkeypatch.setattr(body_module, "LEAST_GAIN", 0.0)
    run = train("compiled")
    assert any("compiled first" in one for one in notes), notes
    assert run.lineage["compiled_gain"] > 0, notes
    ours, theirs = (load_file(one.path / "model" / "model.safetensors") for one in (run, plain))
    # Machine code rounds to bfloat16 at fewer places: as far apart as the heads of the two formats.
    atol = {"fp32": 1e-5, "bf16": 5e-3}[precision]
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=atol), name
