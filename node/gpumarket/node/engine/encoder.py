"""A sentence encoder: token ids to vectors, pooled and normalised as the model's own sentence-transformers files say.

Invariant: the result for a text is that of sentence-transformers for the same tokens, and does not depend on its batch up to 1e-6.
A folder whose pooling we do not know is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpumarket.core.errors import ConfigError, EngineFailed, ProtocolError
from gpumarket.node.engine.loading import load_encoder, read_json

POOLINGS: Final = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
"""What is supported, and the flag by which older files name it."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What happens to the token states: one of POOLINGS, then a division by the Euclidean norm or not."""

    pooling: str
    normalise: bool
    tokens_max: int | None


def read_recipe(folder: Path) -> Recipe:
    """From modules.json and the pooling's config.json. ConfigError when anything in it is unknown."""
    if not (folder / "modules.json").is_file():
        raise ConfigError(f"{folder} has no modules.json", hint="embeddings need a sentence-transformers model")
    pooling, normalise, tokens_max = "", False, None
    for module in read_json(folder / "modules.json"):
        kind = str(module["type"]).rsplit(".", 1)[-1]
        if kind == "Pooling":
            pooling = _pooling(read_json(_within(folder, module["path"]) / "config.json"))
        elif kind == "Normalize":
            normalise = True
        elif kind != "Transformer":
            raise ConfigError(f"modules.json names {kind}, which is not served", hint="Transformer, Pooling, Normalize")
    if not pooling:
        raise ConfigError("modules.json has no Pooling", hint="save the model with sentence-transformers")
    if (folder / "sentence_bert_config.json").is_file():
        tokens_max = read_json(folder / "sentence_bert_config.json").get("max_seq_length")
    return Recipe(pooling, normalise, tokens_max)


def load_encoder_model(folder: Path, compute_dtype: str) -> Encoder:
    """Recipe and weights of a folder. ConfigError for an unsafe or unknown folder, EngineFailed when it does not load."""
    model = load_encoder(folder, compute_dtype)
    return Encoder(model, read_recipe(folder))


class Encoder:
    """The model in memory. Not thread-safe."""

    def __init__(self, model: Any, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.device: torch.device = model.device
        self.vocabulary = int(model.config.vocab_size)
        self.dimensions = int(model.config.hidden_size)
        positions = int(model.config.max_position_embeddings)
        self.tokens_max = min(positions, recipe.tokens_max or positions)

    def check(self, inputs: Sequence[Sequence[int]]) -> None:
        """ProtocolError unless every text fits the model and every id its vocabulary."""
        for i, ids in enumerate(inputs):
            if len(ids) > self.tokens_max:
                raise ProtocolError(
                    f"input {i} has {len(ids)} tokens, the model reads {self.tokens_max}",
                    hint="truncate when tokenizing, or split the text",
                )
            if min(ids) < 0 or max(ids) >= self.vocabulary:
                raise ProtocolError(
                    f"input {i} has token ids outside the vocabulary of {self.vocabulary}",
                    hint="tokenize with the tokenizer of this model's digest",
                )

    def encode_sorted(self, texts: Sequence[Sequence[int]], batch_tokens: int) -> tuple[NDArray[np.float32], int]:
        """Vectors float32 [texts, dimensions] in the order given, computed in batches of similar length; and how many batches."""
        vectors = np.empty((len(texts), self.dimensions), dtype=np.float32)
        batches = 0
        for batch in batches_by_length([len(ids) for ids in texts], batch_tokens):
            vectors[batch] = self.encode([texts[i] for i in batch])
            batches += 1
        return vectors, batches

    @torch.inference_mode()
    def encode(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Vectors of one batch. EngineFailed when the model computed something that is no number."""
        width = max(map(len, texts))
        ids = torch.zeros(len(texts), width, dtype=torch.long)
        mask = torch.zeros(len(texts), width, dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        pooled = self._pool(states, mask)
        if self.recipe.normalise:
            pooled = torch.nn.functional.normalize(pooled, dim=1)
        if not bool(torch.isfinite(pooled).all()):
            raise EngineFailed("the model computed vectors that are not finite", hint="try compute dtype float32")
        result: NDArray[np.float32] = pooled.cpu().numpy()
        return result

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        if self.recipe.pooling == "cls":
            return states[:, 0]
        weights = mask[:, :, None].float()
        return (states * weights).sum(1) / weights.sum(1)


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of the texts, shortest first, in batches whose padded size is at most `batch_tokens`; a longer text goes alone."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _pooling(config: dict[str, Any]) -> str:
    prefix = "pooling_mode_"
    flags = [key.removeprefix(prefix) for key, on in config.items() if on is True and key.startswith(prefix)]
    by_flag = {flag.removeprefix(prefix): name for name, flag in POOLINGS.items()}
    wanted = [config["pooling_mode"]] if "pooling_mode" in config else flags
    found = [by_flag.get(str(name), str(name)) for name in wanted]
    if len(found) != 1 or found[0] not in POOLINGS:
        raise ConfigError(f"pooling {', '.join(found) or 'none'} is not served", hint=f"one of {', '.join(POOLINGS)}")
    return found[0]


def _within(folder: Path, relative: str) -> Path:
    path = (folder / relative).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ConfigError(f"modules.json names {relative}, outside the model folder", hint="do not serve this model")
    return path
