"""A canary: the smallest real job, put through an engine as any other would be, to see whether work would be done.

It has no lease, so it can be neither billed nor paid, and takes no place from one that has: where every slot is taken by paying work, that
work is the canary, and only its silence is a trouble. An engine that was never asked for yet is left cold.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import numpy as np

from gpumarket.core.errors import GpumarketError
from gpumarket.core.tensor_requests import smallest
from gpumarket.core.tensors import Signature
from gpumarket.core.terms import Task
from gpumarket.node.engine.base import SEED_BYTES, TOP_P_PPM_MAX, EmbedRequest, Engine, GenerateRequest, Sampling
from gpumarket.node.engines import Seat

ANSWER_SECONDS = 10.0
SILENT_SECONDS = 60.0
"""An engine with every slot taken that gives nothing for so long does not work: a client that stalls is put out sooner."""
_TOKEN = 1
"""An id that every vocabulary has."""
_TEXT = GenerateRequest((_TOKEN,), 1, (), Sampling(0, TOP_P_PPM_MAX, bytes(SEED_BYTES)))
_EMBED = EmbedRequest(((_TOKEN,),))


async def trouble_with(seat: Seat) -> str:
    """Why this engine would not do a job now; empty when it just did one, or is full of them. Starts an engine that died."""
    if seat.running >= seat.model.slots:
        silent = seat.now() - seat.heard_at
        return f"every slot is taken, and nothing came for {silent:.0f} s" if silent > SILENT_SECONDS else ""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await _run(await seat.warm_up(), seat.model.manifest.task, seat.model.signature)
    except GpumarketError as error:
        return f"a canary job failed ({error.code})"
    except TimeoutError:
        return f"a canary job was not done within {ANSWER_SECONDS:.0f} s"


async def _run(engine: Engine, task: Task, signature: Signature | None) -> str:
    if signature is not None:
        return await _infer(engine, signature)
    if task is Task.EMBED:
        async with aclosing(engine.embed(_EMBED)) as batches:  # type: ignore[type-var]  # an async generator, as every engine's
            rows = [row async for batch in batches for row in batch]
        return "" if len(rows) == 1 and bool(np.isfinite(rows[0]).all()) else "a canary job gave no vector"
    async with aclosing(engine.generate(_TEXT)) as chunks:  # type: ignore[type-var]
        found = [token async for chunk in chunks for token in chunk.tokens]
    return "" if len(found) == 1 else f"a canary job gave {len(found)} tokens instead of one"


async def _infer(engine: Engine, signature: Signature) -> str:
    """Zeros through a tensor model. One with open dimensions besides the rows may need more than 1 of them: it only has to answer."""
    if any(-1 in spec.shape[signature.batched :] for spec in signature.inputs):
        await engine.stats()
        return ""
    async with aclosing(engine.infer(smallest(signature))) as batches:  # type: ignore[type-var]
        found = [batch async for batch in batches]
    return "" if len(found) == 1 and len(found[0]) == len(signature.outputs) else "a canary job gave other tensors than it asked for"
