"""What each endpoint takes: a field for every parameter that OpenAI documents (a test compares with the official client), see `fields`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from gpumarket.gateway.openai.fields import (
    NOTHING,
    AnyTier,
    Count,
    Empty,
    Model,
    Never,
    NoPairs,
    OneOption,
    Refused,
    Seed,
    Stop,
    StreamOptions,
    Temperature,
    TokenId,
    TopP,
    Zero,
)

# --- chat ----------------------------------------------------------------------------------------------------------------------


class TextPart(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    """A part of a message. Images, audio and files are refused."""

    text: str


Parts = Annotated[list[TextPart], Meta(min_length=1)]


class DeveloperMessage(Struct, tag_field="role", tag="developer", forbid_unknown_fields=True):
    """The same as a system message."""

    content: str | Parts
    name: Refused = None


class SystemMessage(Struct, tag_field="role", tag="system", forbid_unknown_fields=True):
    content: str | Parts
    name: Refused = None


class UserMessage(Struct, tag_field="role", tag="user", forbid_unknown_fields=True):
    content: str | Parts
    name: Refused = None


class AssistantMessage(Struct, tag_field="role", tag="assistant", forbid_unknown_fields=True):
    """An earlier answer, as it may be sent back: fields of tools and audio are null or empty."""

    content: str | Parts
    name: Refused = None
    refusal: Refused = None
    audio: Refused = None
    function_call: Refused = None
    tool_calls: Empty = None
    annotations: Empty = None


Message = DeveloperMessage | SystemMessage | UserMessage | AssistantMessage


class TextFormat(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    """Plain text; JSON modes are refused."""


class ChatRequest(Struct, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    model: Model
    messages: Annotated[list[Message], Meta(min_length=1, max_length=10_000)]
    max_completion_tokens: Count = None
    max_tokens: Count = None
    temperature: Temperature = None
    top_p: TopP = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    seed: Seed = None
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: NoPairs = None
    metadata: NoPairs = None
    modalities: Annotated[list[Literal["text"]], Meta(max_length=1, extra=NOTHING)] | None = None
    response_format: TextFormat | None = None
    service_tier: AnyTier = None
    store: Never = None
    tools: Empty = None
    tool_choice: Annotated[Literal["none", "auto"], Meta(extra=NOTHING)] | None = None
    functions: Empty = None
    function_call: Annotated[Literal["none", "auto"], Meta(extra=NOTHING)] | None = None
    parallel_tool_calls: Annotated[Literal[True], Meta(extra=NOTHING)] | None = None
    audio: Refused = None
    moderation: Refused = None
    prediction: Refused = None
    prompt_cache_key: Refused = None
    prompt_cache_options: Refused = None
    prompt_cache_retention: Refused = None
    reasoning_effort: Refused = None
    safety_identifier: Refused = None
    user: Refused = None
    verbosity: Refused = None
    web_search_options: Refused = None


# --- completions ---------------------------------------------------------------------------------------------------------------

Tokens = Annotated[list[TokenId], Meta(min_length=1)]
Mixed = Annotated[list[str | TokenId | Tokens], Meta(min_length=1)]
"""A list of texts, of token ids, or of lists of these: one kind in one list."""


class CompletionRequest(Struct, forbid_unknown_fields=True):
    """POST /v1/completions."""

    model: Model
    prompt: str | Mixed
    max_tokens: Count = None
    temperature: Temperature = None
    top_p: TopP = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    seed: Seed = None
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    best_of: OneOption = None
    echo: Never = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: NoPairs = None
    suffix: Refused = None
    user: Refused = None


# --- embeddings ----------------------------------------------------------------------------------------------------------------


class EmbeddingRequest(Struct, forbid_unknown_fields=True):
    """POST /v1/embeddings. A model has the dimensions that it has: to ask for fewer is refused."""

    model: Model
    input: Annotated[str, Meta(min_length=1)] | Mixed
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Refused = None
    user: Refused = None


# --- responses -----------------------------------------------------------------------------------------------------------------


class InputText(Struct, tag_field="type", tag="input_text", forbid_unknown_fields=True):
    text: str


class OutputText(Struct, tag_field="type", tag="output_text", forbid_unknown_fields=True):
    """An earlier answer's text, as it may be sent back."""

    text: str
    annotations: Empty = None
    logprobs: list[Any] | None = None


class InputMessage(Struct, forbid_unknown_fields=True):
    """A message. An earlier answer keeps its `id` and `status`."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[list[InputText | OutputText], Meta(min_length=1)]
    type: Literal["message"] | UnsetType = UNSET
    id: Annotated[str, Meta(max_length=200)] | None = None
    status: Literal["completed", "incomplete"] | None = None
    phase: Refused = None


class ResponseTextFormat(Struct, forbid_unknown_fields=True):
    """How the text is formed: plainly."""

    format: TextFormat | None = None
    verbosity: Refused = None


class ResponseStreamOptions(Struct, forbid_unknown_fields=True):
    """Of a stream."""

    include_obfuscation: Never = None


class ResponseRequest(Struct, forbid_unknown_fields=True):
    """POST /v1/responses. Nothing is stored: `store` may be false or left out, and no earlier response can be referred to."""

    model: Model
    input: Annotated[str, Meta(min_length=1)] | Annotated[list[InputMessage], Meta(min_length=1, max_length=10_000)]
    instructions: str | None = None
    max_output_tokens: Count = None
    temperature: Temperature = None
    top_p: TopP = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], Meta(max_length=1)] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    text: ResponseTextFormat | None = None
    background: Never = None
    metadata: NoPairs = None
    parallel_tool_calls: Annotated[Literal[True], Meta(extra=NOTHING)] | None = None
    service_tier: AnyTier = None
    store: Never = None
    tools: Empty = None
    tool_choice: Annotated[Literal["none", "auto"], Meta(extra=NOTHING)] | None = None
    truncation: Annotated[Literal["disabled"], Meta(extra=NOTHING)] | None = None
    access_programs: Refused = None
    background_options: Refused = None
    context_management: Refused = None
    conversation: Refused = None
    image: Refused = None
    max_tool_calls: Refused = None
    moderation: Refused = None
    previous_response_id: Refused = None
    prompt: Refused = None
    prompt_cache_key: Refused = None
    prompt_cache_options: Refused = None
    prompt_cache_retention: Refused = None
    reasoning: Refused = None
    safety_identifier: Refused = None
    user: Refused = None
