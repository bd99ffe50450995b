"""Every endpoint of the OpenAI side, as a table: the router, the metrics and /openapi.json are made from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web
from msgspec import Struct

from gpumarket.gateway.call import Call
from gpumarket.gateway.openai import chat, completions, embeddings, models, responses
from gpumarket.gateway.openai.tables import ChatRequest, CompletionRequest, EmbeddingRequest, ResponseRequest

Handler = Callable[[Call], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`name` is its label in metrics, `table` what its body holds; `streams`: whether the answer may be a stream of events."""

    method: str
    path: str
    name: str
    summary: str
    handler: Handler
    table: type[Struct] | None = None
    streams: bool = False

    @property
    def route(self) -> str:
        """The path as the router takes it: an alias may hold slashes."""
        return self.path.replace("{model}", "{model:.+}")


OPENAI = (
    Endpoint("GET", "/v1/models", "models", "The models that this key may use", models.list_models),
    Endpoint("GET", "/v1/models/{model}", "model", "One model", models.get_model),
    Endpoint("POST", "/v1/chat/completions", "chat", "Answer a conversation", chat.create, ChatRequest, True),
    Endpoint("POST", "/v1/completions", "completions", "Continue a prompt", completions.create, CompletionRequest, True),
    Endpoint("POST", "/v1/embeddings", "embeddings", "Embed texts", embeddings.create, EmbeddingRequest),
    Endpoint("POST", "/v1/responses", "responses", "Answer an input", responses.create, ResponseRequest, True),
)
