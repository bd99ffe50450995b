"""One provider's heartbeat stream: hello with its offer, then its load every second; down go channel, voucher, notice, settled leases.

The hello is a signed call of the offer's own provider. A first hello has the GPU challenged and the channel opened; both go on in the
background while the provider is told why it gets no jobs yet.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import structlog

from gpumarket.core.codec import CallGuard
from gpumarket.core.errors import Busy, GpumarketError, ProtocolError
from gpumarket.core.ports import Clock, Random
from gpumarket.core.units import Address, Hash, hex0x
from gpumarket.scheduler.billing import Billing
from gpumarket.scheduler.challenge import Challenger
from gpumarket.scheduler.channels import Channels
from gpumarket.scheduler.holdings import Holdings
from gpumarket.scheduler.listings import Listing, Listings
from gpumarket.scheduler.presence import Presence, Proof, Session
from gpumarket.scheduler.spokes import Spokes
from gpumarket.v1 import market_pb2 as pb
from gpumarket.v1 import terms_pb2

PROOF_RETRY_SECONDS = 2.0
TELL_SECONDS = 1.0
HELLO_SECONDS = 10.0
SILENT_SECONDS = 60.0
"""A stream that says nothing for so long is ended; a provider that lives beats every second."""
UNGREETED_MAX = 256
UNLISTED_MAX = 256
"""Streams of providers that the chain does not back (yet): keys cost nothing, so there is an end to them."""
WARM_MAX = 256
PLACES_MAX = 256
LEASES_MAX = 4_096
_log = structlog.get_logger()


class Greeter:
    """Serves heartbeat streams, and keeps proofs fresh."""

    def __init__(
        self,
        calls: CallGuard,
        clock: Clock,
        random: Random,
        listings: Listings,
        presence: Presence,
        channels: Channels,
        holdings: Holdings,
        billing: Billing,
        spokes: Spokes,
        challenger: Challenger,
        repeat_seconds: float,
    ) -> None:
        self._calls, self._clock, self._random = calls, clock, random
        self.holdings = holdings
        self._listings, self._presence, self._channels = listings, presence, channels
        self._billing, self._spokes, self._challenger = billing, spokes, challenger
        self._repeat_seconds = repeat_seconds
        self._proving: dict[Address, asyncio.Task[None]] = {}
        self._ungreeted = 0

    async def serve(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """One stream, until the provider leaves. Raises GpumarketError for a hello or an offer that is none."""
        caller, message = self._calls.open("Market/Heartbeat", await self._hello(context), terms_pb2.SignedOffer)
        self._require_alone(caller, context.peer())
        self._take(caller, message)
        self._require_place(caller)
        session = self._presence.begin(caller, context.peer())
        _log.info("provider_here", provider=hex0x(caller))
        telling = asyncio.create_task(self._tell(session, context), name="heartbeat down")
        try:
            await self._listen(session, context)
        finally:
            self._presence.end(session)  # before anything is awaited: a call that is cancelled here must not leave its provider present
            _log.info("provider_gone", provider=hex0x(caller))
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)

    async def _hello(self, context: grpc.aio.ServicerContext[Any, Any]) -> terms_pb2.SignedCall:
        if self._ungreeted >= UNGREETED_MAX:
            raise Busy("too many streams that have not said hello", retry_after_seconds=HELLO_SECONDS)
        self._ungreeted += 1
        try:
            first = await asyncio.wait_for(context.read(), HELLO_SECONDS)
        except TimeoutError as error:
            raise ProtocolError(f"no hello within {HELLO_SECONDS:.0f} s") from error
        finally:
            self._ungreeted -= 1
        if not isinstance(first, pb.HeartbeatUp) or not first.HasField("hello"):
            raise ProtocolError("a heartbeat begins with a hello")
        return first.hello

    def _require_alone(self, caller: Address, peer: str) -> None:
        try:
            self._presence.require_alone(caller, peer)
        except Busy as error:
            _log.warning("second_daemon_refused", provider=hex0x(caller), peer=peer, reason=error.message)
            raise

    def _require_place(self, caller: Address) -> None:
        if not self._listings.why_unlisted(caller) or caller in self._presence.sessions:
            return
        strangers = sum(1 for who in self._presence.sessions if who not in self._listings.listed)
        if strangers >= UNLISTED_MAX:
            raise Busy("too many providers that are not registered on chain are here", retry_after_seconds=SILENT_SECONDS)

    async def close(self) -> None:
        """Stop the proofs in progress."""
        tasks = list(self._proving.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- up ------------------------------------------------------------------------------------------------------------------

    async def _listen(self, session: Session, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        while True:
            try:
                message = await asyncio.wait_for(context.read(), SILENT_SECONDS)
            except TimeoutError as error:
                raise ProtocolError(f"no heartbeat for {SILENT_SECONDS:.0f} s") from error
            if not isinstance(message, pb.HeartbeatUp) or self._presence.sessions.get(session.provider) is not session:
                return
            session.heard = self._clock.monotonic()
            kind = message.WhichOneof("message")
            if kind == "held":
                self.holdings.told(session.provider, message.held.vouchers)
                session.holdings_told = True
            elif kind == "load":
                if not session.holdings_told:
                    self.holdings.told(session.provider, ())
                    session.holdings_told = True
                if len(message.load.warm) > WARM_MAX:
                    raise ProtocolError(f"a load of {len(message.load.warm)} warm models; at most {WARM_MAX}")
                if len(message.load.places) > PLACES_MAX:
                    raise ProtocolError(f"a load with places of {len(message.load.places)} models; at most {PLACES_MAX}")
                if len(message.load.leases) > LEASES_MAX:
                    raise ProtocolError(f"a load of {len(message.load.leases)} leases; at most {LEASES_MAX}")
                self._presence.beat(session, message.load)
            elif kind == "offer":
                self._take(session.provider, message.offer)
            else:
                raise ProtocolError("a heartbeat carries load or an offer after its hello")
            listing = self._listings.get(session.provider)
            if listing is not None and not self._listings.why_unlisted(session.provider):
                self._see_to(listing)

    def _take(self, caller: Address, message: terms_pb2.SignedOffer) -> None:
        listing = self._listings.take(message, self._clock.now())
        if listing.provider != caller:
            raise ProtocolError("the offer is another provider's than the caller")

    def _see_to(self, listing: Listing) -> None:
        """What a listed provider still needs: a proof of the GPUs that it offers now, a channel."""
        provider = listing.provider
        key = gpus_key(listing.body)
        proof = self._presence.proofs.get(provider)
        if proof is not None and proof.holds and proof.key == key:
            self._spokes.ensure(provider)  # only for whoever computes: a deposit for every registered key would be anybody's to lock up
        if proof is None or proof.key != key:
            self._presence.proofs[provider] = Proof(key)
            self._presence.note_proof(provider)
            old = self._proving.pop(provider, None)
            if old is not None:
                old.cancel()
        if provider not in self._proving:
            task = self._proving[provider] = asyncio.create_task(self._keep_proven(provider, key), name="gpu proof")
            task.add_done_callback(lambda done: self._proving.pop(provider, None) if self._proving.get(provider) is done else None)

    async def _keep_proven(self, provider: Address, key: bytes) -> None:
        """Challenge now if there is no proof, then again at random, as long as the provider is here with these GPUs."""
        while True:
            proof, listing = self._presence.proofs[provider], self._listings.get(provider)
            if listing is None or provider not in self._presence.sessions or proof.key != key:
                return
            if self._listings.why_unlisted(provider):
                return  # withdrawn, or no longer registered: `_see_to` begins anew when it is back
            try:
                measured = await self._challenger.prove(listing.body)
            except GpumarketError as error:
                passing = error.retryable
                proof.holds = proof.holds and passing
                proof.reason = f"GPU proof {'pending' if passing else 'failed'}: {error.message}"
                _log.warning("gpu_proof_failed", provider=hex0x(provider), reason=error.message)
                wait = PROOF_RETRY_SECONDS if passing else self._repeat_seconds / 10
            else:
                proof.holds, proof.mflops, proof.reason = True, measured.mflops, ""
                self._spokes.ensure(provider)
                _log.info("gpu_proven", provider=hex0x(provider), mflops=measured.mflops, seconds=round(measured.seconds, 3))
                wait = self._repeat_seconds * (0.5 + int.from_bytes(self._random.token(4), "big") / 2**32)
            self._presence.note_proof(provider)
            await asyncio.sleep(wait)

    # --- down ----------------------------------------------------------------------------------------------------------------

    async def _tell(self, session: Session, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        told_channel, told_voucher, told_notice = b"", b"", "-"
        while True:
            session.wake.clear()
            down = pb.HeartbeatDown()
            spoke = self._channels.spoke(session.provider)
            if spoke is not None:
                down.channel = spoke.state.id
                voucher = self._billing.voucher(spoke.state.id)
                if voucher is not None and voucher.signature != told_voucher:
                    down.voucher.CopyFrom(voucher)
            settled, session.settled = session.settled, []
            down.settled.extend(settled)
            session.obstacle, down.notice = self._presence.notice(session.provider)
            now = self._clock.monotonic()
            if session.round_trip.due(now):
                down.probe = 1 + int.from_bytes(self._random.token(8), "big") // 2
                session.round_trip.ask(down.probe, now)
            if (down.channel, down.notice) != (told_channel, told_notice) or down.HasField("voucher") or settled or down.probe:
                await context.write(down)
                told_channel, told_notice = down.channel, down.notice
                told_voucher = down.voucher.signature if down.HasField("voucher") else told_voucher
            try:
                await asyncio.wait_for(session.wake.wait(), TELL_SECONDS)
            except TimeoutError:
                continue


def gpus_key(offer: terms_pb2.OfferBody) -> bytes:
    """What a proof is bound to: the endpoint's TLS key and the GPUs, not what was measured of them."""
    gpus = [terms_pb2.GpuClaim(gpu_class=g.gpu_class, uuid=g.uuid, vram_bytes=g.vram_bytes) for g in offer.gpus]
    return Hash(offer.tls_key_hash) + b"".join(g.SerializeToString(deterministic=True) for g in gpus)
