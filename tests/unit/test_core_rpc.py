"""gRPC with pinned keys on loopback, and errors that come back as themselves."""

from __future__ import annotations

import asyncio
import contextlib
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from gpumarket.core import errors, rpc
from gpumarket.core.errors import BadSignature, Busy, GpumarketError, JournalError, NoProvider, OutOfFunds, ProtocolError, Unreachable
from gpumarket.core.units import Hash
from gpumarket.v1 import market_pb2 as pb
from gpumarket.v1 import market_pb2_grpc as pbg


class Market:
    """A server of Info alone: it answers what the test puts in."""

    answer: GpumarketError | pb.SchedulerInfo = pb.SchedulerInfo(version="1")
    asked: asyncio.Event | None = None
    """Set by a call, which is then never answered."""

    async def Info(self, request: pb.InfoRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.SchedulerInfo:
        if self.asked is not None:
            self.asked.set()
            await asyncio.Event().wait()
        if isinstance(self.answer, GpumarketError):
            await rpc.abort(context, self.answer)
        return self.answer

    def join(self, server: grpc.aio.Server) -> None:
        info = grpc.unary_unary_rpc_method_handler(
            self.Info, request_deserializer=pb.InfoRequest.FromString, response_serializer=pb.SchedulerInfo.SerializeToString
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("gpumarket.v1.Market", {"Info": info}),))


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[tuple[str, rpc.ServerIdentity, Market]]:
    identity, market = rpc.load_identity(tmp_path), Market()
    running = grpc.aio.server(options=rpc.SERVER_OPTIONS)
    market.join(running)
    port = running.add_secure_port("127.0.0.1:0", identity.credentials())
    await running.start()
    yield f"127.0.0.1:{port}", identity, market
    await running.stop(None)


async def ask(endpoint: str, key_hash: bytes) -> pb.SchedulerInfo:
    async with rpc.pinned_channel(endpoint, key_hash) as channel:
        try:
            return await pbg.MarketStub(channel).Info(pb.InfoRequest(), timeout=rpc.CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise rpc.from_rpc(error, endpoint) from error


async def test_rpc_pinned_key_is_talked_to(server: tuple[str, rpc.ServerIdentity, Market]) -> None:
    endpoint, identity, _ = server
    assert (await ask(endpoint, identity.key_hash)).version == "1"


async def test_rpc_another_key_is_refused(server: tuple[str, rpc.ServerIdentity, Market], tmp_path: Path) -> None:
    endpoint, identity, _ = server
    other = rpc.load_identity(tmp_path / "other")
    assert other.key_hash != identity.key_hash
    with pytest.raises(BadSignature, match="pinned"):
        await ask(endpoint, other.key_hash)


async def test_rpc_channel_keeps_to_the_key_it_was_pinned_to(tmp_path: Path) -> None:
    """A server that changes its key behind an open channel is not talked to: the channel trusts the first certificate alone."""
    first, second = rpc.load_identity(tmp_path / "1"), rpc.load_identity(tmp_path / "2")
    honest = grpc.aio.server(options=rpc.SERVER_OPTIONS)
    Market().join(honest)
    port = honest.add_secure_port("127.0.0.1:0", first.credentials())
    await honest.start()
    channel = await rpc.open_channel(f"127.0.0.1:{port}", first.key_hash)
    try:
        await pbg.MarketStub(channel).Info(pb.InfoRequest(), timeout=rpc.CALL_SECONDS)
        await honest.stop(None)
        impostor = grpc.aio.server(options=rpc.SERVER_OPTIONS)
        Market().join(impostor)
        assert impostor.add_secure_port(f"127.0.0.1:{port}", second.credentials()) == port
        await impostor.start()
        with pytest.raises(grpc.aio.AioRpcError):
            await pbg.MarketStub(channel).Info(pb.InfoRequest(), timeout=3)
        await impostor.stop(None)
    finally:
        await channel.close(None)


async def test_rpc_nobody_there_is_unreachable() -> None:
    with pytest.raises(Unreachable, match="does not answer"):
        await rpc.open_channel("127.0.0.1:1", b"\0" * 32)


async def test_rpc_peers_that_drip_their_handshake_hold_up_nobody_and_are_given_up(
    server: tuple[str, rpc.ServerIdentity, Market], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each single read is answered in time: only a limit on the whole ends it."""
    monkeypatch.setattr(rpc, "HANDSHAKE_SECONDS", 1.5)
    endpoint, identity, _ = server

    dripped: list[asyncio.Task[Any] | None] = []

    async def drip(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dripped.append(asyncio.current_task())
        with contextlib.suppress(OSError):
            for byte in b"\x16\x03\x03\x3f\xff" + bytes(1_000):
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.05)
        writer.close()

    dripping = await asyncio.start_server(drip, "127.0.0.1", 0)
    bad = f"127.0.0.1:{dripping.sockets[0].getsockname()[1]}"
    started = time.monotonic()
    stuck = [asyncio.create_task(rpc.open_channel(bad, identity.key_hash)) for _ in range(64)]  # more than the default pool has threads
    await asyncio.sleep(0.2)
    assert await ask(endpoint, identity.key_hash)
    assert not any(task.done() for task in stuck)
    for found in await asyncio.gather(*stuck, return_exceptions=True):
        assert isinstance(found, Unreachable) and "no TLS handshake" in found.message
    assert time.monotonic() - started < 4
    dripping.close()
    await asyncio.gather(*filter(None, dripped))


@pytest.mark.parametrize("endpoint", ["", "localhost", "127.0.0.1:port"])
async def test_rpc_endpoint_that_is_none_is_unreachable(endpoint: str) -> None:
    with pytest.raises(Unreachable):
        await rpc.open_channel(endpoint, b"\0" * 32)


@pytest.mark.parametrize(
    "error",
    [
        OutOfFunds("5 are needed, 3 are there", hint="top up"),
        NoProvider("nobody", removed={"price": 3}, considered=4, hint="h"),
        Busy("queue is full", retry_after_seconds=2.5),
        BadSignature("no"),
    ],
)
async def test_rpc_error_comes_back_as_itself(server: tuple[str, rpc.ServerIdentity, Market], error: GpumarketError) -> None:
    endpoint, identity, market = server
    market.answer = error
    with pytest.raises(type(error)) as caught:
        await ask(endpoint, identity.key_hash)
    assert caught.value.as_dict() == error.as_dict()
    if isinstance(error, NoProvider) and isinstance(caught.value, NoProvider):
        assert (caught.value.removed, caught.value.considered) == ({"price": 3}, 4)
    if isinstance(error, Busy) and isinstance(caught.value, Busy):
        assert caught.value.retry_after_seconds == 2.5


def test_rpc_error_of_every_class_survives_its_wire_form() -> None:
    for code, cls in errors.by_code().items():
        back = rpc.rebuild({"code": code, "message": "m", "hint": "h", "retryable": True})
        assert back.message == "m"
        assert isinstance(back, cls) or code in ("missing_extra", "journal")
    assert type(rpc.rebuild({"code": "from-the-future", "message": "m"})) is GpumarketError


def test_rpc_peer_whose_ledger_fails_is_out_of_reach_and_ends_nobody_elses_daemon() -> None:
    """A JournalError ends the process that meets it: it must be its own."""
    told = rpc.for_peer(JournalError("the disk is full", hint="free space"))
    back = rpc.rebuild(told.as_dict())
    assert type(back) is Unreachable and back.retryable and "(journal)" in back.message


async def test_rpc_call_whose_channel_is_closed_under_it_is_unreachable_and_its_task_lives(
    server: tuple[str, rpc.ServerIdentity, Market],
) -> None:
    endpoint, identity, market = server
    market.asked = asyncio.Event()
    channel = await rpc.open_channel(endpoint, identity.key_hash)

    async def ask_long() -> Any:
        with rpc.hangup_is_unreachable("somebody"):
            return await pbg.MarketStub(channel).Info(pb.InfoRequest())

    asking = asyncio.create_task(ask_long())
    await market.asked.wait()
    await channel.close(None)
    with pytest.raises(Unreachable, match="connection to somebody was given up"):
        await asking


async def test_rpc_task_that_is_cancelled_stays_cancelled() -> None:
    async def waits() -> None:
        with rpc.hangup_is_unreachable("somebody"):
            await asyncio.Event().wait()

    task = asyncio.create_task(waits())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_rpc_identity_is_made_once_and_kept_private(tmp_path: Path) -> None:
    first, again = rpc.load_identity(tmp_path / "tls"), rpc.load_identity(tmp_path / "tls")
    assert first == again
    assert isinstance(first.key_hash, bytes) and len(Hash(first.key_hash)) == 32
    assert stat.S_IMODE((tmp_path / "tls" / "tls.key").stat().st_mode) == 0o600


def test_error_of_our_own_tells_a_peer_its_kind_and_no_more() -> None:
    told = rpc.for_peer(JournalError("cannot write /home/ann/ledger.sqlite: disk full", hint="free space on /home"))
    assert (told.code, told.retryable) == ("journal", False)
    assert "/home" not in told.message + told.hint
    theirs = ProtocolError("your order names no model")
    assert rpc.for_peer(theirs) is theirs


@pytest.mark.parametrize(
    "details", ["not json", "[" * 5_000, "[]", '{"code": "no_provider", "removed": 7}', '{"code": "busy", "retry_after_seconds": "x"}']
)
async def test_rpc_error_details_that_are_none_are_the_peers_fault(details: str) -> None:
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.ABORTED, grpc.aio.Metadata(), grpc.aio.Metadata(("gpumarket-error", details)), details="x", debug_error_string=""
    )
    assert isinstance(rpc.from_rpc(error, "somebody"), ProtocolError)
