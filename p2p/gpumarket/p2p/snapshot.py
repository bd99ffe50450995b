"""Asking peers what they know: `/gpumarket/snapshot/1`, one request and one page of at most 1 MB per stream.

Gossip tells only what is new (measured: a late joiner got 1 of 5 offers by gossip, all 5 by a snapshot in 17 ms). Every new connection
asks once in both directions, and every `resync_seconds` one peer drawn at random is asked for what changed, which heals partitions.
Invariant: an answer is worth nothing by itself; each offer in it passes the gate. What one peer can make us read or serve is bounded.
"""

from __future__ import annotations

import logging
import random
from collections import Counter, OrderedDict

import trio
from google.protobuf.message import DecodeError
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.request_response import BytesCodec, RequestResponse, RequestResponseConfig
from libp2p.request_response.api import RequestContext
from libp2p.request_response.exceptions import ProtocolNotSupportedError, RequestResponseError

from gpumarket.core.ports import Clock
from gpumarket.p2p.book import OfferBook
from gpumarket.p2p.gate import OfferGate
from gpumarket.p2p.limits import Backoff, PeerLimiter, Rate
from gpumarket.p2p.node import Node
from gpumarket.p2p.wire import FRAME_BYTES_MAX, PAGE_BYTES_MAX
from gpumarket.v1 import p2p_pb2 as pb

_log = logging.getLogger(__name__)

SNAPSHOT_PROTOCOL = TProtocol("/gpumarket/snapshot/1")

_CONFIG = RequestResponseConfig(timeout=10.0, max_request_size=1024, max_response_size=FRAME_BYTES_MAX, max_concurrent_inbound=32)
_SERVE_RATE = Rate(per_second=2, burst=80)  # a whole book of 64 MiB is about 70 pages
_PAGES_MAX = 128
_OFFERS_PER_BREATH = 16  # verifying one takes about 0.1 ms; between breaths everything else runs
_CURSORS_MAX = 1024
_TRIES = 3
_ASKED_AT_ONCE = 8
_RETRY = Backoff(first_seconds=0.5, most_seconds=4.0)


class SnapshotSync:
    """Serves our book to peers and reads theirs."""

    def __init__(self, node: Node, book: OfferBook, gate: OfferGate, clock: Clock, counters: Counter[str], rng: random.Random) -> None:
        self._node, self._book, self._gate, self._clock, self._counters, self._rng = node, book, gate, clock, counters, rng
        self._exchange = RequestResponse(node.host)
        self._served = PeerLimiter(_SERVE_RATE)
        self._cursors: OrderedDict[ID, tuple[bytes, int]] = OrderedDict()
        self._asking: set[ID] = set()
        self._slots = trio.CapacityLimiter(_ASKED_AT_ONCE)

    def serve(self) -> None:
        """From now on peers are answered."""
        self._exchange.set_handler(SNAPSHOT_PROTOCOL, self._answer, BytesCodec(), _CONFIG)

    async def ask(self, peer: ID) -> None:
        """Reads what changed in `peer`'s book since we last asked. Failures are retried, then counted: another peer will be asked."""
        if peer in self._asking:
            return
        self._asking.add(peer)
        try:
            async with self._slots:
                await self._ask(peer)
        finally:
            self._asking.discard(peer)

    async def _ask(self, peer: ID) -> None:
        for failures in range(1, _TRIES + 1):
            try:
                await self._read_pages(peer)
                self._counters["snapshots_read"] += 1
                return
            except ProtocolNotSupportedError:
                self._counters["snapshots_unsupported"] += 1
                return
            except (RequestResponseError, DecodeError) as error:
                self._counters["snapshots_failed"] += 1
                _log.info("snapshot from peer %s failed (%s)", peer, type(error).__name__)
            await trio.sleep(_RETRY.delay_seconds(failures, self._rng))

    async def resync_forever(self, resync_seconds: float) -> None:
        """Asks one connected peer after the other, drawn at random."""
        while True:
            await trio.sleep(resync_seconds * (0.75 + 0.5 * self._rng.random()))
            peers = self._node.host.get_connected_peers()
            if peers:
                await self.ask(self._rng.choice(peers))

    async def _read_pages(self, peer: ID) -> None:
        epoch, since = self._cursors.get(peer, (b"", 0))
        for _ in range(_PAGES_MAX):
            request = pb.SnapshotRequest(epoch=epoch, since=since, bytes_max=PAGE_BYTES_MAX).SerializeToString()
            raw = await self._exchange.send_request(peer, [SNAPSHOT_PROTOCOL], request, BytesCodec(), _CONFIG)
            page = pb.SnapshotPage.FromString(raw)
            await self._admit(page)
            advanced = (page.epoch, page.revision) != (epoch, since)
            epoch, since = page.epoch[:16], page.revision
            self._remember(peer, epoch, since)
            if not page.more or not advanced:
                return

    async def _admit(self, page: pb.SnapshotPage) -> None:
        for index, payload in enumerate(page.signed_offers):
            if index % _OFFERS_PER_BREATH == 0:
                await trio.lowlevel.checkpoint()
            self._gate.take(payload, "snapshot", passing_on=False)

    async def _answer(self, raw: bytes, context: RequestContext) -> bytes:
        """Raises to refuse; the exchange then resets the stream."""
        if not self._served.allow(context.peer_id.to_bytes(), trio.current_time()):
            self._counters["snapshots_refused"] += 1
            raise RequestResponseError("this peer asks for snapshots too often")
        try:
            request = pb.SnapshotRequest.FromString(raw)
        except DecodeError as error:
            self._counters["snapshots_rejected"] += 1
            raise RequestResponseError("this is no snapshot request") from error
        bytes_max = min(request.bytes_max, PAGE_BYTES_MAX)
        offers, revision, more = self._book.since(request.epoch, request.since, bytes_max, self._clock.now())
        self._counters["snapshots_served"] += 1
        page = pb.SnapshotPage(epoch=self._book.epoch, revision=revision, more=more, signed_offers=offers)
        return page.SerializeToString()

    def _remember(self, peer: ID, epoch: bytes, revision: int) -> None:
        self._cursors.pop(peer, None)
        self._cursors[peer] = (epoch, revision)
        if len(self._cursors) > _CURSORS_MAX:
            self._cursors.popitem(last=False)
