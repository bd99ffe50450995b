"""/openapi.json, made from the table of endpoints and their parameters: every status an endpoint has, every parameter it takes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import msgspec

from gpumarket.gateway.endpoints import Endpoint
from gpumarket.gateway.inference_protocol.rest import BINARY, HEADER

REF = "#/components/schemas/{name}"
_ALWAYS = {401: "no key, or one that does not hold", 429: "too many requests, or the key's budget is spent", 500: "the gateway failed"}
_BODY = {
    400: "a parameter is wrong, unknown or not supported: `param` names it",
    404: "the key has no such model",
    408: "the body did not come in time",
    409: "a request with this Idempotency-Key is under way",
    413: "the body is too large",
    415: "the body is not application/json",
    422: "the Idempotency-Key was used for another request",
    502: "a provider failed or cheated; nothing but what was delivered is paid",
    503: "the market, or the gateway, cannot take the job now",
}
_PLAIN_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_MODEL = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "gpumarket": {"type": "object"},
    },
}
_USAGE = {
    "type": "object",
    "required": ["prompt_tokens", "total_tokens"],
    "properties": {name: {"type": "integer", "minimum": 0} for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
}


def _object(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "required": ["object", *more], "properties": {"object": {"const": kind}, **more}}


_STRING, _INTEGER = {"type": "string"}, {"type": "integer"}
_LIST = {"type": "array", "items": {"type": "object"}}
_INFERRED = {
    "type": "object",
    "required": ["model_name", "model_version", "outputs"],
    "properties": {"model_name": _STRING, "model_version": _STRING, "id": _STRING, "outputs": _LIST},
}
_TAIL = {"schema": {"type": "string", "format": "binary", "description": f"the same as JSON, {HEADER} bytes of it, then tensors' bytes"}}
_READY = {"type": "object", "required": ["name", "ready"], "properties": {"name": _STRING, "ready": {"type": "boolean"}}}
_METADATA = {
    "type": "object",
    "required": ["name", "versions", "platform", "inputs", "outputs"],
    "properties": {"name": _STRING, "versions": {"type": "array"}, "platform": _STRING, "inputs": _LIST, "outputs": _LIST},
}
_EVENT = {
    "type": "object",
    "description": "Each event of the stream; `data` is a JSON document, or [DONE] at the end of chat and completions.",
    "required": ["data"],
    "properties": {"data": _STRING, "event": _STRING},
}
_ANSWERS: dict[str, dict[str, Any]] = {
    "models": _object("list", data={"type": "array", "items": _MODEL}),
    "model": _MODEL,
    "chat": _object("chat.completion", id=_STRING, created=_INTEGER, model=_STRING, choices=_LIST, usage=_USAGE),
    "completions": _object("text_completion", id=_STRING, created=_INTEGER, model=_STRING, choices=_LIST, usage=_USAGE),
    "embeddings": _object("list", data=_LIST, model=_STRING, usage=_USAGE),
    "infer": _INFERRED,
    "infer_version": _INFERRED,
    "ready": _READY,
    "ready_version": _READY,
    "metadata": _METADATA,
    "metadata_version": _METADATA,
    "responses": _object("response", id=_STRING, created_at=_INTEGER, model=_STRING, output=_LIST, status=_STRING),
}


def document_of(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    tables = [endpoint.table for endpoint in endpoints if endpoint.table is not None]
    _, schemas = msgspec.json.schema_components(tables, ref_template=REF)
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "gpumarket gateway",
            "version": version("gpumarket"),
            "description": "OpenAI's API on a market of GPU inference. What is not supported is refused by name: a parameter that takes "
            "null alone is refused, one that takes a single value has no effect here.",
        },
        "paths": paths,
        "components": {
            "schemas": {**schemas, "Error": _ERROR, "PlainError": _PLAIN_ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "gpumarket gateway key create"}},
        },
        "security": [{"key": []}],
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    found: dict[str, Any] = {"operationId": endpoint.name, "summary": endpoint.summary, "responses": _responses(endpoint)}
    found["parameters"] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in ("model", "version")
        if f"{{{name}}}" in endpoint.path
    ]
    if endpoint.table is not None:
        ref = REF.format(name=endpoint.table.__name__)
        content: dict[str, Any] = {"application/json": {"schema": {"$ref": ref}}}
        found["requestBody"] = {"required": True, "content": content}
        key = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"}
        found["parameters"] += [{"name": "Idempotency-Key", "in": "header", "required": False, "schema": key}]
        if endpoint.binary:
            content[BINARY] = _TAIL
            length = {"type": "integer", "minimum": 0, "description": "bytes of the JSON document that the tensors' bytes follow"}
            found["parameters"] += [{"name": HEADER, "in": "header", "required": False, "schema": length}]
    return found


def _responses(endpoint: Endpoint) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _ANSWERS[endpoint.name]}}
    if endpoint.streams:
        content["text/event-stream"] = {"schema": _EVENT}
    if endpoint.binary:
        content[BINARY] = _TAIL
    problems = {**_ALWAYS, **(_BODY if endpoint.table is not None else {}), **({404: _BODY[404]} if "{model}" in endpoint.path else {})}
    if endpoint.plain:
        problems |= {status: _BODY[status] for status in (400, 502, 503)}  # the market is asked for the model's signature
    error = {"application/json": {"schema": {"$ref": REF.format(name="PlainError" if endpoint.plain else "Error")}}}
    return {
        "200": {"description": "done", "content": content, "headers": {"x-request-id": {"schema": {"type": "string"}}}},
        **{str(status): {"description": text, "content": error} for status, text in sorted(problems.items())},
    }
