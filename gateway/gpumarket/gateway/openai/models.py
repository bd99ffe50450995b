"""GET /v1/models and /v1/models/{model}: what the key may use."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from gpumarket.core.units import hex0x
from gpumarket.gateway.call import Call
from gpumarket.sdk.lock import LockedModel

OWNER = "gpumarket"


async def list_models(call: Call) -> web.Response:
    """All of them."""
    catalog = call.room.catalog
    return call.answer({"object": "list", "data": [_model(entry, catalog.created_at) for entry in catalog.models(call.key)]})


async def get_model(call: Call) -> web.Response:
    """One of them. Raises Problem (404)."""
    catalog = call.room.catalog
    entry = catalog.find(call.key, call.request.match_info["model"])
    return call.answer(_model(entry, catalog.created_at))


def _model(entry: LockedModel, created_at: int) -> dict[str, Any]:
    about = {
        "digest": hex0x(entry.digest),
        "task": entry.task.name.lower(),
        "dtype": entry.dtype,
        "max_input_tokens": entry.max_input_tokens,
    }
    return {"id": entry.name, "object": "model", "created": created_at, "owned_by": OWNER, "gpumarket": about}
