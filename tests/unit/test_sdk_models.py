"""Lock file, tokenizer, chat template: what a model means on the client's side."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sdk_models
from hypothesis import given, settings
from hypothesis import strategies as st

from gpumarket.core.errors import ConfigError, UnknownModel
from gpumarket.core.terms import Task
from gpumarket.core.units import Hash
from gpumarket.sdk.lock import LockedModel, find, read_lock, write_entry
from gpumarket.sdk.model_files import LoadedModel, ModelFiles
from gpumarket.sdk.requests import Sampling, chat_body, completion_body, embed_body, warnings_from_json, warnings_to_json
from gpumarket.sdk.settings import ClientSettings
from gpumarket.sdk.template import ChatTemplate, special_tokens, template_source
from gpumarket.sdk.tokens import TextCodec
from gpumarket.v1 import terms_pb2 as pb

ENTRY = LockedModel("a.b/c", Hash(b"\x12" * 32), Task.EMBED, "float32", 256)


def loaded(task: Task) -> LoadedModel:
    manifest = sdk_models.EMBED if task is Task.EMBED else sdk_models.CHAT
    return LoadedModel(LockedModel.of("model", manifest), ModelFiles(manifest, sdk_models.small_files(task)))


# --- lock file -----------------------------------------------------------------------------------------------------------------


@given(name=st.text(min_size=1), dtype=st.text())
@settings(max_examples=60, deadline=None)
def test_lock_any_name_round_trips(tmp_path_factory: pytest.TempPathFactory, name: str, dtype: str) -> None:
    if any("\ud800" <= c <= "\udfff" for c in name + dtype):
        return
    path = tmp_path_factory.mktemp("lock") / "models.lock"
    entry = LockedModel(name, ENTRY.digest, ENTRY.task, dtype, 7)
    write_entry(path, ENTRY)
    write_entry(path, entry)
    assert read_lock(path) == {ENTRY.name: ENTRY} | {name: entry}


def test_lock_unknown_name_tells_what_is_known_and_what_to_run(tmp_path: Path) -> None:
    path = tmp_path / "models.lock"
    write_entry(path, ENTRY)
    with pytest.raises(UnknownModel, match=r"a\.b/c") as caught:
        find(path, "other")
    assert caught.value.hint == "gpumarket model add other DIGEST"


@pytest.mark.parametrize(
    "text",
    [
        "not toml at all [",
        "models = 3",
        "[models]\nx = 3",
        '[models.x]\ntask = "embed"\ndtype = "f"\nmax_input_tokens = 1',
        '[models.x]\ndigest = "0x12"\ntask = "embed"\ndtype = "f"\nmax_input_tokens = 1',
        f'[models.x]\ndigest = "0x{"12" * 32}"\ntask = "dance"\ndtype = "f"\nmax_input_tokens = 1',
        f'[models.x]\ndigest = "0x{"12" * 32}"\ntask = "embed"\ndtype = "f"\nmax_input_tokens = 0',
        f'[models.x]\ndigest = "0x{"12" * 32}"\ntask = "embed"\ndtype = "f"\nmax_input_tokens = "many"',
    ],
)
def test_lock_broken_entry_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "models.lock"
    path.write_text(text)
    with pytest.raises(ConfigError):
        read_lock(path)


# --- tokenizer -----------------------------------------------------------------------------------------------------------------


def test_tokenizer_ignores_padding_and_truncation_baked_into_the_file() -> None:
    codec = TextCodec(sdk_models.words_tokenizer())
    assert codec.encode("w1 w2", limit=100).ids == (1, 5, 6, 2)
    assert len(codec.encode(" ".join(["w1"] * 20), limit=100).ids) == 22


def test_tokenizer_cut_keeps_the_marks_and_says_so() -> None:
    encoded = TextCodec(sdk_models.words_tokenizer()).encode(" ".join(["w1"] * 20), limit=6)
    assert encoded.ids == (1, 5, 5, 5, 5, 2)
    assert encoded.truncated
    assert encoded.full_length == 22


def test_tokenizer_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError):
        TextCodec(b"{}")


@given(st.text(max_size=40), st.lists(st.integers(1, 4), min_size=1, max_size=20))
@settings(max_examples=150, deadline=None)
def test_decoding_in_pieces_equals_decoding_at_once(text: str, sizes: list[int]) -> None:
    if any("\ud800" <= c <= "\udfff" for c in text):
        return
    codec = TextCodec(sdk_models.bytes_tokenizer())
    ids = codec.encode(text, limit=10_000).ids
    decoder, pieces, at = codec.decoder(), [], 0
    for size in [*sizes, *[3] * len(ids)]:
        pieces.append(decoder.push(ids[at : at + size]))
        at += size
    pieces.append(decoder.finish())
    assert "".join(pieces) == codec.decode(ids)


def test_decoding_hands_out_a_split_character_once_and_whole() -> None:
    codec = TextCodec(sdk_models.bytes_tokenizer())
    decoder = codec.decoder()
    ids = codec.encode("日", limit=10).ids
    if len(ids) == 1:
        ids = codec.encode("鱻", limit=10).ids
    pieces = [decoder.push([token]) for token in ids]
    assert len(ids) > 1
    assert pieces[:-1] == [""] * (len(ids) - 1)
    assert len(pieces[-1]) == 1


# --- template ------------------------------------------------------------------------------------------------------------------


def test_template_renders_messages_and_the_assistants_turn() -> None:
    template = ChatTemplate(sdk_models.TEMPLATE, {"eos_token": "</s>"})
    assert template.render([{"role": "user", "content": "hi"}]) == "<user>hi</s><assistant>"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% set _ = messages.append(1) %}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception('no system role') }}",
        "{{ messages[7].content }}",
        "{{ range(10**9) | list }}",
        "{{ messages + 1 }}",
    ],
)
def test_template_that_reaches_out_or_fails_is_refused(source: str) -> None:
    with pytest.raises(ConfigError):
        ChatTemplate(source, {}).render([{"role": "user", "content": "hi"}])


def test_template_that_does_not_compile_is_refused() -> None:
    with pytest.raises(ConfigError):
        ChatTemplate("{% if %}", {})


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [{"role": 1, "content": "x"}]])
def test_template_bad_messages_are_refused(messages: list[dict[str, str]]) -> None:
    with pytest.raises(ConfigError):
        ChatTemplate("x", {}).render(messages)


def test_template_is_found_in_its_three_places() -> None:
    assert template_source({"chat_template": "config"}, "file") == "file"
    assert template_source({"chat_template": "config"}, None) == "config"
    assert template_source({"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}, None) == "d"
    assert template_source({}, None) is None
    assert special_tokens({"bos_token": "<s>", "eos_token": {"content": "</s>"}})["eos_token"] == "</s>"


# --- requests ------------------------------------------------------------------------------------------------------------------


def test_embed_body_counts_tokens_and_warns_of_cuts() -> None:
    body = embed_body(loaded(Task.EMBED), ["w1", " ".join(["w2"] * 50)])
    request = pb.EmbedRequest.FromString(body.request)
    assert [len(i.ids) for i in request.inputs] == [3, 16]
    assert body.units == body.output_units == 19
    assert warnings_from_json(warnings_to_json(body.warnings)) == body.warnings


def test_embed_body_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError):
        embed_body(loaded(Task.EMBED), [])


def test_chat_body_shares_the_context_between_prompt_and_answer() -> None:
    model = loaded(Task.GENERATE)
    body = chat_body(model, [{"role": "user", "content": "hello"}], Sampling(10_000, 0.0, 0.5))
    request = pb.GenerateRequest.FromString(body.request)
    assert len(request.prompt) + request.max_tokens == model.entry.max_input_tokens
    assert list(request.stop_tokens) == [1]
    assert (request.temperature_milli, request.top_p_ppm) == (0, 500_000)
    assert len(body.warnings) == 1


def test_long_prompt_keeps_its_end_and_warns() -> None:
    model = loaded(Task.GENERATE)
    body = completion_body(model, "x y " * 2_000 + "THE END", Sampling(5))
    request = pb.GenerateRequest.FromString(body.request)
    assert len(request.prompt) < model.entry.max_input_tokens
    assert model.codec.decode(list(request.prompt)).endswith("THE END")
    assert body.warnings


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"temperature": -0.1}, {"temperature": 3.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_out_of_range_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Sampling(**wrong)  # type: ignore[arg-type]


# --- settings and imports ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"check_probability": 1.1},
        {"check_share": 0.0},
        {"deposit": "-1"},
        {"exposure": "nan"},
        {"scheduler": "0x12"},
        {"profiles": "0x12"},
        {"attempts_max": 0},
        {"unknown": 1},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ClientSettings.model_validate(wrong)


def test_importing_the_sdk_loads_nothing_heavy() -> None:
    heavy = "('web3', 'torch', 'libp2p', 'alembic', 'transformers', 'tokenizers', 'eth_account', 'numpy', 'grpc')"
    script = f"import sys, gpumarket.sdk; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


def test_opening_a_client_module_needs_neither_web3_nor_torch() -> None:
    heavy = "('web3', 'torch', 'libp2p', 'alembic', 'transformers', 'tokenizers')"
    script = f"import sys; from gpumarket.sdk import Client; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"
