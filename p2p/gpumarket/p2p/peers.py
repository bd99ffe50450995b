"""Keeping connected: dials every kept peer again until it answers, and says when a peer comes.

libp2p's own reconnect takes 30 s, and it refuses to dial a peer for a minute after a failure; here a lost bootstrap peer is dialled
within a second, then at growing, jittered intervals, for ever. Invariant: the number of kept peers is bounded.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable

import trio
from libp2p.abc import INetConn, INetStream, INetwork, INotifee
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo, info_from_p2p_addr
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from gpumarket.core.errors import ConfigError, Unreachable
from gpumarket.p2p.limits import Backoff
from gpumarket.p2p.node import Node

_log = logging.getLogger(__name__)

KEPT_PEERS_MAX = 64
_DIAL_SECONDS_MAX = 10.0
_LOOK_SECONDS = 0.5
_REDIAL = Backoff(first_seconds=0.5, most_seconds=30.0)


def parse_peer(multiaddr: str) -> PeerInfo:
    """Peer id and address of `/ip4/…/tcp/…/p2p/<id>`. Raises ConfigError."""
    try:
        return info_from_p2p_addr(Multiaddr(multiaddr))
    except (MultiaddrError, ValueError) as error:
        hint = "write it like /ip4/203.0.113.7/tcp/4001/p2p/12D3Koo…"
        raise ConfigError(f"{multiaddr!r} is not a peer's address: {error}", hint=hint) from error


class Dialer:
    """Dials and keeps peers."""

    def __init__(self, node: Node, nursery: trio.Nursery, counters: Counter[str], rng: random.Random) -> None:
        self._node, self._nursery, self._counters, self._rng = node, nursery, counters, rng
        self._kept: set[ID] = set()

    async def dial(self, peer: PeerInfo) -> None:
        """Connects once. Raises Unreachable."""
        network = self._node.host.get_network()
        network.unblock_peer(peer.peer_id)  # type: ignore[attr-defined]
        try:
            with trio.fail_after(_DIAL_SECONDS_MAX):
                await self._node.host.connect(peer)
        except (SwarmException, trio.TooSlowError, OSError) as error:
            where = ", ".join(str(address) for address in peer.addrs)
            raise Unreachable(f"peer {peer.peer_id} does not answer at {where} ({type(error).__name__})") from error

    def keep(self, peer: PeerInfo) -> None:
        """From now on, redials whenever the peer is not connected. Ourselves and peers kept already are skipped.

        Raises ConfigError above `KEPT_PEERS_MAX`.
        """
        if peer.peer_id in self._kept or peer.peer_id == self._node.peer_id:
            return
        if len(self._kept) >= KEPT_PEERS_MAX:
            raise ConfigError(f"already {KEPT_PEERS_MAX} kept p2p peers", hint="name fewer bootstrap peers")
        self._kept.add(peer.peer_id)
        self._nursery.start_soon(self._keep, peer)

    async def _keep(self, peer: PeerInfo) -> None:
        failures = 0
        while True:
            if peer.peer_id not in self._node.host.get_connected_peers():
                try:
                    await self.dial(peer)
                    failures = 0
                    self._counters["dials"] += 1
                except Unreachable as error:
                    failures += 1
                    self._counters["dials_failed"] += 1
                    _log.info("%s; try %d", error, failures)
            await trio.sleep(max(_LOOK_SECONDS, _REDIAL.delay_seconds(failures, self._rng)))


class Arrivals(INotifee):
    """Calls back on each new connection. The callback must not block."""

    def __init__(self, on_peer: Callable[[ID], None]) -> None:
        self._on_peer = on_peer

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        await trio.lowlevel.checkpoint()
        self._on_peer(conn.muxed_conn.peer_id)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        await trio.lowlevel.checkpoint()

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        await trio.lowlevel.checkpoint()

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        await trio.lowlevel.checkpoint()

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None:
        await trio.lowlevel.checkpoint()

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None:
        await trio.lowlevel.checkpoint()
