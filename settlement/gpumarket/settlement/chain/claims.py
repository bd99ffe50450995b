"""What the chain says about redemptions: a channel's own state, the events that paid, what is still on its way.

State is read from the second endpoint where there is one: a redemption counts as done only when the contract itself says so.
Must never: take a receipt's word alone for money that arrived.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from gpumarket.core.errors import ChainError, InconsistentChain
from gpumarket.core.terms import keccak256
from gpumarket.core.units import Hash, Money
from gpumarket.settlement.chain.audit import channel_from_state
from gpumarket.settlement.chain.connection import reachable
from gpumarket.settlement.chain.view import ChannelOnChain

if TYPE_CHECKING:
    from gpumarket.settlement.chain.actions import Actions
    from gpumarket.settlement.chain.sender import TransactionReceipt

BLOCKS_PER_QUERY = 2_000
_WITHDRAW = keccak256(b"withdraw(address)")[:4]


class Paid(NamedTuple):
    """A redemption that the chain tells of."""

    channel: Hash
    cumulative: int
    amount: Money
    tx: Hash
    block: int


class Claims:
    """Questions about the account's channels."""

    def __init__(self, actions: Actions) -> None:
        self._actions = actions

    async def resume(self) -> None:
        """See through what an earlier process left pending."""
        await self._actions.sender.resume()

    async def state(self, channel: Hash) -> ChannelOnChain | None:
        """The channel as the contract has it now; None when it holds none such (closed, or taken back by a reorganisation)."""
        chain = self._actions.chain.second or self._actions.chain
        with reachable(chain.settings.rpc_url):
            return channel_from_state(channel, await chain.channels.functions.channel(channel).call())

    async def gas_price(self) -> int:
        """Wei per gas now."""
        with reachable(self._actions.chain.settings.rpc_url):
            return int(await self._actions.chain.w3.eth.gas_price)

    async def confirmed(self, receipt: TransactionReceipt) -> TransactionReceipt:
        """The receipt once it has its confirmations."""
        return await self._actions.sender.confirmed(receipt)

    async def require_paid(self, channel: Hash, cumulative: int) -> None:
        """Raises InconsistentChain unless the contract says that the channel has paid `cumulative`, or is gone."""
        state = await self.state(channel)
        if state is not None and state.claimed < cumulative:
            raise InconsistentChain(
                f"a receipt says that channel 0x{channel.hex()} has paid {cumulative}, the contract says {state.claimed}",
                hint="nothing was written down; it is looked at again",
            )

    def in_flight(self, channel: Hash) -> bool:
        """Whether a transaction about this channel is still pending: its id stands in the call's data."""
        return any(data.find(channel) >= 0 for data in self._actions.sender.pending_calls())

    def withdrawing(self) -> bool:
        """Whether a withdrawal of what was credited is still pending."""
        return any(data.startswith(_WITHDRAW) for data in self._actions.sender.pending_calls())

    async def hasten(self, worth: Mapping[tuple[Hash, int], int]) -> None:
        """Let the redemptions that are on their way cost what they are worth: wei by channel and cumulative amount, which stand side by
        side in a call's data, alone or in a batch."""
        for data in dict.fromkeys(self._actions.sender.pending_calls()):
            brings = sum(wei for (channel, cumulative), wei in worth.items() if channel + cumulative.to_bytes(32, "big") in data)
            if brings:
                await self._actions.sender.hasten(data, brings)

    async def paid(self, channels: Collection[Hash]) -> list[Paid]:
        """Every redemption of these channels, newest first, unconfirmed ones included."""
        chain, found = self._actions.chain, []
        with reachable(chain.settings.rpc_url):
            end = await chain.block_number()
            while end >= chain.book.deployed_block:
                start = max(chain.book.deployed_block, end - BLOCKS_PER_QUERY + 1)
                logs = await chain.channels.events.Redeemed().get_logs(
                    from_block=start, to_block=end, argument_filters={"id": sorted(channels)}
                )
                found += [_paid(log) for log in reversed(list(logs))]
                end = start - 1
        return found

    async def is_final(self, paid: Paid) -> bool:
        """Whether it has its confirmations."""
        return await self._actions.chain.block_number() >= paid.block + self._actions.chain.settings.confirmations

    async def gas_used(self, tx: Hash) -> int:
        """Gas of a transaction of ours. Raises ChainError when the chain has moved meanwhile."""
        from web3.exceptions import TransactionNotFound

        try:
            with reachable(self._actions.chain.settings.rpc_url):
                return int((await self._actions.chain.w3.eth.get_transaction_receipt(tx))["gasUsed"])  # type: ignore[arg-type]
        except TransactionNotFound as error:
            raise ChainError("the chain moved while redemptions were read back from it", hint="try again") from error


def _paid(log: Any) -> Paid:
    args = log["args"]
    return Paid(
        Hash(bytes(args["id"])),
        int(args["cumulative"]),
        Money(int(args["amount"])),
        Hash(bytes(log["transactionHash"])),
        int(log["blockNumber"]),
    )
