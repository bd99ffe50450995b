"""Tokenizer, chat template and stop tokens of a model, made from its verified small files when they are first needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gpumarket.core import hostile_json
from gpumarket.core.errors import ConfigError, ProtocolError
from gpumarket.core.tensors import SIGNATURE_FILE, Signature, signature_from_json
from gpumarket.core.terms import ModelManifest
from gpumarket.sdk.lock import LockedModel
from gpumarket.sdk.tokens import TextCodec

if TYPE_CHECKING:
    from gpumarket.sdk.template import ChatTemplate


@dataclass(frozen=True)
class ModelFiles:
    """The small files of a model by path, and what the client makes of them."""

    manifest: ModelManifest
    files: dict[str, bytes]

    @cached_property
    def codec(self) -> TextCodec:
        """Its tokenizer. Raises ConfigError when the model brings none."""
        if "tokenizer.json" not in self.files:
            raise ConfigError(f"model {self.manifest.name} has no tokenizer.json", hint="its owner must publish it with one")
        return TextCodec(self.files["tokenizer.json"])

    @cached_property
    def signature(self) -> Signature:
        """What a tensor model takes and gives. Raises ConfigError when the model brings none that can be read."""
        try:
            return signature_from_json(self.files[SIGNATURE_FILE])
        except (KeyError, ProtocolError) as error:
            raise ConfigError(
                f"model {self.manifest.name} has no {SIGNATURE_FILE} that can be read", hint="its owner must publish it anew"
            ) from error

    @cached_property
    def template(self) -> ChatTemplate:
        """Its chat template. Raises ConfigError when the model brings none."""
        from gpumarket.sdk.template import ChatTemplate, special_tokens, template_source

        separate = self.files.get("chat_template.jinja")
        config = self._json("tokenizer_config.json")
        source = template_source(config, separate.decode() if separate is not None else None)
        if source is None:
            raise ConfigError(f"model {self.manifest.name} has no chat template", hint="use complete() with a raw prompt")
        return ChatTemplate(source, special_tokens(config))

    @cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer: eos of the generation settings, the configuration and the tokenizer."""
        from gpumarket.sdk.template import special_tokens

        found: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            value = self._json(name).get("eos_token_id")
            found.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int) and v >= 0)
        text = special_tokens(self._json("tokenizer_config.json"))["eos_token"]
        if text and (token := self.codec.token_id(text)) is not None:
            found.add(token)
        return tuple(sorted(found))

    @cached_property
    def vocabulary(self) -> int:
        """How many token ids the model has: by its configuration, or else by its tokenizer."""
        config = self._json("config.json")
        text = config.get("text_config")
        for settings in (config, text if isinstance(text, dict) else {}):
            size = settings.get("vocab_size")
            if isinstance(size, int) and not isinstance(size, bool) and size > 0:
                return size
        return self.codec.vocabulary

    def _json(self, name: str) -> dict[str, Any]:
        if name not in self.files:
            return {}
        try:
            value = hostile_json.loads(self.files[name])
        except ValueError as error:
            raise ConfigError(
                f"{name} of model {self.manifest.name} is not JSON: {error}", hint="its owner must publish it anew"
            ) from error
        return value if isinstance(value, dict) else {}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model under an alias of the lock file."""

    entry: LockedModel
    files: ModelFiles

    @property
    def codec(self) -> TextCodec:
        return self.files.codec
