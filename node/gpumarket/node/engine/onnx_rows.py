"""Whether the rows of a model are independent, tried before it is sold as one whose rows are.

Requests of strangers share a pass: a model that mixes rows would give each of them an answer that nobody can compute again. A trial, not a
proof: what it misses, checks find later.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gpumarket.core.errors import ConfigError, EngineFailed
from gpumarket.core.tensors import DTYPES, Signature
from gpumarket.node.engine.onnx_session import Session

ROWS: Final = 3
TOLERANCE: Final = 1e-3
"""Of max(1, |number|). Batches differ by rounding, dependent rows by far more."""


def refuse_dependent_rows(session: Session, signature: Signature) -> None:
    """Run some rows together and alone. Raises ConfigError when they differ. A model that does not take made-up numbers is let pass."""
    if not signature.batched or any(-1 in spec.shape[1:] for spec in signature.inputs):
        return
    rng = np.random.default_rng(0)
    inputs = {spec.name: _numbers(rng, DTYPES[spec.datatype], spec.shape[1:]) for spec in signature.inputs}
    names = [spec.name for spec in signature.outputs]
    try:
        together = session.run(names, inputs)
        alone = [session.run(names, {name: array[row : row + 1] for name, array in inputs.items()}) for row in range(ROWS)]
    except EngineFailed:
        return
    for index, name in enumerate(names):
        rows = [outputs[index] for outputs in alone]
        if len(together[index]) != ROWS or not all(_same(together[index][row : row + 1], rows[row]) for row in range(ROWS)):
            raise ConfigError(
                f"output {name!r} of a row depends on the other rows of its batch",
                hint="import the model with --whole: then a request is one unit and runs alone",
            )


def _numbers(rng: np.random.Generator, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Floats around 0; integers and booleans of 0 and 1, which are in most models' range."""
    whole = (ROWS, *shape)
    return rng.normal(0, 1, whole).astype(dtype) if dtype.kind == "f" else rng.integers(0, 2, whole).astype(dtype)


def _same(batched: NDArray[Any], single: NDArray[Any]) -> bool:
    if batched.shape != single.shape:
        return False
    if batched.dtype.kind != "f":
        return bool(np.array_equal(batched, single))
    return bool(np.allclose(batched, single, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True))
