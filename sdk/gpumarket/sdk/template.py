"""Chat templates: messages to prompt text, with the template that the model's own files bring, in a sandbox.

A template comes from a stranger's model folder. It runs in Jinja2's ImmutableSandboxedEnvironment: no attribute that starts with an
underscore, nothing mutable, no imports; and its output is bounded. What it cannot be kept from is wasting a moment of the client's own
time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gpumarket.core.errors import ConfigError

PROMPT_CHARS_MAX = 4_000_000
"""A rendered prompt beyond this is refused: no model takes a million tokens yet."""
_ROLES_HINT = 'messages look like [{"role": "user", "content": "..."}]'


class ChatTemplate:
    """A compiled chat template. `special_tokens` are the texts that templates know as bos_token, eos_token, ..."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = _raise
        environment.filters["tojson"] = _to_json
        self._special = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"the model's chat template does not compile: {error}", hint="use complete() with a raw prompt") from error

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt text of a conversation, ready for the assistant's turn. Raises ConfigError with the template's own words."""
        checked = [_message(index, message) for index, message in enumerate(messages)]
        if not checked:
            raise ConfigError("a chat needs at least one message", hint=_ROLES_HINT)
        try:
            text = self._template.render(messages=checked, add_generation_prompt=True, tools=None, documents=None, **self._special)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise ConfigError(f"the model's chat template refuses these messages: {error}", hint=_ROLES_HINT) from error
        if len(text) > PROMPT_CHARS_MAX:
            raise ConfigError(f"the rendered prompt has {len(text)} characters; at most {PROMPT_CHARS_MAX} are taken", hint="send less")
        return text


def template_source(tokenizer_config: Mapping[str, Any], separate_file: str | None) -> str | None:
    """Where the model keeps its template: `chat_template.jinja`, else tokenizer_config's `chat_template` (a text, or a list with a
    default)."""
    if separate_file is not None:
        return separate_file
    found = tokenizer_config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like as texts; a model states them as a text or as {content: text}."""
    found: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = tokenizer_config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        found[name] = text if isinstance(text, str) else ""
    return found


def _message(index: int, message: Mapping[str, str]) -> dict[str, str]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise ConfigError(f"message {index} has no text under 'role' and 'content'", hint=_ROLES_HINT)
    return dict(message)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    """As transformers has it: plain JSON, not Jinja2's HTML-safe form."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
