"""From texts and messages to request bodies of token ids, with what had to be cut said as warnings. Pure but for the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpumarket.core.errors import ConfigError
from gpumarket.core.units import PER_MILLION
from gpumarket.sdk.model_files import LoadedModel
from gpumarket.sdk.results import InputTruncated, OutputLimited, Warnings
from gpumarket.v1 import terms_pb2 as pb

TEMPERATURE_MAX = 2.0


@dataclass(frozen=True, slots=True)
class Body:
    """A request body. `units` are its input tokens, `output_units` as JobSpec.max_output_units has them."""

    request: bytes
    units: int
    output_units: int
    warnings: Warnings


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. Temperature 0 takes the likeliest; `top_p` 1 keeps every candidate."""

    max_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0 <= self.temperature <= TEMPERATURE_MAX:
            raise ConfigError(f"temperature is {self.temperature}; it must lie between 0 and {TEMPERATURE_MAX:g}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must lie above 0 and not above 1")


def embed_body(model: LoadedModel, texts: Sequence[str]) -> Body:
    """Token ids of each text, with the tokenizer's own marks. Raises ConfigError for no text or one without tokens."""
    if not texts:
        raise ConfigError("there is nothing to embed: the list of texts is empty")
    limit = model.entry.max_input_tokens
    warnings: list[InputTruncated] = []
    lists: list[pb.TokenList] = []
    units = 0
    for index, text in enumerate(texts):
        encoded = model.codec.encode(text, limit=limit)
        if not encoded.ids:
            raise ConfigError(f"input {index} has no tokens", hint="leave empty texts out")
        if encoded.truncated:
            warnings.append(InputTruncated(index, encoded.full_length, len(encoded.ids)))
        units += len(encoded.ids)
        lists.append(pb.TokenList(ids=encoded.ids))
    return Body(pb.EmbedRequest(inputs=lists).SerializeToString(deterministic=True), units, units, tuple(warnings))


def chat_body(model: LoadedModel, messages: Sequence[Mapping[str, str]], sampling: Sampling) -> Body:
    """The rendered conversation; its template brings the special tokens itself."""
    return _generate(model, model.files.template.render(messages), sampling, special_tokens=False)


def completion_body(model: LoadedModel, prompt: str, sampling: Sampling) -> Body:
    """A raw prompt, with the tokenizer's own marks."""
    return _generate(model, prompt, sampling, special_tokens=True)


def _generate(model: LoadedModel, text: str, sampling: Sampling, *, special_tokens: bool) -> Body:
    """Prompt and answer share the model's context: a prompt leaves room for one token at least, an answer gets what is left."""
    context = model.entry.max_input_tokens
    ids = model.codec.encode(text, limit=2**31 - 1, special_tokens=special_tokens).ids
    if not ids:
        raise ConfigError("the prompt has no tokens", hint="give a prompt")
    warnings: list[InputTruncated | OutputLimited] = []
    allowed = min(sampling.max_tokens, max(1, context - len(ids)))
    keep = context - allowed
    if keep < 1:
        raise ConfigError(f"model {model.entry.name} takes {context} tokens in all: no prompt fits beside {allowed} tokens of answer")
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
    )
    return Body(request.SerializeToString(deterministic=True), len(ids), allowed, tuple(warnings))


def warnings_to_json(warnings: Warnings) -> list[dict[str, Any]]:
    """For the journal: a resumed job still says what was cut."""
    kinds = {InputTruncated: "input", OutputLimited: "output"}
    return [{"kind": kinds[type(w)], **{name: getattr(w, name) for name in w.__slots__}} for w in warnings]


def warnings_from_json(stored: Sequence[Mapping[str, Any]]) -> Warnings:
    """Inverse of `warnings_to_json`."""
    found: list[InputTruncated | OutputLimited] = []
    for entry in stored:
        values = {name: value for name, value in entry.items() if name != "kind"}
        found.append(InputTruncated(**values) if entry["kind"] == "input" else OutputLimited(**values))
    return tuple(found)
