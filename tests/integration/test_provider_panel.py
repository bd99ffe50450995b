"""Provider.TakeEvidence: who is heard, and what a broken journal does to the daemon."""

from __future__ import annotations

import time
from pathlib import Path

import grpc.aio
import pytest
from node_fixtures import CLIENT, DOMAIN, PROVIDER, on_sale
from provider_market import Running, provider_at

from gpumarket.core.codec import signed_call
from gpumarket.core.errors import BadSignature, GpumarketError, JournalError, ProtocolError
from gpumarket.core.rpc import from_rpc
from gpumarket.core.terms import Task, keccak256
from gpumarket.core.units import Address, Hash
from gpumarket.v1 import provider_pb2 as pb

ID = Hash(keccak256(b"dispute"))


class Bench:
    """Hears evidence; `broken` is raised."""

    def __init__(self, broken: GpumarketError | None = None) -> None:
        self.broken = broken
        self.heard: list[tuple[Address, Hash, bytes]] = []

    async def take(self, caller: Address, dispute: Hash, evidence: bytes) -> None:
        self.heard.append((caller, dispute, evidence))
        if self.broken is not None:
            raise self.broken


async def hand(running: Running, method: str = "Provider/TakeEvidence", nonce: bytes = b"1") -> None:
    body = pb.PanelEvidence(dispute=ID, evidence=b"evidence")
    call = signed_call(CLIENT, DOMAIN, method, body, PROVIDER.address, int(time.time()), Hash(keccak256(nonce)))
    try:
        await running.stub.TakeEvidence(call, timeout=20)
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error, "the provider") from error


async def test_evidence_where_nobody_sits_on_panels_refused(tmp_path: Path) -> None:
    async with provider_at(tmp_path, on_sale(Task.EMBED)) as running:
        with pytest.raises(ProtocolError, match="no panels"):
            await hand(running)


async def test_evidence_reaches_the_panel_with_whoever_signed_the_call(tmp_path: Path) -> None:
    async with provider_at(tmp_path, on_sale(Task.EMBED)) as running:
        running.provider.service.panel = bench = Bench()
        await hand(running)
        assert bench.heard == [(CLIENT.address, ID, b"evidence")]
        with pytest.raises(BadSignature):
            await hand(running, "Provider/GetReceipt", b"2")
        with pytest.raises((BadSignature, ProtocolError)):
            await hand(running)  # the very same call again
        assert len(bench.heard) == 1


async def test_evidence_that_the_journal_cannot_keep_stops_the_daemon_and_tells_the_caller_little(tmp_path: Path) -> None:
    async with provider_at(tmp_path, on_sale(Task.EMBED)) as running:
        broken: list[JournalError] = []
        running.provider.service._on_journal_error = broken.append
        running.provider.service.panel = Bench(JournalError("disk full at /secret/path"))
        with pytest.raises(GpumarketError) as caught:
            await hand(running)
        assert "secret" not in str(caught.value)
        assert len(broken) == 1
