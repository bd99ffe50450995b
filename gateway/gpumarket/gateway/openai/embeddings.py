"""POST /v1/embeddings."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

from aiohttp import web

from gpumarket.core.terms import Task
from gpumarket.core.units import Hash
from gpumarket.gateway.call import Call
from gpumarket.gateway.counter import Approve
from gpumarket.gateway.openai.inputs import Inputs, inputs_of
from gpumarket.gateway.openai.tables import EmbeddingRequest
from gpumarket.gateway.problems import invalid
from gpumarket.sdk.results import EmbedResult


async def create(call: Call) -> web.Response:
    """One vector an input, all of them one job, which other requests of the key may share. Raises Problem."""
    asked = await call.read(EmbeddingRequest)
    call.room.catalog.find(call.key, asked.model, Task.EMBED)
    inputs = inputs_of(asked.input, "input")
    if len(inputs) > call.room.settings.inputs_max:
        raise invalid(f"there are {len(inputs)} inputs; the gateway takes at most {call.room.settings.inputs_max} at once", "input")
    async with call.buying(1, "input") as ticket:
        if ticket.kept or not call.room.sharing.takes(inputs):
            result = await _alone(call, asked.model, inputs, ticket.job_id(0))
        else:
            result = await call.room.sharing.embed(call.key, asked.model, inputs)
    tokens = result.usage.prompt_tokens
    document = {
        "object": "list",
        "data": _vectors(result, asked.encoding_format == "base64"),
        "model": asked.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return call.answer(document, [result])


async def _alone(call: Call, model: str, inputs: Inputs, job: Hash) -> EmbedResult:
    async def order(approve: Approve) -> EmbedResult:
        return await call.room.counter.client.embed(model, inputs, job_id=job, approve=approve)

    result: EmbedResult = await call.room.counter.whole(call.key, order)
    return result


def _vectors(result: EmbedResult, packed: bool) -> list[dict[str, Any]]:
    """Numbers, or the base64 of little-endian float32 as the official clients ask for."""
    rows = [b64encode(row.tobytes()).decode() for row in result.vectors] if packed else result.vectors.tolist()
    return [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
