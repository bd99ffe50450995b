"""What the engine process does inside its sandbox: load one engine, then answer the frames of its parent.

Invariant: each call is a task; it holds at most the answers that its credits allow, and a call that its reader left is cancelled.
Must never write a prompt anywhere.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

from gpumarket.core.errors import GpumarketError
from gpumarket.core.tensors import encode_item
from gpumarket.node.engine import frames, sandbox

if TYPE_CHECKING:
    from gpumarket.node.engine.embed import EmbedEngine
    from gpumarket.node.engine.onnx import OnnxEngine
    from gpumarket.node.engine.slots import SlotEngine

    AnyEngine = EmbedEngine | OnnxEngine | SlotEngine

Request = frames.Embed | frames.Generate | frames.Infer | frames.Replay | frames.Stats


def run(descriptor: int, in_force: dict[str, bool | str]) -> None:
    """Serve the parent at the other end of the socket until it hangs up."""
    asyncio.run(_serve(socket.socket(fileno=descriptor), in_force))


async def _serve(connection: socket.socket, in_force: dict[str, bool | str]) -> None:
    reader, writer = await asyncio.open_connection(sock=connection)
    load = await frames.read_to_engine(reader)
    if not isinstance(load, frames.Load):
        return
    engine = _made(load)
    try:
        await engine.start()
    except GpumarketError as error:
        writer.write(frames.pack(_failed(0, error)))
        await writer.drain()
        return
    writer.write(frames.pack(frames.Ready(in_force)))
    calls = Calls(engine, writer)
    # At the end of the connection there is nobody left who could read an answer: open calls are not waited for.
    while (message := await frames.read_to_engine(reader)) is not None:
        calls.handle(message)


def _made(load: frames.Load) -> AnyEngine:
    """The engine, of which alone the libraries are imported: a process that reads tensors never holds torch."""
    folder = Path(load.folder)
    if load.kind == "onnx":
        from gpumarket.node.engine.onnx import OnnxEngine

        options = {"memory_mib": sandbox.TENSOR_MEMORY_MIB, **load.options}
        sandbox.limit_memory(options.pop("memory_mib"))
        return OnnxEngine(folder, compute_dtype=load.compute_dtype, threads=load.threads, **options)
    import torch

    from gpumarket.node.engine.embed import EmbedEngine
    from gpumarket.node.engine.slots import SlotEngine

    torch.set_num_threads(load.threads)
    kinds: dict[str, type[EmbedEngine] | type[SlotEngine]] = {"embed": EmbedEngine, "slots": SlotEngine}
    return kinds[load.kind](folder, compute_dtype=load.compute_dtype, **load.options)


class Calls:
    """The open calls: a task and its credits each."""

    def __init__(self, engine: AnyEngine, writer: asyncio.StreamWriter) -> None:
        self.engine, self.writer = engine, writer
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.credits: dict[int, asyncio.Semaphore] = {}

    def handle(self, message: frames.ToEngine) -> None:
        """Start, feed or end a call."""
        if isinstance(message, frames.Credit):
            if message.call in self.credits:
                self.credits[message.call].release()
        elif isinstance(message, frames.Cancel):
            if message.call in self.tasks:
                self.tasks[message.call].cancel()
        elif not isinstance(message, frames.Load):
            self.credits[message.call] = asyncio.Semaphore(frames.CREDITS)
            self.tasks[message.call] = asyncio.create_task(self._run(message))

    async def _run(self, message: Request) -> None:
        call = message.call
        last: frames.FromEngine = frames.Done(call)
        try:
            async with aclosing(self._answers(message)) as answers:
                async for answer in answers:
                    await self.credits[call].acquire()
                    await self._write(answer)
        except GpumarketError as error:
            last = _failed(call, error)
        finally:
            del self.tasks[call], self.credits[call]
        await self._write(last)

    async def _answers(self, message: Request) -> AsyncGenerator[frames.FromEngine, None]:
        call = message.call
        if isinstance(message, frames.Embed):
            async with aclosing(self.engine.embed(message.request)) as batches:
                async for rows in batches:
                    yield frames.Rows(call, rows.shape[1], rows.astype("<f4").tobytes())
        elif isinstance(message, frames.Generate):
            async with aclosing(self.engine.generate(message.request)) as chunks:
                async for chunk in chunks:
                    yield frames.Tokens(call, chunk.tokens, chunk.finish_reason, chunk.logprobs)
        elif isinstance(message, frames.Infer):
            async with aclosing(self.engine.infer(message.request)) as arrays:
                async for batch in arrays:
                    yield frames.Tensors(call, encode_item(batch))
        elif isinstance(message, frames.Replay):
            gaps = await self.engine.replay(message.request, message.output, message.segments)
            yield frames.Rows(call, 1, gaps.astype("<f4").tobytes())
        else:
            yield frames.Report(call, {**await self.engine.stats()})

    async def _write(self, message: frames.FromEngine) -> None:
        self.writer.write(frames.pack(message))
        await self.writer.drain()


def _failed(call: int, error: GpumarketError) -> frames.Failed:
    return frames.Failed(call, error.code, error.message, error.hint, error.retryable)
