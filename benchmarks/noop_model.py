"""A model as near to nothing as an honest engine process can serve: a random BERT of one layer and 32 dimensions, words as tokens."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel

NAME = "no-op"
DIMENSIONS = 32
WORDS = ("red", "fox", "blue", "hen")
TEXT = " ".join(WORDS)


def make_noop_model(out: Path) -> None:
    """Write it as sentence-transformers would."""
    torch.manual_seed(0)
    vocabulary = {word: index for index, word in enumerate(("[UNK]", *WORDS))}
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=DIMENSIONS,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=DIMENSIONS,
        max_position_embeddings=16,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(out)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "1_Pooling").mkdir()
    (out / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (path, kind) in enumerate(modules)
    ]
    (out / "modules.json").write_text(json.dumps(listed))
