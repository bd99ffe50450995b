"""From texts, messages and token ids to request bodies, with what had to be cut said as warnings. Pure but for the tokenizer.

Invariant: token ids of the caller go out as they are, nothing added and nothing cut; an option that is off leaves no byte in the request.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

from gpumarket.core.errors import InvalidRequest
from gpumarket.core.seeds import CLIENT_SEED_MAX, CLIENT_SEED_MIN
from gpumarket.core.units import PER_MILLION
from gpumarket.sdk.model_files import LoadedModel
from gpumarket.sdk.results import InputTruncated, OutputLimited, Warnings
from gpumarket.v1 import terms_pb2 as pb

TEMPERATURE_MAX = 2.0
TOP_LOGPROBS_MAX = 20
Tokens = Sequence[int]
Inputs = str | Tokens | Sequence[str] | Sequence[Tokens]
"""One input or several of them, each a text or its token ids."""


@dataclass(frozen=True, slots=True)
class Body:
    """A request body. `units` are its input tokens, `output_units` as JobSpec.max_output_units has them."""

    request: bytes
    units: int
    output_units: int
    warnings: Warnings


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. Temperature 0 takes the likeliest; `top_p` 1 keeps every candidate. `seed` is a signed 64-bit number; None lets
    the market draw one that nobody chose. `logprobs` alternatives come with each token's logprob; None is without."""

    max_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0 <= self.temperature <= TEMPERATURE_MAX:
            raise InvalidRequest(f"temperature is {self.temperature}; it must lie between 0 and {TEMPERATURE_MAX:g}")
        if not 0 < self.top_p <= 1:
            raise InvalidRequest(f"top_p is {self.top_p}; it must lie above 0 and not above 1")
        if self.seed is not None and not CLIENT_SEED_MIN <= self.seed <= CLIENT_SEED_MAX:
            raise InvalidRequest(f"seed is {self.seed}; it must be a signed number of 64 bits")
        if self.logprobs is not None and not 0 <= self.logprobs <= TOP_LOGPROBS_MAX:
            raise InvalidRequest(f"logprobs is {self.logprobs}; it must lie between 0 and {TOP_LOGPROBS_MAX}, or be None")


def embed_body(model: LoadedModel, inputs: Inputs) -> Body:
    """Token ids of each text, with the tokenizer's own marks, or those that the caller gives, as they are. Raises InvalidRequest for no
    input, one without tokens, and ids that the model does not have or that are more than it takes."""
    each = [inputs] if is_one(inputs) else list(inputs)
    if not each:
        raise InvalidRequest("there is nothing to embed: the list of inputs is empty")
    limit = model.entry.max_input_tokens
    warnings: list[InputTruncated] = []
    lists: list[pb.TokenList] = []
    units = 0
    for index, entry in enumerate(each):
        if isinstance(entry, str):
            encoded = model.codec.encode(entry, limit=limit)
            ids = encoded.ids
            if encoded.truncated:
                warnings.append(InputTruncated(index, encoded.full_length, len(ids)))
        else:
            ids = _token_ids(model, entry, f"input {index}")
            if len(ids) > limit:
                raise InvalidRequest(f"input {index} has {len(ids)} tokens; model {model.entry.name} takes {limit}", hint="shorten it")
        if not ids:
            raise InvalidRequest(f"input {index} has no tokens", hint="leave empty texts out")
        units += len(ids)
        lists.append(pb.TokenList(ids=ids))
    return Body(pb.EmbedRequest(inputs=lists).SerializeToString(deterministic=True), units, units, tuple(warnings))


def chat_body(model: LoadedModel, messages: Sequence[Mapping[str, str]], sampling: Sampling) -> Body:
    """The rendered conversation; its template brings the special tokens itself."""
    return _generate(model, _encoded(model, model.files.template.render(messages), special_tokens=False), sampling)


def completion_body(model: LoadedModel, prompt: str | Tokens, sampling: Sampling) -> Body:
    """A raw prompt, with the tokenizer's own marks; or token ids as they are, which are never cut. Raises InvalidRequest for ids that the
    model does not have, or so many that no answer fits beside them."""
    if isinstance(prompt, str):
        return _generate(model, _encoded(model, prompt, special_tokens=True), sampling)
    ids, context = _token_ids(model, prompt, "the prompt"), model.entry.max_input_tokens
    if len(ids) >= context:
        raise InvalidRequest(
            f"the prompt has {len(ids)} tokens; model {model.entry.name} takes {context} with the answer", hint="shorten it"
        )
    return _generate(model, ids, sampling)


def is_one(inputs: Inputs) -> bool:
    """Whether this is one input, not several: a text, or a list that begins with a token id."""
    return isinstance(inputs, str) or (len(inputs) > 0 and isinstance(inputs[0], SupportsIndex))


def _token_ids(model: LoadedModel, given: object, what: str) -> tuple[int, ...]:
    """Raises InvalidRequest for what is no sequence of ids of this model's vocabulary."""
    size = model.files.vocabulary
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise InvalidRequest(f"{what} is neither a text nor a list of token ids")
    ids = []
    for entry in given:
        if not isinstance(entry, SupportsIndex) or isinstance(entry, bool):
            raise InvalidRequest(f"{what} is no list of token ids: it holds {type(entry).__name__}")
        ids.append(operator.index(entry))
    wrong = next((token for token in ids if not 0 <= token < size), None)
    if wrong is not None:
        raise InvalidRequest(
            f"{what} has token id {wrong}; model {model.entry.name} has {size} of them, from 0",
            hint="use the tokenizer of this very model",
        )
    return tuple(ids)


def _encoded(model: LoadedModel, text: str, *, special_tokens: bool) -> tuple[int, ...]:
    return model.codec.encode(text, limit=2**31 - 1, special_tokens=special_tokens).ids


def _generate(model: LoadedModel, ids: tuple[int, ...], sampling: Sampling) -> Body:
    """Prompt and answer share the model's context: a prompt leaves room for one token at least, an answer gets what is left."""
    context = model.entry.max_input_tokens
    if not ids:
        raise InvalidRequest("the prompt has no tokens", hint="give a prompt")
    warnings: list[InputTruncated | OutputLimited] = []
    allowed = min(sampling.max_tokens, max(1, context - len(ids)))
    keep = context - allowed
    if keep < 1:
        raise InvalidRequest(f"model {model.entry.name} takes {context} tokens in all: no prompt fits beside {allowed} tokens of answer")
    if len(ids) > keep:
        warnings.append(InputTruncated(0, len(ids), keep))
        ids = ids[-keep:]  # the end of a conversation is what is to be answered
    if allowed < sampling.max_tokens:
        warnings.append(OutputLimited(sampling.max_tokens, allowed))
    request = pb.GenerateRequest(
        prompt=ids,
        max_tokens=allowed,
        stop_tokens=model.files.stop_tokens,
        temperature_milli=round(sampling.temperature * 1_000),
        top_p_ppm=max(1, round(sampling.top_p * PER_MILLION)),
        client_seed=sampling.seed,
        top_logprobs=sampling.logprobs,
    )
    return Body(request.SerializeToString(deterministic=True), len(ids), allowed, tuple(warnings))


def warnings_to_json(warnings: Warnings) -> list[dict[str, Any]]:
    """For the journal: a resumed job still says what was cut."""
    kinds: dict[type, str] = {InputTruncated: "input", OutputLimited: "output"}
    return [{"kind": kinds[type(w)], **{name: getattr(w, name) for name in w.__slots__}} for w in warnings]


def warnings_from_json(stored: Sequence[Mapping[str, Any]]) -> Warnings:
    """Inverse of `warnings_to_json`."""
    found: list[InputTruncated | OutputLimited] = []
    for entry in stored:
        values = {name: value for name, value in entry.items() if name != "kind"}
        found.append(InputTruncated(**values) if entry["kind"] == "input" else OutputLimited(**values))
    return tuple(found)
