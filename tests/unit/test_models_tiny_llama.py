"""The small Llama is the same wherever it is made, and its draws are as peaked as verification needs."""

from __future__ import annotations

from importlib import util
from pathlib import Path

import pytest
import torch
from engine_kit import prompt, small_llama
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpumarket.core.errors import MissingExtra
from gpumarket.node.models.minilm import minilm_path
from gpumarket.node.models.tiny_llama import SPECIAL_TOKENS, make_tiny_llama


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_same_seed_gives_same_bytes_and_another_other_weights(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "again", hidden=64, layers=2, vocabulary=600)
    first, again, other = content(small_llama()), content(tmp_path / "again"), content(small_llama(1))
    assert first == again
    assert first["model.safetensors"] != other["model.safetensors"]
    assert first["tokenizer.json"] == other["tokenizer.json"]


def test_tokenizer_roundtrips_text_and_renders_chats() -> None:
    tokenizer = Tokenizer.from_file(str(small_llama() / "tokenizer.json"))
    text = "Grüße an den Fuchs 🦊\n  def f(): pass"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    rendered = AutoTokenizer.from_pretrained(small_llama()).apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=False
    )
    assert rendered == "<s><|user|>hello</s><|assistant|>"
    ids = tokenizer.encode(rendered).ids
    assert ids[:2] == [1, SPECIAL_TOKENS.index("<|user|>")] and ids[-1] == SPECIAL_TOKENS.index("<|assistant|>")


def test_distribution_is_neither_flat_nor_a_single_token() -> None:
    model = AutoModelForCausalLM.from_pretrained(small_llama(), dtype=torch.float32)
    with torch.inference_mode():
        log_p = model(torch.tensor([prompt(64)])).logits[0].log_softmax(-1)
    bits = -(log_p.exp() * log_p).sum(-1) / torch.log(torch.tensor(2.0))
    assert 2 < bits.mean() < 7


def test_minilm_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (minilm_path() / "model.safetensors").is_file()
    monkeypatch.setattr("gpumarket.node.models.minilm.find_spec", lambda name: None if "minilm" in name else util.find_spec(name))
    with pytest.raises(MissingExtra) as missing:
        minilm_path()
    assert "testnet" in missing.value.hint
