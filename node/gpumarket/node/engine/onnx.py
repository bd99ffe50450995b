"""The tensor engine: rows of all open requests, batched through onnxruntime.

Rows of one shape are taken from the requests in turn and run together; a model without a batch dimension runs one request at a time.
The file is judged by `onnx_file` before onnxruntime sees it; then it gets bytes and never a path, so that no folder lies around them.

Invariant: a row does not depend on its batch, within the profile. A pass that takes too long, or more memory than is granted, ends this
process or the pass, never the daemon. Must never import torch, nor put a number of a request or an answer into an error or a log.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gpumarket.core.errors import Busy, ConfigError, EngineFailed, GpumarketError, ProtocolError
from gpumarket.core.tensor_requests import TensorRequest, require_fits
from gpumarket.core.tensors import OUTPUT_BYTES_MAX, SIGNATURE_FILE, Signature, signature_from_json
from gpumarket.node.engine.base import Chunk, EmbedRequest, GenerateRequest, Segment
from gpumarket.node.engine.onnx_rows import refuse_dependent_rows
from gpumarket.node.engine.onnx_session import Session, open_session
from gpumarket.node.engine.thread import ModelThread
from gpumarket.node.models.onnx_import import MODEL_FILE, read_model

REQUESTS_OPEN_MAX: Final = 64
"""Each holds its inputs, and at most OUTPUT_BYTES_MAX that its reader left unread."""
BATCH_ROWS_MAX: Final = 64
BATCH_BYTES_MAX: Final = 8 * 1024 * 1024
"""Input bytes of one pass: rows beyond it wait for the next."""

Batch = tuple[NDArray[Any], ...]


@dataclass(slots=True)
class _Call:
    """One open request. Written by the thread: `taken`; by the loop: the rest."""

    request: TensorRequest
    arrays: dict[str, NDArray[Any]]
    taken: int = 0
    read: int = 0
    sent_bytes: int = 0
    batches: list[Batch] = field(default_factory=list)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    error: GpumarketError | None = None

    @property
    def shape(self) -> tuple[tuple[int, ...], ...]:
        """What rows must share to run together."""
        return tuple(array.shape[1:] for _, array in sorted(self.arrays.items()))

    @property
    def row_bytes(self) -> int:
        return max(1, sum(array.nbytes for array in self.arrays.values()) // self.request.items)


class OnnxEngine:
    """Tensors through the model in `folder`. `pass_seconds` bounds a pass over it; `threads` are those of one operator."""

    task = "infer"

    def __init__(self, folder: Path, *, compute_dtype: str = "float32", threads: int = 1, pass_seconds: int = 30) -> None:
        self._folder, self._compute_dtype, self._threads = folder, compute_dtype, threads
        self._pass_seconds = pass_seconds
        self._session: Session | None = None
        self._signature: Signature | None = None
        self._thread: ModelThread | None = None
        self._calls: dict[int, _Call] = {}
        self._active: dict[int, _Call] = {}
        self._running_keys: frozenset[int] = frozenset()
        self._turn = 0
        self._next_key = 0
        self._counts = {"requests": 0, "rows": 0, "batches": 0, "interrupted": 0}

    async def start(self) -> None:
        """Judge and load the model. ConfigError for a file that is refused or whose rows depend on each other, EngineFailed for
        one that onnxruntime does not load."""
        if self._thread is not None:
            return
        raw, model = await asyncio.to_thread(read_model, self._folder / MODEL_FILE)
        signature = await asyncio.to_thread(_declared, self._folder, model.signature)
        if model.dtype != self._compute_dtype:
            raise ConfigError(f"the model computes in {model.dtype} and is sold as {self._compute_dtype}", hint="import it again")
        session = await asyncio.to_thread(open_session, raw, self._threads, self._pass_seconds)
        await asyncio.to_thread(refuse_dependent_rows, session, signature)
        self._session, self._signature = session, signature
        self._thread = ModelThread("onnx", self._work, lambda: None, lambda error: self._fail(list(self._calls), _broken(error)))

    async def infer(self, request: TensorRequest) -> AsyncGenerator[Batch, None]:
        """Outputs in the request's order, a batch of rows at a time; without rows the whole outputs once. Busy when too many are open."""
        signature, _, thread = self._up()
        require_fits(signature, request)
        if len(self._calls) >= REQUESTS_OPEN_MAX:
            raise Busy(f"{len(self._calls)} tensor requests are open", hint="retry later or at another provider")
        self._next_key += 1
        key, call = self._next_key, _Call(request, {t.name: t.array for t in request.inputs})
        self._calls[key] = call
        self._counts["requests"] += 1
        thread.post(lambda: self._active.__setitem__(key, call))
        try:
            while call.read < request.items:
                await call.ready.wait()
                call.ready.clear()
                if call.error is not None:
                    raise call.error
                batches, call.batches = call.batches, []
                for batch in batches:
                    call.read += len(batch[0]) if request.rows else 1
                    yield batch
                thread.post(lambda: None)
        finally:
            del self._calls[key]
            self._interrupt()
            thread.post(lambda: _forget(self._active, key))

    async def embed(self, request: EmbedRequest) -> AsyncGenerator[NDArray[np.float32], None]:
        """This engine takes tensors."""
        raise _tensors_only()
        yield np.empty((0, 0), np.float32)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """This engine takes tensors."""
        raise _tensors_only()
        yield Chunk(())

    async def replay(self, request: GenerateRequest, output: Sequence[int], segments: Sequence[Segment] = ()) -> NDArray[np.float32]:
        """This engine takes tensors; they are checked by computing them again."""
        raise _tensors_only()

    async def stats(self) -> Mapping[str, int | str]:
        """Counters since the start, what is open, and on what it computes."""
        _, session, _ = self._up()
        return {
            "task": self.task,
            "compute_dtype": self._compute_dtype,
            "device": session.device,
            **self._counts,
            "open": len(self._calls),
        }

    async def close(self) -> None:
        """Stop the thread after its batch; open calls fail."""
        thread, self._thread = self._thread, None
        if thread is not None:
            await thread.stop()
            self._fail(list(self._calls), EngineFailed("the engine was closed", hint="retry at another provider"))

    def _up(self) -> tuple[Signature, Session, ModelThread]:
        if self._signature is None or self._session is None or self._thread is None or not self._thread.alive:
            raise EngineFailed("the tensor engine is not running", hint="start it first")
        return self._signature, self._session, self._thread

    def _interrupt(self) -> None:
        """End the pass that runs when nobody waits for any of it."""
        if self._session is not None and self._running_keys and not self._running_keys & self._calls.keys():
            self._counts["interrupted"] += self._session.interrupt()

    # --- on the thread ----------------------------------------------------------------------------------------------

    def _work(self) -> bool:
        """One pass. Says whether another may follow at once."""
        _, session, thread = self._up()
        taken = self._take()
        if not taken:
            return False
        keys = [key for key, _, _ in taken]
        wanted = sorted({spec.name for _, call, _ in taken for spec in call.request.outputs})
        try:
            inputs = _inputs(taken)
            self._running_keys = frozenset(keys)
            outputs = dict(zip(wanted, session.run(wanted, inputs), strict=True))
            parts = _split(taken, outputs)
        except Exception as error:  # whatever onnxruntime raises
            for key in keys:
                _forget(self._active, key)
            thread.tell(self._fail, keys, error if isinstance(error, GpumarketError) else _broken(error))
            return True
        finally:
            self._running_keys = frozenset()
        thread.tell(self._count, sum(count for _, _, count in taken))
        for key, part in zip(keys, parts, strict=True):
            thread.tell(self._deliver, key, part)
        return True

    def _take(self) -> list[tuple[int, _Call, int]]:
        """(key, request, rows) of the next pass: in turn from the requests whose rows have the shape of the first one's."""
        keys = list(self._active)
        self._turn += 1
        keys = keys[self._turn % max(1, len(keys)) :] + keys[: self._turn % max(1, len(keys))]
        if not keys:
            return []
        first = self._active[keys[0]]
        if not first.request.rows:
            del self._active[keys[0]]
            return [(keys[0], first, 1)]
        together = [key for key in keys if self._active[key].shape == first.shape]
        room = max(1, min(BATCH_ROWS_MAX, BATCH_BYTES_MAX // first.row_bytes))
        taken = []
        for left, key in zip(range(len(together), 0, -1), together, strict=True):
            call = self._active[key]
            count = min(call.request.rows - call.taken, -(-room // left))
            if count:
                taken.append((key, call, count))
                call.taken += count
                room -= count
            if call.taken == call.request.rows:
                del self._active[key]
        return taken

    # --- back on the loop -------------------------------------------------------------------------------------------

    def _deliver(self, key: int, batch: Batch) -> None:
        call = self._calls.get(key)
        if call is None:
            return
        call.sent_bytes += sum(array.nbytes for array in batch)
        if call.sent_bytes > OUTPUT_BYTES_MAX:
            call.error = ProtocolError(f"the answer is over {OUTPUT_BYTES_MAX} bytes", hint="send fewer rows at a time")
        else:
            call.batches.append(batch)
        call.ready.set()

    def _fail(self, keys: list[int], error: GpumarketError) -> None:
        for key in keys:
            call = self._calls.get(key)
            if call is not None:
                call.error = error
                call.ready.set()

    def _count(self, rows: int) -> None:
        self._counts["rows"] += rows
        self._counts["batches"] += 1


def _declared(folder: Path, found: Signature) -> Signature:
    """The signature that the model is sold with. Raises ConfigError when its file has another one."""
    try:
        declared = signature_from_json((folder / SIGNATURE_FILE).read_bytes())
    except (OSError, ProtocolError) as error:
        raise ConfigError(f"the model's {SIGNATURE_FILE} cannot be read ({type(error).__name__})", hint="import the model again") from error
    if (declared.inputs, declared.outputs) != (found.inputs, found.outputs) or (declared.batched and not found.batched):
        raise ConfigError(f"the model's {SIGNATURE_FILE} is not the file's own signature", hint="import the model again")
    return declared


def _inputs(taken: Sequence[tuple[int, _Call, int]]) -> dict[str, NDArray[Any]]:
    if not taken[0][1].request.rows:
        return dict(taken[0][1].arrays)
    names = taken[0][1].arrays
    return {name: np.concatenate([call.arrays[name][call.taken - count : call.taken] for _, call, count in taken]) for name in names}


def _split(taken: Sequence[tuple[int, _Call, int]], outputs: Mapping[str, NDArray[Any]]) -> list[Batch]:
    """Each request's part of the outputs. EngineFailed when the model gives another number of rows than it took."""
    if not taken[0][1].request.rows:
        return [tuple(outputs[spec.name] for spec in taken[0][1].request.outputs)]
    rows = sum(count for _, _, count in taken)
    if any(array.ndim < 1 or len(array) != rows for array in outputs.values()):
        raise EngineFailed(f"the model gave another number of rows than the {rows} it took", hint="it is no batched model", retryable=False)
    parts, at = [], 0
    for _, call, count in taken:
        parts.append(tuple(outputs[spec.name][at : at + count] for spec in call.request.outputs))
        at += count
    return parts


def _forget(active: dict[int, _Call], key: int) -> None:
    active.pop(key, None)


def _broken(error: Exception) -> EngineFailed:
    return EngineFailed(f"a pass failed: {type(error).__name__}", hint="see the provider's log")


def _tensors_only() -> ProtocolError:
    return ProtocolError("this model takes tensors", hint="choose a model of another task")
