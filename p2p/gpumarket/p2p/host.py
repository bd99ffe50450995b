"""The p2p process: `python -m gpumarket.p2p.host --fd N`, started by `gpumarket.p2p.link` with one end of a socket pair.

It alone imports libp2p and trio. It holds no wallet key, dies with its parent, and ends with a non-zero status when anything that it
needs has died, so that the supervisor starts it anew. It must never go on half alive, and never answer for an offer it did not verify.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import random
import resource
import signal
import socket
import sys
from collections import Counter
from pathlib import Path

import trio
from google.protobuf.message import DecodeError
from libp2p.peer.id import ID

from gpumarket.core.errors import ConfigError, GpumarketError, P2PUnavailable, ProtocolError
from gpumarket.core.ports import SystemClock, SystemRandom
from gpumarket.core.signing import market_domain
from gpumarket.core.units import Address
from gpumarket.p2p.announce import Announcer
from gpumarket.p2p.book import OfferBook, OfferKey
from gpumarket.p2p.gate import OfferGate, offer_validator
from gpumarket.p2p.guards import total_validator
from gpumarket.p2p.identity import load_or_create_seed
from gpumarket.p2p.node import OFFERS_TOPIC, Node, build_node, is_healthy, running
from gpumarket.p2p.parent import ParentWire
from gpumarket.p2p.peers import Arrivals, Dialer, parse_peer
from gpumarket.p2p.snapshot import SnapshotSync
from gpumarket.p2p.wire import OFFER_BYTES_MAX, PAGE_BYTES_MAX
from gpumarket.v1 import p2p_pb2 as pb

_log = logging.getLogger(__name__)

EXIT_CONFIGURE = 3
"""The configuration was refused; the reason went to the parent as `failed`."""
EXIT_UNHEALTHY = 70
"""A service died or memory grew over its limit: start me again."""

RSS_BYTES_MAX = 768 << 20
_WATCH_SECONDS = 0.5
_COMMANDS_AT_ONCE = 16
_PR_SET_PDEATHSIG = 1


class Unhealthy(Exception):
    """Something that the process needs has died."""


class Host:
    """One configured host: its parts, and what each command does."""

    def __init__(self, wire: ParentWire, config: pb.HostConfigure, nursery: trio.Nursery) -> None:
        """Raises ConfigError or KeyFileExposed."""
        if len(config.registry) != 20:
            raise ConfigError("the registry's address must have 20 bytes", hint="deploy the contracts, then name their address book")
        rng = random.Random(SystemRandom().token(16))  # noqa: S311  jitter only
        self._wire, self._config, self._nursery = wire, config, nursery
        self.counters: Counter[str] = Counter()
        self._clock = SystemClock()
        limits = {"offers_max": config.book_offers_max, "bytes_max": config.book_bytes_max}
        self._book = OfferBook(SystemRandom().token(8), **{name: value for name, value in limits.items() if value})
        domain = market_domain(config.chain_id, Address(config.registry))
        self._gate = OfferGate(offer_validator(domain), self._book, self._clock, self.counters, self._tell)
        seed = load_or_create_seed(Path(config.identity_path), SystemRandom().token(32))
        self.node: Node = build_node(seed, self.counters, self._disconnect)
        self._announcer = Announcer(self.node.pubsub, config.announce_seconds, self.counters, rng)
        self._sync = SnapshotSync(self.node, self._book, self._gate, self._clock, self.counters, rng)
        self._dialer = Dialer(self.node, nursery, self.counters, rng)
        self._slots = trio.CapacityLimiter(_COMMANDS_AT_ONCE)

    async def serve(self, call_id: int) -> None:
        """Starts everything inside a running node, reports ready, then executes commands until the parent goes."""
        pubsub, validator = self.node.pubsub, total_validator(self._pass_on, self.node.peer_id)
        pubsub.set_topic_validator(OFFERS_TOPIC, validator, False)
        subscription = await pubsub.subscribe(OFFERS_TOPIC)
        self._sync.serve()
        self.node.host.get_network().register_notifee(Arrivals(self._arrived))
        for address in self._config.bootstrap:
            self._dialer.keep(parse_peer(address))
        if self._config.own_offer:
            self._announce(self._config.own_offer)
        self._nursery.start_soon(self._announcer.run)
        self._nursery.start_soon(self._sync.resync_forever, self._config.resync_seconds)
        self._nursery.start_soon(self._watch)
        self._nursery.start_soon(_drain, subscription)
        ready = pb.HostReady(peer_id=str(self.node.peer_id), addresses=self.node.addresses())
        await self._wire.answer(pb.HostEvent(call_id=call_id, ready=ready))
        while (command := await self._wire.next_command()) is not None:
            self._nursery.start_soon(self._execute, command)

    async def _execute(self, command: pb.HostCommand) -> None:
        async with self._slots:
            try:
                await self._run(command)
            except GpumarketError as error:
                await self._wire.answer(failed(command.call_id, error))
            except Exception as error:
                _log.exception("a command of the daemon failed")
                refusal = P2PUnavailable(f"the p2p process could not do it ({type(error).__name__})", hint="see its log")
                await self._wire.answer(failed(command.call_id, refusal))

    async def _run(self, command: pb.HostCommand) -> None:
        kind, call_id = command.WhichOneof("command"), command.call_id
        if kind == "announce":
            self._announce(command.announce.signed_offer)
        elif kind == "connect":
            peer = parse_peer(command.connect.multiaddr)
            await self._dialer.dial(peer)
            self._dialer.keep(peer)
        elif kind == "snapshot":
            return await self._send_book(call_id)
        elif kind == "peers":
            peers = pb.PeerList(peer_ids=[str(peer) for peer in self.node.host.get_connected_peers()])
            return await self._wire.answer(pb.HostEvent(call_id=call_id, peer_list=peers))
        elif kind == "status":
            return await self._wire.answer(pb.HostEvent(call_id=call_id, report=self._report()))
        else:
            raise ProtocolError(f"the p2p process knows no command {kind!r} here")
        await self._wire.answer(pb.HostEvent(call_id=call_id, done=pb.HostDone()))

    def _announce(self, signed_offer: bytes) -> None:
        """Raises ProtocolError unless the offer is valid and not older than what we said before."""
        if len(signed_offer) > OFFER_BYTES_MAX:
            raise ProtocolError(f"an offer of {len(signed_offer)} bytes; the limit is {OFFER_BYTES_MAX}", hint="offer fewer models")
        verdict = self._gate.take(signed_offer, "own", passing_on=True)
        if verdict is None or verdict.value not in ("fresh", "repeat", "echo"):
            reason = f"it is {verdict.value}" if verdict else "its signature or form is wrong"
            raise ProtocolError(f"the own offer is not announced: {reason}", hint="sign a new one with a higher sequence")
        self._announcer.set(signed_offer)

    async def _send_book(self, call_id: int) -> None:
        revision, more = 0, True
        while more:
            offers, revision, more = self._book.since(self._book.epoch, revision, PAGE_BYTES_MAX, self._clock.now())
            await self._wire.answer(pb.HostEvent(call_id=call_id, offers=pb.OfferPage(signed_offers=offers, more=more)))

    def _report(self) -> pb.HostReport:
        return pb.HostReport(
            rss_bytes=rss_bytes(),
            peers=len(self.node.host.get_connected_peers()),
            mesh_peers=len(self.node.gossip.mesh.get(OFFERS_TOPIC, ())),
            book_offers=len(self._book),
            book_bytes=self._book.bytes,
            counters={**self.counters, "book_evicted": self._book.evicted, "seen_dropped": self._wire.dropped},
        )

    def _pass_on(self, payload: bytes) -> bool:
        verdict = self._gate.take(payload, "gossip", passing_on=True)
        return verdict is not None and verdict.value in ("fresh", "repeat")

    def _tell(self, key: OfferKey, payload: bytes, source: str) -> None:
        if source == "own":
            return
        seen = pb.SeenOffer(provider=key.provider, sequence=key.sequence, signed_offer=payload)
        self._wire.tell(pb.HostEvent(seen=seen))

    def _arrived(self, peer: ID) -> None:
        self._nursery.start_soon(self._sync.ask, peer)
        if len(self.node.host.get_connected_peers()) <= 1:
            self._nursery.start_soon(self._announcer.rejoin)

    def _disconnect(self, peer: ID) -> None:
        self._nursery.start_soon(self._close_peer, peer)

    async def _close_peer(self, peer: ID) -> None:
        try:
            await self.node.host.disconnect(peer)
        except Exception as error:  # the connection may be gone in any state; the peer's doing must not end us
            self.counters["disconnects_failed"] += 1
            _log.info("disconnecting peer %s failed (%s)", peer, type(error).__name__)

    async def _watch(self) -> None:
        while True:
            await trio.sleep(_WATCH_SECONDS)
            if not is_healthy(self.node):
                raise Unhealthy("a libp2p service died")
            if (rss := rss_bytes()) > RSS_BYTES_MAX:
                raise Unhealthy(f"{rss >> 20} MiB resident, more than {RSS_BYTES_MAX >> 20}")


def failed(call_id: int, error: GpumarketError) -> pb.HostEvent:
    """An error as the parent raises it again."""
    return pb.HostEvent(call_id=call_id, failed=pb.HostFailed(code=error.code, message=error.message, hint=error.hint))


def rss_bytes() -> int:
    """Resident memory of this process; 0 where /proc does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * resource.getpagesize()


async def run_host(end: socket.socket) -> int:
    """Serves one parent until it closes the socket. Returns the exit status."""
    wire = ParentWire(trio.SocketStream(trio.socket.from_stdlib_socket(end)))
    first = await wire.next_command()
    if first is None:
        return 0
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.write_forever)
            if first.WhichOneof("command") != "configure":
                raise ProtocolError("the first command to a p2p process must be configure")
            host = Host(wire, first.configure, nursery)
            async with running(host.node, first.configure.listen):
                await host.serve(first.call_id)
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        refusal = next((error for error in leaves(group) if isinstance(error, GpumarketError)), None)
        if refusal is None:
            raise
        await wire.last_word(failed(first.call_id, refusal))
        return EXIT_CONFIGURE
    return 0


async def _drain(subscription: object) -> None:
    """The validator takes the offers; the subscription only makes us a member of the topic."""
    while True:
        await subscription.get()  # type: ignore[attr-defined]


def die_with_parent() -> None:
    """Linux: SIGKILL when the parent dies. Elsewhere the closed socket ends us. No core dump, which would hold the identity key."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="gpumarket.p2p.host", description="internal: started by a gpumarket daemon")
    parser.add_argument("--fd", type=int, required=True, help="inherited end of the socket pair")
    arguments = parser.parse_args()
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's ^C is for the daemon, which then closes us
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("libp2p").setLevel(logging.ERROR)  # its warnings are written at any peer's will
    try:
        return trio.run(run_host, socket.socket(fileno=arguments.fd))
    except (DecodeError, ProtocolError, BrokenPipeError, trio.BrokenResourceError):
        _log.exception("the wire to the daemon broke")
    except BaseExceptionGroup as group:
        _log.error("the p2p process ends: %s", "; ".join(sorted({repr(error) for error in leaves(group)})), exc_info=group)
    return EXIT_UNHEALTHY


def leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The exceptions inside nested groups."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found.extend(leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    os._exit(status)  # libp2p leaves threads behind that would hold the interpreter
