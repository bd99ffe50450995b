"""The tables of parameters: all that OpenAI documents is in them, and what is not done is refused by name."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from gpumarket.gateway.endpoints import ENDPOINTS
from gpumarket.gateway.openai.fields import rules
from gpumarket.gateway.openai.reading import Reader
from gpumarket.gateway.openai.tables import ChatRequest, CompletionRequest, EmbeddingRequest, ResponseRequest
from gpumarket.gateway.openapi import document_of
from gpumarket.gateway.problems import Problem

TABLES: dict[type[Any], Any] = {
    ChatRequest: chat_create_params.CompletionCreateParamsBase,
    CompletionRequest: completion_create_params.CompletionCreateParamsBase,
    EmbeddingRequest: embedding_create_params.EmbeddingCreateParams,
    ResponseRequest: response_create_params.ResponseCreateParamsBase,
}
LEAST: dict[type[Any], dict[str, Any]] = {
    ChatRequest: {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    CompletionRequest: {"model": "m", "prompt": "hi"},
    EmbeddingRequest: {"model": "m", "input": "hi"},
    ResponseRequest: {"model": "m", "input": "hi"},
}
EFFECT = {
    "frequency_penalty": 0.5,
    "presence_penalty": -1,
    "logit_bias": {"5": 10},
    "metadata": {"a": "b"},
    "modalities": ["audio"],
    "response_format": {"type": "json_object"},
    "service_tier": "priority",
    "store": True,
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "parallel_tool_calls": False,
    "best_of": 2,
    "echo": True,
    "background": True,
    "truncation": "auto",
}
"""Where only one value changes nothing: another one."""


def refusal(table: type[Any], **more: Any) -> dict[str, Any]:
    with pytest.raises(Problem) as caught:
        Reader(table).read(json.dumps(LEAST[table] | more).encode())
    assert caught.value.status == 400
    error: dict[str, Any] = caught.value.document["error"]
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize("table", TABLES)
def test_table_has_every_parameter_of_the_official_client(table: type[Any]) -> None:
    documented = set(TABLES[table].__annotations__) - {"extra_headers"}
    assert documented - set(rules(table)) == set()
    assert set(rules(table)) - documented - {"stream"} == set()


@pytest.mark.parametrize("table", TABLES)
def test_table_takes_null_for_whatever_may_be_left_out(table: type[Any]) -> None:
    optional = {name: None for name in rules(table) if name not in LEAST[table]}
    assert Reader(table).read(json.dumps(LEAST[table] | optional).encode()) is not None


@pytest.mark.parametrize(("table", "name"), [(t, n) for t in TABLES for n, rule in rules(t).items() if rule == "refused"])
def test_refused_parameter_is_named(table: type[Any], name: str) -> None:
    for value in ("x", 1, {"a": 1}, [1], True):
        error = refusal(table, **{name: value})
        assert (error["code"], error["param"]) == ("unsupported_parameter", name)
        assert name in error["message"]


@pytest.mark.parametrize(("table", "name"), [(t, n) for t in TABLES for n, rule in rules(t).items() if rule == "no-op"])
def test_parameter_without_effect_is_refused_where_it_would_have_one(table: type[Any], name: str) -> None:
    error = refusal(table, **{name: EFFECT[name]})
    assert error["param"] == name
    assert error["code"] == "unsupported_parameter"


@pytest.mark.parametrize("table", TABLES)
def test_unknown_parameter_is_refused_by_name(table: type[Any]) -> None:
    error = refusal(table, temprature=1)
    assert (error["code"], error["param"]) == ("unknown_parameter", "temprature")


@pytest.mark.parametrize(
    ("table", "more", "param"),
    [
        (ChatRequest, {"temperature": 2.1}, "temperature"),
        (ChatRequest, {"temperature": "1"}, "temperature"),
        (ChatRequest, {"top_p": -0.1}, "top_p"),
        (ChatRequest, {"n": 0}, "n"),
        (ChatRequest, {"max_tokens": 0}, "max_tokens"),
        (ChatRequest, {"max_completion_tokens": 1.5}, "max_completion_tokens"),
        (ChatRequest, {"seed": 2**63}, "seed"),
        (ChatRequest, {"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        (ChatRequest, {"stop": ""}, "stop"),
        (ChatRequest, {"top_logprobs": 21}, "top_logprobs"),
        (ChatRequest, {"messages": []}, "messages"),
        (ChatRequest, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (ChatRequest, {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        (ChatRequest, {"response_format": {"type": "json_schema"}}, "response_format.type"),
        (ChatRequest, {"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        (CompletionRequest, {"logprobs": 6}, "logprobs"),
        (CompletionRequest, {"prompt": []}, "prompt"),
        (EmbeddingRequest, {"encoding_format": "int8"}, "encoding_format"),
        (EmbeddingRequest, {"input": ""}, "input"),
        (EmbeddingRequest, {"dimensions": 64}, "dimensions"),
        (ResponseRequest, {"text": {"format": {"type": "json_schema"}}}, "text.format.type"),
        (ResponseRequest, {"include": ["file_search_call.results"]}, "include[0]"),
    ],
)
def test_wrong_value_is_refused_with_its_place(table: type[Any], more: dict[str, Any], param: str) -> None:
    assert refusal(table, **more)["param"] == param


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "refusal"])
def test_content_part_that_is_no_text_is_refused_by_name(kind: str) -> None:
    error = refusal(ChatRequest, messages=[{"role": "user", "content": [{"type": kind, kind: {}}]}])
    assert (error["code"], error["param"]) == ("unsupported_value", "messages[0].content[0].type")
    assert kind in error["message"]


@pytest.mark.parametrize("role", ["tool", "function", "critic"])
def test_message_of_a_role_that_is_not_supported_is_refused_by_name(role: str) -> None:
    error = refusal(ChatRequest, messages=[{"role": role, "content": "x"}])
    assert error["param"] == "messages[0].role"
    assert role in error["message"]


def test_missing_parameter_is_named() -> None:
    with pytest.raises(Problem) as caught:
        Reader(ChatRequest).read(b'{"messages": [{"role": "user", "content": "hi"}]}')
    assert (caught.value.code, caught.value.param) == ("missing_required_parameter", "model")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b'{"model": NaN}', b"[" * 100_000, b'{"model":' * 500])
def test_body_that_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(Problem) as caught:
        Reader(ChatRequest).read(body)
    assert caught.value.status == 400


def test_openapi_document_has_every_endpoint_and_refers_only_to_what_it_has() -> None:
    document = document_of(ENDPOINTS)
    assert {(path, method.upper()) for path, methods in document["paths"].items() for method in methods} == {
        (endpoint.path, endpoint.method) for endpoint in ENDPOINTS
    }
    text = msgspec.json.encode(document).decode()
    wanted = {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert wanted <= set(document["components"]["schemas"])
    chat = document["components"]["schemas"]["ChatRequest"]
    assert set(chat["properties"]) == set(rules(ChatRequest))
    assert chat["additionalProperties"] is False
