"""The two files of a tensor model: model.onnx, and signature.json, which clients read instead of the weights.

Invariant: the signature is derived from the very bytes that are stored, and the engine derives it again from those that it loads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from gpumarket.core.errors import ConfigError
from gpumarket.node.models.onnx_file import FILE_BYTES_MAX, OnnxModel, RefusedModel, read_onnx

MODEL_FILE: Final = "model.onnx"


def read_model(path: Path) -> tuple[bytes, OnnxModel]:
    """The bytes of a file, and what they declare. Raises RefusedModel, or ConfigError for a file that cannot be read."""
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path.name}: {error.strerror}", hint="name an .onnx file") from error
    if len(raw) > FILE_BYTES_MAX:
        raise RefusedModel("too-large", f"over {FILE_BYTES_MAX} bytes")
    return raw, read_onnx(raw)
