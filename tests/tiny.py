"""Backbones with random weights, a few thousand parameters each; and real digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
WORDS = "the rain falls on hills bread with butter soup snow fog sun day cold wind a of and hot rice sweet apple cake"


def save_backbone(directory: Path, config: object, processor: object | None = None, model_class: str = "") -> Path:
    """A transformers model with random weights, in Hub layout."""
    import torch
    import transformers

    torch.manual_seed(0)
    chosen = getattr(transformers, model_class) if model_class else transformers.AutoModelForImageClassification
    model = chosen(config) if model_class else chosen.from_config(config)
    model.save_pretrained(directory)
    if processor is not None:
        processor.save_pretrained(directory)
    return directory


def make_digits(root: Path) -> Path:
    """600 real digits as class folders of PNG: train/ (400) and test/ (200)."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    for row in range(600):
        folder = root / ("train" if row < 400 else "test") / str(data.target[row])
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.minimum(data.images[row] * 16, 255).astype("uint8")
        Image.fromarray(pixels).save(folder / f"{row:04}.png")
    return root


def make_resnet(directory: Path) -> Path:
    """A ResNet with BatchNorm and 7 classes, some 20,000 parameters, 32 x 32 pixels."""
    from transformers import ConvNextImageProcessor, ResNetConfig

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=7)
    processor = ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0)
    return save_backbone(directory, config, processor)


def make_wav2vec2(directory: Path) -> Path:
    """8 kHz waveforms of any length."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor

    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, conv_dim=[16, 16],
        conv_kernel=[10, 8], conv_stride=[5, 4], num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
    )  # fmt: skip
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=8000)
    return save_backbone(directory, config, extractor, "Wav2Vec2ForSequenceClassification")


def make_bert(directory: Path) -> Path:
    """24 tokens, whole words."""
    from transformers import BertConfig

    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=24,
    )  # fmt: skip
    return save_backbone(directory, config, tokenizer, "BertForSequenceClassification")


def make_tokenizer() -> Any:
    """Whole words, 24 tokens at most."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *WORDS.split()]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_max_length=24)


SENTENCES = [
    "rain falls on the hills", "a cold wind blows today", "the sun shines all day", "snow and fog tonight",
    "fresh bread with butter", "a bowl of hot soup", "rice and beans for lunch", "sweet apple cake",
]  # fmt: skip


def make_bpe_tokenizer(specials: list[str], **names: Any) -> Any:
    """Pieces of bytes, as GPT-2 and BART have them; `specials` are numbered from 0. `names`: bos_token and its like."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(SENTENCES * 3, vocab_size=320, special_tokens=specials, show_progress=False)
    made = Tokenizer.from_str(trained._tokenizer.to_str())
    if "cls_token" in names:
        numbers = {token: i for i, token in enumerate(specials)}
        first, last = names["cls_token"], names["sep_token"]
        made.post_processor = processors.RobertaProcessing((last, numbers[last]), (first, numbers[first]))
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **names)


def make_encoder_decoder(directory: Path, form: str) -> Path:
    """BART or T5, whose heads read the last end token of each text."""
    from tokenizers import SentencePieceUnigramTokenizer, Tokenizer, processors
    from transformers import BartConfig, PreTrainedTokenizerFast, T5Config

    if form == "bart":
        specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        tokenizer = make_bpe_tokenizer(
            specials, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", cls_token="<s>",
            sep_token="</s>", mask_token="<mask>",
        )  # fmt: skip
        config: Any = BartConfig(
            vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
            pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
        )  # fmt: skip
        return save_backbone(directory, config, tokenizer, "BartModel")
    trained = SentencePieceUnigramTokenizer()
    trained.train_from_iterator(
        SENTENCES * 3, vocab_size=150, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    made = Tokenizer.from_str(trained._tokenizer.to_str())
    made.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return save_backbone(directory, config, tokenizer, "T5Model")


def make_language_model(directory: Path, form: str, padding: str = "") -> Path:
    """GPT-2 or Llama; `padding` is a token that the tokenizer has, and the embedding no row for."""
    from transformers import GPT2Config, LlamaConfig

    if form == "gpt2":
        end = "<|endoftext|>"
        tokenizer = make_bpe_tokenizer([end], bos_token=end, eos_token=end, unk_token=end)
        config: Any = GPT2Config(
            vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
    else:
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        tokenizer = make_bpe_tokenizer(["<s>", "</s>", "<unk>"], **names)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
    if padding:
        tokenizer.add_special_tokens({"pad_token": padding})
    return save_backbone(directory, config, tokenizer, {"gpt2": "GPT2Model", "llama": "LlamaModel"}[form])


def make_xlnet(directory: Path) -> Path:
    """An XLNet with its own kind of tokenizer, which puts <sep> <cls> behind a text; large weights."""
    import json

    import sentencepiece
    from transformers import XLNetConfig, XLNetTokenizer

    directory.mkdir(parents=True)
    corpus, model = directory / "corpus.txt", directory / "spiece"
    corpus.write_text("\n".join(SENTENCES * 3))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(model), vocab_size=150, model_type="unigram", hard_vocab_limit=False,
        control_symbols="<cls>,<sep>,<pad>,<mask>,<eod>,<eop>", unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        minloglevel=2,
    )  # fmt: skip
    corpus.unlink()
    (directory / "spiece.vocab").unlink()
    (directory / "config.json").write_text(json.dumps({"model_type": "xlnet"}))
    tokenizer = XLNetTokenizer.from_pretrained(directory)
    config = XLNetConfig(
        vocab_size=len(tokenizer), d_model=32, n_layer=2, n_head=2, d_inner=64, initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return save_backbone(directory, config, tokenizer, "XLNetModel")
