"""Loading a model folder without running anything that it brings.

Invariant: only safetensors and JSON are read. A folder with pickled weights, with Python files or with a config that names code is refused
before any library looks at it, and `trust_remote_code` is never true.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.utils.logging import disable_progress_bar

from gpumarket.core import hostile_json
from gpumarket.core.errors import ConfigError, EngineFailed
from gpumarket.node.models.store import REFUSED_SUFFIXES

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
JSON_BYTES_MAX: Final = 1 << 22

# oneDNN reads this once, at its first use, hence on import. Measured: a virtual machine that advertises AMX and faults on it ends the
# process with SIGILL in the first bf16 product. The level below works everywhere; an owner who has AMX sets the variable himself.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


def refuse_unsafe(folder: Path) -> None:
    """Raise ConfigError unless the folder holds safetensors weights and nothing that could run."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json", hint="name the folder that a model was saved to")
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in REFUSED_SUFFIXES:
            raise ConfigError(
                f"{path.name} in the model folder may run code when it is loaded",
                hint="save the model as safetensors and remove the file",
            )
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{folder} has no safetensors weights", hint="save the model with save_pretrained")
    for path in sorted(folder.rglob("*.json")):
        # A tokenizer's vocabulary may be larger than any configuration; it is read by the tokenizers library alone, which runs nothing.
        described = {} if path.name == "tokenizer.json" else read_json(path)
        if isinstance(described, dict) and "auto_map" in described:
            raise ConfigError(f"{path.name} names code of the model's own (auto_map)", hint="only built-in architectures are served")


def read_json(path: Path) -> Any:
    """A JSON file of the model folder, as it is. Raises ConfigError when it is too large or no JSON."""
    if path.stat().st_size > JSON_BYTES_MAX:
        raise ConfigError(f"{path.name} is larger than {JSON_BYTES_MAX} bytes", hint="this is no model configuration")
    try:
        return hostile_json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path.name} is not valid JSON: {error}", hint="save the model again") from error


def load_decoder(folder: Path, compute_dtype: str) -> Any:
    """A causal language model in eval mode. EngineFailed when its cache is not plain full attention in every layer."""
    refuse_unsafe(folder)
    config = _configuration(folder)
    layers = DynamicCache(config=config).layers
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        raise EngineFailed(
            f"{config.model_type} does not use full attention in every layer, which the slots engine needs",
            hint="serve it through an upstream engine",
            retryable=False,
        )
    return _load(AutoModelForCausalLM, folder, compute_dtype)


def load_encoder(folder: Path, compute_dtype: str) -> Any:
    """A text encoder without head, in eval mode."""
    refuse_unsafe(folder)
    _configuration(folder)
    return _load(AutoModel, folder, compute_dtype)


def _configuration(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"config.json describes no known model: {error}", hint="check model_type in it") from error


def _load(kind: Any, folder: Path, compute_dtype: str) -> Any:
    if compute_dtype not in DTYPES:
        raise ConfigError(f"compute dtype {compute_dtype} is unknown", hint=f"use one of {', '.join(DTYPES)}")
    disable_progress_bar()  # type: ignore[no-untyped-call]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model, report = kind.from_pretrained(
            folder,
            dtype=DTYPES[compute_dtype],
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise EngineFailed(f"the model does not load: {error}", hint="check the folder", retryable=False) from error
    lost = sorted(name for name in report["missing_keys"] if "position_ids" not in name and "pooler" not in name)
    if lost:
        raise EngineFailed(
            f"the weights lack {len(lost)} tensors, {lost[0]} first; they would be random",
            hint="save the whole model again",
            retryable=False,
        )
    return model.to(device).eval()
