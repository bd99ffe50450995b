"""A small Llama with random weights and a byte-level BPE tokenizer, for demo and tests: `python -m gpumarket.node.models.tiny_llama OUT`.

Its text means nothing; it is as quick as a model can be and exercises everything that a real one does. The weights are scaled so that its
next-token distribution is about as peaked as a trained model's: near-uniform logits would hide what verification has to see.

Invariant: the same seed, library versions and text give the same bytes.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

SPECIAL_TOKENS: Final = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
VOCABULARY: Final = 2000
POSITIONS: Final = 2048
LOGIT_SPREAD: Final = 3.0
"""Standard deviation of a row of logits. Measured on this model: the entropy of a draw is about 5 of 11 bits."""

CHAT_TEMPLATE: Final = (
    "<s>{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tiny_llama(out: Path, *, seed: int = 0, hidden: int = 128, layers: int = 4, heads: int = 4, vocabulary: int = VOCABULARY) -> None:
    """Write the model, its tokenizer and its chat template to `out` (created). Half a million to a few million parameters; 2-5 s."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(vocabulary)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3 // 32 * 32,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 2),
            max_position_embeddings=POSITIONS,
            initializer_range=0.5 / hidden**0.5 * 2,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    with torch.no_grad():
        # After the last norm a state has length sqrt(hidden), so this is the spread of the logits.
        model.lm_head.weight.normal_(0.0, LOGIT_SPREAD / hidden**0.5)
        # Special tokens are never drawn, but for the end of text now and then.
        model.lm_head.weight[[0, 1, 3, 4, 5]] = 0.0
    disable_progress_bar()  # type: ignore[no-untyped-call]
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def train_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the language reference that ships with every Python."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_text(), trainer)
    ends = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)  # type: ignore[no-untyped-call]
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _text() -> Iterator[str]:
    for topic in sorted(pydoc_data.topics.topics):
        yield pydoc_data.topics.topics[topic]


def main() -> None:
    """Make the model in the folder given."""
    parser = argparse.ArgumentParser(description="make a small Llama with random weights")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    make_tiny_llama(arguments.out, seed=arguments.seed)


if __name__ == "__main__":
    main()
