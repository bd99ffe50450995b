"""Small models for tests of the SDK: real tokenizers made on the spot, a chat template, and the manifests that pin them."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gpumarket.core.tensors import SIGNATURE_FILE, Signature, TensorSpec, signature_to_json
from gpumarket.core.terms import ManifestFile, ModelManifest, Task
from gpumarket.core.units import Hash

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "größer, höher, weiter: Übermut tut selten gut",
    "naïve café 日本語のテキスト 🙂🙃",
] * 4


@lru_cache
def bytes_tokenizer() -> bytes:
    """Byte-level BPE: characters of several bytes come apart into several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer.to_str().encode()


@lru_cache
def words_tokenizer() -> bytes:
    """Words with [CLS] and [SEP], with padding and a truncation of its own switched on, as published tokenizers have."""
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", *(f"w{i}" for i in range(60))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.enable_padding(length=32, pad_id=3, pad_token="[PAD]")
    tokenizer.enable_truncation(8)
    return tokenizer.to_str().encode()


TENSORS = Signature((TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1,)), TensorSpec("n", "INT64", (-1,))), True)


def small_files(task: Task) -> dict[str, bytes]:
    if task is Task.INFER:
        return {SIGNATURE_FILE: signature_to_json(TENSORS)}
    if task is Task.EMBED:
        return {"tokenizer.json": words_tokenizer(), "config.json": b"{}"}
    config = {"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    return {
        "config.json": json.dumps({"eos_token_id": 1}).encode(),
        "tokenizer.json": bytes_tokenizer(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def manifest(task: Task, max_input_tokens: int) -> ModelManifest:
    files = [ManifestFile(path, Hash(hashlib.sha256(data).digest()), len(data)) for path, data in small_files(task).items()]
    files.append(ManifestFile("model.safetensors", Hash(hashlib.sha256(task.name.encode()).digest()), 1))
    return ModelManifest(task.name.lower(), task, "float32", "none", "Apache-2.0", max_input_tokens, tuple(sorted(files)))


EMBED = manifest(Task.EMBED, 16)
CHAT = manifest(Task.GENERATE, 256)
TABLE = manifest(Task.INFER, 16)
