"""What `check` and `plan` accept, the first batch accepts too: inputs on which it once was not so."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import orchestrator
from orchestrator.backbone import read_tensors
from orchestrator.errors import DataError, RefusedError, TrainingError
from orchestrator.features.sources import collated
from orchestrator.gate import planning
from orchestrator.job import Data
from orchestrator.modality import registry
from tests.backbone.test_cards import files_of
from tests.conftest import Cli, save_backbone
from tests.hub_server import Hub, Repository
from tests.tiny import (
    SENTENCES,
    make_bert,
    make_encoder_decoder,
    make_language_model,
    make_tokenizer,
    make_xlnet,
)


def silent(_event: object) -> None:
    pass


def table(folder: Path, texts: list[str], name: str = "texts.csv") -> Path:
    file = folder / name
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows(
            [("text", "label"), *((text, ("food", "weather")[i % 2]) for i, text in enumerate(texts))]
        )
    return file


def sentences(num: int = 40) -> list[str]:
    return [f"{SENTENCES[i % len(SENTENCES)]} {i}" for i in range(num)]


def finetune(modality: str, backbone: Path, data: Path, **more: Any) -> orchestrator.Run:
    fields = {
        "method": "full",
        "training": {"epochs": 1, "batch_size": 8},
        "scaling": {"threads_per_worker": 1},
        **more,
    }
    return orchestrator.finetune(modality=modality, backbone=str(backbone), data=str(data), report=silent, **fields)


# --- control tokens in a text ---


@pytest.mark.parametrize("form", ["bart", "t5"])
def test_an_end_token_in_a_text_is_text(form: str, tmp_path: Path, cli: Cli) -> None:
    """Their heads want as many end tokens in each text of a batch, and raised where a text held `</s>`."""
    backbone = make_encoder_decoder(tmp_path / form, form)
    texts = sentences()
    texts[7] += " </s> end of the page"
    texts[8] = "</s> </s>"
    data = table(tmp_path, texts)
    for method in ("full", "head"):
        run = finetune("text", backbone, data, method=method)
        assert run.results["num_skipped"] == 0
    said = orchestrator.predict(run, texts[:12])
    assert not any(one.problem for one in said)
    (alone,) = orchestrator.predict(run, texts[7])
    assert dict(said[7].top) == pytest.approx(dict(alone.top), abs=1e-5)
    pipe = transformers.pipeline("text-classification", model=str(run.model))
    assert pipe(texts[7])[0]["score"] == pytest.approx(alone.score, abs=1e-4)
    done = cli("evaluate", run.path, "--data", data)
    assert done.returncode == 0, done.stderr


def test_of_bart_the_letters_of_an_end_token_are_read(tmp_path: Path) -> None:
    backbone = make_encoder_decoder(tmp_path / "bart", "bart")
    plan = orchestrator.plan(modality="text", backbone=str(backbone), data=str(table(tmp_path, sentences())))
    text = registry.get("text")
    assert text.batch is not None
    assert text.decode is not None
    ids = text.batch(plan, backbone)([text.decode({"text": b"rain </s> snow"})], False)["input_ids"]
    assert (ids == 2).sum() == 1


@pytest.mark.parametrize("where", ["tokenizer_config.json", "special_tokens_map.json"])
def test_tokens_that_the_network_was_trained_with_stay_tokens_and_control_tokens_are_said(
    where: str, tmp_path: Path
) -> None:
    """As tweets have: `<url>` became five unknown pieces, and `[PAD]` between two texts passed in silence."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<url>", "<far>"]})
    url, far = tokenizer.convert_tokens_to_ids(["<url>", "<far>"])
    config = transformers.BertConfig(
        vocab_size=far, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=24,
    )  # fmt: skip
    backbone = save_backbone(tmp_path / "bert", config, tokenizer, "BertForSequenceClassification")
    if where == "special_tokens_map.json":  # where earlier versions wrote them
        (backbone / where).write_text(json.dumps({"additional_special_tokens": ["<url>", {"content": "<far>"}]}))
        change(backbone, "tokenizer_config.json", extra_special_tokens=[])
    texts = [f"{one} <url>" for one in sentences()]
    texts[3] = "rain [PAD] snow"
    data = table(tmp_path, texts)
    plan = orchestrator.plan(modality="text", backbone=str(backbone), data=str(data))
    (said,) = [one for one in plan.adaptations if one.what == "control tokens"]
    assert str(said).startswith("control tokens: '[PAD]' -> read as text")
    assert said.share == pytest.approx(1 / 40)
    assert any("pairs of texts are two columns" in one for one in plan.warnings)

    text = registry.get("text")
    assert text.batch is not None
    assert text.decode is not None
    card = plan.backbone
    collate = text.batch(plan, backbone)
    for content, kept in (("rain <url>", [url]), ("rain <far>", []), ("rain [PAD]", [])):
        decoded = text.decode({"text": content.encode()})
        ids = collate([decoded], False)["input_ids"][0].tolist()
        assert [one for one in ids if one in (0, url, far)] == kept
        assert text.measure is not None
        assert text.measure(decoded, card)["tokens"] == len(ids)

    run = finetune("text", backbone, data)
    pipe = transformers.pipeline("text-classification", model=str(run.model))
    for content in ("rain <url>", "rain [PAD]", "rain <far>"):
        (alone,) = orchestrator.predict(run, [content])
        assert pipe(content)[0]["score"] == pytest.approx(alone.score, abs=1e-4)
    assert pipe.tokenizer.tokenize("rain <url>") == ["rain", "<url>"]


def test_a_head_that_reads_an_end_token_which_no_text_gets_is_refused(tmp_path: Path) -> None:
    backbone = make_encoder_decoder(tmp_path / "t5", "t5")
    change(backbone, "tokenizer.json", post_processor=None)
    data = table(tmp_path, sentences())
    with pytest.raises(RefusedError, match="without the end token 1 "):
        orchestrator.plan(modality="text", backbone=str(backbone), data=str(data))


def test_an_xmod_that_does_not_say_its_language_is_refused(tmp_path: Path) -> None:
    """As published; its first batch raised: input language unknown."""
    tokenizer = make_tokenizer()
    config = transformers.XmodConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=26, languages=["de_DE", "en_XX"], pad_token_id=0,
    )  # fmt: skip
    backbone = save_backbone(tmp_path / "xmod", config, tokenizer, "XmodForSequenceClassification")
    with pytest.raises(RefusedError, match="does not say which one") as refused:
        orchestrator.check(str(backbone), "text")
    assert '"default_language": "de_DE"' in refused.value.mend
    change(backbone, "config.json", default_language="en_XX")  # the mend
    assert finetune("text", backbone, table(tmp_path, sentences())).finished


# --- a tokenizer that fails on one sample ---


def refuse_hail(decoded: Any, train: bool) -> Any:  # noqa: ARG001
    if any("hail" in text.first for text in decoded):
        raise ValueError("no token for hail")
    return {"num": len(decoded)}


def test_what_raises_on_one_sample_is_that_samples_fault() -> None:
    text = registry.get("text")
    assert text.decode is not None
    decoded = [text.decode({"text": one.encode()}) for one in ("rain", "hail", "snow")]
    inputs, faults = collated(refuse_hail, decoded, False)
    assert inputs == {"num": 2}
    assert {place: error.message for place, error in faults.items()} == {1: "ValueError: no token for hail"}
    assert collated(refuse_hail, decoded[1:2], False)[0] is None

    def without_memory(decoded: Any, train: bool) -> Any:  # noqa: ARG001
        raise MemoryError

    with pytest.raises(MemoryError):
        collated(without_memory, decoded, False)


def test_a_batch_that_only_fails_together_is_no_samples_fault() -> None:
    def together(decoded: Any, train: bool) -> Any:  # noqa: ARG001
        if len(decoded) > 1:
            raise ValueError("of different sizes")
        return {}

    with pytest.raises(ValueError, match="of different sizes"):
        collated(together, [1, 2], False)


def fussy_batch(plan: Any, directory: Path) -> Any:
    """The text plugin's, with a tokenizer that raises where a text holds hail."""
    from orchestrator_text.network import make_collate

    collate = make_collate(plan, directory)
    return lambda decoded, train: collate(decoded, train) if refuse_hail(decoded, train) else {}


@pytest.fixture
def fussy() -> Iterator[None]:
    registry.register(dataclasses.replace(registry.get("text"), name="fussy", batch=fussy_batch))
    yield
    registry.unregister("fussy")


@pytest.mark.parametrize("method", ["full", "head"])
@pytest.mark.usefixtures("fussy")
def test_a_text_that_the_tokenizer_cannot_take_is_named_or_left_out(method: str, tmp_path: Path) -> None:
    backbone, data = make_bert(tmp_path / "bert"), table(tmp_path, [*sentences(), "rain and hail"])
    job = {"method": method, "data.validation_fraction": 0, "data.test_fraction": 0}
    with pytest.raises((TrainingError, DataError), match="row 41: ValueError: no token for hail"):
        finetune("fussy", backbone, data, **job)
    run = finetune("fussy", backbone, data, **job, **{"data.on_bad_sample": "skip"}, name="skipped")
    assert run.results["num_skipped"] == 1
    (line,) = (run.path / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["problem"] == "ValueError: no token for hail"
    said = orchestrator.predict(run, ["rain", "hail", "snow"])
    assert [one.problem for one in said] == ["", "ValueError: no token for hail", ""]
    with pytest.raises(DataError, match="row 41: ValueError: no token for hail"):
        orchestrator.evaluate(run, str(data))
    figures = orchestrator.evaluate(run, Data(path=str(data), on_bad_sample="skip"))
    assert (figures["num_samples"], figures["num_skipped"]) == (40, 1)


def test_a_text_that_makes_no_place_for_canine_is_a_bad_sample(tmp_path: Path) -> None:
    """It makes one place of four characters, and of fewer none: its pooling raised in the middle of a run."""
    config = transformers.CanineConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, num_hash_buckets=64,
        local_transformer_stride=16, max_position_embeddings=64,
    )  # fmt: skip
    backbone = save_backbone(
        tmp_path / "canine", config, transformers.CanineTokenizer(), "CanineForSequenceClassification"
    )
    plan = orchestrator.plan(modality="text", backbone=str(backbone), data=str(table(tmp_path, sentences())))
    text = registry.get("text")
    assert text.batch is not None
    assert text.decode is not None
    decoded = [text.decode({"text": one}) for one in (b"rain", b"x", b"snow")]
    inputs, faults = collated(text.batch(plan, backbone), decoded, False)
    assert inputs is not None
    assert len(inputs["input_ids"]) == 2
    assert [error.message for error in faults.values()] == ["has fewer than 4 tokens, and canine takes no fewer"]


# --- numbers beyond the embedding ---


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_a_padding_token_beyond_the_embedding(form: str, tmp_path: Path, cli: Cli) -> None:
    """Somebody added [PAD] to the tokenizer, and not to the embedding: IndexError in the first batch of two lengths."""
    backbone = make_language_model(tmp_path / form, form, padding="[PAD]")
    checked = cli("check", backbone, "--modality", "text", "--json")
    assert checked.returncode == 0
    (said,) = json.loads(checked.stdout)["warnings"]
    assert "'[PAD]' has the number" in said
    assert "beyond the embedding's" in said
    data = table(tmp_path, [f"{one}{' and so on' * (i % 4)}" for i, one in enumerate(sentences())])
    run = finetune("text", backbone, data)
    assert said in run.plan.warnings
    assert len(orchestrator.predict(run, ["rain [PAD] rain", "a much longer text about the rain"])) == 2
    pipe = transformers.pipeline("text-classification", model=str(run.model), batch_size=2)
    assert len(pipe(["rain", "a much longer text about the rain"])) == 2


def test_words_beyond_the_embedding_are_refused_at_the_gate(tmp_path: Path) -> None:
    backbone = make_language_model(tmp_path / "gpt2", "gpt2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(backbone)
    rows = len(tokenizer)
    tokenizer.add_tokens(["brontosaurus"])
    tokenizer.save_pretrained(backbone)
    with pytest.raises(
        RefusedError, match=f"'brontosaurus' the number {rows}, and the embedding has {rows} rows"
    ) as said:
        planning.inspect(str(backbone), "text")
    assert said.value.reason == "bad_config"
    assert f"resize_token_embeddings({rows + 1})" in said.value.mend
    model = transformers.AutoModel.from_pretrained(backbone)  # the mend, as it is written
    model.resize_token_embeddings(rows + 1)
    model.save_pretrained(backbone)
    tokenizer.save_pretrained(backbone)
    run = finetune("text", backbone, table(tmp_path, [f"{one} brontosaurus" for one in sentences()]))
    assert run.finished


def test_a_special_token_beyond_the_embedding_that_no_text_becomes_is_no_matter(tmp_path: Path) -> None:
    """As gemma 3's `<image_soft_token>`: its number is the size of the embedding."""
    backbone = make_language_model(tmp_path / "gpt2", "gpt2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(backbone)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(backbone)
    run = finetune("text", backbone, table(tmp_path, [f"{one} <image_soft_token>" for one in sentences()]))
    (warning,) = run.plan.warnings  # of the words in the texts, and not of the number
    assert warning.startswith("100% of the texts hold '<image_soft_token>'")
    assert not finetune("text", backbone, table(tmp_path, sentences()), name="without").plan.warnings


def test_a_pair_with_an_embedding_of_one_type(tmp_path: Path) -> None:
    """IndexError in the first batch: the second text has the type 1."""
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "rain", "cold", "wind"])
    )
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=24, type_vocab_size=1,
    )  # fmt: skip
    backbone = save_backbone(tmp_path / "bert", config, tokenizer, "BertModel")
    rows = [{"text": one, "text_pair": "cold wind", "label": "ab"[i % 2]} for i, one in enumerate(sentences())]
    with pytest.raises(RefusedError, match="is a pair, and the embedding of types has 1 rows"):
        orchestrator.plan(modality="text", backbone=str(backbone), data=rows)


def test_a_reformer_whose_body_is_to_move_is_refused(tmp_path: Path) -> None:
    """While it is trained it takes texts of one length alone: a ValueError in the first step."""
    tokenizer = make_tokenizer()
    config = transformers.ReformerConfig(
        vocab_size=len(tokenizer), is_decoder=False, axial_pos_shape=[4, 6], axial_pos_embds_dim=[16, 16],
        hidden_size=32, num_attention_heads=2, attention_head_size=8, feed_forward_size=32,
        attn_layers=["local", "lsh"], lsh_attn_chunk_length=8, local_attn_chunk_length=8, max_position_embeddings=48,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    backbone = save_backbone(tmp_path / "reformer", config, tokenizer, "ReformerForSequenceClassification")
    data = table(tmp_path, [f"{one} {'cold ' * (i % 40)}" for i, one in enumerate(sentences())])
    with pytest.raises(RefusedError, match="it takes texts of 24 tokens alone") as refused:
        orchestrator.plan(modality="text", backbone=str(backbone), data=str(data), method="full")
    assert "method head" in refused.value.mend
    run = finetune("text", backbone, data, method="head")
    assert run.plan.input["max_tokens"] == 24


# --- padding on the side that the family wants ---


def test_xlnet_is_padded_on_the_left(tmp_path: Path) -> None:
    """Its head reads the last place; padded on the right, a text's label depended on those beside it."""
    backbone = make_xlnet(tmp_path / "xlnet")
    texts = [f"{one}{' and so on' * (i % 5)}" for i, one in enumerate(sentences())]
    run = finetune("text", backbone, table(tmp_path, texts))
    together = orchestrator.predict(run, texts)
    pipe = transformers.pipeline("text-classification", model=str(run.model), top_k=None)
    for text, one in list(zip(texts, together, strict=True))[:10]:
        (alone,) = orchestrator.predict(run, text)
        served = {said["label"]: said["score"] for said in pipe([text])[0]}
        assert dict(one.top) == pytest.approx(dict(alone.top), abs=1e-4)
        assert dict(one.top) == pytest.approx(served, abs=1e-4)


# --- channels of the network against those of its processor ---


def make_vit(directory: Path, channels: int = 1, **settings: Any) -> Path:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        num_channels=channels,
    )  # fmt: skip
    return save_backbone(
        directory, config, transformers.ViTImageProcessor(size={"height": 16, "width": 16}, **settings)
    )


def change(directory: Path, file: str, **settings: Any) -> None:
    """Keys of a JSON file set, or taken out where None is given."""
    held = json.loads((directory / file).read_text()) | settings
    (directory / file).write_text(json.dumps({key: value for key, value in held.items() if value is not None}))


def test_a_network_for_one_channel_with_a_processor_of_three_means(tmp_path: Path, flat_digits: Path) -> None:
    """Accepted, and then a RuntimeError of shapes."""
    backbone = make_vit(tmp_path / "vit")
    with pytest.raises(RefusedError, match=r"for 1 channel, and image_mean in .* holds 3 numbers") as refused:
        orchestrator.check(str(backbone), "image")
    assert refused.value.reason == "bad_config"
    change(backbone, "preprocessor_config.json", image_mean=[0.5], image_std=[0.5])  # the mend
    run = finetune("image", backbone, flat_digits)
    assert run.plan.input["channels"] == 1
    assert not orchestrator.predict(run, [next(flat_digits.rglob("*.png"))])[0].problem


@pytest.mark.parametrize(
    ("channels", "settings", "words"),
    [
        (3, {"image_mean": [0.5]}, "for 3 channels, and image_mean"),
        (3, {"image_std": [0.5, 0.5]}, "for 3 channels, and image_std"),
        (3, {"image_std": [0.5, 0.5, 0]}, "image_std in preprocessor_config.json holds 0"),
        (3, {"image_mean": [0.5, 0.5, "x"]}, "holds 'x'"),
        (1, {"image_mean": None, "image_std": None}, "holds 3 numbers"),  # the class's own means
        (1, {"image_mean": [0.5], "image_std": [0.5], "do_convert_rgb": True}, "makes 3 of it"),
        (1, {"image_mean": 0.5, "image_std": 0.5}, ""),
        (1, {"do_normalize": False}, ""),
        (3, {"do_convert_rgb": True}, ""),
    ],
)
def test_channels_are_held_against_means(channels: int, settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    backbone = make_vit(tmp_path / "vit", channels)
    change(backbone, "preprocessor_config.json", **settings)
    if not words:
        assert orchestrator.check(str(backbone), "image").model_type == "vit"
        return
    with pytest.raises(RefusedError, match=words) as refused:
        orchestrator.check(str(backbone), "image")
    assert refused.value.mend


def test_of_timms_networks_too(tmp_path: Path, flat_digits: Path) -> None:
    import timm
    from timm.models import save_for_hf

    backbone = tmp_path / "gray"
    network = timm.create_model("resnet10t", in_chans=1, num_classes=5)
    save_for_hf(network, str(backbone), model_args={"in_chans": 1}, safe_serialization=True)
    plan = orchestrator.plan(backbone=str(backbone), data=str(flat_digits), settings={"size": 32})
    assert plan.input["channels"] == 1
    config = json.loads((backbone / "config.json").read_text())
    wrong = config["pretrained_cfg"] | {"mean": [0.5, 0.5, 0.5]}
    change(backbone, "config.json", pretrained_cfg=wrong)
    with pytest.raises(RefusedError, match="for 1 channel, and mean in pretrained_cfg"):
        orchestrator.check(str(backbone), "image")
    change(backbone, "config.json", pretrained_cfg=config["pretrained_cfg"], model_args=None)
    with pytest.raises(RefusedError, match="has 1 channels, and the network is built with 3"):
        orchestrator.check(str(backbone), "image")


def test_numbers_a_frame_of_a_speech_network(tmp_path: Path) -> None:
    from tests.plugins.test_audio import of_bert

    config, extractor = of_bert()
    backbone = save_backbone(tmp_path / "bert", config, extractor, "Wav2Vec2BertForSequenceClassification")
    assert orchestrator.check(str(backbone), "audio").model_type == "wav2vec2-bert"
    change(backbone, "preprocessor_config.json", stride=1)
    with pytest.raises(RefusedError, match=r"a network for 160 numbers a frame, and .* gives 80"):
        orchestrator.check(str(backbone), "audio")


# --- BatchNorm with a batch of one ---


@pytest.fixture(scope="module")
def levit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its head has a BatchNorm of its own, over one value a sample and channel."""
    config = transformers.LevitConfig(
        image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[1, 1, 1], depths=[1, 1, 1], key_dim=[8, 8, 8]
    )
    processor = transformers.LevitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    return save_backbone(tmp_path_factory.mktemp("levit"), config, processor, "LevitModel")


@pytest.mark.parametrize("features", ["once", "every step"])
def test_a_head_with_batch_norm_and_a_batch_of_one(features: str, levit: Path, flat_digits: Path) -> None:
    """It raised: expected more than 1 value per channel."""
    training = {"epochs": 1, "batch_size": 1, "features": features}
    run = finetune("image", levit, flat_digits, method="head", training=training, **{"data.num_train": 20})
    assert run.plan.recipe.steps_per_epoch == 20
    assert run.finished


def test_a_batch_of_one_that_bad_samples_leave(levit: Path, flat_digits: Path) -> None:
    """Microbatches of two, of which one cannot be decoded: too late for the plan to know."""
    from orchestrator.network import set_mode
    from orchestrator.network.network import Network

    plan = orchestrator.plan(backbone=str(levit), data=str(flat_digits), method="full", settings={})
    layer = torch.nn.BatchNorm1d(3)
    network = Network(torch.nn.Sequential(layer), ("0",), (), (), lambda *_: None)
    set_mode(network, plan.recipe.phases[0], training=True)
    one = torch.tensor([[1.0, 2.0, 3.0]])
    assert torch.allclose(network.module(one), one, atol=1e-4)
    assert int(layer.num_batches_tracked) == 0
    assert layer.training
    network.module(torch.cat([one, -one]))
    assert int(layer.num_batches_tracked) == 1


def test_a_microbatch_of_one_is_refused_where_there_is_batch_norm_and_nowhere_else(
    tiny_resnet: Path, tiny_vit: Path, flat_digits: Path
) -> None:
    job = {"data": str(flat_digits), "method": "full", "training": {"batch_size": 1}}
    with pytest.raises(RefusedError, match="leave microbatches of 1"):
        orchestrator.plan(backbone=str(tiny_resnet), **job)
    assert orchestrator.plan(backbone=str(tiny_vit), **job).recipe.batch_size == 1


# --- code of a repository for a type that is known ---


def of_own_code(backbone: Path, **settings: Any) -> Path:
    """The repository says that its code makes the network."""
    own = {"AutoConfig": "configuration_bert.OwnConfig", "AutoModel": "modeling_bert.OwnModel"}
    change(backbone, "config.json", auto_map=own, **settings)
    return backbone


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"position_embedding_type": "alibi"}, "sets position_embedding_type"),
        ({"feed_forward_type": "glu", "alibi_starting_size": 512}, "sets alibi_starting_size, feed_forward_type"),
        ({"architectures": ["AlibiBertForMaskedLM"]}, "names the class AlibiBertForMaskedLM"),
    ],
)
def test_another_network_under_a_known_type_is_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    """It was trained as a plain BERT."""
    backbone = of_own_code(make_bert(tmp_path / "bert"), **settings)
    with pytest.raises(RefusedError, match=words) as refused:
        orchestrator.check(str(backbone), "text")
    assert refused.value.reason == "unsupported"
    assert "take auto_map" in refused.value.mend
    change(backbone, "config.json", **{"auto_map": None, "architectures": None, **dict.fromkeys(settings)})  # the mend
    assert orchestrator.check(str(backbone), "text").model_type == "bert"


def test_own_code_for_what_the_plain_class_is_passes(tmp_path: Path) -> None:
    backbone = of_own_code(make_bert(tmp_path / "bert"), position_embedding_type="absolute")
    assert finetune("text", backbone, table(tmp_path, sentences())).finished


@pytest.mark.parametrize("own_code", [False, True])
def test_keys_that_only_the_networks_code_asks_for_are_known(own_code: bool, tmp_path: Path) -> None:
    """As deberta-v3 is published: its constructor names none of them, and getattr reads them all."""
    tokenizer = make_tokenizer()
    config = transformers.DebertaV2Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=24, type_vocab_size=0, relative_attention=True, position_biased_input=False,
        pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=True, norm_rel_ebd="layer_norm",
        cls_dropout=0.1, conv_kernel_size=3,
    )  # fmt: skip
    backbone = save_backbone(tmp_path / "deberta", config, tokenizer, "DebertaV2ForSequenceClassification")
    change(backbone, "config.json", auto_map={"AutoConfig": "own.OwnConfig"} if own_code else None)
    assert json.loads((backbone / "config.json").read_text())["position_buckets"] == 8
    fit = planning.inspect(str(backbone), "text").fit
    assert fit is not None
    assert not [one for one in fit.warnings if "config.json sets" in one]


@pytest.mark.parametrize(
    "left",
    [
        {"tie_weights_": True, "forced_bos_token_id": 0, "encoder_no_repeat_ngram_size": 3},
        {"normalize_embedding": True, "extra_pos_embeddings": 2, "n_positions": 512, "untie_r": True},
        {"down_scale_factor": 1, "gap_size": 0, "net_structure_type": 0, "num_memory_blocks": 0, "path_norm": True},
        {"mask_channel_length": 10, "mask_channel_selection": "static", "mask_time_other": 0.5},
        {"attn_implementation": "sdpa", "torch_dtype": "float16"},
    ],
)  # fmt: skip
def test_keys_that_nobody_ever_read_are_no_fault(left: dict[str, Any], tmp_path: Path) -> None:
    backbone = of_own_code(make_bert(tmp_path / "bert"), **left)
    fit = planning.inspect(str(backbone), "text").fit
    assert fit is not None
    assert not [one for one in fit.warnings if "config.json sets" in one]


def with_tensor(directory: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    save_file(load_file(file) | {name: torch.zeros(3)}, file, metadata={"format": "pt"})


def test_own_code_whose_weights_the_plain_class_does_not_use_is_refused_by_the_plan(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=24,
    )  # fmt: skip
    backbone = of_own_code(save_backbone(tmp_path / "bert", config, make_tokenizer(), "BertModel"))
    data = table(tmp_path, sentences())
    assert orchestrator.plan(modality="text", backbone=str(backbone), data=str(data)).warnings == ()
    with_tensor(backbone, "encoder.layer.0.attention.slopes")
    with pytest.raises(RefusedError, match=r"no place for encoder\.layer\.0\.attention\.slopes of its weights"):
        orchestrator.plan(modality="text", backbone=str(backbone), data=str(data))


def test_keys_and_weights_that_nobody_uses_are_said(tmp_path: Path) -> None:
    backbone = make_bert(tmp_path / "bert")
    change(backbone, "config.json", rotary_emb_fraction=0.5)
    with_tensor(backbone, "cls.predictions.bias")
    plan = orchestrator.plan(modality="text", backbone=str(backbone), data=str(table(tmp_path, sentences())))
    warnings = plan.warnings
    assert any(
        "config.json sets rotary_emb_fraction, which transformers' bert does not know" in one for one in warnings
    )
    assert not any("not used" in one for one in warnings)  # of a body that was trained for another task: as always
    assert (
        "one tensor of the checkpoint is not used (cls.predictions.bias): another task's head, or a part beside"
        in plan.rehearsal
    )
    assert any("rotary_emb_fraction" in one for one in planning.inspect(str(backbone), "text").fit.warnings)  # type: ignore[union-attr]


# --- the rehearsal ---


def test_headers_are_read_once_and_a_network_that_is_not_built_of_them_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BertForSequenceClassification that looks at a weight, as families do which the headers alone do not build."""
    backbone, data = make_bert(tmp_path / "bert"), table(tmp_path, sentences())
    asked = []

    def reading(card: Any) -> Any:
        asked.append(card.source)
        return read_tensors(card)

    monkeypatch.setattr(planning, "read_tensors", reading)
    plan = orchestrator.plan(modality="text", backbone=str(backbone), data=str(data))
    assert plan.rehearsal[1] == "the network from the headers of its weights: they fit"
    assert len(asked) == 1

    text = registry.get("text")

    def looking(plan: Any, directory: Path) -> Any:
        assert text.build is not None
        network = text.build(plan, directory)
        assert next(network.module.parameters()).sum().item() is not None
        return network

    monkeypatch.setattr(registry, "get", lambda _name: dataclasses.replace(text, build=looking))
    plan = orchestrator.plan(modality="text", backbone=str(backbone), data=str(data))
    assert plan.rehearsal[1].startswith("the network was not built from its headers: ")


def test_a_plan_says_what_a_few_samples_became(tmp_path: Path, cli: Cli) -> None:
    backbone, data = make_bert(tmp_path / "bert"), table(tmp_path, sentences())
    asked = ("plan", "--modality", "text", "--backbone", backbone, "--data", data)
    first, second = json.loads(cli(*asked, "--json").stdout)["rehearsal"]
    assert first.startswith("a batch of 4 samples: input_ids int64 [4, ")
    assert second == "the network from the headers of its weights: they fit"
    assert "tried" in cli(*asked).stdout
    run = finetune("text", backbone, data)
    assert run.plan.rehearsal == (first, second)


def test_what_each_kind_of_sample_becomes_is_tried(tiny_vit: Path, tmp_path: Path) -> None:
    """Of many images the first, and those of other modes; in threads or not, always the same."""
    from PIL import Image

    from orchestrator.data import prepare_data

    for i in range(40):
        file = tmp_path / "images" / "ab"[i % 2] / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        mode = "L" if i == 35 else "RGBA" if i == 36 else "RGB"
        Image.new(mode, (8 + i, 9)).save(file)
    card = orchestrator.check(str(tiny_vit), "image")
    prepared = prepare_data(Data(path=str(tmp_path / "images")), registry.get("image"), card)
    names = [Path(one.place).name for one in prepared.examples]
    assert len(names) <= 8
    assert {"35.png", "36.png"} <= set(names)


def test_weights_that_do_not_fit_are_refused_by_the_plan(tmp_path: Path) -> None:
    backbone = make_bert(tmp_path / "bert")
    change(backbone, "config.json", num_hidden_layers=3)
    with pytest.raises(RefusedError, match=r"do not fit its config\.json"):
        orchestrator.plan(modality="text", backbone=str(backbone), data=str(table(tmp_path, sentences())))


def test_a_processor_that_takes_nothing_is_refused_by_the_plan(tmp_path: Path, flat_digits: Path) -> None:
    backbone = make_vit(tmp_path / "vit", 3)
    change(backbone, "preprocessor_config.json", resample="cubic")
    with pytest.raises(RefusedError, match="its tokenizer or processor") as refused:
        orchestrator.plan(backbone=str(backbone), data=str(flat_digits))
    assert refused.value.reason == "bad_config"


def test_a_feature_extractor_of_another_kind_is_refused_by_the_plan(tmp_path: Path) -> None:
    from tests.plugins.test_audio import encoded, of_whisper, tone
    from tests.tiny import make_wav2vec2

    backbone = make_wav2vec2(tmp_path / "wav2vec2")
    of_whisper()[1].save_pretrained(backbone)
    for i in range(20):
        file = tmp_path / "tones" / "ab"[i % 2] / f"{i}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(tone(300 + 10 * i, 0.3)))
    with pytest.raises(RefusedError, match=r"gives input_features.* takes input_values"):
        orchestrator.plan(modality="audio", backbone=str(backbone), data=str(tmp_path / "tones"))


def test_a_rehearsal_of_a_repository_downloads_no_weights(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/bert"] = Repository(files_of(make_bert(tmp_path / "bert")))
    plan = orchestrator.plan(modality="text", backbone="org/bert", data=str(table(tmp_path, sentences())))
    assert len(plan.rehearsal) == 2
    assert not [one for one in hub.requests if one[0] == "GET" and one[1].startswith("/large") and not one[2]]
