"""Continuous batching: sequences join the running batch when there is room and leave when they are done.

One call of `step` does at most one prefill pass of bounded size and one decode pass over all running rows, so that a long prompt delays
the others by no more than a pass at a time. Short prompts are prefilled together, one after another in a single row (nothing is padded);
a long one is prefilled in pieces while the others decode.

Invariant: rows [0, running) of the cache decode; row `running` belongs to the long prompt being prefilled, if there is one.
What a row computes does not depend on the others, up to the rounding of batched matrix products.
This class never blocks, sleeps or touches a clock; its thread and its queue are `slots.SlotEngine`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gpumarket.core.errors import ProtocolError
from gpumarket.node.engine.base import FINISH_LENGTH, FINISH_STOP, GenerateRequest, TokenLogprobs
from gpumarket.node.engine.kv_cache import COLUMN_BLOCK, SlotCache, block_cells
from gpumarket.node.engine.pick import pick_logprobs, pick_tokens


@dataclass(slots=True)
class Emission:
    """One drawn token of one sequence; `finish_reason` is not empty on its last, `logprobs` there where they were asked for."""

    key: int
    token: int
    finish_reason: str = ""
    logprobs: TokenLogprobs | None = None


@dataclass(slots=True)
class Row:
    """A sequence in work. `context` is prompt + prefix + output; the cache holds its first `cached` tokens."""

    key: int
    request: GenerateRequest
    context: list[int]
    cached: int = 0
    stops: frozenset[int] = field(default_factory=frozenset)

    @property
    def final_length(self) -> int:
        """Longest that the sequence may become."""
        return len(self.request.prompt) + self.request.max_tokens

    def accept(self, token: int, logprobs: TokenLogprobs | None = None) -> Emission:
        """Append a drawn token."""
        self.context.append(token)
        if token in self.stops:
            return Emission(self.key, token, FINISH_STOP, logprobs)
        return Emission(self.key, token, FINISH_LENGTH if len(self.context) >= self.final_length else "", logprobs)


class SlotDecoder:
    """The batch of a causal language model of transformers with full attention in every layer. Not thread-safe."""

    def __init__(self, model: Any, *, rows_max: int, cache_tokens_max: int, prefill_tokens: int) -> None:
        self.model = model
        self.rows_max = rows_max
        self.cache_tokens_max = cache_tokens_max
        self.prefill_tokens = prefill_tokens
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.length_max = int(getattr(model.config.get_text_config(), "max_position_embeddings", cache_tokens_max))
        self.device: torch.device = model.device
        self.cache = SlotCache(int(model.config.get_text_config().num_hidden_layers), cache_tokens_max)
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self.extending: Row | None = None
        self.steps = 0
        self._packed_last = False

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not (self.waiting or self.running or self.extending)

    def check(self, request: GenerateRequest) -> None:
        """ProtocolError unless the model can serve the request."""
        length = len(request.prompt) + request.max_tokens
        bound = min(self.length_max, self.cache_tokens_max - COLUMN_BLOCK)
        if length > bound:
            raise ProtocolError(
                f"prompt and max_tokens come to {length} tokens, the model serves {bound}",
                hint="shorten the prompt or lower max_tokens",
            )
        if (request.top_logprobs or 0) > self.vocabulary:
            raise ProtocolError(f"{request.top_logprobs} alternatives were asked for; the vocabulary has {self.vocabulary} tokens")
        self.check_ids(request.prompt)
        self.check_ids(request.prefix)

    def check_ids(self, ids: tuple[int, ...]) -> None:
        """ProtocolError unless every id is in the vocabulary."""
        for token in ids:
            if not 0 <= token < self.vocabulary:
                raise ProtocolError(
                    f"token id {token} is outside the vocabulary of {self.vocabulary}",
                    hint="tokenize with the tokenizer of this model's digest",
                )

    def submit(self, key: int, request: GenerateRequest) -> None:
        """Queue a request that `check` has passed."""
        context = [*request.prompt, *request.prefix]
        self.waiting.append(Row(key, request, context, stops=frozenset(request.stop_tokens)))

    @torch.inference_mode()
    def cancel(self, key: int) -> None:
        """Forget a sequence, wherever it is. Unknown keys are fine: it may have ended already."""
        self.waiting = deque(row for row in self.waiting if row.key != key)
        if self.extending is not None and self.extending.key == key:
            self.extending = None
        self._leave({key})

    def clear(self) -> None:
        """Forget everything, after a failure."""
        self.waiting.clear()
        self.running.clear()
        self.extending = None
        self.cache.release()

    @torch.inference_mode()
    def step(self) -> list[Emission]:
        """At most one prefill pass and one decode pass. Returns the tokens drawn, at most two per sequence."""
        self.steps += 1
        emitted = self._prefill()
        self._leave({e.key for e in emitted if e.finish_reason})
        if self.running:
            drawn = self._decode()
            self._leave({e.key for e in drawn if e.finish_reason})
            emitted += drawn
        return emitted

    def release(self) -> None:
        """Give the cache's memory back while nothing runs."""
        if self.idle:
            self.cache.release()

    def _decode(self) -> list[Emission]:
        rows = self.running
        positions, mask = self.cache.decode([row.cached for row in rows], self.device)
        tokens = torch.tensor([[row.context[-1]] for row in rows], device=self.device)
        logits = self._forward(tokens, positions, mask)[:, -1]
        for row in rows:
            row.cached += 1
        return self._draw(rows, logits)

    def _prefill(self) -> list[Emission]:
        if self.extending and self._packed_last:
            self._packed_last = False
            return self._extend(self.extending)
        group = self._group()
        self._packed_last = bool(group)
        if group:
            return self._pack(group)
        if self.extending is None and self.waiting and self._fits([self.waiting[0]]):
            self.extending = self.waiting.popleft()
            self._reserve([self.extending])
        return self._extend(self.extending) if self.extending else []

    def _group(self) -> list[Row]:
        """Waiting short prompts, first come first served, that fit one pass and the cache.

        They overtake a long prompt only while another is being prefilled, so a long one is never starved.
        """
        group: list[Row] = []
        total = 0
        for row in self.waiting:
            size = len(row.context)
            if size > self.prefill_tokens and self.extending:
                continue
            if total + size > self.prefill_tokens or not self._fits([*group, row]):
                break
            group.append(row)
            total += size
        for row in group:
            self.waiting.remove(row)
        self._reserve(group)
        return group

    def _fits(self, joining: list[Row]) -> bool:
        """Whether rows and cache have room. The cache is a rectangle: every row costs as much as the longest."""
        rows = self._rows(joining)
        return len(rows) <= self.rows_max and self._cells(len(rows), rows) <= self.cache_tokens_max

    def _reserve(self, joining: list[Row]) -> None:
        """Room for those that join, and, where the cache allows, at once for those that wait behind them: growing costs a copy."""
        if not joining:
            return
        rows = self._rows(joining)
        soon = min(self.rows_max, len(rows) + len(self.waiting))
        count = soon if self._cells(soon, rows) <= self.cache_tokens_max else len(rows)
        self.cache.reserve(count, max(row.final_length for row in rows))

    def _rows(self, joining: list[Row]) -> list[Row]:
        return [*self.running, *joining, *([self.extending] if self.extending else [])]

    @staticmethod
    def _cells(count: int, rows: list[Row]) -> int:
        return block_cells(count, max(row.final_length for row in rows))

    def _pack(self, group: list[Row]) -> list[Emission]:
        lengths = [len(row.context) for row in group]
        first = len(self.running) + (1 if self.extending else 0)
        positions, mask = self.cache.pack(first, lengths, self.device)
        tokens = torch.tensor([[t for row in group for t in row.context]], device=self.device)
        ends = torch.tensor(lengths).cumsum(0) - 1
        logits = self._forward(tokens, positions, mask, keep=ends)[0]
        for row, length in zip(group, lengths, strict=True):
            row.cached = length
        if self.extending:
            # The long prompt gives its place to the last of the group and goes behind it.
            last = first + len(group) - 1
            self.cache.swap(first - 1, last, max(self.extending.cached, lengths[-1]))
            self.running += [group[-1], *group[:-1]]
        else:
            self.running += group
        return self._draw(group, logits)

    def _extend(self, row: Row) -> list[Emission]:
        count = min(self.prefill_tokens, len(row.context) - row.cached)
        positions, mask = self.cache.extend(len(self.running), row.cached, count, self.device)
        tokens = torch.tensor([row.context[row.cached : row.cached + count]], device=self.device)
        logits = self._forward(tokens, positions, mask, keep=torch.tensor([count - 1]))[0]
        row.cached += count
        if row.cached < len(row.context):
            return []
        self.extending = None
        self.running.append(row)
        return self._draw([row], logits)

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, keep: Tensor | int = 0) -> Tensor:
        out = self.model(
            tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: Tensor = out.logits
        return logits

    def _draw(self, rows: list[Row], logits: Tensor) -> list[Emission]:
        tokens = pick_tokens(logits, [len(row.context) for row in rows], [row.request.sampling for row in rows])
        if all(row.request.top_logprobs is None for row in rows):
            return [row.accept(token) for row, token in zip(rows, tokens, strict=True)]
        found = pick_logprobs(logits, tokens, [row.request.top_logprobs for row in rows])
        return [row.accept(token, told) for row, token, told in zip(rows, tokens, found, strict=True)]

    def _leave(self, keys: set[int]) -> None:
        """Drop running rows; the last takes the place of each, so that the rows in use stay the first ones."""
        before = len(self.running)
        for index in range(before - 1, -1, -1):
            if self.running[index].key in keys:
                last = self.running.pop()
                if index < len(self.running):
                    self.running[index] = last
                    self.cache.move(len(self.running), index, last.cached)
        if self.extending and len(self.running) < before and self.extending.cached:
            self.cache.move(before, len(self.running), self.extending.cached)
