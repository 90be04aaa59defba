"""A network with a frozen body, cut: the same head is learnt as when the body runs in every step."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import orchestrator
from orchestrator.network.cut import Body, Cut, Head, find_cut
from orchestrator.network.network import Network
from tests.conftest import save_backbone
from tests.tiny import WORDS, make_tokenizer
from tests.whole.test_train import silent

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
# Base models: what a classifier needs beyond them is random, and so is head.
TEXT: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("BertForMaskedLM", SMALL, "first into bert.pooler"),
    "roberta": ("RobertaModel", SMALL, "first into classifier"),
    "distilbert": ("DistilBertModel", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
                   "into pre_classifier"),
    "albert": ("AlbertForMaskedLM", {**SMALL, "embedding_size": 16}, "into albert.pooler"),
    "gpt2": ("GPT2Model", {"n_embd": 32, "n_layer": 2, "n_head": 2}, "last into score"),
    "deberta-v2": ("DebertaV2Model", SMALL, "first into pooler"),
}  # fmt: skip
TRAINING = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 of them, of one word to nine."""
    chance, words = random.Random(0), WORDS.split()
    rows = [
        {"text": " ".join(chance.choices(words[i % 2 :: 2], k=chance.randint(1, 9))), "label": ["even", "odd"][i % 2]}
        for i in range(60)
    ]
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def both_ways(backbone: Path, data: Path, **more: Any) -> tuple[orchestrator.Run, orchestrator.Run]:
    """The same job with stored features, and with the body in every step."""
    runs = [
        orchestrator.finetune(
            backbone=str(backbone), data=str(data), training={**TRAINING, "features": features}, name=features[:4],
            scaling={"threads_per_worker": 1}, report=silent, **{"method": "head", **more},
        )
        for features in ("once", "every step")
    ]  # fmt: skip
    return runs[0], runs[1]


def assert_same(once: orchestrator.Run, every_step: orchestrator.Run, backbone: Path) -> None:
    assert (once.lineage["features"], every_step.lineage["features"]) == ("once", "every step")
    assert once.lineage["cut_error"] <= 1e-4
    one, other = (load_file(run.model / "model.safetensors") for run in (once, every_step))
    before = load_file(backbone / "model.safetensors")
    head = tuple(f"{name.removeprefix('timm_model.')}." for name in once.lineage["head"])
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], atol=1e-5), name
        theirs = before.get(name, before.get(name.partition(".")[2]))  # a base model's names lack the prefix
        if not name.startswith(head) and theirs is not None:
            assert torch.equal(tensor, theirs), name
    assert any(name.startswith(head) for name in one)


@pytest.mark.parametrize("model_type", TEXT)
def test_texts(model_type: str, texts: Path, tmp_path: Path) -> None:
    import transformers

    model_class, settings, point = TEXT[model_type]
    tokenizer = make_tokenizer()
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    config = transformers.CONFIG_MAPPING[model_type](**{"max_position_embeddings": 30, **settings, **tokens})
    backbone = save_backbone(tmp_path / "base", config, tokenizer, model_class)
    once, every_step = both_ways(backbone, texts, modality="text", settings={"head": "native"})
    assert once.lineage["cut"] == point
    assert_same(once, every_step, backbone)


def test_recordings(tmp_path: Path) -> None:
    """wav2vec2's projector is random where the checkpoint has none; the mean over time stands behind it."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor

    from tests.plugins.test_audio import WAVE, encoded, tone

    chance = random.Random(0)
    for i in range(30):
        file = tmp_path / "tones" / ("low", "high")[i % 2] / f"{i}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(tone((250, 1500)[i % 2], chance.choice((0.2, 0.3)))))
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=8000)
    backbone = save_backbone(tmp_path / "base", Wav2Vec2Config(**WAVE), extractor, "Wav2Vec2Model")
    once, every_step = both_ways(backbone, tmp_path / "tones", modality="audio")
    assert once.lineage["head"] == ["projector", "classifier"]
    assert once.lineage["cut"] == "mean into projector"
    assert_same(once, every_step, backbone)


def test_images_with_two_heads(flat_digits: Path, tmp_path: Path) -> None:
    """deit with distillation: two layers, each on a token of its own, and the mean of both."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", pretrained=False, num_classes=5, embed_dim=32, depth=1, num_heads=2
    )
    args = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    timm.models.save_for_hf(model, tmp_path / "saved", model_args=args, safe_serialization=True)
    few = {"path": str(flat_digits), "num_train": 24, "validation_fraction": 0.5, "test_fraction": 0.05}
    runs = [
        orchestrator.finetune(
            method="head",
            backbone=str(tmp_path / "saved"), data=few, training={**TRAINING, "epochs": 1, "features": features},
            name=features[:4], scaling={"threads_per_worker": 1}, report=silent,
        )
        for features in ("once", "every step")
    ]  # fmt: skip
    assert runs[0].lineage["cut"] == "into timm_model.head, timm_model.head_dist"
    assert_same(runs[0], runs[1], tmp_path / "saved")


# --- the proof ---


class Two(nn.Module):
    """A body, and a head of two layers with something between them."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.first(self.body(x))))  # type: ignore[no-any-return]


def network(module: nn.Module, *head: str) -> Network:
    return Network(module.eval(), head, (), (), lambda *_: None)


@pytest.mark.parametrize(
    ("between", "activation"), [(lambda x: x, ""), (torch.relu, "relu"), (torch.tanh, "tanh"), (torch.sin, None)]
)
def test_what_stands_between_is_told_apart_whatever_the_head_starts_with(
    between: Callable[[torch.Tensor], torch.Tensor], activation: str | None
) -> None:
    torch.manual_seed(0)
    module = Two(between)
    for layer in (module.first, module.second):  # so small that tanh, sin and nothing look the same
        nn.init.normal_(layer.weight, std=1e-3)
        nn.init.zeros_(layer.bias)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    cut, error = find_cut(network(module, "first", "second"), {"x": torch.randn(16, 6)})
    assert (cut.activation if cut else None) == activation
    assert (error <= 1e-4) == (cut is not None)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


class Sequence(nn.Module):
    """A head on some token of a sequence."""

    def __init__(self, pooling: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.pooling = nn.Linear(6, 8), nn.Linear(8, 3), pooling

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        assert attention_mask.shape == x.shape[:2]
        return self.pooling(self.head(self.body(x)))


@pytest.mark.parametrize(
    ("pooling", "name"),
    [
        (lambda x: x[:, 0], "first"),
        (lambda x: x[:, -1], "end"),
        (lambda x: x[[0, 1], [4, 2]], "last"),
        (lambda x: x[:, 1], None),
        (lambda x: torch.stack([x[0].mean(0), x[1, :3].mean(0)]), "mean"),
        (lambda x: x.max(dim=1).values, None),
    ],
)
def test_which_token_is_read(pooling: Callable[[torch.Tensor], torch.Tensor], name: str | None) -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    inputs = {"x": torch.randn(2, 5, 6), "attention_mask": mask}
    made = network(Sequence(pooling), "head")
    cut, _ = find_cut(made, inputs)
    assert (cut.pooling if cut else None) == name
    if cut is not None:
        features = Body(made, cut)(inputs)
        assert features.shape == (2, 1, 8)
        assert torch.allclose(Head(made, cut)({"features": features}), made.logits(inputs), atol=1e-5)


def test_a_module_that_is_never_called_cuts_nothing() -> None:
    module = Two(torch.relu)
    module.pooler = nn.Linear(8, 8)
    cut, _ = find_cut(network(module, "pooler", "first", "second"), {"x": torch.randn(4, 6)})
    assert cut == Cut(("first", "second"), "chain", "", "relu")
    assert find_cut(network(module, "pooler"), {"x": torch.randn(4, 6)})[0] is None


def test_a_module_that_nobody_reads_cuts_nothing() -> None:
    class Unread(Two):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.pooler(self.body(x))
            return super().forward(x)

    module = Unread(torch.tanh)
    module.pooler = nn.Linear(8, 8)
    cut, _ = find_cut(network(module, "pooler", "first", "second"), {"x": torch.randn(4, 6)})
    assert cut == Cut(("first", "second"), "chain", "", "tanh")
