"""A daemon's link to the offers' network: supervises the p2p process and outlives it.

The process may die at any message of any peer; the link starts it again, tells it everything it had been told, and goes on. Invariants:
the peer id and the addresses never change while the link lives; an announced offer stays announced; every wait ends in an answer or a
typed error. It must never import libp2p: a daemon without the process still has its heartbeats.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import random
import time
from collections.abc import AsyncIterator, Callable

from gpumarket.core.errors import GpumarketError, MissingExtra, P2PUnavailable
from gpumarket.core.ports import SystemRandom
from gpumarket.p2p.child import Child
from gpumarket.p2p.limits import Backoff
from gpumarket.p2p.settings import P2PSettings
from gpumarket.p2p.stream import NewestSequence, OfferStream
from gpumarket.v1 import p2p_pb2 as pb

__all__ = ["Link", "P2PSettings"]

_log = logging.getLogger(__name__)

_RESTART = Backoff(first_seconds=0.1, most_seconds=15.0)
_WATCH_SECONDS = 5.0
_HANG_SECONDS = 30.0
_HEALTHY_SECONDS = 30.0
"""A process that lived this long does not count as a repeated death."""


class Link:
    """The p2p network as a daemon uses it. `start` before anything else, `close` at the end."""

    def __init__(self, settings: P2PSettings, *, on_restart: Callable[[], None] | None = None) -> None:
        """`on_restart` is called after each restart, once the process listens again; it must not block."""
        self.settings = settings
        self.peer_id = ""
        self.addresses: list[str] = []
        """Full multiaddrs with /p2p/<id>, the same after every restart."""
        self.restarts = 0
        """Deaths of the process that were mended."""
        self.last_error = ""
        """Why the process last died or did not start; empty when it never did."""
        self._on_restart = on_restart
        self._listen = settings.listen
        self._kept = list(settings.bootstrap)
        self._own_offer = b""
        self._newest = NewestSequence(settings.book_offers_max)
        self._streams: set[OfferStream] = set()
        self._child: Child | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._rng = random.Random(SystemRandom().token(16))  # noqa: S311  jitter only

    async def start(self) -> None:
        """Up and listening, or raises why not: MissingExtra, KeyFileExposed, ConfigError, PortInUse, P2PUnavailable after the deadline."""
        if self._supervisor is not None:
            raise RuntimeError("this link was started before")
        if importlib.util.find_spec("libp2p") is None:
            raise MissingExtra("p2p", "the p2p network")
        self._child = await self._launch()
        self._supervisor = asyncio.create_task(self._supervise(self._child), name="p2p supervisor")
        self._supervisor.add_done_callback(self._supervision_ended)

    async def close(self) -> None:
        """Ends the process and every `offers()`. Safe to call twice."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        child, self._child = self._child, None
        if child is not None:
            await child.stop()
        for stream in list(self._streams):
            stream.end()

    async def announce(self, signed_offer: bytes) -> None:
        """Publishes a serialized SignedOffer (paced) and goes on announcing it, through restarts, until another one replaces it.

        Raises ProtocolError when it does not verify or is older than the last one: that last one then stays announced. On
        P2PUnavailable it is remembered all the same and goes out when the process is back.
        """
        before, self._own_offer = self._own_offer, signed_offer
        try:
            await self._running().call(pb.HostCommand(announce=pb.HostAnnounce(signed_offer=signed_offer)))
        except P2PUnavailable:
            raise
        except GpumarketError:
            if self._own_offer is signed_offer:
                self._own_offer = before
            raise

    def offers(self, queue_max: int = 1024) -> AsyncIterator[bytes]:
        """Verified SignedOffers from now on, each newer than what this link had seen of its provider; ends with `close`.

        A reader that falls behind by more than `queue_max` loses the oldest (counted in `status`); a snapshot has them.
        """
        stream = OfferStream(queue_max, self._streams.discard)
        self._streams.add(stream)
        return stream

    async def snapshot(self) -> list[bytes]:
        """Every offer that the process knows now, the own one included."""
        pages = await self._running().call_many(pb.HostCommand(snapshot=pb.HostSnapshot()))
        return [offer for page in pages for offer in page.offers.signed_offers]

    async def connect(self, multiaddr: str) -> None:
        """Dials a peer and keeps it, through restarts. Raises Unreachable, or ConfigError for an address that is none."""
        await self._running().call(pb.HostCommand(connect=pb.HostConnect(multiaddr=multiaddr)))
        if multiaddr not in self._kept:
            self._kept.append(multiaddr)

    async def peers(self) -> list[str]:
        """Peer ids connected now."""
        answer = await self._running().call(pb.HostCommand(peers=pb.HostPeers()))
        return list(answer.peer_list.peer_ids)

    async def status(self) -> dict[str, int | str]:
        """Counters for metrics. Never raises for a process that is down: `up` is then 0 and its own counters are missing."""
        known: dict[str, int | str] = {
            "up": 0,
            "restarts": self.restarts,
            "last_error": self.last_error,
            "offers_dropped": sum(stream.dropped for stream in self._streams),
        }
        try:
            report = (await self._running().call(pb.HostCommand(status=pb.HostStatusQuery()))).report
        except P2PUnavailable:
            return known
        names = ("rss_bytes", "peers", "mesh_peers", "book_offers", "book_bytes")
        return known | {"up": 1} | {name: getattr(report, name) for name in names} | dict(report.counters)

    @property
    def pid(self) -> int | None:
        """Of the running process; None while there is none."""
        return self._child.pid if self._child is not None else None

    def _running(self) -> Child:
        if self._child is None:
            why = f" ({self.last_error})" if self.last_error else ""
            raise P2PUnavailable(f"the p2p process is not running{why}", hint="try again in a second")
        return self._child

    async def _launch(self) -> Child:
        child = await Child.start(self._seen)
        try:
            answer = await child.call(pb.HostCommand(configure=self._configuration()), self.settings.start_seconds_max)
            self._settle(answer.ready)
        except P2PUnavailable as error:
            await child.stop()
            raise P2PUnavailable(f"{error.message}; its log ends: {child.last_words() or 'empty'}", hint=error.hint) from error
        except BaseException:
            await child.stop()
            raise
        return child

    def _configuration(self) -> pb.HostConfigure:
        return pb.HostConfigure(
            listen=self._listen,
            bootstrap=self._kept,
            identity_path=str(self.settings.identity_path),
            announce_seconds=self.settings.announce_seconds,
            resync_seconds=self.settings.resync_seconds,
            chain_id=self.settings.chain_id,
            registry=self.settings.registry,
            own_offer=self._own_offer,
            book_offers_max=self.settings.book_offers_max,
            book_bytes_max=self.settings.book_bytes_max,
        )

    def _settle(self, ready: pb.HostReady) -> None:
        """The first start fixes identity and port."""
        if not self.peer_id:
            self.peer_id, self.addresses = ready.peer_id, list(ready.addresses)
            port = self.addresses[0].split("/tcp/")[1].split("/")[0]
            self._listen = self._listen.rpartition("/")[0] + f"/{port}"
        elif ready.peer_id != self.peer_id:
            raise P2PUnavailable(f"the p2p identity changed from {self.peer_id} to {ready.peer_id}", hint="restart the daemon")

    async def _supervise(self, child: Child) -> None:
        deaths = 0
        while True:
            born = time.monotonic()
            async with asyncio.TaskGroup() as watching:
                watchdog = watching.create_task(self._watch(child))
                status = await child.wait()
                watchdog.cancel()
            self._child = None
            deaths = 1 if time.monotonic() - born > _HEALTHY_SECONDS else deaths + 1
            self.last_error = f"status {status}: {child.last_words()[-500:]}"
            _log.warning("the p2p process died (%s); restart %d", self.last_error, self.restarts + 1)
            child, deaths = await self._relaunch(deaths)
            self._child = child
            self.restarts += 1
            self._tell_restart()

    def _tell_restart(self) -> None:
        if self._on_restart is not None:
            try:
                self._on_restart()
            except Exception:  # the daemon's own callback; supervision must not end with it
                _log.exception("the callback on a p2p restart failed")

    def _supervision_ended(self, task: asyncio.Task[None]) -> None:
        """Ends by cancellation in `close`; anything else is our bug, and must be seen."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.last_error = f"supervision ended: {error!r}"
            _log.critical("the p2p process is no longer supervised; restart the daemon", exc_info=error)

    async def _watch(self, child: Child) -> None:
        """Kills a process that runs but does not answer: a stopped or spinning one would never be restarted."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            try:
                await child.call(pb.HostCommand(peers=pb.HostPeers()), _HANG_SECONDS)
            except P2PUnavailable as error:
                _log.warning("the p2p process %d hangs (%s): killed", child.pid, error.message)
                child.kill()
                return

    async def _relaunch(self, deaths: int) -> tuple[Child, int]:
        """Tries until it runs; each failure is logged and waits longer."""
        while True:
            await asyncio.sleep(_RESTART.delay_seconds(deaths, self._rng))
            try:
                return await self._launch(), deaths
            except (GpumarketError, OSError) as error:
                deaths += 1
                self.last_error = str(error)
                _log.error("the p2p process does not come back (%s); trying again", error)

    def _seen(self, offer: pb.SeenOffer) -> None:
        if self._newest.rises(offer.provider, offer.sequence):
            for stream in self._streams:
                stream.put(offer.signed_offer)
