"""Keeps the signed offer true and fresh, and hands it on: to p2p, and to the heartbeats, which read `current`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from gpumarket.core.errors import GpumarketError, P2PUnavailable
from gpumarket.core.ports import Clock
from gpumarket.core.signing import Domain, Signer
from gpumarket.node.accounts import Accounts
from gpumarket.node.offers import WITHDRAWN_SECONDS, is_due, next_sequence, sign_body
from gpumarket.node.tables import OFFER_SEQUENCE
from gpumarket.v1 import terms_pb2 as pb

LOOK_SECONDS = 1.0
_log = structlog.get_logger()

Announce = Callable[[bytes], Awaitable[None]]


class Advert:
    """The offer of this provider. `refresh` once before `current`; then `run` until cancelled."""

    def __init__(
        self,
        signer: Signer,
        domain: Domain,
        accounts: Accounts,
        clock: Clock,
        *,
        body: Callable[[], Awaitable[pb.OfferBody]],
        announce: Announce,
        on_new: Callable[[], None],
        offer_seconds: int,
    ) -> None:
        self._signer, self._domain, self._accounts, self._clock = signer, domain, accounts, clock
        self._body, self._announce, self._on_new, self._offer_seconds = body, announce, on_new, offer_seconds
        self._signed: pb.SignedOffer | None = None
        self._said: pb.OfferBody | None = None
        self._signed_at = 0
        self._look = asyncio.Event()
        self._one = asyncio.Lock()

    @property
    def current(self) -> pb.SignedOffer:
        assert self._signed is not None, "no offer was signed yet"
        return self._signed

    def look(self) -> None:
        """Something may have changed."""
        self._look.set()

    async def run(self) -> None:
        """Ends only by cancellation or a JournalError."""
        while True:
            self._look.clear()
            await self.refresh()
            try:
                await asyncio.wait_for(self._look.wait(), LOOK_SECONDS)
            except TimeoutError:
                continue
            await asyncio.sleep(LOOK_SECONDS / 4)  # changes come in bursts: one offer for all of them

    async def refresh(self) -> None:
        """Sign and spread a new offer when it is due."""
        async with self._one:
            body = await self._body()
            if is_due(self._said, body, self._signed_at, self._clock.now(), self._offer_seconds):
                await self._publish(body, self._offer_seconds)

    async def withdraw(self, body: pb.OfferBody) -> None:
        """Say good-bye: an offer of nothing, soon forgotten."""
        async with self._one:
            await self._publish(body, WITHDRAWN_SECONDS)

    async def _publish(self, body: pb.OfferBody, seconds: int) -> None:
        now = self._clock.now()
        sequence = next_sequence(self._accounts.fact(OFFER_SEQUENCE), now)
        await self._accounts.keep_fact(OFFER_SEQUENCE, sequence)
        self._signed = sign_body(self._signer, self._domain, body, sequence, now + seconds)
        self._said, self._signed_at = body, now
        self._on_new()
        try:
            await self._announce(self._signed.SerializeToString())
        except P2PUnavailable as error:
            _log.warning("offer not announced yet", reason=error.message)  # the link remembers it and announces when it is back
        except GpumarketError as error:
            _log.error("offer refused by the p2p process", code=error.code, reason=error.message, hint=error.hint)
