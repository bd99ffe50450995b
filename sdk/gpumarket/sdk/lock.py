"""The client's lock file: which digest an alias stands for. TOML, written atomically, made to be committed and reviewed.

Invariant: a model is bought by digest only. No scheduler and no provider can change what an alias means.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gpumarket.core.errors import ConfigError, UnknownModel
from gpumarket.core.terms import ModelManifest, Task
from gpumarket.core.units import Hash, hex0x, parse_hash

_HEAD = "# Models by digest. Written by `gpumarket model add`; commit this file.\n"
_TASKS = {Task.EMBED: "embed", Task.GENERATE: "generate", Task.INFER: "infer"}


@dataclass(frozen=True, slots=True)
class LockedModel:
    """What an alias stands for. `max_input_tokens` is the longest input that the model takes."""

    name: str
    digest: Hash
    task: Task
    dtype: str
    max_input_tokens: int

    @staticmethod
    def of(name: str, manifest: ModelManifest) -> LockedModel:
        """The entry for a manifest under an alias."""
        return LockedModel(name, manifest.digest, manifest.task, manifest.dtype, manifest.max_input_tokens)


def read_lock(path: Path) -> dict[str, LockedModel]:
    """Every alias; empty when there is no file yet. Raises ConfigError naming the entry that is wrong."""
    try:
        found = path.stat()
        return dict(_parsed(path, (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint="give another file with GPUMARKET_CLIENT_LOCK_FILE") from error


@lru_cache(maxsize=16)
def _parsed(path: Path, _stamp: tuple[int, ...]) -> dict[str, LockedModel]:
    """The file as it is since it was last written: each order asks for a model, and parsing TOML takes longer than signing."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}", hint="restore it from version control") from error
    models = document.get("models", {})
    if not isinstance(models, dict):
        raise ConfigError(f"{path}: [models] must be a table", hint="restore it from version control")
    return {name: _entry(path, name, values) for name, values in models.items()}


def find(path: Path, name: str) -> LockedModel:
    """The entry of one alias. Raises UnknownModel with the command that adds it."""
    models = read_lock(path)
    if name not in models:
        known = ", ".join(sorted(models)) or "none yet"
        raise UnknownModel(f"{name!r} is not in {path} (known: {known})", hint=f"gpumarket model add {name} DIGEST")
    return models[name]


def write_entry(path: Path, entry: LockedModel) -> None:
    """Add or replace one alias; the file is replaced in one step."""
    models = read_lock(path) | {entry.name: entry}
    parts = [_HEAD]
    for name in sorted(models):
        model = models[name]
        parts.append(
            f"\n[models.{_quote(name)}]\n"
            f"digest = {_quote(hex0x(model.digest))}\n"
            f"task = {_quote(_TASKS[model.task])}\n"
            f"dtype = {_quote(model.dtype)}\n"
            f"max_input_tokens = {model.max_input_tokens}\n"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write("".join(parts))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _quote(text: str) -> str:
    """A TOML basic string: JSON's short escapes are TOML's too; DEL is escaped besides, and nothing is written as surrogates."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _entry(path: Path, name: str, values: Mapping[str, Any]) -> LockedModel:
    where = f"{path}: [models.{_quote(name)}]"
    hint = f"add it again: gpumarket model add {name} DIGEST"
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a table", hint=hint)
    try:
        task = {text: task for task, text in _TASKS.items()}[values["task"]]
        tokens = values["max_input_tokens"]
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
            raise ValueError("max_input_tokens must be a positive integer")
        return LockedModel(name, parse_hash(values["digest"]), task, str(values["dtype"]), tokens)
    except KeyError as error:
        raise ConfigError(f"{where}: {error.args[0]!r} is missing or no known value", hint=hint) from error
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{where}: {error}", hint=hint) from error
