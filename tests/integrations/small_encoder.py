"""A small sentence encoder, made on the spot: a word a token, two layers."""

from __future__ import annotations

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizer

WORDS = [f"word{i}" for i in range(40)]


def small_encoder(
    directory, dtype: torch.dtype = torch.float64, seed: int = 0, words: list[str] = WORDS
) -> SentenceTransformer:
    """Without dropout, in ``directory``: two calls give the same."""
    torch.manual_seed(seed)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (directory / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(directory / "vocab.txt")).save_pretrained(directory)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(directory)
    return load_encoder(directory, dtype)


def load_encoder(directory, dtype: torch.dtype = torch.float64) -> SentenceTransformer:
    """What :func:`small_encoder` has made there; in a process of a group, too, of which only the first writes files."""
    return SentenceTransformer(modules=[Transformer(str(directory)), Pooling(24)], device="cpu").to(dtype)


def sentences(count: int, seed: int) -> list[str]:
    rng = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (5,), generator=rng)) for _ in range(count)]
