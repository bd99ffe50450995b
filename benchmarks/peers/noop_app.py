"""The other side of the gateway's benchmarks, run by the peers' own environment: an OpenAI embeddings endpoint that does nothing.

It is a bare FastAPI route that reads its body raw, and it is what stands behind the litellm proxy.
"""

from __future__ import annotations

import base64
import json

from fastapi import FastAPI, Request, Response

DIMENSIONS = 32
_ROW = base64.b64encode(bytes(4 * DIMENSIONS)).decode()
_ANSWER = json.dumps(
    {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": _ROW}],
        "model": "no-op",
        "usage": {"prompt_tokens": 4, "total_tokens": 4},
    }
).encode()
app = FastAPI()


@app.post("/v1/embeddings")
async def embeddings(request: Request) -> Response:
    """The same vector, whatever came."""
    await request.body()
    return Response(_ANSWER, media_type="application/json")
