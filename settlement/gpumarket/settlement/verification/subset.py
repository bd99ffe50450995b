"""Which part of a request a check repeats, for jobs whose answer has an item for each input: embeddings and tensors. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from gpumarket.core.errors import ProtocolError
from gpumarket.core.tensor_requests import from_proto, to_proto
from gpumarket.v1 import terms_pb2 as pb

ByItem = pb.EmbedRequest | pb.TensorRequest


def check_of(request: ByItem, drawn: Sequence[int]) -> pb.CheckRequest:
    """The check of some inputs or rows, in this order. Raises ProtocolError for ones that the request does not have."""
    if isinstance(request, pb.EmbedRequest):
        if any(not 0 <= index < len(request.inputs) for index in drawn):
            raise ProtocolError("inputs that the request does not have")
        return pb.CheckRequest(embed=pb.EmbedRequest(inputs=[request.inputs[i] for i in drawn]))
    return pb.CheckRequest(infer=to_proto(from_proto(request).take(drawn)))


def drawn_by(request: ByItem, check: pb.CheckRequest, start: int, end: int) -> tuple[int, ...]:
    """Indices from `start` to `end` of the inputs or rows that a check repeats, ascending. Equal ones have equal answers, so the first that
    fits is as good as any. Raises ProtocolError when the check is no subset, in order."""
    have, wanted = _keys(request), _keys(check.embed if isinstance(request, pb.EmbedRequest) else check.infer)
    drawn: list[int] = []
    at = start
    for key in wanted:
        while at < end and have[at] != key:
            at += 1
        if at >= end:
            raise ProtocolError("the check's inputs are not a subset, in order, of the job's")
        drawn.append(at)
        at += 1
    return tuple(drawn)


def _keys(request: ByItem) -> list[bytes]:
    """What tells one input or row from another."""
    if isinstance(request, pb.EmbedRequest):
        return [item.SerializeToString(deterministic=True) for item in request.inputs]
    opened = from_proto(request)
    if not opened.rows:
        return [b"".join(t.contents for t in opened.inputs)]
    sizes = [len(t.contents) // opened.rows for t in opened.inputs]
    pairs = list(zip(opened.inputs, sizes, strict=True))
    return [b"".join(t.contents[row * size : (row + 1) * size] for t, size in pairs) for row in range(opened.rows)]
