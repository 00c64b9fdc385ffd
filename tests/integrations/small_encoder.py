"""A small sentence encoder, made on the spot: a word a token, two layers."""

from __future__ import annotations

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizer

WORDS = [f"word{i}" for i in range(40)]


def small_encoder(directory, dtype: torch.dtype = torch.float64) -> SentenceTransformer:
    """Without dropout, in ``directory``: two calls give the same."""
    torch.manual_seed(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (directory / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(directory / "vocab.txt")).save_pretrained(directory)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(directory)
    encoder = Transformer(str(directory))
    return SentenceTransformer(modules=[encoder, Pooling(24)], device="cpu").to(dtype)


def sentences(count: int, seed: int) -> list[str]:
    rng = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (5,), generator=rng)) for _ in range(count)]
