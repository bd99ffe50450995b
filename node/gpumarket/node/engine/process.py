"""The parent's side of an engine process: the Engine interface over a socket pair.

Invariant: an engine process that dies, hangs up or talks nonsense fails every open call with a retryable EngineFailed, and nothing else in
the daemon; `start` brings a new one up. Neither arguments nor environment of the child hold anything but the descriptor's number.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from gpumarket.core.errors import ConfigError, EngineFailed, GpumarketError, ProtocolError, by_code
from gpumarket.core.tensor_requests import TensorRequest
from gpumarket.core.tensors import decode_item
from gpumarket.node.engine import frames
from gpumarket.node.engine.base import Chunk, EmbedRequest, GenerateRequest, Segment
from gpumarket.node.engine.sandbox import scrubbed_environment

KINDS: Final = {"embed": "embed", "slots": "generate", "onnx": "infer"}
"""Kinds of engine, and the task of each."""
START_SECONDS_MAX: Final = 300.0
STDERR_BYTES_KEPT: Final = 2000


@dataclass(slots=True)
class _Call:
    """One open call. The queue never holds more than CREDITS answers and the end."""

    answers: asyncio.Queue[frames.FromEngine | GpumarketError] = field(default_factory=asyncio.Queue)
    ended: bool = False


@dataclass(slots=True)
class _Child:
    """A running engine process."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    sandbox: Mapping[str, bool | str] = field(default_factory=dict)
    stderr: bytearray = field(default_factory=bytearray)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class EngineProcess:
    """An engine of `kind` (one of KINDS) serving the model in `folder`, in an unprivileged process of its own.

    `options` are the keyword arguments of that engine (rows_max, queue_max, batch_tokens, …).
    """

    def __init__(
        self,
        kind: str,
        folder: Path,
        *,
        compute_dtype: str = "float32",
        threads: int = 1,
        options: Mapping[str, int] | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ConfigError(f"there is no engine {kind}", hint=f"use one of {', '.join(KINDS)}")
        self._load = frames.Load(kind, str(folder.resolve()), compute_dtype, threads, dict(options or {}))
        self._child: _Child | None = None
        self._calls: dict[int, _Call] = {}
        self._next_call = 0
        self._starts = 0
        self._starting = asyncio.Lock()

    @property
    def task(self) -> str:
        """ "embed", "generate" or "infer"."""
        return KINDS[self._load.kind]

    @property
    def running(self) -> bool:
        """Whether a child is up and takes calls."""
        return self._child is not None

    @property
    def pid(self) -> int:
        """Process id of the child. EngineFailed when there is none."""
        return self._up().process.pid

    async def start(self) -> None:
        """Bring a child up, unless one is. Raises what the engine raised, or EngineFailed when it died or took too long."""
        async with self._starting:
            if self._child is not None:
                return
            child = await self._spawn()
            try:
                async with asyncio.timeout(START_SECONDS_MAX):
                    child.sandbox = await self._await_ready(child)
            except TimeoutError as error:
                raise EngineFailed(f"the engine did not start in {START_SECONDS_MAX:.0f} s", hint="see the log") from error
            finally:
                if not child.sandbox:
                    await self._end(child)
            self._child = child
            self._starts += 1
            child.tasks.append(asyncio.create_task(self._read(child)))

    async def embed(self, request: EmbedRequest) -> AsyncGenerator[NDArray[np.float32], None]:
        """Vectors in input order, in batches of rows."""
        async with contextlib.aclosing(self._ask(lambda call: frames.Embed(call, request))) as answers:
            async for answer in answers:
                yield _rows(answer)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """New tokens as they are drawn."""
        async with contextlib.aclosing(self._ask(lambda call: frames.Generate(call, request))) as answers:
            async for answer in answers:
                if not isinstance(answer, frames.Tokens):
                    raise EngineFailed("the engine answered with the wrong kind of frame", hint="retry elsewhere")
                yield Chunk(answer.tokens, answer.finish_reason, answer.logprobs)

    async def infer(self, request: TensorRequest) -> AsyncGenerator[tuple[NDArray[Any], ...], None]:
        """The wanted outputs, in batches of rows."""
        async with contextlib.aclosing(self._ask(lambda call: frames.Infer(call, request))) as answers:
            async for answer in answers:
                yield _arrays(answer)

    async def replay(self, request: GenerateRequest, output: Sequence[int], segments: Sequence[Segment] = ()) -> NDArray[np.float32]:
        """The gap of each output token."""
        asked = self._ask(lambda call: frames.Replay(call, request, tuple(output), tuple(segments)))
        gaps = _rows(await _only(asked)).reshape(-1)
        if len(gaps) != len(output):
            raise EngineFailed(f"{len(gaps)} gaps came back for {len(output)} tokens", hint="retry elsewhere")
        return gaps

    async def stats(self) -> Mapping[str, object]:
        """The engine's numbers; of its process `pid`, `starts`, the tier in force as `sandbox` and its parts as `sandbox_…`."""
        child = self._up()
        answer = await _only(self._ask(frames.Stats))
        if not isinstance(answer, frames.Report):
            raise EngineFailed("the engine answered with the wrong kind of frame", hint="retry elsewhere")
        parts = {f"sandbox_{name}": value for name, value in child.sandbox.items() if name != "tier"}
        return {**answer.values, "sandbox": child.sandbox.get("tier", "none"), **parts, "pid": child.process.pid, "starts": self._starts}

    async def close(self) -> None:
        """Kill the child; open calls fail."""
        async with self._starting:
            child, self._child = self._child, None
            if child is not None:
                await self._end(child)
            self._fail_all(EngineFailed("the engine was closed", hint="retry at another provider"))

    # --- calls ------------------------------------------------------------------------------------------------------

    async def _ask(self, make: _MakeCall) -> AsyncGenerator[frames.FromEngine, None]:
        child = self._up()
        self._next_call += 1
        number, call = self._next_call, _Call()
        message = frames.pack(make(number))
        self._calls[number] = call
        try:
            child.writer.write(message)
            await child.writer.drain()
            while True:
                answer = await call.answers.get()
                if isinstance(answer, GpumarketError):
                    raise answer
                if isinstance(answer, frames.Done):
                    return
                yield answer
                self._send(frames.Credit(number))
        except ConnectionError as error:
            raise EngineFailed("the engine process hung up", hint="retry; it is started again") from error
        finally:
            del self._calls[number]
            if not call.ended:
                self._send(frames.Cancel(number))

    def _send(self, message: frames.ToEngine) -> None:
        if self._child is not None and not self._child.writer.is_closing():
            self._child.writer.write(frames.pack(message))

    def _up(self) -> _Child:
        if self._child is None:
            raise EngineFailed("the engine process is not running", hint="it is started again; retry")
        return self._child

    # --- the child --------------------------------------------------------------------------------------------------

    async def _spawn(self) -> _Child:
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as on_failure:
            on_failure.callback(ours.close)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-m", "gpumarket.node.engine.worker"),
                *("--fd", str(theirs.fileno()), "--parent", str(os.getpid())),
                pass_fds=(theirs.fileno(),),
                env=scrubbed_environment(dict(os.environ)),
                cwd="/",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
            on_failure.pop_all()
        reader, writer = await asyncio.open_connection(sock=ours)
        child = _Child(process, reader, writer)
        child.tasks.append(asyncio.create_task(_keep_tail(process, child.stderr)))
        return child

    async def _await_ready(self, child: _Child) -> Mapping[str, bool | str]:
        child.writer.write(frames.pack(self._load))
        first = await frames.read_from_engine(child.reader)
        if isinstance(first, frames.Ready):
            return first.sandbox
        if isinstance(first, frames.Failed):
            raise _error(first)
        raise await _death(child)

    async def _read(self, child: _Child) -> None:
        """Hand answers to their calls until the child is gone, then fail the calls that are left."""
        try:
            while (message := await frames.read_from_engine(child.reader)) is not None:
                self._dispatch(message)
            failure = await _death(child)
        except EngineFailed as error:
            failure = error
        if self._child is child:
            self._child = None
            self._fail_all(failure)
            await self._end(child)

    def _dispatch(self, message: frames.FromEngine) -> None:
        if isinstance(message, frames.Ready):
            raise EngineFailed("the engine said twice that it is ready", hint="it is started again; retry")
        call = self._calls.get(message.call)
        if call is None:
            return
        if call.answers.qsize() > frames.CREDITS:
            raise EngineFailed("the engine sent more than it may", hint="it is started again; retry")
        call.ended = isinstance(message, frames.Done | frames.Failed)
        call.answers.put_nowait(_error(message) if isinstance(message, frames.Failed) else message)

    def _fail_all(self, error: GpumarketError) -> None:
        for call in self._calls.values():
            if not call.ended:
                call.ended = True
                call.answers.put_nowait(error)

    async def _end(self, child: _Child) -> None:
        """Kill and reap, whatever state it is in."""
        _kill(child)
        await child.process.wait()
        child.writer.close()
        for task in child.tasks:
            if task is not asyncio.current_task():
                task.cancel()


class _MakeCall(Protocol):
    def __call__(self, call: int, /) -> frames.ToEngine: ...


async def _only(answers: AsyncIterator[frames.FromEngine]) -> frames.FromEngine:
    """The single answer of a call that has one."""
    found = [answer async for answer in answers]
    if len(found) != 1:
        raise EngineFailed(f"the engine answered {len(found)} times instead of once", hint="retry elsewhere")
    return found[0]


def _rows(answer: frames.FromEngine) -> NDArray[np.float32]:
    """Values of a Rows frame, checked: the process that sent it is not trusted."""
    if not isinstance(answer, frames.Rows) or answer.dimensions < 1 or len(answer.data) % (4 * answer.dimensions):
        raise EngineFailed("the engine answered with a malformed frame of values", hint="retry elsewhere")
    values = np.frombuffer(answer.data, dtype="<f4").astype(np.float32)
    return values.reshape(-1, answer.dimensions)


def _arrays(answer: frames.FromEngine) -> tuple[NDArray[Any], ...]:
    """The arrays of a Tensors frame. What they should be, their reader knows (`tensor_work`)."""
    if not isinstance(answer, frames.Tensors):
        raise EngineFailed("the engine answered with the wrong kind of frame", hint="retry elsewhere")
    try:
        return tuple(part.array for part in decode_item(answer.item))
    except ProtocolError as error:
        raise EngineFailed("the engine answered with a malformed frame of tensors", hint="retry elsewhere") from error


def _error(failed: frames.Failed) -> GpumarketError:
    """The error as itself when its class can be made from a message alone, else an EngineFailed that says the same."""
    kind = by_code().get(failed.code, EngineFailed)
    try:
        error = kind(failed.message, hint=failed.hint)
    except TypeError:
        error = EngineFailed(failed.message, hint=failed.hint)
    error.retryable = failed.retryable
    return error


async def _death(child: _Child) -> EngineFailed:
    """How the child ended, with the end of what it wrote to stderr."""
    _kill(child)
    code = await child.process.wait()
    await asyncio.wait(child.tasks[:1], timeout=1.0)
    said = child.stderr.decode(errors="replace").strip().splitlines()[-1:]
    return EngineFailed(
        f"the engine process ended ({'signal' if code < 0 else 'exit'} {abs(code)}){': ' + said[0] if said else ''}",
        hint="it is started again; retry",
    )


def _kill(child: _Child) -> None:
    """Not `Process.kill`: that polls first, and so takes the exit status of a child that has just ended from the loop's watcher."""
    if child.process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.process.pid, signal.SIGKILL)


async def _keep_tail(process: asyncio.subprocess.Process, kept: bytearray) -> None:
    """Read stderr to its end and keep the last bytes: a full pipe would stop the child."""
    if process.stderr is None:
        return
    while data := await process.stderr.read(4096):
        kept += data
        del kept[:-STDERR_BYTES_KEPT]
