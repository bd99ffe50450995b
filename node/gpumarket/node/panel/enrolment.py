"""Keeps this provider's entries in the lists that panels are drawn from as its settings want them.

A member is drawn for models that it can compute, or pays for not showing up: whatever is no longer on sale is left. Never: stake that the
seat's terms do not ask for.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import structlog

from gpumarket.core.errors import TransactionFailed
from gpumarket.core.ports import Random
from gpumarket.core.sealing import public_key
from gpumarket.core.units import Address, Hash, Money, format_money, hex0x

_log = structlog.get_logger()


class Terms(Protocol):
    @property
    def seat_stake(self) -> int: ...


class Seat(Protocol):
    @property
    def locked(self) -> int: ...
    @property
    def models(self) -> int: ...


class SeatChain(Protocol):
    """What enrolment asks of the chain (settlement.chain.disputes.DisputeActions)."""

    async def terms(self) -> Terms: ...
    async def seat(self, operator: Address) -> Seat: ...
    async def enrolled(self, model: Hash, operator: Address) -> bool: ...
    async def enrol(self, model: Hash, evidence_key: bytes) -> object: ...
    async def leave(self, model: Hash) -> object: ...
    async def top_up_seat(self) -> object: ...


class Enrolment:
    """`reconcile` at start and whenever a panel is over."""

    def __init__(self, me: Address, chain: SeatChain, random: Random, wanted: Collection[Hash]) -> None:
        self._me, self._chain, self._random, self._wanted = me, chain, random, wanted

    async def reconcile(self, known: Collection[Hash]) -> None:
        """Enrol for what is wanted, leave what of `known` (models that this provider may be listed for) is not. What the stake does not
        allow is said and left: a provider without a seat still sells."""
        for model in known:
            if model not in self._wanted and await self._chain.enrolled(model, self._me):
                await self._chain.leave(model)
                _log.info("left_panel_list", model=hex0x(model))
        try:
            await self._enrol()
        except TransactionFailed as error:
            stake = format_money(Money((await self._chain.terms()).seat_stake))
            hint = f"a seat locks {stake} of free stake: raise the setting stake, or set panel = false"
            _log.warning("no_panel_seat", reason=error.message, hint=hint)

    async def _enrol(self) -> None:
        missing = [model for model in self._wanted if not await self._chain.enrolled(model, self._me)]
        for model in missing:
            unused = public_key(self._random.token(32))  # whoever misses evidence sets a fresh key first, so nobody needs this one's secret
            await self._chain.enrol(model, unused)
            _log.info("on_panel_list", model=hex0x(model))
        seat = await self._chain.seat(self._me)
        if self._wanted and not missing and seat.locked < (await self._chain.terms()).seat_stake:
            await self._chain.top_up_seat()
