"""An engine process is cut off from everything but its socket, and its death is an error of the calls it had, not of the daemon."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from engine_kit import request, small_llama

from gpumarket.core.errors import Busy, ConfigError, EngineFailed, ProtocolError
from gpumarket.node.engine import frames
from gpumarket.node.engine.base import EmbedRequest, GenerateRequest
from gpumarket.node.engine.process import EngineProcess
from gpumarket.node.engine.sandbox import ENVIRONMENT_PASSED, ENVIRONMENT_SET, scrubbed_environment
from gpumarket.node.engine.slots import SlotEngine

MODULE_LOOP = pytest.mark.asyncio(loop_scope="module")
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux namespaces and /proc")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def process() -> AsyncIterator[EngineProcess]:
    """One child for the module: starting one costs seconds."""
    os.environ["GPUMARKET_PASSWORD"] = "canary-7f3a"
    made = EngineProcess("slots", small_llama(), options={"rows_max": 2, "queue_max": 1})
    await made.start()
    del os.environ["GPUMARKET_PASSWORD"]
    yield made
    await made.close()


async def drawn(engine: EngineProcess | SlotEngine, asked: GenerateRequest) -> list[int]:
    return [token async for chunk in engine.generate(asked) for token in chunk.tokens]


@LINUX
@MODULE_LOOP
async def test_process_serves_like_the_engine_and_gives_up_what_it_says(process: EngineProcess) -> None:
    own = SlotEngine(small_llama())
    await own.start()
    asked = request(20, 24, temperature=1000)
    output = await drawn(process, asked)
    assert output == await drawn(own, asked)
    assert (await process.replay(asked, output) == await own.replay(asked, output)).all()
    await own.close()

    folder = Path(f"/proc/{process.pid}")
    assert "canary-7f3a" not in (folder / "environ").read_text()
    names = {line.split("=")[0] for line in (folder / "environ").read_text().split("\0") if line}
    assert names <= {*ENVIRONMENT_PASSED, *ENVIRONMENT_SET}
    assert str(small_llama()) not in (folder / "cmdline").read_text()
    stats = await process.stats()
    status = (folder / "status").read_text()
    assert stats["sandbox_no_new_privileges"] is True and "NoNewPrivs:\t1" in status
    assert (folder / "limits").read_text().split("Max core file size")[1].split()[0] == "0"
    if stats["sandbox_no_capabilities"]:
        assert "CapEff:\t0000000000000000" in status
    cut = os.readlink(folder / "ns" / "net") != os.readlink("/proc/self/ns/net")
    assert stats["sandbox_no_network"] is cut
    assert stats["sandbox"] == ("process+netns" if cut else "process")
    if cut:
        interfaces = [line.split(":")[0].strip() for line in (folder / "net" / "dev").read_text().splitlines()[2:]]
        assert interfaces == ["lo"]


@MODULE_LOOP
async def test_process_errors_come_back_as_themselves(process: EngineProcess) -> None:
    with pytest.raises(ProtocolError, match="outside the vocabulary") as refused:
        await drawn(process, request(3, 4, prefix=(9999,)))
    assert refused.value.hint and not refused.value.retryable
    with pytest.raises(ProtocolError, match="generates text"):
        await anext(process.embed(EmbedRequest(((1,),))))
    four = [asyncio.create_task(drawn(process, request(5, 2000, salt=i))) for i in range(4)]  # two rows, a queue of one
    done, running = await asyncio.wait(four, return_when=asyncio.FIRST_EXCEPTION)
    for task in running:
        task.cancel()
    assert [type(task.exception()) for task in done] == [Busy]
    await asyncio.wait(running)


@MODULE_LOOP
async def test_process_call_closed_early_is_cancelled_in_the_child(process: EngineProcess) -> None:
    call = process.generate(request(5, 1500))
    await anext(call)
    await call.aclose()
    while (await process.stats())["open"]:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert (await process.stats())["tokens_out"] != 1500


@MODULE_LOOP
async def test_process_slow_reader_blocks_nobody_and_loses_nothing(process: EngineProcess) -> None:
    slow = process.generate(request(5, 300, temperature=1000))
    got = list((await anext(slow)).tokens)
    for i in range(3):
        assert len(await drawn(process, request(5, 20, salt=i))) == 20
    while (await process.stats())["running"]:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    got += [token for chunk in [c async for c in slow] for token in chunk.tokens]
    assert got == await drawn(process, request(5, 300, temperature=1000))


@MODULE_LOOP
async def test_process_killed_fails_open_calls_and_starts_again(process: EngineProcess) -> None:
    call = process.generate(request(5, 1500))
    await anext(call)
    first = process.pid
    os.kill(first, signal.SIGKILL)
    with pytest.raises(EngineFailed, match="signal 9") as died:
        async for _ in call:
            pass
    assert died.value.retryable
    with pytest.raises(EngineFailed, match="not running"):
        await process.stats()
    await process.start()
    assert process.pid != first
    assert len(await drawn(process, request(5, 4))) == 4
    assert (await process.stats())["starts"] == 2


@LINUX
@MODULE_LOOP
async def test_process_dies_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import asyncio, os, sys\n"
        "from pathlib import Path\n"
        "from gpumarket.node.engine.process import EngineProcess\n"
        "async def main():\n"
        "    engine = EngineProcess('slots', Path(sys.argv[1]))\n"
        "    await engine.start()\n"
        "    print(engine.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program, str(small_llama())], capture_output=True, text=True, timeout=120
    )
    pid = int(done.stdout)
    for _ in range(500):
        if has_ended(pid):
            return
        await asyncio.sleep(0.02)
    pytest.fail("the engine outlived its parent")


@MODULE_LOOP
async def test_process_of_unsafe_folder_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    engine = EngineProcess("slots", tmp_path)
    with pytest.raises(ConfigError, match="may run code"):
        await engine.start()
    assert not engine.running


def test_process_of_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no engine"):
        EngineProcess("magic", tmp_path)


@LINUX
def test_sandbox_without_network_cannot_reach_loopback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = (
            "import os, socket, sys\n"
            "from gpumarket.node.engine import sandbox\n"
            "report = sandbox.enter(os.getppid())\n"
            "try:\n"
            "    socket.create_connection(('127.0.0.1', int(sys.argv[1])), timeout=5).close(); reached = True\n"
            "except OSError:\n"
            "    reached = False\n"
            "print(report['no_network'], reached)\n"
        )
        port = str(server.getsockname()[1])
        done = subprocess.run([sys.executable, "-c", program, port], capture_output=True, text=True, check=True, timeout=60)
    claimed, reached = done.stdout.split()
    assert (claimed, reached) in {("True", "False"), ("False", "True")}


@LINUX
def test_sandbox_whose_parent_has_gone_refuses() -> None:
    program = "from gpumarket.node.engine import sandbox; sandbox.enter(1 << 30)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "has ended" in done.stderr


def test_environment_passes_an_allow_list_only() -> None:
    secret = {"GPUMARKET_PASSWORD": "x", "AWS_SECRET_ACCESS_KEY": "y", "PYTHONPATH": "z"}
    passed = scrubbed_environment({"PATH": "/bin", "HOME": "/root", **secret})
    assert passed["PATH"] == "/bin" and passed["HOME"] == "/nonexistent" and passed["OMP_NUM_THREADS"] == "1"
    assert not set(secret) & set(passed)


def has_ended(pid: int) -> bool:
    """Gone, or a zombie that nobody has reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def reader_with(data: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return reader


@MODULE_LOOP
async def test_frame_roundtrip_keeps_requests() -> None:
    message = frames.Replay(7, request(4, 9, temperature=300), (1, 2), ())
    assert await frames.read_to_engine(reader_with(frames.pack(message))) == message


@pytest.mark.parametrize(
    "data",
    [
        (frames.FRAME_BYTES_MAX + 1).to_bytes(4, "little"),
        (3).to_bytes(4, "little") + b"abc",
        frames.pack(frames.Cancel(1)),  # a message of the other direction
    ],
)
@MODULE_LOOP
async def test_frame_that_is_bad_is_refused(data: bytes) -> None:
    with pytest.raises(EngineFailed):
        await frames.read_from_engine(reader_with(data))


@MODULE_LOOP
async def test_frame_cut_short_is_the_end() -> None:
    assert await frames.read_from_engine(reader_with(frames.pack(frames.Done(1))[:-1])) is None


def test_frame_over_the_limit_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="over the limit"):
        frames.pack(frames.Rows(1, 1, bytes(frames.FRAME_BYTES_MAX)))


@pytest.mark.parametrize("answer", [frames.Rows(1, 3, bytes(16)), frames.Rows(1, 0, b""), frames.Tokens(1, (1,), "")])
def test_rows_that_are_malformed_are_refused(answer: frames.FromEngine) -> None:
    from gpumarket.node.engine.process import _rows

    with pytest.raises(EngineFailed):
        _rows(answer)
    assert np.array_equal(_rows(frames.Rows(1, 1, bytes(4))), [[0]])
