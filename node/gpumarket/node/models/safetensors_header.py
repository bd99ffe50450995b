"""Checking a safetensors file before any library maps it: the header must describe exactly the bytes that are there.

Source: the safetensors format (8-byte little-endian header length, JSON header, data; huggingface/safetensors README). Only reads.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

from gpumarket.core import hostile_json
from gpumarket.core.errors import ConfigError

HEADER_BYTES_MAX: Final = 100_000_000
_BITS: Final = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


def check_safetensors(path: Path) -> None:
    """Raise ConfigError unless every tensor has a known dtype and its exact place, without gap, overlap or rest."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(HEADER_BYTES_MAX, size - 8):
            raise _lie(path, "the header is longer than the file")
        raw = file.read(length)
    try:
        header = hostile_json.loads(raw)
        spans = sorted(_span(tensor) for name, tensor in header.items() if name != "__metadata__")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _lie(path, f"the header is malformed ({type(error).__name__})") from error
    end = 0
    for start, stop in spans:
        if start != end:
            raise _lie(path, "the tensors overlap or leave gaps")
        end = stop
    if end != size - 8 - length:
        raise _lie(path, "the header describes more or fewer bytes than there are")


def _span(tensor: dict[str, Any]) -> tuple[int, int]:
    """Begin and end of a tensor's bytes. ValueError when they do not agree with its dtype and shape."""
    start, stop = tensor["data_offsets"]
    shape = tensor["shape"]
    if not all(isinstance(n, int) and n >= 0 for n in (start, stop, *shape)):
        raise ValueError("a size that is no natural number")
    if stop - start != math.prod(shape) * _BITS[tensor["dtype"]] // 8:
        raise ValueError("bytes that do not match dtype and shape")
    return start, stop


def _lie(path: Path, what: str) -> ConfigError:
    return ConfigError(f"{path.name} is no sound safetensors file: {what}", hint="save the model again")
