"""Token ids of the caller go out as they are; options that are off leave no byte in the request; every token can be spelled."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sdk_models
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from gpumarket.core.errors import ConfigError
from gpumarket.core.terms import Task
from gpumarket.sdk.lock import LockedModel
from gpumarket.sdk.logprobs import Logprobs
from gpumarket.sdk.model_files import LoadedModel, ModelFiles
from gpumarket.sdk.reading import TextReader
from gpumarket.sdk.requests import Sampling, chat_body, completion_body, embed_body
from gpumarket.sdk.stopping import before_stop
from gpumarket.sdk.tokens import TextCodec
from gpumarket.v1 import terms_pb2 as pb


def loaded(task: Task, **files: bytes) -> LoadedModel:
    manifest = sdk_models.EMBED if task is Task.EMBED else sdk_models.CHAT
    return LoadedModel(LockedModel.of("model", manifest), ModelFiles(manifest, sdk_models.small_files(task) | files))


EMBED, CHAT = loaded(Task.EMBED), loaded(Task.GENERATE)


def asked(body: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest.FromString(body.request)


# --- token arrays ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ([7, 8], [[7, 8]]),
        ([[7, 8], [9]], [[7, 8], [9]]),
        ((np.int64(7), 8), [[7, 8]]),
        (["w1", [9]], [[1, 5, 2], [9]]),
    ],
)
def test_embed_token_ids_go_out_as_they_are(inputs: Any, expected: list[list[int]]) -> None:
    body = embed_body(EMBED, inputs)
    assert [list(entry.ids) for entry in pb.EmbedRequest.FromString(body.request).inputs] == expected
    assert body.units == sum(map(len, expected))
    assert not body.warnings


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([], "nothing to embed"),
        ([[]], "input 0 has no tokens"),
        ([[7], [64]], "input 1 has token id 64; model model has 64 of them"),
        ([-1], "token id -1"),
        ([[7, "w1"]], "it holds str"),
        ([7, True], "it holds bool"),
        ([7, [8]], "it holds list"),
        ([b"w1"], "neither a text nor a list"),
        ([[7] * 17], "17 tokens; model model takes 16"),
    ],
)
def test_embed_what_is_no_input_is_refused_by_name(inputs: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        embed_body(EMBED, inputs)


def test_completion_of_token_ids_is_their_own_prompt_and_never_cut() -> None:
    body = completion_body(CHAT, [5, 6, 7], Sampling(9))
    assert (list(asked(body).prompt), body.units) == ([5, 6, 7], 3)
    assert asked(completion_body(CHAT, [5] * 250, Sampling(50))).max_tokens == 6
    with pytest.raises(ConfigError, match="256 tokens; model model takes 256"):
        completion_body(CHAT, [5] * 256, Sampling(1))
    with pytest.raises(ConfigError, match="no tokens"):
        completion_body(CHAT, [], Sampling())


def test_vocabulary_is_the_models_own_where_its_configuration_says_it() -> None:
    assert loaded(Task.EMBED, **{"config.json": json.dumps({"vocab_size": 70}).encode()}).files.vocabulary == 70
    assert loaded(Task.EMBED, **{"config.json": json.dumps({"text_config": {"vocab_size": 71}}).encode()}).files.vocabulary == 71
    assert EMBED.files.vocabulary == 64


# --- options -----------------------------------------------------------------------------------------------------------------------


def test_options_that_are_off_leave_no_byte_in_the_request() -> None:
    plain = chat_body(CHAT, [{"role": "user", "content": "hello"}], Sampling(5))
    assert not asked(plain).HasField("client_seed")
    assert not asked(plain).HasField("top_logprobs")
    for changed in (replace(Sampling(5), seed=0), replace(Sampling(5), logprobs=0)):
        body = chat_body(CHAT, [{"role": "user", "content": "hello"}], changed)
        assert body.request.startswith(plain.request)
        assert len(body.request) > len(plain.request)


@given(st.integers(-(2**63), 2**63 - 1))
def test_seed_of_64_bits_comes_through(seed: int) -> None:
    assert asked(completion_body(CHAT, "hi", Sampling(seed=seed))).client_seed == seed


@pytest.mark.parametrize("wrong", [{"seed": 2**63}, {"seed": -(2**63) - 1}, {"logprobs": 21}, {"logprobs": -1}])
def test_options_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)


# --- reading -----------------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.text(max_size=12), st.lists(st.integers(1, 5), max_size=20), st.lists(st.text(min_size=1, max_size=2), max_size=3))
def test_reader_any_batches_give_the_text_before_the_first_stop_string(text: str, sizes: list[int], stops: list[str]) -> None:
    codec = CHAT.codec
    ids = list(codec.encode(text, limit=10_000).ids)
    whole, stopped = before_stop(codec.decode(ids), stops)
    reader, found, at = TextReader(codec, frozenset({1}), stops), "", 0
    tokens: list[int] = []
    for size in [*sizes, len(ids) + 1]:
        piece = reader.push([token.to_bytes(4, "little") for token in ids[at : at + size]])
        at, found, tokens = at + size, found + piece.text, [*tokens, *piece.tokens]
        assert piece.logprobs is None
    found += reader.finish().text
    assert (found, reader.stopped) == (whole, stopped)
    assert tokens == ids[: len(tokens)]
    assert stopped or tokens == ids
    if stopped:
        assert before_stop(codec.decode(tokens), stops) == (whole, True), "the tokens that were told reach to the stop string"


def test_reader_logprobs_are_those_of_the_pieces_own_tokens() -> None:
    codec = CHAT.codec
    ids = codec.encode("abcd", limit=9).ids
    told = [Logprobs(token, -0.5, ((token, -0.5),)) for token in ids]
    reader = TextReader(codec, frozenset(), ("c",), logprobs=True)
    piece = reader.push([token.to_bytes(4, "little") for token in ids], told)
    assert piece.text == "ab"
    assert piece.logprobs is not None
    assert [entry.token for entry in piece.logprobs] == list(piece.tokens) == list(ids[:3])
    assert [(entry.text, entry.raw, entry.logprob) for entry in piece.logprobs] == [(c, c.encode(), -0.5) for c in "abc"]
    assert [entry.top[0].text for entry in piece.logprobs] == ["a", "b", "c"]


@given(st.text(max_size=20))
def test_tokens_spelled_one_by_one_are_the_texts_bytes(text: str) -> None:
    ids = CHAT.codec.encode(text, limit=10_000).ids
    assert b"".join(CHAT.codec.spelled(token)[2] for token in ids) == text.encode()


def test_tokens_of_other_vocabularies_are_spelled_by_their_decoders() -> None:
    tokenizer = Tokenizer(models.BPE({"▁the": 0, "<0xE2>": 1, "a": 2}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    codec = TextCodec(tokenizer.to_str().encode())
    assert [codec.spelled(token) for token in range(4)] == [(0, " the", b" the"), (1, "\ufffd", b"\xe2"), (2, "a", b"a"), (3, "", b"")]
    assert CHAT.codec.spelled(1) == (1, "</s>", b"</s>")
