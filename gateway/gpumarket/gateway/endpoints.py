"""Every endpoint that takes a key, as a table: the router, the metrics and /openapi.json are made from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web
from msgspec import Struct

from gpumarket.gateway.call import Call
from gpumarket.gateway.inference_protocol import rest
from gpumarket.gateway.inference_protocol.tables import InferRequest
from gpumarket.gateway.openai import chat, completions, embeddings, models, responses
from gpumarket.gateway.openai.tables import ChatRequest, CompletionRequest, EmbeddingRequest, ResponseRequest

Handler = Callable[[Call], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`name` is its label in metrics, `table` what its body holds; `streams`: whether the answer may be a stream of events; `plain`:
    whether its errors have the shape of the Open Inference Protocol; `binary`: whether tensors may come and go as bytes."""

    method: str
    path: str
    name: str
    summary: str
    handler: Handler
    table: type[Struct] | None = None
    streams: bool = False
    plain: bool = False
    binary: bool = False

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
_MODEL, _VERSION = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
INFERENCE = (
    Endpoint("POST", f"{_VERSION}/infer", "infer_version", "Run a tensor model", rest.infer, InferRequest, plain=True, binary=True),
    Endpoint("GET", f"{_VERSION}/ready", "ready_version", "Whether somebody sells it now", rest.ready, plain=True),
    Endpoint("GET", _VERSION, "metadata_version", "What a tensor model takes and gives", rest.metadata, plain=True),
    Endpoint("POST", f"{_MODEL}/infer", "infer", "Run a tensor model", rest.infer, InferRequest, plain=True, binary=True),
    Endpoint("GET", f"{_MODEL}/ready", "ready", "Whether somebody sells it now", rest.ready, plain=True),
    Endpoint("GET", _MODEL, "metadata", "What a tensor model takes and gives", rest.metadata, plain=True),
)
"""The longer paths first: an alias may hold slashes."""
ENDPOINTS = (*OPENAI, *INFERENCE)
