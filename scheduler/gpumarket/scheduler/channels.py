"""The ledger's channels in step with the chain: deposits, redemptions, closes, as the follower confirms them.

A client's channel enters the ledger with its first order or voucher; a spoke only when this scheduler opened it. A channel that pays us on
chain beyond our own signatures, or one of ours that this ledger never signed for, stops the scheduler or is left alone: never guessed.
"""

from __future__ import annotations

from gpumarket.core.errors import ChannelExpiring, OutOfFunds, ProtocolError
from gpumarket.core.signing import Domain
from gpumarket.core.units import Address, Hash, money_from_bytes
from gpumarket.scheduler.holdings import overtaken
from gpumarket.scheduler.ledger import HubChannel, Ledger, Spoke
from gpumarket.settlement.chain.view import ChainEvent, ChainView, ChannelChanged, ChannelOnChain
from gpumarket.settlement.channel import (
    ChainClosed,
    ChainClosing,
    ChainRedeemed,
    ChainToppedUp,
    PaidChannel,
    ReceivedChannel,
    ReceiveVoucher,
    State,
    handle,
)
from gpumarket.settlement.vouchers import verify_voucher
from gpumarket.v1 import terms_pb2 as pb


class Channels:
    """Both kinds of channel, looked up and kept current."""

    def __init__(self, ledger: Ledger, view: ChainView, me: Address, domain: Domain) -> None:
        self._ledger, self._view, self._me, self._domain = ledger, view, me, domain
        self._clients: set[Address] = set()

    def trades(self, caller: Address) -> bool:
        """Whether a caller has something at stake here: an entry on chain, or a channel to us that it ordered on."""
        return caller in self._clients or caller in self._view.nodes

    def hub(self, channel: Hash) -> HubChannel:
        """A client's channel that orders may be taken on. Raises OutOfFunds (unknown on chain) or ChannelExpiring (closing)."""
        hub = self._ledger.hubs.get(channel)
        chain = self._view.channels.get(channel)
        if chain is None:
            raise OutOfFunds(
                f"channel 0x{channel.hex()} is not on the chain, as far as {self._view.block} confirmed blocks tell",
                hint="open it, or wait for its confirmations",
            )
        if chain.payee != self._me:
            raise ProtocolError(f"channel 0x{channel.hex()} pays somebody else")
        if hub is None:
            hub = self._ledger.hubs[channel] = HubChannel(_received(chain), chain.payer)
            self._ledger.put_hub(hub.state)
            self._clients |= {hub.payer, hub.state.signer}
        if hub.close_signed:
            raise ChannelExpiring(f"channel 0x{channel.hex()} is being closed", hint="open another channel")
        return hub

    def receive(self, signed: pb.SignedVoucher) -> HubChannel:
        """Take a voucher that is higher than the one held, after its signature. Raises FundsError, BadSignature or ProtocolError."""
        if len(signed.voucher.channel) != 32:
            raise ProtocolError("a voucher without a channel")
        hub = self.hub(Hash(signed.voucher.channel))
        try:
            cumulative = money_from_bytes(signed.voucher.cumulative)
        except ValueError as error:
            raise ProtocolError(f"a voucher of an amount that is none: {error}") from error
        if cumulative > hub.state.voucher:
            after = handle(hub.state, ReceiveVoucher(cumulative, signed.signature))  # refuses before the costly part
            verify_voucher(self._domain, hub.state.id, cumulative, signed.signature, hub.state.signer)
            self._ledger.put_hub(after)
        return hub

    def adopt(self, channel: Hash, provider: Address, deposit: int, expires_at: int) -> None:
        """A channel that we have just opened. Its guard is written with it; the chain's word on deposit and expiry wins."""
        if channel in self._ledger.spokes:
            return
        chain = self._view.channels.get(channel)
        if chain is not None:
            deposit, expires_at = chain.deposit, chain.expires_at
        self._ledger.add_spoke(PaidChannel(channel, provider, deposit, expires_at), provider)

    def spoke(self, provider: Address) -> Spoke | None:
        """The channel that new leases of a provider are paid from: open, not closing or about to, the one that lives longest."""
        usable = [s for s in self._ledger.spokes_of(provider) if not s.state.closing and not s.leaving]
        return max(usable, key=lambda s: s.state.expires_at, default=None)

    def on_chain_event(self, event: ChainEvent) -> None:
        """What the follower saw."""
        if isinstance(event, ChannelChanged):
            self.refresh(event.id)

    def refresh_all(self) -> None:
        """After a restart: everything that happened meanwhile."""
        self._clients |= {who for hub in self._ledger.hubs.values() for who in (hub.payer, hub.state.signer)}
        for channel in (*self._ledger.hubs, *self._ledger.spokes):
            self.refresh(channel)

    def refresh(self, channel: Hash) -> None:
        """Bring one channel up to the chain. Raises JournalError when the chain paid more on a spoke than this process ever signed."""
        chain = self._view.channels.get(channel)
        if chain is None:
            return  # gone in a reorganisation: `hub` refuses it until it is back
        hub = self._ledger.hubs.get(channel)
        if hub is not None:
            self._ledger.put_hub(_followed(hub.state, chain))
        spoke = self._ledger.spokes.get(channel)
        if spoke is not None:
            if chain.claimed > spoke.state.vouchered and not spoke.confirmed:
                overtaken(self._ledger, spoke, chain.claimed)
            self._ledger.put_spoke(_followed(spoke.state, chain))


def _received(chain: ChannelOnChain) -> ReceivedChannel:
    return _followed(ReceivedChannel(chain.id, chain.signer, chain.deposit, chain.expires_at), chain)


def _followed(state: State, chain: ChannelOnChain) -> State:
    state = handle(state, ChainToppedUp(chain.deposit, chain.expires_at))
    if chain.claimed > state.redeemed:
        state = handle(state, ChainRedeemed(chain.claimed))
    if chain.closes_at != state.closing:
        state = handle(state, ChainClosing(chain.closes_at))
    if chain.closed and not state.closed:
        state = handle(state, ChainClosed())
    return state
