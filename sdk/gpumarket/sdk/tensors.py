"""From arrays to a tensor request, by the signature in the model's verified files. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpumarket.core.errors import InvalidRequest, ProtocolError
from gpumarket.core.tensor_requests import Tensor, TensorRequest, require_fits, to_proto
from gpumarket.core.tensors import DTYPES, Signature, TensorSpec
from gpumarket.sdk.model_files import LoadedModel
from gpumarket.sdk.requests import Body


def tensor_body(model: LoadedModel, inputs: Mapping[str, ArrayLike], outputs: Sequence[str] | None) -> Body:
    """The request for these arrays; `outputs` names the ones that are wanted, all by default. Raises InvalidRequest naming what does not
    fit: an array is taken as the input's datatype only where no number changes by that."""
    signature = model.files.signature
    try:
        request = _request(signature, inputs, outputs)
        require_fits(signature, request)
    except ProtocolError as error:
        raise InvalidRequest(f"model {model.entry.name}: {error.message}", hint=error.hint or "see the model's signature") from error
    limit = model.entry.max_input_tokens
    if request.items > limit:
        told = f"model {model.entry.name} takes {limit} rows at a time, not {request.items}"
        raise InvalidRequest(told, hint="send fewer rows at a time")
    return Body(to_proto(request).SerializeToString(deterministic=True), request.items, request.items, ())


def _request(signature: Signature, inputs: Mapping[str, ArrayLike], outputs: Sequence[str] | None) -> TensorRequest:
    specs = {spec.name: spec for spec in signature.inputs}
    tensors = []
    for name, given in inputs.items():
        if name not in specs:
            raise ProtocolError(f"the model has no input {name!r}", hint=f"it takes {', '.join(specs)}")
        array = _converted(specs[name], given)
        tensors.append(Tensor(name, specs[name].datatype, array.shape, array.tobytes()))
    rows = tensors[0].shape[0] if signature.batched and tensors and tensors[0].shape else 0
    return TensorRequest(tuple(tensors), _wanted(signature, outputs), rows)


def _wanted(signature: Signature, outputs: Sequence[str] | None) -> tuple[TensorSpec, ...]:
    if outputs is None:
        return signature.outputs
    known = {spec.name: spec for spec in signature.outputs}
    if unknown := [name for name in outputs if name not in known]:
        raise ProtocolError(f"the model has no output {unknown[0]!r}", hint=f"it gives {', '.join(known)}")
    return tuple(known[name] for name in outputs)


def _converted(spec: TensorSpec, given: ArrayLike) -> NDArray[Any]:
    """The array in the input's datatype, row-major. Floats may lose precision, as they do in the model; anything else must be the same."""
    try:
        array = np.asarray(given)
    except ValueError as error:
        raise ProtocolError(f"input {spec.name!r} is no array: {error}") from error
    wanted = DTYPES[spec.datatype]
    if array.dtype == wanted:
        return np.ascontiguousarray(array)
    kinds = (array.dtype.kind, wanted.kind)
    if (kinds == ("f", "f") and _finite(array, wanted)) or (array.dtype.kind in "iu" and wanted.kind in "iuf" and _exact(array, wanted)):
        return np.ascontiguousarray(array, dtype=wanted)
    raise ProtocolError(
        f"input {spec.name!r} is of dtype {array.dtype}, the model takes {spec.datatype}", hint=f"convert it: .astype({wanted})"
    )


def _finite(array: NDArray[Any], wanted: np.dtype[Any]) -> bool:
    """Whether no finite number becomes infinite."""
    with np.errstate(over="ignore"):
        return bool(np.array_equal(np.isfinite(array), np.isfinite(array.astype(wanted))))


def _exact(array: NDArray[Any], wanted: np.dtype[Any]) -> bool:
    """Whether these integers are the same in another type; for floats those up to which every one is."""
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if wanted.kind == "f":
        most: int = 2 ** (int(np.finfo(wanted).nmant) + 1)
        return -most <= low and high <= most
    return int(np.iinfo(wanted).min) <= low and high <= int(np.iinfo(wanted).max)
