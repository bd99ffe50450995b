"""What providers hold against what this ledger knows that it signed: how a ledger that is an older copy finds out before it signs (I3).

A ledger read from disk may be a backup, brought back after its key had signed more. So a spoke's payee is heard first: it shows its newest
voucher after its hello and with every claim, under our own signature. One above our guard is taken over as signed. One that is above it
later in this life can only come from another process with our key: this one stops.
Must never: sign below what a payee proves to hold, take a voucher for proven that is not under our signature.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import structlog

from gpumarket.core.codec import open_voucher
from gpumarket.core.errors import BadSignature, JournalError, ProtocolError
from gpumarket.core.signing import Domain
from gpumarket.core.units import Address, Hash, hex0x
from gpumarket.scheduler.ledger import Ledger, Spoke
from gpumarket.v1 import market_pb2 as pb
from gpumarket.v1 import terms_pb2

HOLDINGS_MAX = 256
"""Vouchers in one telling."""
_log = structlog.get_logger()


class Holdings:
    """Hears providers. `me` signs the spokes' vouchers."""

    def __init__(self, ledger: Ledger, me: Address, channels_domain: Domain) -> None:
        self._ledger, self._me, self._domain = ledger, me, channels_domain

    def told(self, provider: Address, vouchers: Iterable[terms_pb2.SignedVoucher]) -> None:
        """Everything that a provider holds; of its other spokes it holds nothing. Raises as `claimed`."""
        held = {bytes(signed.voucher.channel): signed for signed in vouchers}
        if len(held) > HOLDINGS_MAX:
            raise ProtocolError(f"{len(held)} vouchers held; at most {HOLDINGS_MAX} are heard")
        for spoke in self._ledger.spokes_of(provider):
            self._hear(spoke, held.get(spoke.state.id))

    def claimed(self, provider: Address, claim: pb.ClaimRequest) -> None:
        """A claim says what its provider holds of the lease's channel.

        Raises ProtocolError or BadSignature for a voucher that is not ours, JournalError when another process signs with our key.
        """
        spoke = self._ledger.spokes.get(Hash(claim.lease.lease.provider_channel))
        if spoke is not None and spoke.provider == provider:
            self._hear(spoke, claim.held if claim.HasField("held") else None)

    def _hear(self, spoke: Spoke, signed: terms_pb2.SignedVoucher | None) -> None:
        channel, cumulative = spoke.state.id, 0
        if signed is not None and signed.signature != spoke.signature:
            voucher, signer = open_voucher(self._domain, signed)
            if voucher.channel != channel or signer != self._me:
                raise BadSignature(f"the voucher shown for channel {hex0x(channel)} is not this scheduler's")
            cumulative = voucher.cumulative
        if cumulative > spoke.released:
            if spoke.confirmed:
                raise self._ledger.fail(_twin(spoke, cumulative))
            overtaken(self._ledger, spoke, cumulative)
        self._ledger.confirm(channel)


def overtaken(ledger: Ledger, spoke: Spoke, cumulative: int) -> None:
    """Our key has signed `cumulative` on a spoke that this ledger, an older copy, knows less of: take it over.

    Raises JournalError when that and what the ledger still reserves pass the deposit.
    """
    state = replace(spoke.state, vouchered=max(spoke.state.vouchered, cumulative))
    if state.vouchered + state.reserved > state.deposit:
        raise ledger.fail(
            JournalError(
                f"channel {hex0x(state.id)}: {cumulative} was signed before, and with what this ledger still reserves ({state.reserved}) "
                f"that is more than the deposit of {state.deposit}: the ledger is too old to go on with",
                hint="bring a newer copy of the ledger back, or top the channel up",
            )
        )
    _log.warning("ledger_is_older", channel=hex0x(state.id), signed=cumulative, known=spoke.released)
    ledger.put_spoke(state)


def _twin(spoke: Spoke, cumulative: int) -> JournalError:
    return JournalError(
        f"provider {hex0x(spoke.provider)} holds a voucher of {cumulative} on channel {hex0x(spoke.state.id)}; this ledger has signed "
        f"{spoke.released} at most: another process signs with this key",
        hint="stop the other scheduler that uses this key, then start this one again",
    )
