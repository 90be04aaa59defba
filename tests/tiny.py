"""Backbones of audio and text with random weights, a few thousand parameters each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.conftest import save_backbone

WORDS = "the rain falls on hills bread with butter soup snow fog sun day cold wind a of and hot rice sweet apple cake"


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
