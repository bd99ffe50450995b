"""One tensor request, whichever way it came: checked against the model's signature and bought for a key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpumarket.core.tensors import Signature, datatype_of
from gpumarket.core.terms import Task
from gpumarket.core.units import hex0x
from gpumarket.gateway.answers import Ticket
from gpumarket.gateway.call import Room
from gpumarket.gateway.counter import Approve
from gpumarket.gateway.inference_protocol.arrays import Array
from gpumarket.gateway.keys import Key
from gpumarket.gateway.problems import Problem, invalid
from gpumarket.sdk.lock import LockedModel
from gpumarket.sdk.results import InferResult

PLATFORM = "onnx"
EXTENSIONS = ("binary_tensor_data",)


@dataclass(frozen=True, slots=True)
class Asked:
    """A tensor request. `outputs` None: all of them."""

    inputs: Mapping[str, Array]
    outputs: Sequence[str] | None


def version_of(entry: LockedModel) -> str:
    """The one version that an alias has: what it stands for."""
    return hex0x(entry.digest)


def model_of(room: Room, key: Key, name: str, version: str) -> LockedModel:
    """The model that is meant. Raises Problem: 404 where the key has none such, 400 where it is no tensor model."""
    entry = room.catalog.find(key, name, Task.INFER)
    if version not in ("", version_of(entry)):
        raise Problem(404, "model_not_found", f"the model {name} has the version {version_of(entry)} alone", param="version")
    return entry


async def on_sale(room: Room, entry: LockedModel) -> bool:
    """Whether somebody sells it now."""
    return bool(await room.counter.client.offers(entry.digest))


async def buy(room: Room, key: Key, entry: LockedModel, asked: Asked, ticket: Ticket) -> InferResult:
    """Raises Problem for a datatype that is not the model's, and whatever the market has to say."""
    _check(await room.counter.client.signature(entry.name), asked)

    async def order(approve: Approve) -> InferResult:
        job_id = ticket.job_id(0)
        return await room.counter.client.infer(entry.name, asked.inputs, outputs=asked.outputs, job_id=job_id, approve=approve)

    result: InferResult = await room.counter.whole(key, order)
    return result


def _check(signature: Signature, asked: Asked) -> None:
    """What the client would convert is refused here: a caller of this protocol names its datatypes."""
    wanted = {spec.name: spec.datatype for spec in signature.inputs}
    for name, array in asked.inputs.items():
        if name not in wanted:
            raise invalid(f"the model has no input {name!r}; it takes {', '.join(wanted)}", name)
        if datatype_of(array.dtype) != wanted[name]:
            raise invalid(f"input {name!r} is {datatype_of(array.dtype)}; the model takes {wanted[name]}", name)
    if missing := sorted(set(wanted) - set(asked.inputs)):
        raise invalid(f"input {missing[0]!r} is missing", missing[0])
